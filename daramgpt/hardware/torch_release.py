"""Which torch release suits a machine, and why one that is there does not serve it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from daramgpt.gpu_table import Capability
from daramgpt.hardware.machine import Machine

TORCH_FLOOR = (2, 7, 1)
TORCH_PIN = "2.13.0"
# The last release on the package index whose wheels hold kernels below TORCH_PIN_FROM.
TORCH_PIN_OLD_GPUS = "2.7.1"
TORCH_PIN_FROM = (7, 5)


def choose_torch(machine: Machine) -> tuple[str, str]:
    """The release to install, and the reason."""
    capability = machine.capability
    if capability is not None and capability < TORCH_PIN_FROM:
        version = f"{capability[0]}.{capability[1]}"
        return TORCH_PIN_OLD_GPUS, f"compute capability {version}: the last release on the index with its kernels"
    if capability is None:
        return TORCH_PIN, "no GPU: the release this project is tested with"
    return TORCH_PIN, f"compute capability {capability[0]}.{capability[1]}: the release this project is tested with"


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
