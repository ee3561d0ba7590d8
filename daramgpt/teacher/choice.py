"""Which precision a teacher is held in where the recipe says ``auto``: a rule over a short measurement.

A quantised layer pays for its memory with time: the rows are dequantised before every product, a share of it that
falls with the tokens of a forward pass and rises with the device's rate. So each candidate's real modules are timed on
an MLP of the teacher's own width, with the activation that some of them apply on the way, at the tokens of a
micro-batch, and the smallest that costs hardly any time is taken: the memory it frees is the micro-batch's. The plan
freezes the answer, so a run measures once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from daramgpt.errors import UserError
from daramgpt.hardware import TEACHER_RULE, TEACHER_TOLERANCE
from daramgpt.teacher import DTYPES, QUANTISED, eight_bit_linear
from daramgpt.teacher.activations import join_products
from daramgpt.teacher.quantised import four_bit_linear, weight_bytes

# Of a measurement: more would cost seconds, and the shares hardly change.
MOST_TOKENS = {"cpu": 4096, "cuda": 8192}
MEASURE_SECONDS = 2.0
FEWEST_ROUNDS, MOST_ROUNDS = 2, 20
# Activations of trained models have a few columns beyond LLM.int8's threshold, which it multiplies in 16 bits;
# without any it would look faster than it is.
OUTLIER_COLUMN_STEP, OUTLIER_FACTOR = 1024, 20.0


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate's MLP, measured: seconds of a forward pass at best, and bytes of weights and scales."""

    seconds: float
    weight_bytes: int


def choose(
    candidates: Sequence[str],
    *,
    width: int,
    num_tokens: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    left_out: Mapping[str, str],
) -> tuple[str, str]:
    """Measure `candidates` and choose: the precision, and why, with the figures and what was wrong with the others.

    Args:
        candidates: in order of preference, as from `daramgpt.hardware.teacher_candidates`.
        width: of the teacher's residual stream.
        num_tokens: of a forward pass.
        compute_dtype: of a quantised candidate's activations.
        device: that the teacher will run on.
        left_out: what was no candidate, and why.

    Raises:
        UserError: none of the candidates works on the device.
    """
    trials, failures = measure(
        candidates, layer_shape(width, device), num_tokens=num_tokens, compute_dtype=compute_dtype, device=device
    )
    if not trials:
        raise UserError(
            f"teacher.precision: {'; '.join(f'{name} fails ({why})' for name, why in failures.items())}",
            "see what python -m daramgpt doctor says",
        )
    chosen, verdicts = decide(trials)
    verdicts |= {name: f"fails here ({why})" for name, why in failures.items()} | dict(left_out)
    times = ", ".join(f"{name} {trial.seconds * 1e3:.3g} ms" for name, trial in trials.items())
    rows, columns = layer_shape(width, device)
    reason = f"measured: {times} for {num_tokens:,} tokens through an MLP of {columns} x {rows}; {TEACHER_RULE}"
    return chosen, "; ".join([reason, *(f"{name} {verdict}" for name, verdict in verdicts.items())])


def decide(trials: Mapping[str, Trial]) -> tuple[str, dict[str, str]]:
    """The first of `trials` (in order of preference) that is fast enough, and what is wrong with the others."""
    fastest = min(trials, key=lambda name: trials[name].seconds)
    slowdowns = {name: trial.seconds / trials[fastest].seconds - 1 for name, trial in trials.items()}
    chosen = next(name for name in trials if slowdowns[name] <= TEACHER_TOLERANCE)
    verdicts = {}
    for name, trial in trials.items():
        ratio = trial.weight_bytes / trials[chosen].weight_bytes
        if name == chosen:
            continue
        if slowdowns[name] > TEACHER_TOLERANCE:
            verdicts[name] = f"is {slowdowns[name]:.0%} slower than {fastest}"
        elif ratio > 1.05:
            verdicts[name] = f"takes {ratio:.1f} times the memory"
        else:
            verdicts[name] = "takes as much memory and is less exact"
    return chosen, verdicts


def measure(
    candidates: Sequence[str],
    shape: tuple[int, int],
    *,
    num_tokens: int,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, Trial], dict[str, str]]:
    """Time a forward pass of an MLP in every precision, in turns, so that all meet the same noise.

    Args:
        candidates: precisions.
        shape: [out, in] of its first layer; the second leads back.
        num_tokens, compute_dtype, device: as of `choose`.

    Returns:
        What was measured, in the order of `candidates`, and why the others did not work.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    inputs = torch.randn(num_tokens, shape[1], generator=generator)
    inputs[:, ::OUTLIER_COLUMN_STEP] *= OUTLIER_FACTOR
    inputs = inputs.to(device, compute_dtype)
    layers: dict[str, nn.Module] = {}
    failures: dict[str, str] = {}
    for name in candidates:
        try:
            layers[name] = TrialMlp(name, weight, compute_dtype, device)
            # The first pass makes buffers and finds kernels; it does not count.
            _forward_seconds(layers[name], inputs.to(DTYPES.get(name, compute_dtype)))
        except Exception as error:  # a broken native library raises whatever it likes
            layers.pop(name, None)
            failures[name] = first_line(error)
    best = dict.fromkeys(layers, float("inf"))
    deadline, rounds = time.perf_counter() + MEASURE_SECONDS, 0
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < deadline):
        for name, layer in layers.items():
            best[name] = min(best[name], _forward_seconds(layer, inputs.to(DTYPES.get(name, compute_dtype))))
        rounds += 1
    return {name: Trial(best[name], weight_bytes(layer)) for name, layer in layers.items()}, failures


def layer_shape(width: int, device: torch.device) -> tuple[int, int]:
    """[out, in] of the first layer that is timed.

    On a GPU it widens four times, as in the teacher. On a CPU it does not, a quarter of the time: products, activations
    and dequantised rows are to each other as in the whole.
    """
    return (width if device.type == "cpu" else 4 * width, width)


class TrialMlp(nn.Module):
    """Two frozen layers and a GELU, as a teacher of `precision` computes them on `device`; no biases but zeros.

    Args:
        precision: of both layers.
        weight: [out, in] of the first, fp32 and on the CPU; the second is its transpose.
        compute_dtype: of a quantised precision's activations.
        device: that computes.
    """

    def __init__(self, precision: str, weight: torch.Tensor, compute_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        widened, width = weight.shape
        self.c_fc = trial_layer(precision, weight, torch.zeros(widened), compute_dtype, device)
        self.act: nn.Module = nn.GELU(approximate="tanh")
        self.c_proj = trial_layer(precision, weight.T.contiguous(), torch.zeros(width), compute_dtype, device)
        if precision == "int8" and device.type == "cpu":
            join_products(self, type(self.c_fc), compute_dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, in] → [N, in]."""
        return self.c_proj(self.act(self.c_fc(inputs)))


def trial_layer(
    precision: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """A frozen layer over `weight` [out, in], fp32 and on the CPU, as a teacher of `precision` holds it on `device`."""
    dtype = DTYPES.get(precision, compute_dtype)
    bias = None if bias is None else bias.to(dtype)
    if precision in DTYPES:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(device, dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(device))
        return layer.requires_grad_(False)
    assert precision in QUANTISED, precision
    _import_bitsandbytes()
    if precision == "nf4":
        return four_bit_linear(weight, bias, compute_dtype, device)
    return eight_bit_linear(weight, bias, precision, device)


def first_line(error: Exception) -> str:
    """What an exception says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@torch.no_grad()
def _forward_seconds(layer: nn.Module, inputs: torch.Tensor) -> float:
    is_cuda = inputs.device.type == "cuda"
    # Queued, as a model's layers are, so that a launch hides behind the product before.
    num_calls = 10 if is_cuda else 1
    if is_cuda:
        torch.cuda.synchronize(inputs.device)
    start = time.perf_counter()
    for _ in range(num_calls):
        layer(inputs)
    if is_cuda:
        torch.cuda.synchronize(inputs.device)
    return (time.perf_counter() - start) / num_calls


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without torch's compiler, which nothing here uses and whose import takes 3 s of a core.

    bitsandbytes hands a few fallbacks to ``torch.compile``, and torch keeps the compiler off each kernel that is
    registered with it: either imports it.
    """
    if "bitsandbytes" in sys.modules:
        return
    replaced = {name: getattr(torch, name) for name in ("compile", "_disable_dynamo") if hasattr(torch, name)}
    for name in replaced:
        setattr(torch, name, lambda function=None, *_, **__: function or (lambda wrapped: wrapped))
    try:
        import bitsandbytes  # noqa: F401
    finally:
        for name, function in replaced.items():
            setattr(torch, name, function)
