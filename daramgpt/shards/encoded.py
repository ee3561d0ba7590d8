"""Units as tokens, with the bytes of text that each stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Encoded:
    """Units of a text, or of several, as tokens.

    Attributes:
        token_ids: [tokens]
        unit_tokens: [units], how many of them each unit has.
        text_bytes: [units], UTF-8 bytes with the separator.
        unit_bytes: [units], the same without it.
        unknown_bytes: [units], those of them that became unknown tokens.
    """

    token_ids: NDArray[np.unsignedinteger[Any]]
    unit_tokens: NDArray[np.uint32]
    text_bytes: NDArray[np.uint32]
    unit_bytes: NDArray[np.uint32]
    unknown_bytes: NDArray[np.uint32]

    @property
    def num_bytes(self) -> int:
        """Of all units, without separators."""
        return int(self.unit_bytes.sum(dtype=np.int64))

    def units(self, start: int, end: int, first_token: int, end_token: int) -> Encoded:
        """Some of the units, and the tokens that are theirs."""
        return Encoded(
            self.token_ids[first_token:end_token],
            self.unit_tokens[start:end],
            self.text_bytes[start:end],
            self.unit_bytes[start:end],
            self.unknown_bytes[start:end],
        )

    def copy(self) -> Encoded:
        """The same in memory of its own: a part of a block holds on to all of it."""
        return Encoded(
            self.token_ids.copy(),
            self.unit_tokens.copy(),
            self.text_bytes.copy(),
            self.unit_bytes.copy(),
            self.unknown_bytes.copy(),
        )

    def first(self, num_units: int) -> Encoded:
        """The units before `num_units`."""
        return self.units(0, num_units, 0, int(self.unit_tokens[:num_units].sum()))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
