"""Losses and gradients that are not finite: nothing moves by them.

A loss that is not finite makes its own gradient NaN, so that one look at the norm of all gradients, which is the same
on every rank, covers both. ZeRO looks before its optimizer moves, and skips the step; without ZeRO, and with
``bf16.check_grad_overflow`` off, nobody does. So the optimizer itself is kept from moving, whoever has looked before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def carried_by_gradient(loss: torch.Tensor, factor: float) -> torch.Tensor:
    """``loss * factor``, with a gradient of NaN where the loss is not finite; to the bit the same where it is."""
    return loss * (loss.detach() * 0 + factor)


def guard(optimizer: torch.optim.Optimizer, norm: Callable[[], torch.Tensor | float]) -> None:
    """Have an optimizer leave weights, moments and step counts as they are where the gradient is not finite.

    torch's own decides it on its device: nothing waits. The others run on the host, or make it wait themselves
    (bitsandbytes' after every tensor).

    Args:
        optimizer: torch's fused AdamW, or one whose step does all it does.
        norm: of the gradients of all ranks, when the optimizer is about to step.
    """
    if isinstance(optimizer, torch.optim.AdamW):

        def look(adam: Any, *_: Any) -> None:
            # What torch's own gradient scaler sets for its fused optimizers.
            adam.found_inf = torch.as_tensor(norm()).isfinite().logical_not().float()

        optimizer.register_step_pre_hook(look)
        return
    step = optimizer.step

    def step_if_finite(*arguments: Any, **options: Any) -> Any:
        return step(*arguments, **options) if math.isfinite(float(norm())) else None

    # Of the instance: DeepSpeed knows its optimizers by their classes.
    vars(optimizer)["step"] = step_if_finite
