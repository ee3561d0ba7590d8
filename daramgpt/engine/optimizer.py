"""The optimizer that DeepSpeed is given.

torch's fused AdamW, because DeepSpeed's own CPU Adam compiles C++ on first use (about two minutes, and a compiler) and
is no faster. bitsandbytes' AdamW with 8-bit moments runs on a GPU and on a CPU; on a CPU it is slow (5.3 s against
0.15 s a step for 68 M parameters on two cores).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from daramgpt.errors import UserError
from daramgpt.recipe import Optimizer


def client_optimizer(module: nn.Module, settings: Optimizer, is_offloaded: bool) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    constants: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **constants)
    if settings.kind == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **constants)
    if torch.cuda.is_available() and not is_offloaded:
        raise UserError(
            f"optimizer.kind: {settings.kind} works in the memory of the CPU, and this ds_config keeps the optimizer "
            "on the GPU",
            'use a ds_config with zero_optimization.offload_optimizer, or optimizer.kind="adamw"',
        )
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, **constants)
    except Exception as error:  # of the compiler, of ninja, or of loading what they built
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"optimizer.kind: {settings.kind} could not be built: {reason}",
            'install a C++ compiler and ninja, or use optimizer.kind="adamw"',
        ) from error
