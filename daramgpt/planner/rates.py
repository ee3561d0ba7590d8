"""How fast a GPU that is not at hand does what training is made of: a handful of constants from its data sheet.

The sheet (`daramgpt.gpu_table`) gives the rate of products and of memory; an operation that is no product takes as long
as the bytes that it moves. What is at hand is timed instead (`daramgpt.planner.timing`), but for one figure that is
measured here as well: the best rate of its matrix products, which no training exceeds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daramgpt import gpu_table

if TYPE_CHECKING:
    import torch

# Share of a GPU's product rate that attention reaches: assumed, not measured.
ATTENTION_SHARE = 0.5
# Backward over forward FLOPs of attention: its kernels compute the scores once more.
ATTENTION_BACKWARD = 2.5
# Bytes a logit that the softmax arithmetic moves on a GPU, as `daramgpt.losses.row_kernels` counts them, with a narrow
# gradient; without a teacher at T = 1.
LOGIT_BYTES, LOGIT_BYTES_ALONE = 90.0, 26.0
# Launching a kernel from Python, where there is so little to do that it counts.
DISPATCH_SECONDS = 8e-6


@dataclass(frozen=True)
class Rates:
    """Seconds of the operations of a step; see `daramgpt.planner.speed` for how they are used.

    Attributes:
        product_flops_per_second: of products of a block, forward and backward alike.
        head_flops_per_second, head_backward_flops_per_second: of products with the head's many rows.
        teacher_flops_per_second: of those of the teacher's blocks, which may be accumulated in fp16.
        attention_flops_per_second: forward, counting causal FLOPs.
        attention_backward: seconds of the backward pass over those of the forward pass.
        norm_seconds, norm_backward_seconds: a number of a layer norm.
        gelu_seconds, gelu_backward_seconds: a number of the tanh GELU.
        logit_seconds, logit_alone_seconds: a logit of the loss's softmax arithmetic, with and without a teacher.
        dequantised_seconds: a weight of the 8-bit teacher.
        optimizer_seconds: a parameter of AdamW in fp32.
        bytes_per_second: of passes over large tensors.
        source: of the figures.
    """

    product_flops_per_second: float
    teacher_flops_per_second: float
    head_flops_per_second: float
    head_backward_flops_per_second: float
    attention_flops_per_second: float
    attention_backward: float
    norm_seconds: float
    norm_backward_seconds: float
    gelu_seconds: float
    gelu_backward_seconds: float
    logit_seconds: float
    logit_alone_seconds: float
    dequantised_seconds: float
    optimizer_seconds: float
    bytes_per_second: float
    source: str


def of_gpu(key: str, dtype: str, half_accumulation: bool = False) -> Rates:
    """Of a GPU of `gpu_table.GPU_TABLE`, from its data sheet.

    Args:
        key: of the table.
        dtype: of the student's arithmetic.
        half_accumulation: of the products of the teacher's blocks.
    """
    sheet = gpu_table.GPU_TABLE[key]
    share, source = gpu_table.gemm_share(key)
    teraflops = {"fp32": sheet.fp32_teraflops, "fp16": sheet.fp16_teraflops, "bf16": sheet.bf16_teraflops}[dtype]
    assert teraflops is not None, f"the {key} has no {dtype}"
    products = share * teraflops * 1e12
    teacher_teraflops = gpu_table.HALF_ACCUMULATION_TERAFLOPS.get(key, teraflops) if half_accumulation else teraflops
    bandwidth = gpu_table.BANDWIDTH_SHARE * sheet.bandwidth_gigabytes_per_second * 1e9
    width = 4 if dtype == "fp32" else 2
    return Rates(
        product_flops_per_second=products,
        teacher_flops_per_second=share * teacher_teraflops * 1e12,
        head_flops_per_second=products,
        head_backward_flops_per_second=products,
        attention_flops_per_second=ATTENTION_SHARE * products,
        attention_backward=ATTENTION_BACKWARD,
        norm_seconds=2 * width / bandwidth,
        norm_backward_seconds=5 * width / bandwidth,
        gelu_seconds=2 * width / bandwidth,
        gelu_backward_seconds=3 * width / bandwidth,
        logit_seconds=LOGIT_BYTES / bandwidth,
        logit_alone_seconds=LOGIT_BYTES_ALONE / bandwidth,
        dequantised_seconds=(1 + 3 * width) / bandwidth,
        optimizer_seconds=28 / bandwidth,
        bytes_per_second=bandwidth,
        source=(
            f"data sheet: {teraflops:g} TFLOP/s of {dtype} products"
            + (f", {teacher_teraflops:g} accumulated in fp16" if teacher_teraflops != teraflops else "")
            + f", {share:.2f} of it reached ({source}), by attention {ATTENTION_SHARE:g} of that (assumed); "
            f"{sheet.bandwidth_gigabytes_per_second} GB/s, {gpu_table.BANDWIDTH_SHARE:g} of it reached (assumed)"
        ),
    )


def gemm_rate(dtype: str, sizes: Sequence[int], device: torch.device, seconds: float = 0.1) -> float:
    """Best measured FLOP/s of square matrix products.

    Args:
        dtype: of the factors.
        sizes: rows of the factors.
        device: that multiplies.
        seconds: for each size, and at least two products.
    """
    import torch

    from daramgpt.teacher import DTYPES

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        product = torch.empty_like(left)
        deadline, tries = time.perf_counter() + seconds, 0
        while tries < 2 or time.perf_counter() < deadline:
            synchronise()
            start = time.perf_counter()
            torch.mm(left, right, out=product)
            synchronise()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
            tries += 1
    return best
