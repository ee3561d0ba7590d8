"""What the device computes, found out by trying: a product, and a small layer in every precision of the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from daramgpt import hardware
from daramgpt.doctor.finding import Check, Status, pip_install
from daramgpt.doctor.libraries import KNOWN_VERSIONS
from daramgpt.hardware import LLM_INT8_FROM, Machine

if TYPE_CHECKING:
    import torch

# Relative to an fp32 product on the CPU; several times what each is off by where it works.
LARGEST_ERROR = {"fp32": 0.005, "fp16": 0.01, "bf16": 0.02, "int8": 0.05, "llm-int8": 0.05, "nf4": 0.2}


def kernel(machine: Machine) -> Check:
    """A product on every device, in the precision the machine would train in, against fp32 on the CPU."""
    import torch

    name = hardware.choose(machine).dtype
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator) for _ in range(2))
    devices = [f"cuda:{index}" for index in range(len(machine.gpus))] or ["cpu"]
    for device in devices:
        try:
            product = (left.to(device, dtype) @ right.to(device, dtype)).float().cpu()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return Check("kernel", "blocked", f"a product on {device} fails: {reason}; {_reinstall_torch(machine)}")
        error_size = ((product - left @ right).norm() / (left @ right).norm()).item()
        if not error_size < 0.02:
            return Check("kernel", "blocked", f"a {name} product on {device} is wrong; {_reinstall_torch(machine)}")
    return Check("kernel", "ok", f"{name} product on {', '.join(devices)}")


def precisions(machine: Machine, dtype: str, alternatives: Sequence[str]) -> Iterator[Check]:
    """A small layer in each precision; one that does not work is a warning.

    Args:
        machine: on whose first GPU, or CPU, the layers are tried.
        dtype: of the run.
        alternatives: precisions of which the run needs one; where none works, the run is blocked.
    """
    faults, worked = {}, {}
    too_old = machine.capability is not None and machine.capability < LLM_INT8_FROM
    for name, largest in LARGEST_ERROR.items():
        if name == "llm-int8" and too_old:
            continue
        try:
            error_size = _layer_error(name, dtype, machine.device)
        except Exception as error:  # a broken native library raises whatever it likes
            faults[name] = f"fails: {next(iter(str(error).splitlines()), type(error).__name__)}"
            continue
        if error_size < largest:
            worked[name] = error_size
        else:
            faults[name] = f"is off from fp32 by {error_size:.0%}"
    is_blocked = bool(alternatives) and not any(name in worked for name in alternatives)
    for name, fault in faults.items():
        status: Status = "blocked" if is_blocked and name in alternatives else "warn"
        yield Check("precisions", status, f"a layer in {name} {fault}; {_mend(name, machine, worked, status)}")
    errors = ", ".join(f"{name} {error_size:.2g}" for name, error_size in worked.items())
    skipped = f"; llm-int8 not tried, it needs compute capability {'.'.join(map(str, LLM_INT8_FROM))}" * too_old
    if worked:
        yield Check("precisions", "ok", f"a small layer's relative error: {errors}{skipped}")


def _layer_error(precision: str, dtype: str, device_name: str) -> float:
    """Of a layer's output, relative to an fp32 product on the CPU."""
    import torch

    from daramgpt.teacher import DTYPES, choice

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    inputs = torch.randn(4, 64, generator=generator)
    device = torch.device(device_name)
    layer = choice.trial_layer(precision, weight, None, DTYPES[dtype], device)
    with torch.no_grad():
        output = layer(inputs.to(device, DTYPES[precision if precision in DTYPES else dtype]))
    return _relative_error(output, inputs @ weight.T)


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float().cpu() - expected).norm() / expected.norm())


def _mend(name: str, machine: Machine, worked: dict[str, float], status: str) -> str:
    if name in ("fp32", "fp16", "bf16"):
        mend = _reinstall_torch(machine)
    else:
        known = KNOWN_VERSIONS["bitsandbytes"][0]
        mend = pip_install("--force-reinstall", "--no-deps", f"bitsandbytes=={known}")
    if status == "blocked" and worked:
        return f"{mend}, or --set teacher.precision={'int8' if 'int8' in worked else next(iter(worked))}"
    return mend


def _reinstall_torch(machine: Machine) -> str:
    return pip_install("--force-reinstall", f"torch=={hardware.choose(machine).torch_pin}")
