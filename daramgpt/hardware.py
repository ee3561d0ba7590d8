"""What this machine is, and the precision, configuration and torch release that suit it, each with its reason.

Everything follows from the compute capability and memory that ``nvidia-smi`` reports: torch is not asked, because
the answer decides which torch is installed, and because torch counts emulation as support (it says that a T4 has
bfloat16). Only the standard library is imported, so that a bare python3 can use this module.

Source: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daramgpt.gpu_table import Capability, rates

GIB = 2**30
TORCH_FLOOR = (2, 7, 1)
TORCH_PIN = "2.13.0"
# The last release on the package index whose wheels hold kernels below TORCH_PIN_FROM.
TORCH_PIN_OLD_GPUS = "2.7.1"
TORCH_PIN_FROM = (7, 5)
# Integer matrix products, which LLM.int8 needs.
LLM_INT8_FROM = (7, 5)
# As Linux names them.
CPU_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
# A precision of the teacher may be this much slower than the fastest where it takes less memory.
TEACHER_TOLERANCE = 0.10
TEACHER_RULE = f"the smallest at most {TEACHER_TOLERANCE:.0%} slower than the fastest, of equals in size the most exact"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as nvidia-smi names it."""

    name: str
    memory_bytes: int
    capability: Capability


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPUs, cores and memory that this process may use.

    Attributes:
        cpu_has_bf16: the cores have instructions for bf16 products, at two or more times the fp32 rate.
    """

    gpus: tuple[Gpu, ...]
    num_cores: int
    memory_bytes: int
    cpu_has_bf16: bool = False

    @property
    def device(self) -> str:
        """``"cuda"`` or ``"cpu"``."""
        return "cuda" if self.gpus else "cpu"

    @property
    def capability(self) -> Capability | None:
        """The lowest among the GPUs, because every rank runs the same program; None without a GPU."""
        return min((gpu.capability for gpu in self.gpus), default=None)

    @property
    def gpu_memory_bytes(self) -> int:
        """Of the smallest GPU; 0 without one."""
        return min((gpu.memory_bytes for gpu in self.gpus), default=0)

    def describe(self) -> str:
        """One line: GPUs with memory and capability, cores, memory."""
        kinds: dict[str, int] = {}
        for gpu in self.gpus:
            major, minor = gpu.capability
            text = f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, compute capability {major}.{minor}"
            kinds[text] = kinds.get(text, 0) + 1
        parts = [f"{count} x {text}" if count > 1 else text for text, count in kinds.items()] or ["no GPU"]
        return "; ".join([*parts, f"{self.num_cores} cores, {self.memory_bytes / GIB:.0f} GiB memory"])


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


def detect() -> Machine:
    """This machine; no GPU where nvidia-smi is absent or fails. ``CUDA_VISIBLE_DEVICES`` is honoured."""
    gpus = _parse_gpus(_nvidia_smi("name,memory.total,compute_cap") or _nvidia_smi("name,memory.total"))
    visible = _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(visible, _num_cores(), _memory_bytes(), _cpu_has_bf16())


def choose(machine: Machine) -> Choices:
    """Precision of the student, precision of the teacher, ds_config and torch release for `machine`."""
    dtype, dtype_reason = _choose_dtype(machine)
    precision, precision_reason = _choose_teacher_precision(machine)
    ds_config, ds_config_reason = _choose_ds_config(machine, dtype)
    torch_pin, torch_reason = _choose_torch(machine)
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


def kernels_cover(arch_list: Sequence[str], capability: Capability) -> bool:
    """Whether a torch built for `arch_list` (``torch.cuda.get_arch_list()``) runs on a device of `capability`.

    Machine code (``sm_XY``) runs on the same major version from minor Y up; ``sm_90a`` on exactly its own version;
    PTX (``compute_XY``) is compiled by the driver for anything from XY up.
    """
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
        if not match:
            continue
        kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        if suffix == "a":
            covered = capability == built
        elif kind == "sm" or suffix:
            covered = capability[0] == built[0] and capability >= built
        else:
            covered = capability >= built
        if covered:
            return True
    return False


def torch_fault(machine: Machine) -> str | None:
    """Why the torch that this Python imports does not serve `machine`; None where it does. Imports torch."""
    try:
        import torch
    except Exception as error:  # a torch with missing libraries fails in many ways
        return f"torch does not import: {type(error).__name__}: {error}"
    version = torch.__version__
    if parse_version(version) < TORCH_FLOOR:
        return f"torch {version} is older than {'.'.join(map(str, TORCH_FLOOR))}"
    if machine.gpus:
        arch_list = torch.cuda.get_arch_list()
        if torch.version.cuda is None:
            return f"torch {version} is built without CUDA"
        if not torch.cuda.is_available():
            return f"torch {version} (CUDA {torch.version.cuda}) cannot use the driver of this machine"
        for gpu in machine.gpus:
            if not kernels_cover(arch_list, gpu.capability):
                arch = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
                return f"torch {version} has no {arch} kernels for the {gpu.name} (it has {' '.join(arch_list)})"
    return None


def parse_version(text: str) -> tuple[int, ...]:
    """``"2.10.0+cu128"`` as ``(2, 10, 0)``."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


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


def _choose_torch(machine: Machine) -> tuple[str, str]:
    capability = machine.capability
    if capability is not None and capability < TORCH_PIN_FROM:
        version = f"{capability[0]}.{capability[1]}"
        return TORCH_PIN_OLD_GPUS, f"compute capability {version}: the last release on the index with its kernels"
    if capability is None:
        return TORCH_PIN, "no GPU: the release this project is tested with"
    return TORCH_PIN, f"compute capability {capability[0]}.{capability[1]}: the release this project is tested with"


def _nvidia_smi(fields: str) -> str:
    """Output of one query; empty where nvidia-smi is absent, fails (also for a field it is too old for) or hangs."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _parse_gpus(output: str) -> tuple[Gpu, ...]:
    """GPUs from ``name, 15360 MiB, 7.5`` lines; what a line leaves out is taken from `gpu_table`."""
    gpus = []
    for row in csv.reader(output.splitlines(), skipinitialspace=True):
        name, known = row[0].strip() if row else "", rates(row[0]) if row else None
        memory = re.fullmatch(r"(\d+)\s*MiB", row[1].strip()) if len(row) > 1 else None
        version = re.fullmatch(r"(\d+)\.(\d+)", row[2].strip()) if len(row) > 2 else None
        capability = (int(version[1]), int(version[2])) if version else known.capability if known else None
        if capability is None:
            continue
        memory_bytes = int(memory[1]) * 2**20 if memory else known.memory_gigabytes * 10**9 if known else 0
        gpus.append(Gpu(name, memory_bytes, capability))
    return tuple(gpus)


def _visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves; as CUDA does, the list ends at the first index out of range."""
    if setting is None:
        return gpus
    chosen: list[Gpu] = []
    for position, part in enumerate(part.strip() for part in setting.split(",")):
        if re.fullmatch(r"\d+", part) and int(part) < len(gpus):
            chosen.append(gpus[int(part)])
        elif re.match(r"(GPU|MIG)-", part) and gpus:
            chosen.append(gpus[min(position, len(gpus) - 1)])
        else:
            break
    return tuple(chosen)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_has_bf16() -> bool:
    """Whether an x86 processor lists AMX or AVX512 instructions for bf16 products."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not CPU_BF16_FLAGS.isdisjoint(flags[1].split())


def _memory_bytes() -> int:
    """Physical memory, or the limit of the container where that is lower."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            sizes.append(int(text))
    return min(sizes)
