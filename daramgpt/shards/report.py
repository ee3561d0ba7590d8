"""What `prepare` tells the user: how fast it goes, and at the end what came out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from daramgpt.text_table import aligned, duration, fitted, terminal_columns

_SECONDS_BETWEEN_LINES = 5.0
_LINES_NAMED = 5
_HEADINGS = (
    *("stage", "corpus", "unit", "documents", "held-out", "units"),
    *("text MB", "tokens", "bytes/token", "disk MB", "seconds", "MB/s"),
)
_SUMMED = ("documents", "heldout_documents", "units", "text_bytes", "tokens", "seconds")
_LOW_SHARE = 0.999


class Pace:
    """Progress through the stages, a line every few seconds.

    Args:
        say: takes the lines.
        takes_bytes: text of each stage that is still to be written.
    """

    def __init__(self, say: Callable[[str], None], takes_bytes: list[int]) -> None:
        self._say = say
        self._takes_bytes = takes_bytes
        self._finished_stages = 0
        # Written by this process: in stages that are finished; in this one, before it began.
        self._finished_bytes = self._stage_began_at = 0
        self._stage = ""
        self._begin = self._last_line = time.monotonic()

    def begin(self, stage: str, stage_bytes: int) -> None:
        """A stage begins, of which so much text has been written before."""
        self._stage = stage
        self._stage_began_at = stage_bytes

    def advance(self, stage_bytes: int) -> None:
        """So much text of the stage has been written."""
        now = time.monotonic()
        written = self._finished_bytes + stage_bytes - self._stage_began_at
        if now - self._last_line < _SECONDS_BETWEEN_LINES or not written:
            return
        self._last_line = now
        rate = written / (now - self._begin)
        left_of_stage = max(0, self._takes_bytes[self._finished_stages] - stage_bytes)
        left = left_of_stage + sum(self._takes_bytes[self._finished_stages + 1 :])
        self._say(
            f"{self._stage}: {stage_bytes / 1e6:,.1f} of {self._takes_bytes[self._finished_stages] / 1e6:,.1f} MB, "
            f"{rate / 1e6:.2f} MB/s, done in {duration(left_of_stage / rate)}, "
            f"all stages in {duration(left / rate)} at most"
        )

    def end(self, info: dict[str, Any]) -> None:
        """The stage is written; warns where it has less text than it should."""
        self._finished_stages += 1
        self._finished_bytes += info["unit_bytes"] - self._stage_began_at
        if info["unit_bytes"] < info["take_bytes"] * _LOW_SHARE:
            self._say(
                f"warning: stage {info['name']} wanted {info['take_bytes'] / 1e6:,.2f} MB, corpus {info['corpus']} had "
                f"{info['unit_bytes'] / 1e6:,.2f} MB left ({info['unit_bytes'] / info['take_bytes']:.0%})"
            )
        if not info["heldout_documents"]:
            self._say(f"warning: stage {info['name']} has no held-out text, nothing can be measured on it")


def summary(stages: list[dict[str, Any]], files: dict[str, dict[str, Any]]) -> list[str]:
    """A table of the stages, and for each what cleaning did and what was at fault, as lines.

    Args:
        files: of the shards, by name, with their ``bytes``.
    """
    rows = [
        (
            stage["name"],
            stage["corpus"],
            stage["unit"],
            *_figures(stage, sum(file["bytes"] for name, file in files.items() if name[3:].startswith(stage["name"]))),
        )
        for stage in stages
    ]
    total = Counter[str]()
    for stage in stages:
        total.update({key: stage[key] for key in _SUMMED})
    if len(stages) > 1:
        rows.append(("all", "", "", *_figures(total, sum(file["bytes"] for file in files.values()))))
    cells = [_HEADINGS, *rows]
    tables = fitted(cells, terminal_columns())
    lines = [line for table in tables for line in aligned(table, num_left=3 if table is cells else 1)]
    for stage in stages:
        counts = sorted(stage["cleaned"].items(), key=lambda item: (-item[1], item[0]))
        lines += [f"{stage['name']}: {rule}: {count:,}" for rule, count in counts]
        for kind in ("faults", "notes"):
            named = stage[kind]
            lines += [f"{stage['name']}: {kind[:-1]}: {line}" for line in named[:_LINES_NAMED]]
            if len(named) > _LINES_NAMED:
                lines.append(f"{stage['name']}: {len(named) - _LINES_NAMED:,} more {kind}, all named in index.json")
    if unknown_bytes := sum(stage["unknown_bytes"] for stage in stages):
        share = unknown_bytes / sum(stage["text_bytes"] for stage in stages)
        lines.append(f"lost to unknown tokens: {unknown_bytes:,} bytes ({share:.4%})")
    return lines


def _figures(counts: Mapping[str, Any], disk_bytes: int) -> tuple[str, ...]:
    return (
        f"{counts['documents']:,}",
        f"{counts['heldout_documents']:,}",
        f"{counts['units']:,}",
        f"{counts['text_bytes'] / 1e6:,.2f}",
        f"{counts['tokens']:,}",
        f"{counts['text_bytes'] / counts['tokens']:.2f}",
        f"{disk_bytes / 1e6:,.2f}",
        f"{counts['seconds']:,.1f}",
        f"{counts['text_bytes'] / 1e6 / max(counts['seconds'], 1e-9):.2f}",
    )
