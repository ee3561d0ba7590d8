"""The curves of a run: loss and bits per byte over the tokens trained, those without a teacher beside them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from daramgpt.ledger import entries
from daramgpt.report.chart import Point, Series, Span, line_chart
from daramgpt.report.page import section
from daramgpt.run_directory import RunDirectory

Data = dict[str, Any]
# Of the step before, below which the last one is not drawn.
LEAST_STEP_SHARE = 0.5
# A larger loss or number of tokens is none.
MOST_DRAWN = 1e15


def curves(run: RunDirectory, index: Data) -> str:
    """The section; empty where nothing was logged.

    Args:
        run: of which the metrics are read, and those of its part without a teacher.
        index: of its shards.
    """
    metrics = _metrics(run)
    if not metrics:
        return ""
    baseline = _metrics(run.part("baseline"))
    spans = _spans(metrics)
    distils = any(line["kd"] for line in metrics)
    loss = [
        Series(
            "distillation (T² · divergence)", [(line["tokens"], line["kd"]) for line in metrics] if distils else [], 1
        ),
        Series("cross-entropy", [(line["tokens"], line["ce"]) for line in metrics], 2),
        Series("cross-entropy without teacher", [(line["tokens"], line["ce"]) for line in baseline], 3),
    ]
    charts = [line_chart("Loss on the text trained", loss, spans, "tokens trained", "nats a token")]
    hidden = [(line["tokens"], line["hidden"]) for line in metrics if _can_be_drawn(line.get("hidden"))]
    if hidden:
        series = [Series("student", hidden, 1)]
        charts.append(line_chart("Hidden states of student and teacher", series, spans, "tokens trained", "1 - cosine"))
    bits = [
        Series("student", _bits_per_byte(metrics, index), 1),
        Series("student without teacher", _bits_per_byte(baseline, index), 3),
    ]
    if bits[0].points:
        charts.append(line_chart("Bits per byte of the text trained", bits, spans, "tokens trained", "bits per byte"))
    note = (
        "Each step is measured before the model learns from it. Dashed lines part the stages of the curriculum, in "
        "the order of the table above; the very first steps may lie above the picture."
    )
    return section("Curves", f'<div class="charts">{"".join(charts)}</div>', f'<p class="soft">{note}</p>')


def _can_be_drawn(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value < MOST_DRAWN


def _metrics(run: RunDirectory) -> list[Data]:
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
        if last < LEAST_STEP_SHARE * before:
            lines.pop()
    return lines


def _bits_per_byte(metrics: list[Data], index: Data) -> list[Point]:
    """Cross-entropy over the mean bytes a token of the step's stage."""
    bytes_per_token = {stage["name"]: stage["text_bytes"] / stage["tokens"] for stage in index.get("stages", [])}
    return [
        (line["tokens"], line["ce"] / math.log(2) / bytes_per_token[line["stage"]])
        for line in metrics
        if line["stage"] in bytes_per_token
    ]


def _spans(metrics: list[Data]) -> list[Span]:
    """Stretches of tokens trained in one stage."""
    spans: list[Span] = []
    for line in metrics:
        last = spans[-1].last if spans else 0.0
        if spans and spans[-1].name == line["stage"]:
            spans[-1] = Span(line["stage"], spans[-1].first, line["tokens"])
        else:
            spans.append(Span(line["stage"], last, line["tokens"]))
    return spans
