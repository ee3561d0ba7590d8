"""How far the distributions of teachers are from the reference's, added up over batches, a few positions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import linear

# Positions whose logits exist at a time.
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: [V, D] weight and [V] bias or None, in fp32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def log_probabilities(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """[C, V] at T = 1: the product in fp32, the softmax in fp64, for KLs of interest are about 1e-5."""
        return linear(hidden_CD, self.weight, self.bias).double().log_softmax(dim=-1)


@dataclass
class Sums:
    """What a row has added up over its batches.

    Attributes:
        kl: nats.
        agreed: tokens whose most probable next token is that of the reference.
        seconds: of each batch.
    """

    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)


def compare(hidden: Sequence[torch.Tensor], heads: Sequence[Head], sums: Sequence[Sums]) -> None:
    """Add the agreement of rows with the reference to their sums, `CHUNK_TOKENS` positions at a time.

    Args:
        hidden: [N, D] of each row, in fp32; the first is the reference.
        heads: of each row.
        sums: of each row; ``kl``, ``agreed`` and ``tokens`` are added to.
    """
    for start in range(0, len(hidden[0]), CHUNK_TOKENS):
        logs = None
        for hidden_ND, head, total in zip(hidden, heads, sums, strict=True):
            row_CV = head.log_probabilities(hidden_ND[start : start + CHUNK_TOKENS])
            if logs is None:
                logs = row_CV, row_CV.exp(), row_CV.argmax(dim=-1)
            log_CV, probability_CV, best_C = logs
            total.kl += float((probability_CV * (log_CV - row_CV)).sum())
            total.agreed += int((row_CV.argmax(dim=-1) == best_C).sum())
            total.tokens += len(row_CV)
