"""What the engine wraps: the student's body and the fused head, which gives losses and never logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from daramgpt.losses import DistillationHead, Objective
from daramgpt.recipe import Loss

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


class DistillationModel(nn.Module):
    """The student's body and the fused head; parameters keep their Hugging Face names.

    The head weight is a parameter of the head module too (the same one as the embedding): ZeRO-3 gathers a parameter
    for the module whose forward uses it.
    """

    def __init__(self, student: GPT2LMHeadModel, loss: Loss, chunk_tokens: int, loss_is_compiled: bool = False) -> None:
        super().__init__()
        self.transformer = student.transformer
        self.head = DistillationHead(
            student.lm_head.weight,
            objective=Objective(
                temperature=loss.temperature,
                kd_weight=loss.kd_weight,
                ce_weight=loss.ce_weight,
                divergence=loss.divergence,
                jsd_beta=loss.jsd_beta,
                skew_alpha=loss.skew_alpha,
            ),
            chunk_tokens=chunk_tokens,
            is_compiled=loss_is_compiled,
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_weight: torch.Tensor | None = None,
        teacher_bias: torch.Tensor | None = None,
        **model_inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T] ids and labels → sums over the target tokens, in nats: loss, kd (with T²), ce.

        Args:
            model_inputs: mask and positions, as from `Documents.model_inputs`; none looks across documents.
        """
        hidden_BTD = self.transformer(input_ids, use_cache=False, **model_inputs).last_hidden_state
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.flatten(0, 1)
        return self.head(hidden_BTD.flatten(0, 1), labels.flatten(), teacher_hidden, teacher_weight, teacher_bias)


@contextlib.contextmanager
def consecutive_positions() -> Iterator[None]:
    """Have transformers take positions without a mask for those of one text a row, in the forward passes in here.

    It would look at them for several texts a row, and wait for the GPU to see: once a forward pass of each model. Rows
    without a mask always have their default positions.
    """
    from transformers import masking_utils

    # No public name: another release may look in another way, or not at all.
    original = getattr(masking_utils, "find_packed_sequence_indices", None)
    if original is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
