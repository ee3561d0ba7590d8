"""The loss in its plain form: what the fused form is tested and measured against.

It holds the logits of both models whole: 0.8 GB each for 4,096 tokens of a 51,200-token vocabulary in fp32, and as
much again for every intermediate that autograd keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from daramgpt.losses.objective import IGNORED_LABEL, Objective, softmax_dtype


def distillation_loss_reference(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, objective: Objective | float
) -> tuple[Tensor, Tensor]:
    """Both terms in their plain form, differentiable.

    Args:
        student_logits: [N, V].
        teacher_logits: [N, V], or None for plain cross-entropy.
        labels: [N], token ids; -100 leaves a token out of both terms.
        objective: divergence and temperature, which softens both distributions in the divergence and neither in the
            cross-entropy; the weights are the caller's. A number is the temperature of the forward KL.

    Returns:
        T² · divergence and cross-entropy, each summed over the target tokens, in nats; fp32, or fp64 when the
        student's logits are.
    """
    if not isinstance(objective, Objective):
        objective = Objective(objective)
    wide, temperature = softmax_dtype(student_logits.dtype), objective.temperature
    targets = labels != IGNORED_LABEL
    student = student_logits[targets].to(wide)
    ce = cross_entropy(student, labels[targets], reduction="sum")
    if teacher_logits is None:
        return torch.zeros_like(ce), ce
    student_log = torch.log_softmax(student / temperature, dim=-1)
    teacher_log = torch.log_softmax(teacher_logits[targets].to(wide) / temperature, dim=-1)
    return temperature**2 * _divergence(student_log, teacher_log, objective), ce


def _divergence(student_log: Tensor, teacher_log: Tensor, objective: Objective) -> Tensor:
    """Sum over rows; both are log-probabilities."""
    if objective.divergence == "forward-kl":
        return _kl(teacher_log, student_log)
    if objective.divergence == "reverse-kl":
        return _kl(student_log, teacher_log)
    if objective.divergence == "skew-kl":
        return _kl(teacher_log, _log_mixture(teacher_log, student_log, objective.skew_alpha))
    beta = objective.jsd_beta
    mixture_log = _log_mixture(teacher_log, student_log, beta)
    return beta * _kl(teacher_log, mixture_log) + (1 - beta) * _kl(student_log, mixture_log)


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p ‖ q)."""
    return kl_div(q_log, p_log, reduction="sum", log_target=True)


def _log_mixture(p_log: Tensor, q_log: Tensor, share: float) -> Tensor:
    """log(share · p + (1 − share) · q)."""
    return torch.logaddexp(p_log + math.log(share), q_log + math.log1p(-share))
