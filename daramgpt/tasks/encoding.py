"""Rows of a task as token ids.

Each text begins with the token that ends one, for so each text begins in the rows that the student was trained on; an
empty text is that token alone. What is too long loses tokens where the task can spare them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from daramgpt.pace import Pace
from daramgpt.tasks.data import Example, Spare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that are tokenised between two looks at the clock.
CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of each text of a row, and its label."""

    ids: tuple[list[int], ...]
    label: int

    @property
    def num_tokens(self) -> int:
        """Of all its texts."""
        return sum(map(len, self.ids))


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_tokens: int, pace: Pace
) -> list[Encoded]:
    """Token ids of examples, in their order.

    Args:
        tokenizer: a fast one; its token that ends a text begins each.
        max_tokens: of a text, the first token counted.
        pace: is advanced by one an example.
    """
    encoded = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        texts = [text for example in chunk for text in example.texts]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for example in chunk:
            found = tuple(
                [tokenizer.eos_token_id, *_cut(tokenizer, text, next(ids), example.spare, max_tokens - 1)]
                for text in example.texts
            )
            encoded.append(Encoded(found, example.label))
        pace.advance(len(chunk))
    return encoded


def _cut(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spare: tuple[Spare, ...], room: int
) -> list[int]:
    """At most `room` of the ids: what is spared goes first, then what is left of the beginning."""
    excess = len(ids) - room
    if excess <= 0:
        return ids
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    dropped: set[int] = set()
    for span in spare:
        inside = [
            place for place, (start, end) in enumerate(offsets) if span.start <= start and start < end <= span.end
        ]
        dropped.update(inside[::-1][:excess] if span.from_end else inside[:excess])
        excess = len(ids) - room - len(dropped)
        if not excess:
            break
    return [one for place, one in enumerate(ids) if place not in dropped][-room:]
