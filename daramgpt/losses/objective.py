"""What is minimised for a token: a divergence between teacher and student, and cross-entropy.

p is the teacher's and q the student's distribution, both softened by the temperature T:

* ``forward-kl``: KL(p ‖ q) (Hinton, Vinyals & Dean, arXiv 1503.02531);
* ``reverse-kl``: KL(q ‖ p);
* ``jsd``: the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1),
  β · KL(p ‖ m) + (1 − β) · KL(q ‖ m) with m = βp + (1 − β)q: β weighs the teacher, in the mixture and before its term.
  Divided by β it tends to the forward KL as β → 0, divided by 1 − β to the reverse KL as β → 1;
* ``skew-kl``: KL(p ‖ αp + (1 − α)q) of DistiLLM (arXiv 2402.03898, equation 4): α is the teacher's share of the
  mixture.

T² keeps the size of the gradient when T changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

IGNORED_LABEL = -100
Divergence: TypeAlias = Literal["forward-kl", "reverse-kl", "jsd", "skew-kl"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)


@dataclass(frozen=True)
class Objective:
    """What is minimised for a token: ``kd_weight · T² · divergence + ce_weight · cross-entropy``.

    Attributes:
        temperature: T > 0.
        kd_weight, ce_weight: of both terms.
        divergence: a name above.
        jsd_beta: β of ``jsd``, between 0 and 1, both excluded.
        skew_alpha: α of ``skew-kl``, between 0 and 1, both excluded.
    """

    temperature: float = 2.0
    kd_weight: float = 1.0
    ce_weight: float = 0.1
    divergence: Divergence = "forward-kl"
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1

    def __post_init__(self) -> None:
        assert self.temperature > 0, f"temperature {self.temperature}"
        assert self.divergence in DIVERGENCES, f"divergence {self.divergence}"
        assert 0 < self.jsd_beta < 1, f"jsd_beta {self.jsd_beta}"
        assert 0 < self.skew_alpha < 1, f"skew_alpha {self.skew_alpha}"


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax arithmetic on logits of that dtype is done in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
