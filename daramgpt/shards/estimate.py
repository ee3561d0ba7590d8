"""What preparing will take, measured on the beginning of each corpus before all of it is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daramgpt import corpora
from daramgpt.corpora import Corpus
from daramgpt.curriculum import take_bytes
from daramgpt.shards.encode import Encoder
from daramgpt.shards.encoded import token_dtype
from daramgpt.shards.workers import encode_block
from daramgpt.shards.writer import CREDIT_DTYPE
from daramgpt.text_table import aligned, duration

if TYPE_CHECKING:
    from daramgpt.recipe import Recipe

# Of each corpus and unit; about a second of work.
SAMPLE_TEXT_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """What a stage will take, if its corpus has the text and goes on as it begins.

    Attributes:
        seconds: with all workers.
    """

    name: str
    text_bytes: int
    tokens: float
    disk_bytes: float
    seconds: float


def estimate(
    recipe: Recipe, found: dict[str, Corpus], encoder: Encoder, context_tokens: int, num_workers: int
) -> list[StageEstimate]:
    """Tokens, disk and time of every stage.

    Args:
        found: the corpora, by name.
    """
    samples: dict[tuple[str, str], tuple[float, float]] = {}
    estimates = []
    for stage in recipe.curriculum.stages:
        key = stage.corpus, stage.unit
        if key not in samples:
            splitter = recipe.corpus.splitter(stage.corpus)
            samples[key] = _sample(found[stage.corpus], stage.unit, splitter, encoder)
        tokens_per_byte, seconds_per_byte = samples[key]
        text_bytes = take_bytes(recipe, stage)
        tokens = text_bytes * tokens_per_byte
        row_bytes = context_tokens * token_dtype(encoder.vocab_size).itemsize + CREDIT_DTYPE.itemsize
        disk_bytes = tokens / context_tokens * row_bytes
        seconds = text_bytes * seconds_per_byte / num_workers
        estimates.append(StageEstimate(stage.name, text_bytes, tokens, disk_bytes, seconds))
    return estimates


def _sample(corpus: Corpus, unit: str, splitter: str, encoder: Encoder) -> tuple[float, float]:
    """Tokens a byte of text, and seconds of one core a byte."""
    text_bytes = tokens = 0
    begin = time.process_time()
    for block in corpora.blocks(corpus):
        encoded = encode_block(block, unit, splitter, encoder)
        text_bytes += int(encoded.units.unit_bytes.sum())
        tokens += len(encoded.units.token_ids) + len(encoded.ids)
        if text_bytes >= SAMPLE_TEXT_BYTES:
            break
    seconds = time.process_time() - begin
    return tokens / max(1, text_bytes), seconds / max(1, text_bytes)


def table(estimates: list[StageEstimate]) -> list[str]:
    """The estimates and their sum, as lines."""
    total = StageEstimate(
        "all",
        sum(one.text_bytes for one in estimates),
        sum(one.tokens for one in estimates),
        sum(one.disk_bytes for one in estimates),
        sum(one.seconds for one in estimates),
    )
    rows = [
        (
            one.name,
            f"{one.text_bytes / 1e6:,.1f}",
            f"{one.tokens / 1e6:,.1f}",
            f"{one.disk_bytes / 1e6:,.1f}",
            duration(one.seconds),
        )
        for one in (*estimates, total)
    ]
    return aligned([("stage", "text MB", "million tokens", "disk MB", "time"), *rows])
