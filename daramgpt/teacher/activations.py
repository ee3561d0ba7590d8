"""Activation functions of a frozen teacher in as few passes over memory as the device allows.

transformers' ``gelu_new`` is several memory-bound kernels; torch's tanh GELU is the same function in one. On a CPU not
even that one is needed: oneDNN's matrix product applies the function to its fp32 accumulators before it stores them.
At 1920 -> 7680 channels and 4,096 tokens in bf16 the product with its GELU then takes 75 ms where the two took 94, at
320 -> 1280 2.6 ms where they took 6.4, and a rounding to bf16 between them is saved. It has no backward pass.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

# What an MLP calls its first linear layer and the activation behind it: GPT-2, GPT-NeoX, Llama.
PAIRS = (("c_fc", "act"), ("dense_h_to_4h", "act"), ("gate_proj", "act_fn"))

# oneDNN's name for it, and its algorithm.
NO_ACTIVATION = ("none", "")


def fuse_gelu(model: nn.Module) -> None:
    """Exchange transformers' ``gelu_new`` for torch's kernel of the same function."""
    for module in model.modules():
        if type(getattr(module, "act", None)).__name__ == "NewGELUActivation":
            module.act = nn.GELU(approximate="tanh")


def join_products(model: nn.Module, linear_type: type[nn.Module], compute_dtype: torch.dtype) -> None:
    """Have the linear layers of this type apply the activation behind them, which becomes the identity.

    In bf16 the others too take oneDNN's product: it adds the bias to its accumulators, where torch first copies it to
    every row of the result (4 to 9 % of a product's time at 4,096 tokens with AMX). In fp32 torch's own is as fast.

    Args:
        model: on a CPU; without oneDNN, or kernels of it for `compute_dtype`, it stays as it is.
        linear_type: has an attribute `product`, a function of inputs, weight and bias that its forward calls.
        compute_dtype: of the products.
    """
    if not _has_kernels(compute_dtype):
        return
    for module in model.modules():
        for linear_name, activation_name in PAIRS:
            linear, activation = getattr(module, linear_name, None), getattr(module, activation_name, None)
            names = _onednn_names(activation)
            if isinstance(linear, linear_type) and names is not None:
                linear.product = partial(product_with_activation, activation=names)  # type: ignore[assignment]
                setattr(module, activation_name, nn.Identity())
    if compute_dtype == torch.bfloat16:
        for module in model.modules():
            if isinstance(module, linear_type) and not isinstance(module.product, partial):
                module.product = partial(product_with_activation, activation=NO_ACTIVATION)  # type: ignore[assignment]


def product_with_activation(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: tuple[str, str]
) -> torch.Tensor:
    """activation(inputs · weightᵀ + bias) in one kernel; on a CPU.

    Args:
        inputs: [..., in].
        weight: [out, in].
        bias: [out], or None.
        activation: as oneDNN names function and algorithm.
    """
    function, algorithm = activation
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, function, [], algorithm)


def _has_kernels(compute_dtype: torch.dtype) -> bool:
    # The op is what torch's own compiler emits for a CPU; it is no public name, so it may be absent.
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if compute_dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return compute_dtype == torch.float32


def _onednn_names(activation: nn.Module | None) -> tuple[str, str] | None:
    kind = type(activation).__name__
    if isinstance(activation, nn.GELU):
        return "gelu", activation.approximate
    if kind == "GELUTanh":
        return "gelu", "tanh"
    if kind == "GELUActivation":
        return "gelu", "none"
    if isinstance(activation, nn.SiLU) or kind == "SiLUActivation":
        return "swish", ""
    return None
