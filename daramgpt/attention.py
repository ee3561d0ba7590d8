"""Attention within documents: which tokens of a row see each other, and which position each of them has.

The stream that rows are cut from is EOS, text, EOS, text..., so an EOS among the inputs begins a document: it stands at
position 0, where a text alone would have its mark of the beginning. What a row holds before its first EOS is the rest
of a document that began in an earlier row; it counts from position 0 as well, as nothing before it is seen.

The mask is additive and made once for a micro-batch and dtype: torch's attention kernels would turn a boolean one into
this in every block again, and keep each copy for the backward pass. Attention across documents needs none of this:
without a mask transformers lets the kernel itself be causal.

Legend of shapes: B rows, T tokens a row.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def document_numbers(input_ids_BT: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Number of each token's document within its row, [B, T] int64; 0 is the one that began before the row."""
    return (input_ids_BT == eos_token_id).cumsum(dim=1)


def document_positions(input_ids_BT: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Position of each token within its document, or within the part of it that the row holds, [B, T] int64."""
    import torch

    places_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    starts_BT = torch.where(input_ids_BT == eos_token_id, places_T, 0).cummax(dim=1).values
    return places_T - starts_BT


def document_mask(numbers_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores: 0 for tokens of the same document up to the token itself, else the lowest.

    Returns:
        [B, 1, T, T] of `dtype`, queries before keys; the same for all heads.
    """
    import torch

    hidden_BTT = (numbers_BT[:, :, None] == numbers_BT[:, None, :]).tril_().logical_not_()
    mask_BTT = torch.zeros(hidden_BTT.shape, dtype=dtype, device=numbers_BT.device)
    # Not -inf: a kernel that goes through the keys in blocks would meet blocks of nothing else, whose softmax is NaN.
    return mask_BTT.masked_fill_(hidden_BTT, torch.finfo(dtype).min).unsqueeze(1)


class Documents:
    """The documents of one micro-batch, shared by all models that see it.

    Args:
        input_ids_BT: [B, T], on the device where the models are.
        eos_token_id: begins a document.
    """

    def __init__(self, input_ids_BT: torch.Tensor, eos_token_id: int) -> None:
        self._input_ids_BT, self._eos_token_id = input_ids_BT, eos_token_id
        self._masks: dict[torch.dtype, torch.Tensor] = {}

    @cached_property
    def positions(self) -> torch.Tensor:
        """[B, T] int64, see `document_positions`."""
        return document_positions(self._input_ids_BT, self._eos_token_id)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[B, 1, T, T], see `document_mask`; `dtype` is that of the activations."""
        if dtype not in self._masks:
            self._masks[dtype] = document_mask(document_numbers(self._input_ids_BT, self._eos_token_id), dtype)
        return self._masks[dtype]

    def model_inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Keyword arguments of a transformers model, beside the ids."""
        return {"attention_mask": self.mask(dtype), "position_ids": self.positions}
