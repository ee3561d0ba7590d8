"""Out of memory in a step: which errors say so, and whether all ranks have left the step."""

from __future__ import annotations

import torch


class StepOutOfMemoryError(Exception):
    """A step that did not fit; says what the allocator said.

    Raised in place of the allocator's error, because the tensors of the failed pass live as long as its traceback.

    Args:
        reason: what the allocator said.
        is_shared: every rank raises it, with no collective begun that another rank waits in; else only this one has
            left the step.
    """

    def __init__(self, reason: str, is_shared: bool) -> None:
        super().__init__(reason)
        self.is_shared = is_shared


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of a CPU whose system refuses more."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
