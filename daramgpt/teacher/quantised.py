"""The quantised layers of a teacher: bitsandbytes' own classes, loaded through transformers' quantiser.

``llm-int8``  bitsandbytes' LLM.int8 (Dettmers et al., arXiv 2208.07339): activations are quantised too.
``int8``      weight-only: the same int8 rows and fp32 row scales, dequantised before the product. It runs on every
              device, and at thousands of tokens a batch the dequantisation is a small part of the product.
``nf4``       4-bit NormalFloat blocks of 64 (QLoRA, arXiv 2305.14314): half the memory, and a larger error.

The weight-only forward is a subclass over the storage of ``Linear8bitLt``: a loaded layer becomes one by its class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from daramgpt.errors import UserError
from daramgpt.teacher.activations import join_products
from daramgpt.teacher.half_accumulation import product as half_product
from daramgpt.teacher.residual import is_norm, widen_residual_stream

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

EIGHT_BIT = ("int8", "llm-int8")
QUANTISED = (*EIGHT_BIT, "nf4")
# LLM.int8's outlier threshold: activation columns beyond it are multiplied in 16 bits.
OUTLIER_THRESHOLD = 6.0
# Weights that share a scale. Where a row ends within a block, bitsandbytes' kernel for CPUs with AVX512 goes on with
# the scale of the wrong block: values are off by 25 %, not 9 % (0.50.2).
NF4_BLOCK = 64
# On a CPU with AVX512-BF16 bitsandbytes says, as it is imported, that it has not found a kernel for few tokens at a
# time, which nothing here would call; see `_leave_unpacked`.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quantisation(precision: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What tells transformers to quantise each linear layer as it is read; it leaves out the output embedding."""
    from transformers import BitsAndBytesConfig

    if precision == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD)


def refit(model: PreTrainedModel, precision: str, compute_dtype: torch.dtype, half_accumulation: bool = False) -> None:
    """Give a model that was quantised as it was read its forward, and what is not quantised the compute dtype.

    The residual stream and its norms keep fp32; see `residual`. `half_accumulation`: see the module of that name.

    Raises:
        UserError: nf4 on a CPU with layers that bitsandbytes dequantises wrongly there.
    """
    import bitsandbytes as bnb

    if precision == "int8":
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear8bitLt):
                module.__class__ = _weight_only_linear()  # type: ignore[assignment]
                if half_accumulation:
                    module.product = half_product  # type: ignore[assignment]
        if model.device.type == "cpu":
            join_products(model, _weight_only_linear(), compute_dtype)
    elif precision == "nf4":
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                if model.device.type == "cpu" and module.in_features % NF4_BLOCK:
                    raise UserError(
                        f"teacher.precision: nf4 does not work on a CPU for rows of {module.in_features} weights, "
                        f"no multiple of {NF4_BLOCK}",
                        "use int8",
                    )
                _leave_unpacked(module)
    else:
        _hush_casts()
    norms = {id(parameter) for module in model.modules() if is_norm(module) for parameter in module.parameters()}
    # Each parameter once, so that tied ones stay tied; buffers keep their dtype, as rotary frequencies must.
    for parameter in model.parameters():
        if not isinstance(parameter, (bnb.nn.Int8Params, bnb.nn.Params4bit)):
            dtype = torch.float32 if id(parameter) in norms else compute_dtype
            # A copy, for a view of the mapped file would keep all of it in the process's resident memory.
            parameter.data = parameter.data.to(dtype, copy=True)
    model.config.dtype = compute_dtype
    widen_residual_stream(model, model.get_input_embeddings(), compute_dtype)


def eight_bit_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, precision: str, device: torch.device | None = None
) -> nn.Module:
    """A frozen ``Linear8bitLt`` that holds `weight` [out, in] as int8 rows with fp32 row scales.

    `weight` is on the CPU, as bitsandbytes quantises what moves away from it or stays on it; `device` defaults to that.
    """
    import bitsandbytes as bnb

    _hush_casts()
    kind = _weight_only_linear() if precision == "int8" else bnb.nn.Linear8bitLt
    layer = kind(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD,
        device="meta",
    )
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(device or weight.device)  # type: ignore[misc]
    if bias is not None:
        layer.bias = nn.Parameter(bias.data.to(device or weight.device), requires_grad=False)
    return layer.requires_grad_(False)


def four_bit_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, compute_dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A frozen ``Linear4bit`` that holds `weight` [out, in] as NF4 blocks."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        compute_dtype=compute_dtype,
        quant_type="nf4",
        device="meta",
    )
    parameter: nn.Parameter = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = parameter.to(device)
    if bias is not None:
        layer.bias = nn.Parameter(bias.data.to(device), requires_grad=False)
    _leave_unpacked(layer)
    return layer.requires_grad_(False)


def _leave_unpacked(layer: nn.Module) -> None:
    """Keep a ``Linear4bit`` from bitsandbytes' own product for CPUs with AVX512-BF16, made for a few tokens at a time.

    At 4,096 tokens it takes 752 ms where dequantising and multiplying take 56 (1920 -> 7680, bf16, AMX).
    """
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _hush_casts() -> None:
    """LLM.int8 works on fp16 activations, and bitsandbytes warns of the cast at every product."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@cache
def _weight_only_linear() -> type[nn.Module]:
    """The weight-only forward over bitsandbytes' storage; made on first use, as importing bitsandbytes is slow."""
    import bitsandbytes as bnb

    class WeightOnlyLinear8bit(bnb.nn.Linear8bitLt):
        """``Linear8bitLt`` whose int8 rows are dequantised into the product; activations keep their dtype."""

        product: Callable[..., torch.Tensor] = staticmethod(nn.functional.linear)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, scales = self.weight.data, self.weight.SCB  # type: ignore[attr-defined]
            weight = _buffer(rows.shape, x.dtype, x.device)
            weight.copy_(rows)
            weight.mul_((scales / 127.0).to(x.dtype).unsqueeze(1))
            return self.product(x, weight, self.bias)

    return WeightOnlyLinear8bit


_buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One scratch matrix that all layers dequantise into: page faults of fresh ones cost more than the arithmetic."""
    key, size = (dtype, device), shape.numel()
    if key not in _buffers or _buffers[key].numel() < size:
        _buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return _buffers[key][:size].view(shape)


def num_parameters(model: nn.Module) -> int:
    """Weights of the model before quantisation, shared ones once."""
    # A 4-bit parameter holds two weights a byte; its state knows the shape they had.
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters())
    return sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of the scales that bitsandbytes keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        scales = getattr(parameter, "SCB", None) if state is None else state.absmax
        if scales is not None:
            total += scales.nbytes
    return total


def non_finite_weight(model: nn.Module) -> str | None:
    """Name of the first weight with a value that is not finite; None where there is none."""
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            values = parameter.data
            if parameter.dtype == torch.int8:
                # A row is what its scale is; the first LLM.int8 product moves the scales to the layer's state.
                values = parameter.SCB if parameter.SCB is not None else module.state.SCB
            elif (state := getattr(parameter, "quant_state", None)) is not None:
                values = state.absmax
            if not bool(values.isfinite().all()):
                return f"{name}.{key}"
    return None
