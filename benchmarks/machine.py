"""What measurements share: machine, versions, peak memory, output.

torch is imported where memory of a GPU is read and nowhere else: a process that watches others may have to do without.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import hardware
from daramgpt.run_directory import write_atomically

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed", "bitsandbytes", "daramgpt", "trl", "liger-kernel")
# What a side of a comparison is started with, as launch.sh starts a training. glibc hands large tensors back to the
# kernel after each use unless told otherwise, and their pages are faulted in anew: a training step on a CPU then takes
# up to three times as long.
SIDE_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "34359738368",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_MMAP_MAX_": "0",
}


def describe_machine() -> dict[str, Any]:
    """``hardware`` of a result: processor, cores, memory, GPUs."""
    machine = hardware.detect()
    return {
        "summary": machine.describe(),
        "processor": _processor(),
        "num_cores": machine.num_cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [gpu.name for gpu in machine.gpus],
    }


def versions() -> dict[str, str]:
    """``versions`` of a result; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class PeakMemory:
    """Most memory that this process held on a device since `restart`, less what it held at `start`.

    On a CPU that is resident memory, so start it after the imports; on a GPU what torch allocated there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before_bytes = 0

    def start(self) -> None:
        """What is held now does not count."""
        if self._device.type == "cpu":
            self._before_bytes = _status_bytes("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far, such as that of loading a model; where the kernel forbids it, it stays."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            return
        # proc(5): 5 resets the peak of the resident set to its current size.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read_bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") - self._before_bytes


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """The result with ``hardware`` and ``versions`` as indented JSON; nowhere when `path` is None."""
    if path is not None:
        complete = {"hardware": describe_machine(), "versions": versions(), **result}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(complete, indent=1, ensure_ascii=False) + "\n")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def format_cell(value: float | None, form: str, unit: str = "") -> str:
    """A figure of a table; a dash where it was not measured."""
    return "-" if value is None else format(value, form) + unit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _status_bytes(key: str) -> int:
    """A field of /proc/self/status, which gives KiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {key}")
