"""How fast a machine does what training is made of: a handful of constants, measured here or from a data sheet.

On the machine at hand each constant is the median of a few repetitions of the operation itself, on tensors of a fixed
size: they describe the machine, not the run that is planned. All of them together take some seconds. For a GPU that is
not at hand they follow from its data sheet (`daramgpt.gpu_table`), by the bytes each operation moves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daramgpt import gpu_table

if TYPE_CHECKING:
    import torch

# A measurement stops at the first of these; that of a product, which counts most, takes longer.
MEASURE_SECONDS, MOST_REPETITIONS, FEWEST_REPETITIONS = 0.1, 50, 3
PRODUCT_SECONDS = 0.25
# Sizes of what is measured: products of a mid-sized model, tensors beyond the second-level cache.
TOKENS, WIDTH, VOCABULARY, HEAD_WIDTH, CONTEXT = 1024, 640, 16384, 64, 512
# Share of a GPU's product rate that attention reaches: assumed, not measured.
ATTENTION_SHARE = 0.5
# Backward over forward FLOPs of attention: its kernels compute the scores once more.
ATTENTION_BACKWARD = 2.5
# Bytes a logit that the softmax arithmetic moves on a GPU, as `daramgpt.losses.row_kernels` counts them, with a narrow
# gradient; without a teacher at T = 1. On a CPU it stays in caches and is measured.
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


def measure(dtype: str, device: torch.device) -> Rates:
    """Of this machine, in some seconds.

    Args:
        dtype: of the student's arithmetic.
        device: that trains.
    """
    import torch
    from torch.nn import functional as F

    from daramgpt.losses import Objective, Workspace, distillation_loss
    from daramgpt.teacher import DTYPES

    kind = DTYPES[dtype]

    def random(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=kind).requires_grad_(grad)

    def seconds(run: Callable[[], object]) -> float:
        return typical_seconds(run, device)

    def product_seconds(run: Callable[[], object]) -> float:
        return typical_seconds(run, device, PRODUCT_SECONDS)

    def forward_and_backward(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
        with torch.no_grad():
            forward = seconds(run)
        output = run()
        gradient = torch.ones_like(output)
        return forward, seconds(lambda: output.backward(gradient, retain_graph=True))

    hidden, wide = random(TOKENS, WIDTH), random(TOKENS, 4 * WIDTH)
    weight, weight_out = random(WIDTH, 4 * WIDTH), random(4 * WIDTH, WIDTH)
    head, logits = random(VOCABULARY, WIDTH), random(TOKENS, VOCABULARY)
    few = logits[: TOKENS // 2]
    # The layouts of a training step: forward, backward to the input, backward to the weight.
    block = [
        lambda: torch.mm(hidden, weight),
        lambda: torch.mm(wide, weight_out),
        lambda: torch.mm(wide, weight.T),
        lambda: torch.mm(hidden.T, wide),
    ]
    # As the loss does it: half the rows where the head's are the inner dimension.
    head_backward = [lambda: torch.mm(few, head), lambda: torch.mm(few, head), lambda: torch.mm(logits.T, hidden)]
    block_flops, head_flops = 2 * TOKENS * 4 * WIDTH**2, 2 * TOKENS * VOCABULARY * WIDTH
    with torch.no_grad():
        product_rate = len(block) * block_flops / sum(map(product_seconds, block))
        head_rate = head_flops / product_seconds(lambda: torch.mm(hidden, head.T))
        head_backward_rate = 2 * head_flops / sum(map(product_seconds, head_backward))
    queries = [random(2, WIDTH // HEAD_WIDTH, CONTEXT, HEAD_WIDTH, grad=True) for _ in range(3)]
    attention, attention_backward = forward_and_backward(
        lambda: F.scaled_dot_product_attention(queries[0], queries[1], queries[2], is_causal=True)
    )
    channels = random(TOKENS, WIDTH, grad=True)
    scale, shift = random(WIDTH, grad=True), random(WIDTH, grad=True)
    norm, norm_backward = forward_and_backward(lambda: F.layer_norm(channels, (WIDTH,), scale, shift))
    inner = random(TOKENS, 4 * WIDTH, grad=True)
    gelu, gelu_backward = forward_and_backward(lambda: F.gelu(inner, approximate="tanh"))
    # So narrow that the products with the head cost next to nothing.
    narrow, narrow_head = random(TOKENS // 4, 8, grad=True), random(VOCABULARY, 8, grad=True)
    labels = torch.randint(VOCABULARY, (len(narrow),), device=device)
    workspace, objective = Workspace(), Objective()

    def loss(teacher: tuple[torch.Tensor, torch.Tensor] | None) -> object:
        return distillation_loss(
            narrow,
            narrow_head,
            labels,
            *((narrow.detach(), narrow_head.detach()) if teacher else ()),
            objective=objective if teacher else Objective(1.0, 0.0, 1.0),
            chunk_tokens=len(narrow),
            workspace=workspace,
        )

    with_teacher = seconds(lambda: loss((narrow, narrow_head)))
    alone = seconds(lambda: loss(None))
    numbers = len(narrow) * VOCABULARY
    rows = torch.zeros(4 * WIDTH, WIDTH, dtype=torch.int8, device=device)
    scales, buffer = torch.ones(4 * WIDTH, 1, device=device, dtype=kind), random(4 * WIDTH, WIDTH)
    parameter = torch.nn.Parameter(torch.zeros(4_000_000, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    source, target = torch.zeros(2, 16_000_000, device=device).unbind()
    return Rates(
        product_flops_per_second=product_rate,
        teacher_flops_per_second=product_rate,
        head_flops_per_second=head_rate,
        head_backward_flops_per_second=head_backward_rate,
        attention_flops_per_second=2.0 * 2 * CONTEXT**2 * WIDTH / attention,
        attention_backward=attention_backward / attention,
        norm_seconds=norm / channels.numel(),
        norm_backward_seconds=norm_backward / channels.numel(),
        gelu_seconds=gelu / inner.numel(),
        gelu_backward_seconds=gelu_backward / inner.numel(),
        logit_seconds=with_teacher / numbers,
        logit_alone_seconds=alone / numbers,
        dequantised_seconds=seconds(lambda: buffer.copy_(rows).mul_(scales)) / buffer.numel(),
        optimizer_seconds=seconds(optimizer.step) / parameter.numel(),
        bytes_per_second=2 * source.nbytes / seconds(lambda: target.copy_(source)),
        source="measured here",
    )


def typical_seconds(run: Callable[[], object], device: torch.device, most_seconds: float = MEASURE_SECONDS) -> float:
    """Median over the repetitions that a short while allows, after one that warms up.

    Not the fastest: a step is long enough for whatever slows a machine down now and then.
    """
    import torch

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    synchronise()
    took: list[float] = []
    while len(took) < FEWEST_REPETITIONS or (sum(took) < most_seconds and len(took) < MOST_REPETITIONS):
        start = time.perf_counter()
        run()
        synchronise()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


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
