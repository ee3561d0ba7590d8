"""What a GPT-2 teacher's residual stream holds on calibration text, one block after the other.

Legend of shapes: R rows, T tokens a row, N = R · T, D the teacher's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

ROWS_AT_ONCE = 4


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


@torch.no_grad()
def walk(model: Any, input_ids: torch.Tensor) -> Iterator[BlockStates]:
    """States of every block in order; only those of one are there at a time.

    Args:
        model: a GPT-2 with its head, fp32.
        input_ids: [R, T], on its device.
    """
    transformer = model.transformer
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = transformer.wte(input_ids) + transformer.wpe(positions)
    for block in transformer.h:
        middles: list[torch.Tensor] = []
        handle = block.ln_2.register_forward_pre_hook(lambda module, inputs: middles.append(inputs[0]))  # noqa: B023
        try:
            after = [_output(block(rows)) for rows in hidden.split(ROWS_AT_ONCE)]
        finally:
            handle.remove()
        before, hidden = hidden, torch.cat(after)
        yield BlockStates(block, *(centred(states).flatten(0, 1) for states in (before, torch.cat(middles), hidden)))


def _output(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
