"""Batches of tokens for the teacher measurement: real text of all corpora, or random tokens for random weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import inputs
from benchmarks.prepare import find_corpora
from daramgpt import corpora, teacher
from daramgpt.corpora import Corpus, ReadReport
from daramgpt.curriculum import cut
from daramgpt.errors import UserError
from daramgpt.shards.encode import Encoder

ROW_TOKENS, BATCH_TOKENS = 1024, 4096
FULL = inputs.SHAPES["full"]


def given_text(teacher_dir: Path, corpus_dir: Path, num_tokens: int) -> NDArray[np.int64]:
    """[number, B, T] batches of real text in the teacher's own tokens.

    Raises:
        UserError: no such teacher, no tokenizer, no corpus, or too little text.
    """
    num_batches, batch_rows, row_tokens = batch_shape(num_tokens, teacher.max_positions(teacher_dir))
    rows = text_rows(corpus_dir, Encoder(teacher_dir), row_tokens, num_batches * batch_rows)
    return rows.reshape(num_batches, batch_rows, row_tokens)


def random_tokens(num_tokens: int) -> NDArray[np.int64]:
    """[number, B, T] batches of random tokens of the full shape's vocabulary; none for 0 tokens."""
    if not num_tokens:
        return np.empty((0, 0, 0), dtype=np.int64)
    return np.random.default_rng(inputs.SEED).integers(
        FULL.vocab_size, size=batch_shape(num_tokens, FULL.context_tokens), dtype=np.int64
    )


def text_rows(corpus_dir: Path, encoder: Encoder, row_tokens: int, num_rows: int) -> NDArray[np.int64]:
    """[num_rows, row_tokens] token ids: the beginnings of all corpora in turn, packed, so that any part is a mix.

    Raises:
        UserError: no corpus, or too little text.
    """
    streams = deque(
        _packed(
            corpora.find(corpus_dir, name, format),
            "paragraph" if name == "written" else "sentence",
            encoder,
            row_tokens,
        )
        for name, format in find_corpora(corpus_dir).items()
    )
    rows: list[NDArray[np.int64]] = []
    while streams and len(rows) < num_rows:
        if (row := next(streams[0], None)) is None:
            streams.popleft()
        else:
            rows.append(row)
            streams.rotate(-1)
    if len(rows) < num_rows:
        raise UserError(
            f"{corpus_dir} holds {len(rows) * row_tokens:,} tokens in whole rows, {num_rows * row_tokens:,} are needed",
            "give more text, or fewer with --tokens",
        )
    return np.stack(rows)


def _packed(corpus: Corpus, unit: str, encoder: Encoder, row_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Rows of a corpus, documents one after the other with an end of text between them."""
    tokens: list[int] = []
    for document in corpora.read(corpus, ReadReport()):
        if units := cut(document, unit):
            tokens += [*encoder.encode(units).token_ids.tolist(), encoder.eos_token_id]
        whole = len(tokens) - len(tokens) % row_tokens
        for start in range(0, whole, row_tokens):
            yield np.array(tokens[start : start + row_tokens], dtype=np.int64)
        del tokens[:whole]


def batch_shape(num_tokens: int, max_positions: int) -> tuple[int, int, int]:
    """Batches, rows in each, tokens in a row, that hold at least so many tokens, at most `BATCH_TOKENS` a batch."""
    row_tokens = min(ROW_TOKENS, max_positions, num_tokens)
    num_rows = -(-num_tokens // row_tokens)
    batch_rows = min(num_rows, max(1, BATCH_TOKENS // row_tokens))
    return -(-num_rows // batch_rows), batch_rows, row_tokens
