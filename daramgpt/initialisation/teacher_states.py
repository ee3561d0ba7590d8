"""What a GPT-2 teacher's residual stream holds on calibration text, one block after the other.

Legend of shapes: R rows, T tokens a row, N = R · T, D the teacher's width, d the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from daramgpt.blocks import states_of
from daramgpt.initialisation.least_squares import Fit, fit

ROWS_AT_ONCE = 4
_INPUT_RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class BlockStates:
    """Of one block; what is added to all channels of a token alike is left out, for no norm sees it.

    Attributes:
        block: the block itself.
        before, between, after: [N, D] in front of the attention, of the MLP, and behind both.
    """

    block: Any
    before: torch.Tensor
    between: torch.Tensor
    after: torch.Tensor


def centred(states: torch.Tensor) -> torch.Tensor:
    """Without each row's mean."""
    return states - states.mean(-1, keepdim=True)


def read_by(inputs: torch.Tensor, normed: torch.Tensor, sample_weights: torch.Tensor) -> Fit:
    """What a part of a block of the teacher reads, found in the student's stream.

    Args:
        inputs: [N, D], the teacher's stream behind the part's norm.
        normed: [N, d], the student's behind its own.
        sample_weights: [N]
    """
    return fit(normed, inputs, sample_weights, _INPUT_RIDGE)


def _nothing() -> None:
    pass


@torch.no_grad()
def walk(model: Any, input_ids: torch.Tensor, tick: Callable[[], None] = _nothing) -> Iterator[BlockStates]:
    """States of every block in order; only those of one are there at a time.

    Args:
        model: a GPT-2 with its head, fp32.
        input_ids: [R, T], on its device.
        tick: called once every few rows and block.
    """
    transformer = model.transformer
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = transformer.wte(input_ids) + transformer.wpe(positions)
    before = centred(hidden).flatten(0, 1)
    for block in transformer.h:
        middles: list[torch.Tensor] = []
        handle = block.ln_2.register_forward_pre_hook(lambda module, inputs: middles.append(centred(inputs[0])))  # noqa: B023
        try:
            for first in range(0, len(hidden), ROWS_AT_ONCE):
                tick()
                rows = hidden[first : first + ROWS_AT_ONCE]
                # In its own place: many rows of a wide teacher are gigabytes.
                rows.copy_(states_of(block(rows)))
        finally:
            handle.remove()
        after = centred(hidden).flatten(0, 1)
        yield BlockStates(block, before, torch.cat(middles).flatten(0, 1), after)
        before = after
