"""Projections from the student's hidden states to the teacher's that begin where the two are closest.

With projections at random the loss of hidden states would first pull a student that begins near its teacher in random
directions. They are fitted by least squares on calibration text instead, each token by its direction: the loss sees no
length.

Legend of shapes: R rows, T tokens a row, N = R · T, D width of the teacher, d of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from daramgpt.blocks import blocks_of, states_of
from daramgpt.engine import PROJECTIONS
from daramgpt.initialisation.least_squares import fit

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from daramgpt.teacher import Teacher

RIDGE = 1e-3
ROWS_AT_ONCE = 4


@torch.no_grad()
def fit_projections(
    teacher: Teacher,
    student: GPT2LMHeadModel,
    input_ids: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
    tick: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Weights of the projections, by their names in a run's weights.

    Args:
        teacher, student: on the same device; the latter with the weights that it begins with.
        input_ids: [R, T] of calibration text, on that device.
        pairs: blocks of student and teacher, from 1, as from `daramgpt.blocks.block_pairs`.
        tick: called now and then, where it may raise.

    Returns:
        [D, d] weights and [D] biases, fp32, on the CPU.
    """
    found: dict[str, torch.Tensor] = {}
    # A pair at a time: the states of a wide teacher on all rows are hundreds of megabytes.
    for number, (own, other) in enumerate(pairs):
        mine: list[torch.Tensor] = []
        theirs: list[torch.Tensor] = []
        block = blocks_of(student)[own - 1]
        handle = block.register_forward_hook(lambda module, inputs, output, kept=mine: kept.append(states_of(output)))
        try:
            for rows in input_ids.split(ROWS_AT_ONCE):
                tick()
                student.transformer(rows, use_cache=False)
                theirs.append(teacher.states(rows, [other])[1][0].flatten(0, 1).float())
        finally:
            handle.remove()
        wanted = torch.cat(theirs)
        one = fit(torch.cat(mine).flatten(0, 1), wanted, 1 / wanted.square().mean(1).clamp(min=1e-12), RIDGE)
        found[f"{PROJECTIONS}projections.{number}.weight"] = one.weight.T.contiguous().cpu()
        found[f"{PROJECTIONS}projections.{number}.bias"] = one.bias.cpu()
    return found
