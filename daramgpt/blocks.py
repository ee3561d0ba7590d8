"""The blocks of a transformer: where a model has them, and which of a teacher's a student's stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from daramgpt.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks of a transformers model, in order."""
    from torch import nn

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # Not what is listed inside a block.
    return max(stacks, key=len)


def states_of(output: Any) -> torch.Tensor:
    """What a block hands on, of its output, in which some releases of transformers put more."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def matching_blocks(num_student: int, num_teacher: int) -> list[int]:
    """Of each block of a student, the teacher's, from 1, up to which it stands for the teacher's blocks: evenly."""
    return [round(number * num_teacher / num_student) for number in range(1, num_student + 1)]


def block_pairs(asked: Sequence[tuple[int, int]] | None, num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Blocks of student and teacher, from 1, that a loss of hidden states compares.

    Args:
        asked: ``loss.hidden_blocks``; None = all of the student's, evenly.
        num_student, num_teacher: blocks of each.

    Raises:
        UserError: there is no such block.
    """
    if asked is None:
        # A teacher with fewer blocks has nothing behind its first one for the student's first ones.
        return [pair for pair in enumerate(matching_blocks(num_student, num_teacher), 1) if pair[1] > 0]
    for own, other in asked:
        if own > num_student or other > num_teacher:
            raise UserError(
                f"loss.hidden_blocks: there is no pair {own}, {other}: the student has {num_student} blocks, the "
                f"teacher {num_teacher}",
                "give pairs of blocks that are there, or leave it out",
            )
    return list(asked)
