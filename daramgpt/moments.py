"""AdamW's two moments in fp32, from and to the 8-bit state of bitsandbytes' AdamW.

That optimizer keeps a moment as blocks of 256 numbers: a byte for each, its place in a table of 256 values from -1 to
1, and one fp32 scale for the block (Dettmers et al., arXiv 2110.02861). Checkpoints hold fp32 moments, so that they
are free of the optimizer's kind, of ranks and of ZeRO stages. The way back finds the scale from which the very same
fp32 values follow: the largest number of a block stands at one end of the table, and the ends are known. Quantising
anew would not do, because the table of signed values ends at 1 but begins at -0.993: a block whose largest number is
negative would shrink by 0.7 % at each restart. Where the blocks begin elsewhere than when the moments were saved
(other ranks, another ZeRO stage, another kind of optimizer), there is no such scale, and they are rounded.
"""

from __future__ import annotations

from typing import Any

import torch

# bitsandbytes' names of a moment's numbers, table and block scales, by the name that torch's AdamW has for it.
NAMES = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}
BLOCK_NUMBERS = 256
# Blocks at a time: temporaries stay within some 10 MB.
CHUNK_BLOCKS = 4096
# The scale is a quotient of rounded numbers, so it may be off by two units in the last place.
SCALE_STEPS = (0, 1, -1, 2, -2)


def expose(state: dict[str, Any]) -> None:
    """Add both moments in fp32, under torch's names, to the state of one tensor.

    They lie on the CPU: at the moment of saving, the device has no room for what 8 bits save there. A tensor that is
    too small for 8 bits has fp32 moments already, and these are shown themselves.
    """
    for name, (numbers, table, scales) in NAMES.items():
        value = state[numbers]
        if value.dtype == torch.uint8:
            flat = dequantise(value.flatten().cpu(), state[table].cpu(), state[scales].cpu())
            value = flat.view(value.shape)
        state[name] = value


def hide(state: dict[str, Any]) -> None:
    """Remove what `expose` added."""
    for name in NAMES:
        del state[name]


def absorb(state: dict[str, Any]) -> None:
    """Remove what `expose` added, after what was written into it has become the optimizer's own state."""
    for name, (numbers, table, scales) in NAMES.items():
        if state[numbers].dtype == torch.uint8:
            quantised, scale = quantise(state[name].flatten(), state[table].cpu())
            state[numbers].copy_(quantised.view(state[numbers].shape))
            state[scales].copy_(scale)
    hide(state)


def dequantise(numbers: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[n] bytes, [256] table and [blocks] scales → [n] fp32, rounded as the optimizer itself rounds."""
    values = torch.empty(numbers.shape, dtype=torch.float32)
    step = CHUNK_BLOCKS * BLOCK_NUMBERS
    for start in range(0, numbers.numel(), step):
        part = numbers[start : start + step]
        scale = scales[start // BLOCK_NUMBERS :][:CHUNK_BLOCKS].repeat_interleave(BLOCK_NUMBERS)
        values[start : start + step] = table[part.int()] * scale[: part.numel()]
    return values


def quantise(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] fp32 and [256] ascending table → [n] bytes and [blocks] scales.

    A block that `dequantise` gave comes back as one that it turns into the same values, to the bit; any other is
    rounded to the nearest of the table, its largest number as scale.
    """
    num_blocks = -(-values.numel() // BLOCK_NUMBERS)
    numbers = torch.empty(num_blocks * BLOCK_NUMBERS, dtype=torch.uint8)
    scales = torch.empty(num_blocks)
    step = CHUNK_BLOCKS * BLOCK_NUMBERS
    for start in range(0, values.numel(), step):
        part = values[start : start + step]
        padded = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK_NUMBERS)).view(-1, BLOCK_NUMBERS)
        quantised, scale = _quantise_blocks(padded, table)
        numbers[start : start + step] = quantised.flatten()
        scales[start // BLOCK_NUMBERS :][: len(scale)] = scale
    return numbers[: values.numel()], scales


def _quantise_blocks(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, 256] fp32 → [b, 256] bytes and [b] scales."""
    middles = (table[:-1] + table[1:]) / 2
    lowest, highest = values.aminmax(dim=1)
    largest = torch.maximum(-lowest, highest)
    # One below 1 the table has the mirror image of its lower end too, so in a tie the negative number decides. A
    # table without negative values begins at 0, and its blocks have no negative number.
    quotient = largest / torch.where((-lowest == largest) & (largest > 0), -table[0], table[-1])
    scales = torch.empty_like(largest)
    numbers = torch.empty(values.shape, dtype=torch.int32)
    unsolved = torch.arange(len(values))
    # Neighbouring floats are neighbouring integers.
    tries = [(quotient.view(torch.int32) + steps).clamp(min=0).view(torch.float32) for steps in SCALE_STEPS]
    # The largest number comes last: it is the scale of what has no exact one.
    for scale in (*tries, largest):
        scale_U1, values_UK = scale[unsolved, None], values[unsolved]
        nearest_UK = torch.bucketize(values_UK / torch.where(scale_U1 == 0, 1.0, scale_U1), middles, out_int32=True)
        scales[unsolved], numbers[unsolved] = scale_U1[:, 0], nearest_UK
        unsolved = unsolved[~(table[nearest_UK] * scale_U1 == values_UK).all(dim=1)]
        if not len(unsolved):
            break
    return numbers.to(torch.uint8), scales
