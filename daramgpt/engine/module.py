"""What the engine wraps: the student's body and the losses behind it; the fused head never gives logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from daramgpt.blocks import states_of
from daramgpt.losses import DistillationHead, HiddenStateLoss, Objective
from daramgpt.recipe import Loss

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


# Beginning of the names of parameters that are trained along and are none of the student's.
PROJECTIONS = "hidden_states."


def objective_of(loss: Loss) -> Objective:
    """What the head minimises, of a recipe's loss."""
    return Objective(**loss.model_dump(include={field.name for field in fields(Objective)}))


class DistillationModel(nn.Module):
    """The student's body and the losses behind it; parameters keep their Hugging Face names.

    The head weight is a parameter of the head module too (the same one as the embedding): ZeRO-3 gathers a parameter
    for the module whose forward uses it.

    Args:
        student: whose body it is.
        loss: of the recipe.
        chunk_tokens: tokens the losses take at a time.
        loss_is_compiled: softmax arithmetic by torch.compile.
        teacher_width: channels of the teacher's hidden states, where the loss compares them.
        compared_blocks: of the student, from 1, whose states are compared with the teacher's; none = not at all.
        seed: of the projections to the teacher's width.
    """

    def __init__(
        self,
        student: GPT2LMHeadModel,
        loss: Loss,
        chunk_tokens: int,
        loss_is_compiled: bool = False,
        teacher_width: int = 0,
        compared_blocks: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.transformer = student.transformer
        self._hidden_weight, self._compared = loss.hidden_weight, tuple(compared_blocks)
        self.hidden_states: HiddenStateLoss | None = None
        if self._compared:
            width = student.config.n_embd
            self.hidden_states = HiddenStateLoss(width, teacher_width, len(self._compared), seed, chunk_tokens)
        self.head = DistillationHead(
            student.lm_head.weight,
            objective=objective_of(loss),
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
        teacher_states: Sequence[torch.Tensor] = (),
        **model_inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T] ids and labels → sums over the target tokens: loss, kd (with T²) and ce in nats, hidden.

        Args:
            teacher_states: [B, T, Dt] of each pair of blocks that is compared; without them their loss is 0.
            model_inputs: mask and positions, as from `Documents.model_inputs`; none looks across documents.
        """
        own_states: list[torch.Tensor] = []
        with self._kept(own_states) if teacher_states else contextlib.nullcontext():
            hidden_BTD = self.transformer(input_ids, use_cache=False, **model_inputs).last_hidden_state
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.flatten(0, 1)
        targets, hidden = labels.flatten(), None
        # Before the head, with which all that ranks have to gather for each other is to end.
        if self.hidden_states is not None and teacher_states:
            states = ([one.flatten(0, 1) for one in side] for side in (own_states, teacher_states))
            hidden = self.hidden_states(*states, targets)
        loss, kd, ce = self.head(hidden_BTD.flatten(0, 1), targets, teacher_hidden, teacher_weight, teacher_bias)
        if hidden is None:
            return loss, kd, ce, torch.zeros_like(loss)
        return loss + self._hidden_weight * hidden, kd, ce, hidden.detach()

    def take_along(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take from a run's weights, by name, those that belong to no student; what is not there stays as it is."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith(PROJECTIONS) and name in weights and weights[name].shape == parameter.shape:
                    parameter.copy_(weights[name])

    @contextlib.contextmanager
    def _kept(self, states: list[torch.Tensor]) -> Iterator[None]:
        """Add what the compared blocks hand on in here to `states`, in their order."""
        found: dict[int, torch.Tensor] = {}

        def keep(number: int, output: Any) -> None:
            found[number] = states_of(output)

        handles = [
            self.transformer.h[number - 1].register_forward_hook(
                lambda module, inputs, output, number=number: keep(number, output)
            )
            for number in self._compared
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        states.extend(found[number] for number in self._compared)


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
