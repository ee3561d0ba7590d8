"""What this machine is, and the precision, configuration and torch release that suit it, each with its reason.

Everything follows from the compute capability and memory that ``nvidia-smi`` reports: torch is not asked, because
the answer decides which torch is installed, and because torch counts emulation as support (it says that a T4 has
bfloat16). Only the standard library is imported, so that a bare python3 can use this module.

Source: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from daramgpt.hardware.choices import (
    LLM_INT8_FROM,
    TEACHER_RULE,
    TEACHER_TOLERANCE,
    Choices,
    choose,
    dtype_fault,
    teacher_candidates,
)
from daramgpt.hardware.machine import GIB, Gpu, Machine, detect
from daramgpt.hardware.torch_release import (
    TORCH_FLOOR,
    TORCH_PIN,
    TORCH_PIN_OLD_GPUS,
    kernels_cover,
    parse_version,
    torch_fault,
)

__all__ = [
    "GIB",
    "LLM_INT8_FROM",
    "TEACHER_RULE",
    "TEACHER_TOLERANCE",
    "TORCH_FLOOR",
    "TORCH_PIN",
    "TORCH_PIN_OLD_GPUS",
    "Choices",
    "Gpu",
    "Machine",
    "choose",
    "detect",
    "dtype_fault",
    "kernels_cover",
    "parse_version",
    "teacher_candidates",
    "torch_fault",
]
