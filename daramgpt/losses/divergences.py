"""The divergences other than the forward KL, for log-probabilities: their value by row, and their gradient.

p is the teacher's and q the student's distribution, s the student's scaled logits. With g the derivative by q, the
gradient by s is q · (g − Σqg). Mixtures are taken relative to one of both distributions, by the logarithm of their
ratio, so that nothing underflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daramgpt.losses.objective import Objective

# e to this power is finite; where probabilities differ by more, one of them contributes nothing.
LARGEST_LOG_RATIO = 80.0
# e to this power is a normal number of fp32. MKL takes twenty times as long for an exponential that is not, and a
# student that no divergence holds at the teacher's improbable tokens has many.
LEAST_EXPONENT = -87.0


def divergence_and_gradient(student_log: Tensor, teacher_log: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The divergence of each row [B, 1], and its gradient by s [B, V].

    Args:
        student_log, teacher_log: [B, V], log-probabilities at the objective's temperature.
        objective: its divergence is any but the forward KL.
    """
    if objective.divergence == "reverse-kl":
        return _reverse_kl(student_log, teacher_log)
    if objective.divergence == "jsd":
        return _jsd(student_log, teacher_log, objective.jsd_beta)
    assert objective.divergence == "skew-kl", objective.divergence
    return _skew_kl(student_log, teacher_log, objective.skew_alpha)


def normal_exponential(logarithm: Tensor, out: Tensor | None = None) -> Tensor:
    """e to the power of what is at most 0; what is less than every normal number of fp32 becomes the least of them."""
    return torch.clamp(logarithm, min=LEAST_EXPONENT, out=out).exp_()


def _reverse_kl(student_log: Tensor, teacher_log: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) [B, 1] and its gradient by s [B, V] for log-probabilities: g = ln(q/p) but for a constant."""
    student, ratio_log = normal_exponential(student_log), student_log - teacher_log
    divergence = (student * ratio_log).sum(dim=1, keepdim=True)
    return divergence, ratio_log.sub_(divergence).mul_(student)


def _jsd(student_log: Tensor, teacher_log: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The same of β · KL(p ‖ m) + (1 − β) · KL(q ‖ m), m = βp + (1 − β)q: g = (1 − β) · ln(q/m)."""
    student, ratio_log = normal_exponential(student_log), _clamped(teacher_log - student_log)
    # ln(m/q) = ln(1 + β(p/q − 1)), and ln(m/p) is that less ln(p/q).
    mixture_log = torch.expm1(ratio_log).mul_(beta).log1p_()
    expected = (student * mixture_log).sum(dim=1, keepdim=True)
    teacher_part = normal_exponential(teacher_log).mul_(ratio_log.sub_(mixture_log)).sum(dim=1, keepdim=True)
    return beta * teacher_part - (1 - beta) * expected, mixture_log.sub_(expected).mul_(student).mul_(beta - 1)


def _skew_kl(student_log: Tensor, teacher_log: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The same of KL(p ‖ m), m = αp + (1 − α)q: g = −(1 − α) · p/m."""
    student, ratio_log = normal_exponential(student_log), _clamped(student_log - teacher_log)
    # ln(m/p) = ln(1 + (1 − α)(q/p − 1)).
    mixture_log = torch.expm1(ratio_log).mul_(1 - alpha).log1p_()
    divergence = (normal_exponential(teacher_log) * mixture_log).sum(dim=1, keepdim=True).neg_()
    share = mixture_log.neg_().exp_()
    expected = (student * share).sum(dim=1, keepdim=True)
    return divergence, share.sub_(expected).mul_(student).mul_(alpha - 1)


def _clamped(ratio_log: Tensor) -> Tensor:
    return ratio_log.clamp_(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
