"""What the softmax arithmetic knows of each row, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from daramgpt.losses.objective import Objective


@dataclass(frozen=True)
class Rows:
    """Columns [C, 1]: of each row what goes in, and places for what comes out.

    What leaves a token out is a factor per row, which costs no pass over V.

    Attributes:
        target: 1, or 0 for a row that is left out.
        soft_factor: kd_weight · T, or 0.
        hard_factor: ce_weight, or 0.
        student_shift: what the scaled logits are taken less of, to give s.
        hard_sum: Σ(eˢ)ᵀ.
        divergence: but for what a whole block returns.
    """

    target: Tensor
    soft_factor: Tensor
    hard_factor: Tensor
    student_shift: Tensor
    hard_sum: Tensor
    divergence: Tensor

    @classmethod
    def empty(cls, target_C: Tensor, objective: Objective) -> Rows:
        """Of a chunk whose targets are 1."""
        target, out = (
            target_C.unsqueeze(1),
            torch.zeros(3, len(target_C), 1, dtype=target_C.dtype, device=target_C.device),
        )
        soft_factor = objective.kd_weight * objective.temperature * target
        return cls(target, soft_factor, objective.ce_weight * target, *out.unbind())

    def split(self, num_rows: int) -> Iterator[Rows]:
        """Views of so many rows each."""
        columns = [getattr(self, field.name).split(num_rows) for field in fields(self)]
        return (Rows(*block) for block in zip(*columns, strict=True))
