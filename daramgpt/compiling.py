"""torch.compile where a recipe asks for it: the check that it works here, and the blocks of teacher and student.

What is done beside matrix products is fused, products are left as they are. The loss's own arithmetic is in
`daramgpt.losses.compiled`; it gains most. Each block is compiled by itself: they are alike, so one compilation serves
all, and a DeepSpeed hook or a quantised layer that the compiler cannot follow breaks one graph, not the model. Off
unless the recipe says so, for it changes rounding, takes up to a minute at every start, and needs Triton or a C++
compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from daramgpt.blocks import blocks_of
from daramgpt.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# What Triton has kernels for.
CAPABILITY_FLOOR = (7, 0)


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of a transformers model in place, at its first forward pass.

    Raises:
        UserError: the device or the machine cannot.
    """
    check()
    for block in blocks_of(model):
        block.compile(dynamic=False)


def check() -> None:
    """See that torch.compile works here, by a function of one operation.

    Raises:
        UserError: it does not.
    """
    import torch

    mend = "--set engine.compile=none"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < CAPABILITY_FLOOR:
        floor = ".".join(map(str, CAPABILITY_FLOOR))
        raise UserError(
            f"engine.compile: this GPU has compute capability {capability[0]}.{capability[1]}, below {floor}", mend
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(torch.nn.functional.gelu, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of Triton, or of loading what they built
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"engine.compile: torch.compile does not work here: {reason}",
            f"install a C++ compiler or Triton, or {mend}",
        ) from None
