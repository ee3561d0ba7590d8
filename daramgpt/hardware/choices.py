"""The precision and configuration that suit a machine, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from daramgpt.hardware.machine import GIB, Machine
from daramgpt.hardware.torch_release import choose_torch

# Integer matrix products, which LLM.int8 needs.
LLM_INT8_FROM = (7, 5)
# A precision of the teacher may be this much slower than the fastest where it takes less memory.
TEACHER_TOLERANCE = 0.10
TEACHER_RULE = f"the smallest at most {TEACHER_TOLERANCE:.0%} slower than the fastest, of equals in size the most exact"


@dataclass(frozen=True, slots=True)
class Choices:
    """What suits a machine; a recipe may say otherwise. `reasons` has one entry a field.

    `teacher_precision` is what capability alone says: a plan measures it against the other `teacher_candidates`.
    """

    dtype: str
    teacher_precision: str
    ds_config: str
    torch_pin: str
    reasons: dict[str, str]


def choose(machine: Machine) -> Choices:
    """Precision of the student, precision of the teacher, ds_config and torch release for `machine`."""
    dtype, dtype_reason = _choose_dtype(machine)
    precision, precision_reason = _choose_teacher_precision(machine)
    ds_config, ds_config_reason = _choose_ds_config(machine, dtype)
    torch_pin, torch_reason = choose_torch(machine)
    return Choices(
        dtype,
        precision,
        ds_config,
        torch_pin,
        {
            "dtype": dtype_reason,
            "teacher_precision": precision_reason,
            "ds_config": ds_config_reason,
            "torch_pin": torch_reason,
        },
    )


def teacher_candidates(machine: Machine, dtype: str) -> tuple[str, ...]:
    """Precisions of a teacher that `machine` can run well beside a student trained in `dtype`.

    In order of preference: least memory first, of equal memory the most exact first. nf4 is not among them: a layer in
    it is off by 9 %, in int8 by 0.6 %, so it is for a teacher that does not fit otherwise.
    """
    capability = machine.capability
    unrounded = {dtype}
    if capability is None:
        return ("int8", *unrounded)
    if dtype == "fp32" and capability >= (7, 0):
        # There 16-bit products run at several times the rate of fp32.
        unrounded.add("bf16" if capability >= (8, 0) else "fp16")
    elif capability < (7, 0):
        # There fp32 products run at the same rate.
        unrounded.add("fp32")
    eight_bit = ("int8", "llm-int8") if capability >= LLM_INT8_FROM else ("int8",)
    return (*eight_bit, *sorted(unrounded, key="bf16 fp16 fp32".index))


def dtype_fault(machine: Machine, dtype: str) -> str | None:
    """Why `machine` should not train in `dtype` ("fp32", "fp16", "bf16"); None where it can."""
    capability = machine.capability
    if dtype == "fp32":
        return None
    if capability is None:
        return None if dtype == "bf16" else "a CPU has no fast fp16 arithmetic"
    needed = (8, 0) if dtype == "bf16" else (6, 0)
    if capability >= needed:
        return None
    return f"{dtype} needs compute capability {needed[0]}.{needed[1]}, this GPU has {capability[0]}.{capability[1]}"


def _choose_dtype(machine: Machine) -> tuple[str, str]:
    capability = machine.capability
    if capability is None:
        if machine.cpu_has_bf16:
            return "bf16", "this CPU has instructions for bf16 products (AMX or AVX512), far faster than its fp32"
        return "fp32", "this CPU has no AMX or AVX512-BF16 instructions: bf16 would be emulated, a hundred times slower"
    version = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= (8, 0):
        return "bf16", f"{version} has bf16 (from 8.0): the range of fp32, so no loss scale"
    if capability >= (7, 0):
        return "fp16", f"{version} has fp16 tensor cores and no bf16 (from 8.0); dynamic loss scale"
    if capability >= (6, 0):
        return "fp16", (
            f"{version}: fp16 is stored and products accumulate in fp32, at the fp32 rate; activations, dequantised "
            "teacher rows and logits take half the room and bandwidth of fp32; dynamic loss scale"
        )
    return "fp32", f"{version} has no fp16 arithmetic (from 6.0)"


def _choose_teacher_precision(machine: Machine) -> tuple[str, str]:
    why = "int8 rows dequantised into the product: a quarter of the fp32 memory, "
    capability = machine.capability
    if capability is None:
        return "int8", f"{why}and the product keeps the precision that this CPU is fast in"
    if capability < LLM_INT8_FROM:
        return "int8", f"{why}and LLM.int8 needs compute capability 7.5, this GPU has {capability[0]}.{capability[1]}"
    return "int8", f"{why}and activations stay exact, which LLM.int8 rounds too (KL to fp32 1.2e-5 against 2.2e-4)"


def _choose_ds_config(machine: Machine, dtype: str) -> tuple[str, str]:
    if not machine.gpus:
        name = "cpu-bf16" if dtype == "bf16" else "cpu"
        return name, f"no GPU: ZeRO-2 with the optimizer on the CPU, {dtype}"
    gibibytes = machine.gpu_memory_bytes / GIB
    memory = f"{gibibytes:.0f} GiB a GPU, {dtype}"
    if dtype == "fp32":
        return "cpu", f"{memory}: the fp32 configuration, optimizer on the CPU"
    if dtype == "fp16":
        if machine.capability is not None and machine.capability < (7, 0):
            return "p100-16gb", f"{memory}: the optimizer's state goes to the CPU, its memory to a larger micro-batch"
        return "t4x2-16gb", f"{memory}: gradients and optimizer split over {len(machine.gpus)} GPU(s), no offload"
    if gibibytes >= 70:
        return "h100-80gb", f"{memory}: everything fits, so nothing is moved off the GPU"
    if gibibytes >= 36:
        return "a100-40gb", f"{memory}: everything fits, so nothing is moved off the GPU"
    return "l4-24gb", f"{memory}: optimizer and gradients split over {len(machine.gpus)} GPU(s), small buckets"
