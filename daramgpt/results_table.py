"""The result of an evaluation as plain text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from daramgpt.text_table import cut, fitted, narrowed, pad, ruled, terminal_columns, width_of, wrapped

Cells = list[list[str]]
FORGETTING = "held-out bits per byte of the student after each stage"
LONGEST_LISTED = 48
LEGEND = "KL(teacher ‖ model) in nats a token; top-1: tokens where model and teacher agree on the likeliest"


def format_evaluation(evaluation: dict[str, Any], width: int | None = None) -> str:
    """Table of the models, bits per byte per stage, and the continuations, ready to print.

    Args:
        evaluation: content of ``evaluation.json``.
        width: columns that lines may take; None = those of the terminal.
    """
    width = width or terminal_columns()
    rows = evaluation["rows"]
    parts = ["\n".join(ruled(narrowed(model_cells(rows), width))), *wrapped(LEGEND, width)]
    if names := compared_names(rows):
        # A dash of closeness alone does not say whose model it is.
        listed = ", ".join(cut(name, LONGEST_LISTED) for name in names)
        parts += wrapped(f"no models of this run, compared on the same text: {listed}", width)
    if rows and len(rows[0]["bits_per_byte"]) > 1:
        parts += ["", "held-out bits per byte by stage", _by_stage(rows, width)]
    if evaluation.get("forgetting"):
        parts += ["", FORGETTING, _table(forgetting_cells(evaluation["forgetting"]), width)]
    if evaluation.get("samples"):
        parts += ["", format_samples(evaluation["samples"], width)]
    if evaluation["state"] != "done":
        parts += ["", f"partial: measured at step {evaluation['step']}, before the end of the run"]
    return "\n".join(parts)


def model_cells(rows: list[dict[str, Any]]) -> Cells:
    """Header and one line a model: parameters, size, bits per byte of all text, closeness to the teacher, speed."""
    header = ["model", "params", "MB", "bits/byte", "KL", "top-1", "tokens/s"]
    return [
        header,
        *(
            [
                row["name"],
                f"{row['parameters'] / 1e6:,.1f} M",
                f"{row['bytes'] / 1e6:,.1f}",
                number(row["bits_per_byte"]["all"], ".4f"),
                number(row["kl_to_teacher"], ".5f"),
                number(row["top1_agreement"], ".1%"),
                number(row["tokens_per_second"], ",.0f"),
            ]
            for row in rows
        ),
    ]


def compared_names(rows: list[dict[str, Any]]) -> list[str]:
    """Of the models that the run has no part in."""
    return [row["name"] for row in rows if row.get("compared")]


def number(value: float | None, form: str) -> str:
    """A figure in its format, a dash where nothing was measured."""
    return "–" if value is None else format(value, form)


def stage_cells(rows: list[dict[str, Any]], corner: str = "bits per byte") -> Cells:
    """Header, which `corner` begins, and one line a model: bits per byte of every stage."""
    stages = [stage for stage in rows[0]["bits_per_byte"] if stage != "all"]
    return [
        [corner, *stages],
        *([row["name"], *(number(row["bits_per_byte"][stage], ".4f") for stage in stages)] for row in rows),
    ]


def forgetting(metrics: Iterable[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The student's held-out bits per byte after each stage, as far as it was trained.

    Args:
        metrics: lines of ``metrics.jsonl``.
        step: that the student has reached.

    Returns:
        ``{after, step, tokens, bits_per_byte}`` a stage that has ended, in their order.
    """
    return [
        {"after": line["stage_ended"], **{key: line[key] for key in ("step", "tokens", "bits_per_byte")}}
        for line in metrics
        if isinstance(line.get("stage_ended"), str)
        and isinstance(line.get("bits_per_byte"), dict)
        and {"step", "tokens"} <= line.keys()
        and line["step"] <= step
    ]


def forgetting_cells(rows: list[dict[str, Any]]) -> Cells:
    """Header, one line a stage that has ended, and what each of them has lost since.

    Args:
        rows: from `forgetting`.
    """
    stages = [stage for stage in rows[0]["bits_per_byte"] if stage != "all"]
    own_end = {row["after"]: row["bits_per_byte"].get(row["after"]) for row in rows}
    last = rows[-1]["bits_per_byte"]
    lost = [
        "–" if own_end.get(stage) is None or last.get(stage) is None else f"{last[stage] - own_end[stage]:+.4f}"
        for stage in stages
    ]
    found = [["after", *stages, "all"]]
    for row in rows:
        figures = row["bits_per_byte"]
        found.append([row["after"], *(number(figures.get(name), ".4f") for name in (*stages, "all"))])
    return [*found, ["since its own end", *lost, ""]]


def _by_stage(rows: list[dict[str, Any]], width: int) -> str:
    """Models down and stages across."""
    return _table(stage_cells(rows, "model"), width)


def format_samples(samples: list[dict[str, str]], width: int = 100) -> str:
    """Each prompt, and below it what every model went on with, wrapped to `width` columns."""
    lines: list[str] = []
    name_columns = max(width_of(sample["model"]) for sample in samples)
    prompt = None
    for sample in samples:
        if sample["prompt"] != prompt:
            prompt = sample["prompt"]
            lines += [""] * bool(lines) + [f"「{prompt}」"]
        text = " ".join(f"{prompt}{sample['text']}".split())
        for index, line in enumerate(wrapped(text, width - name_columns - 4)):
            lines.append(f"  {pad(sample['model'] if index == 0 else '', name_columns)}  {line}")
    return "\n".join(lines)


def _table(cells: Cells, width: int) -> str:
    """First column to the left, figures to the right, a rule below the header; as many tables as the width asks for."""
    return "\n".join("\n".join(ruled(table)) for table in fitted(cells, width))
