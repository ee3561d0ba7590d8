"""Distillation losses: a fused, chunked language-model head beside its plain reference.

`objective` says what is minimised, `reference` computes it in its plain form, `fused` without whole logits;
`hidden_states` compares what the blocks hand on.
"""

from daramgpt.losses.fused import DistillationHead, Workspace, distillation_loss
from daramgpt.losses.hidden_states import HiddenStateLoss
from daramgpt.losses.objective import DIVERGENCES, IGNORED_LABEL, Objective
from daramgpt.losses.reference import distillation_loss_reference
from daramgpt.vector_math import choose_kernels

__all__ = [
    "DIVERGENCES",
    "IGNORED_LABEL",
    "DistillationHead",
    "HiddenStateLoss",
    "Objective",
    "Workspace",
    "distillation_loss",
    "distillation_loss_reference",
]

# Whoever computes a loss imports this first.
choose_kernels()
