"""The GPUs, cores and memory of this machine, as ``nvidia-smi``, the kernel and the container's limits report them."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from daramgpt.gpu_table import Capability, rates

GIB = 2**30
# As Linux names them.
CPU_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


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

    @property
    def kind(self) -> str:
        """What a plan was made for, such as ``"Tesla T4, 15 GiB"`` or ``"CPU, 2 cores"``; not how many GPUs."""
        kinds = sorted({f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB" for gpu in self.gpus})
        return " and ".join(kinds) or f"CPU, {self.num_cores} cores"


def detect() -> Machine:
    """This machine; no GPU where nvidia-smi is absent or fails. ``CUDA_VISIBLE_DEVICES`` is honoured."""
    gpus = _parse_gpus(_nvidia_smi("name,memory.total,compute_cap") or _nvidia_smi("name,memory.total"))
    visible = _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(visible, _num_cores(), _memory_bytes(), _cpu_has_bf16())


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
