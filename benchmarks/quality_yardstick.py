"""Text that neither the teacher nor the corpora have, as rows of tokens: the yardstick of a comparison of students.

A folder of ``<kind>.txt``, documents parted by a blank line. Each kind is a stream of its own: documents one after the
other, the end-of-text token before the first and after each, cut into rows. Bytes are those of the documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from daramgpt.errors import UserError
from daramgpt.evaluation.held_out import IGNORED

BATCH_ROWS = 8
ALL = "all"


@dataclass(frozen=True)
class Yardstick:
    """The rows.

    Attributes:
        batches: (input_ids [B, T], labels [B, T], text bytes).
    """

    batches: list[tuple[torch.Tensor, torch.Tensor, int]]

    def heldout(self, stage_name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """All of it, under the one name that it has."""
        assert stage_name == ALL
        return iter(self.batches)

    @property
    def text_bytes(self) -> int:
        return sum(text_bytes for *_, text_bytes in self.batches)


def read(folder: Path, tokenizer_dir: Path, eos_token_id: int, context_tokens: int, every: int = 1) -> Yardstick:
    """The yardstick of a folder.

    Args:
        folder: of the texts.
        tokenizer_dir, eos_token_id, context_tokens: as of the shards.
        every: only every so many-th document of each kind is taken, the first one included.

    Raises:
        UserError: it holds no text.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"--heldout: {folder} holds no .txt files", "give a folder of texts, one a kind")
    batches = []
    for file in files:
        documents = [text for text in file.read_text(encoding="utf-8").split("\n\n") if text.strip()][::every]
        ids = [eos_token_id]
        for encoded in tokenizer.encode_batch(documents, add_special_tokens=False):
            ids += [*encoded.ids, eos_token_id]
        rows = _rows(ids, eos_token_id, context_tokens)
        # The bytes of a kind count where its first rows are: only sums over all rows are asked for.
        text_bytes = sum(len(text.encode()) for text in documents)
        for start in range(0, len(rows), BATCH_ROWS):
            inputs, labels = zip(*rows[start : start + BATCH_ROWS], strict=True)
            batches.append((torch.stack(inputs), torch.stack(labels), text_bytes if start == 0 else 0))
    return Yardstick(batches)


def _rows(ids: list[int], eos_token_id: int, context_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = []
    for start in range(0, len(ids) - 1, context_tokens):
        inputs = torch.full((context_tokens,), eos_token_id)
        labels = torch.full((context_tokens,), IGNORED)
        piece = torch.tensor(ids[start : start + context_tokens + 1])
        inputs[: len(piece) - 1], labels[: len(piece) - 1] = piece[:-1], piece[1:]
        rows.append((inputs, labels))
    return rows
