"""What `prepare` tells the user: how fast it goes, and at the end what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_SECONDS_BETWEEN_LINES = 5.0
_LINES_NAMED = 5
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
            f"{rate / 1e6:.2f} MB/s, done in {_duration(left_of_stage / rate)}, "
            f"all stages in {_duration(left / rate)} at most"
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


def summary(stages: list[dict[str, Any]]) -> list[str]:
    """A table of the stages, the counts of the cleaning rules, and the faults, as lines."""
    head = ("stage", "corpus", "unit", "documents", "units", "text MB", "tokens", "bytes/token", "held-out", "MB/s")
    rows = [
        (
            stage["name"],
            stage["corpus"],
            stage["unit"],
            f"{stage['documents']:,}",
            f"{stage['units']:,}",
            f"{stage['text_bytes'] / 1e6:,.2f}",
            f"{stage['tokens']:,}",
            f"{stage['bytes_per_token']:.2f}",
            f"{stage['heldout_documents']:,}",
            f"{stage['text_bytes'] / 1e6 / max(stage['seconds'], 1e-9):.2f}",
        )
        for stage in stages
    ]
    num_names = 3
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < num_names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
