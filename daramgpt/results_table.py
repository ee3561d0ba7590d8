"""The result of an evaluation as plain text of at most 100 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from daramgpt.text_table import aligned, pad, width_of

Cells = list[list[str]]
LEGEND = "KL(teacher ‖ model) in nats a token; top-1: tokens where model and teacher agree on the likeliest"


def format_evaluation(evaluation: dict[str, Any], width: int = 100) -> str:
    """Table of the models, bits per byte per stage, and the continuations, ready to print.

    Args:
        evaluation: content of ``evaluation.json``.
        width: columns that lines may take.
    """
    rows = evaluation["rows"]
    parts = [_columns(model_cells(rows)), LEGEND]
    if rows and len(rows[0]["bits_per_byte"]) > 1:
        parts += ["", "held-out bits per byte by stage", _by_stage(rows, width)]
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


def _by_stage(rows: list[dict[str, Any]], width: int) -> str:
    """Models down and stages across, or the other way round where the stages would be too wide."""
    cells = stage_cells(rows, "model")
    text = _columns(cells)
    if max(width_of(line) for line in text.splitlines()) <= width:
        return text
    return _columns([list(line) for line in zip(*cells, strict=True)])


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
        wrapped = _wrap(text, width - name_columns - 4)
        for index, line in enumerate(wrapped):
            lines.append(f"  {pad(sample['model'] if index == 0 else '', name_columns)}  {line}")
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken between words, or within one that is longer."""
    lines = [""]
    for word in text.split():
        # In a line of wide letters alone a column count of width is width // 2 characters.
        for piece in textwrap.wrap(word, max(1, width // 2)):
            joined = f"{lines[-1]} {piece}" if lines[-1] else piece
            if width_of(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines


def _columns(cells: Cells) -> str:
    """First column to the left, figures to the right, a rule below the header."""
    head, *lines = aligned(cells)
    return "\n".join([head, "─" * max(map(width_of, (head, *lines))), *lines])
