"""The curves of a run: what it learned over the tokens trained, how fast, and what became of its hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from daramgpt.ledger import Session, entries
from daramgpt.report.chart import COLOURS, Chart, Point, Series, Span
from daramgpt.run_directory import RunDirectory

Data = dict[str, Any]
Line = dict[str, Any]
# Of the step before, below which the last one is not drawn.
LEAST_STEP_SHARE = 0.5
# A larger loss or number of tokens is none.
MOST_DRAWN = 1e15
# Of the budget, below which a picture of what is left of it shows nothing.
LEAST_BUDGET_SHARE = 0.01
TOKENS = "tokens trained"


def charts(run: RunDirectory, index: Data, plan: Data, found: Sequence[Session], budget_hours: float) -> list[Chart]:
    """All that there is something to draw for.

    Args:
        run: of which the metrics are read, and those of its part without a teacher.
        index: of its shards.
        plan: with what it predicted.
        found: its sessions.
        budget_hours: of the run.
    """
    metrics = _metrics(run)
    if not metrics:
        return []
    baseline = _metrics(run.part("baseline"))
    drawn = [
        *_learning(metrics, baseline, index),
        *_speed_and_memory(metrics, plan),
        *_optimizer(metrics),
        *_hours(metrics, found, budget_hours),
    ]
    return [chart for chart in drawn if any(series.points for series in chart.series)]


def _learning(metrics: list[Line], baseline: list[Line], index: Data) -> list[Chart]:
    spans, distils = _spans(metrics), any(line["kd"] for line in metrics)
    loss = [
        Series("distillation (T² · divergence)", _over_tokens(metrics, "kd") if distils else [], 1),
        Series("cross-entropy", _over_tokens(metrics, "ce"), 2),
        Series("cross-entropy without teacher", _over_tokens(baseline, "ce"), 3),
    ]
    hidden = [Series("student", _over_tokens(metrics, "hidden"), 1)]
    trained = [
        Series("student", _bits_per_byte(metrics, index), 1),
        Series("student without teacher", _bits_per_byte(baseline, index), 3),
    ]
    return [
        Chart("Loss on the text trained", loss, TOKENS, "nats a token", spans),
        Chart("Hidden states of student and teacher", hidden, TOKENS, "1 - cosine", spans),
        Chart("Bits per byte of the text trained", trained, TOKENS, "bits per byte", spans),
        Chart("Bits per byte of held-out text", _held_out(metrics, baseline), TOKENS, "bits per byte", spans),
    ]


def _held_out(metrics: list[Line], baseline: list[Line]) -> list[Series]:
    """Each stage's text as it was measured on the way; all of it together where the stages are too many to tell."""
    stages = dict.fromkeys(
        stage for line in metrics for stage in _figures(line) if stage != "all" and isinstance(stage, str)
    )
    names = list(stages) if 1 < len(stages) < len(COLOURS) else ["all"]
    found = [Series(name, _measured(metrics, name), number, "marked") for number, name in enumerate(names, 1)]
    if names == ["all"]:
        found = [Series("student", found[0].points, 1, "marked")]
        found.append(Series("student without teacher", _measured(baseline, "all"), 3, "marked"))
    return found


def _figures(line: Line) -> Data:
    figures = line.get("bits_per_byte")
    return figures if isinstance(figures, dict) else {}


def _measured(metrics: list[Line], stage: str) -> list[Point]:
    return [(line["tokens"], _figures(line)[stage]) for line in metrics if _can_be_drawn(_figures(line).get(stage))]


def _speed_and_memory(metrics: list[Line], plan: Data) -> list[Chart]:
    predicted = plan.get("predicted")
    predicted = predicted if isinstance(predicted, dict) else {}

    def level(key: str, scale: float = 1.0) -> list[Point]:
        value: Any = predicted.get(key)
        return [(tokens, value / scale) for tokens in _ends(metrics)] if _can_be_drawn(value) else []

    speed = [
        Series("measured", _over_tokens(metrics, "tokens_per_second"), 1),
        Series("planned", level("tokens_per_second"), 2, "dashed"),
    ]
    memory = [
        Series("peak so far", [(x, y / 1e9) for x, y in _over_tokens(metrics, "peak_memory_bytes")], 1),
        Series("planned", level("memory_total_bytes", 1e9), 2, "dashed"),
    ]
    return [
        Chart("Speed", speed, TOKENS, "tokens a second", from_zero=True),
        Chart("Memory", memory, TOKENS, "GB", from_zero=True),
    ]


def _optimizer(metrics: list[Line]) -> list[Chart]:
    scale = _over_tokens(metrics, "loss_scale")
    scaled = [(tokens, math.log2(value)) for tokens, value in scale if value > 0]
    return [
        Chart("Learning rate", [Series("learning rate", _over_tokens(metrics, "lr"), 1)], TOKENS, "", from_zero=True),
        Chart("Gradient norm", [Series("before clipping", _over_tokens(metrics, "grad_norm"), 1)], TOKENS, ""),
        # Without fp16 it is one, all the way.
        Chart("Loss scale", [Series("loss scale", scaled if any(y for _, y in scaled) else [], 1)], TOKENS, "log2"),
    ]


def _hours(metrics: list[Line], found: Sequence[Session], budget_hours: float) -> list[Chart]:
    """What the budget still holds, and what the curriculum would still take, over the hours used."""
    used = sum(session.seconds for session in found) / 3600
    lines = [
        line for line in metrics if _can_be_drawn(line.get("hours_used")) and _can_be_drawn(line.get("hours_left"))
    ]
    if not budget_hours or used < LEAST_BUDGET_SHARE * budget_hours or not lines:
        return []
    spans, end = [], 0.0
    for number, session in enumerate((one for one in found if one.seconds), 1):
        spans.append(Span(str(number), end, end + session.seconds / 3600))
        end += session.seconds / 3600
    left = [
        Series("left in the budget", [(0.0, budget_hours), (used, max(0.0, budget_hours - used))], 1),
        Series("needed for what is left of the text", [(line["hours_used"], line["hours_left"]) for line in lines], 2),
    ]
    return [Chart("Budget", left, "hours of training used, by session", "hours", spans, from_zero=True)]


def _can_be_drawn(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value < MOST_DRAWN


def _metrics(run: RunDirectory) -> list[Line]:
    """Lines of ``metrics.jsonl`` with finite losses, the last step only where it is not nearly empty.

    What is left of the text for it may be a few tokens, whose loss says nothing beside those of whole steps.
    """
    lines = [
        line
        for line in entries(run.metrics)
        if all(_can_be_drawn(line.get(key)) for key in ("tokens", "kd", "ce")) and isinstance(line.get("stage"), str)
    ]
    if len(lines) > 2:
        before, last = (late["tokens"] - early["tokens"] for early, late in pairwise(lines[-3:]))
        # What was measured there is of the whole run.
        if last < LEAST_STEP_SHARE * before and not _figures(lines[-1]):
            lines.pop()
    return lines


def _over_tokens(metrics: list[Line], key: str) -> list[Point]:
    return [(line["tokens"], line[key]) for line in metrics if _can_be_drawn(line.get(key))]


def _ends(metrics: list[Line]) -> tuple[float, float]:
    return metrics[0]["tokens"], metrics[-1]["tokens"]


def _bits_per_byte(metrics: list[Line], index: Data) -> list[Point]:
    """Cross-entropy over the mean bytes a token of the step's stage."""
    bytes_per_token = {stage["name"]: stage["text_bytes"] / stage["tokens"] for stage in index.get("stages", [])}
    return [
        (line["tokens"], line["ce"] / math.log(2) / bytes_per_token[line["stage"]])
        for line in metrics
        if line["stage"] in bytes_per_token
    ]


def _spans(metrics: list[Line]) -> list[Span]:
    """Stretches of tokens trained in one stage."""
    spans: list[Span] = []
    for line in metrics:
        last = spans[-1].last if spans else 0.0
        if spans and spans[-1].name == line["stage"]:
            spans[-1] = Span(line["stage"], spans[-1].first, line["tokens"])
        else:
            spans.append(Span(line["stage"], last, line["tokens"]))
    return spans
