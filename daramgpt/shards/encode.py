"""Units to tokens, so that the tokens of a text, joined, decode to the text again.

A unit comes with the separator before it, a space or a line feed. Tokenizers treat such a start in four ways, so for
each separator and tokenizer the first rule whose tokens decode rightly on a few probes is chosen, in this order:

* ``whole``: encode separator and unit together. Right for byte-level BPE, and for a space before Metaspace.
* ``marked``: the same, and drop the word mark put before the separator. Right for a line feed before Metaspace,
  which encodes as ``▁ <0x0A> 둘째`` and would decode with a space before the line feed.
* ``bare``: encode the unit alone. Right for tokenizers that put a space before every text.
* ``apart``: the separator's own tokens, then the unit encoded alone.

A tokenizer without any token for the line feed reads it as a space; one that loses the space as well reads units
whole. No offsets are needed for the bytes of a unit. A tokenizer of words gets many units as one text, which takes it
two thirds of the time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from daramgpt.errors import UserError
from daramgpt.shards.encoded import Encoded, token_dtype

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SPACE, _LINE_FEED = ord(" "), ord("\n")
# What the tokenizer makes of a text takes 80 times its memory; larger batches are not faster.
_BATCH_CHARACTERS = 100_000
_Tokens = tuple[NDArray[Any], NDArray[np.uint32]]
_PROBES = (("첫째 문장입니다.", "둘째 문장이다."), ("가나", "다. 라"), ("in 1997", "K리그"))


@dataclass(frozen=True, slots=True)
class _Shapes:
    """What units look like from outside, [units] each.

    Attributes:
        first: code point of the first character, which is the separator if there is one.
        num_characters, num_bytes, num_spaces: in the whole unit.
    """

    first: NDArray[np.uint32]
    num_characters: NDArray[np.int64]
    num_bytes: NDArray[np.uint32]
    num_spaces: NDArray[np.int64]

    @classmethod
    def of(cls, units: list[str]) -> _Shapes:
        """Of units that are not empty; all at once, for there are thousands in a block."""
        num_characters = np.fromiter(map(len, units), dtype=np.int64, count=len(units))
        starts = np.cumsum(num_characters) - num_characters
        points = np.frombuffer("".join(units).encode("utf-32-le"), dtype="<u4")
        num_bytes = np.ones(len(points), dtype=np.uint8)
        for least in (0x80, 0x800, 0x10000):
            num_bytes += points >= least
        return cls(
            points[starts],
            num_characters,
            np.add.reduceat(num_bytes, starts, dtype=np.uint32),
            np.add.reduceat(points == _SPACE, starts, dtype=np.int64),
        )

    def batches(self) -> Iterator[tuple[int, int]]:
        """Starts and ends of batches of a bounded size: what the tokenizer gives back takes many times its memory."""
        ends, start = np.cumsum(self.num_characters), 0
        while start < len(ends):
            full = _BATCH_CHARACTERS + (ends[start - 1] if start else 0)
            end = min(int(np.searchsorted(ends, full)) + 1, len(ends))
            yield start, end
            start = end

    def part(self, start: int, end: int) -> _Shapes:
        return _Shapes(
            self.first[start:end], self.num_characters[start:end], self.num_bytes[start:end], self.num_spaces[start:end]
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a unit with a certain separator is encoded: what is given to the tokenizer, what of its answer is kept."""

    keeps_separator: bool = True
    dropped_first: int | None = None
    put_before: tuple[int, ...] = ()

    @property
    def changes_tokens(self) -> bool:
        return self.dropped_first is not None or bool(self.put_before)

    def text(self, unit: str) -> str:
        return unit if self.keeps_separator else unit[1:]

    def token_ids(self, encoded: list[int]) -> list[int]:
        if self.dropped_first is not None and encoded and encoded[0] == self.dropped_first:
            encoded = encoded[1:]
        return [*self.put_before, *encoded] if self.put_before else encoded


class Encoder:
    """The tokenizer of a directory.

    Attributes:
        vocab_size: the highest token id, added ones included, plus one.
        eos_token_id: ends every text.
        keeps_line_feeds: False if paragraphs are joined by a space because the tokenizer has no line feed.

    Raises:
        UserError: no ``tokenizer.json``, a broken one, or no end-of-sequence token.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        file = tokenizer_dir / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{file} is missing", "give a teacher directory with a fast tokenizer (tokenizer.json)")
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise UserError(f"{file} cannot be read: {error}", "download the tokenizer again") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Text that happens to read "</s>" must not end a document.
        self.tokenizer.encode_special_tokens = True
        # Ids may have gaps, so their number says too little.
        self.vocab_size: int = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_token_id = _eos_token_id(tokenizer_dir, self.tokenizer)
        self._dtype = token_dtype(self.vocab_size)
        self._begins_word = _begins_word(self.tokenizer, self.vocab_size)
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self._unknown_id: int | None = self.tokenizer.token_to_id(unknown) if unknown else None
        line_feed, space = self._find_rule("\n"), self._find_rule(" ")
        self.keeps_line_feeds = line_feed is not None
        space = space or _Rule()
        self._rules = {" ": space, "\n": line_feed or space}

    def encode(self, units: list[str]) -> Encoded:
        """Tokens of units, each with its separator before it."""
        shapes = _Shapes.of(units)
        token_ids, unit_tokens = [np.empty(0, self._dtype)], [np.empty(0, np.uint32)]
        for start, end in shapes.batches():
            batch = units[start:end]
            ids, lengths = self._encode_joined(batch, shapes.part(start, end)) or self._encode_apart(batch)
            token_ids.append(ids)
            unit_tokens.append(lengths)
        all_ids, all_lengths = np.concatenate(token_ids), np.concatenate(unit_tokens)
        unknown_bytes = np.zeros(len(units), dtype=np.uint32)
        if self._unknown_id is not None and (places := np.flatnonzero(all_ids == self._unknown_id)).size:
            for number in np.unique(np.searchsorted(np.cumsum(all_lengths), places, side="right")):
                unknown_bytes[number] = self._unknown_bytes(self._given(units[number]))
        has_separator = (shapes.first == _SPACE) | (shapes.first == _LINE_FEED)
        return Encoded(all_ids, all_lengths, shapes.num_bytes, shapes.num_bytes - has_separator, unknown_bytes)

    def _encode_apart(self, units: list[str]) -> _Tokens:
        """Tokens of all units, and their number in each."""
        encodings = self.tokenizer.encode_batch_fast([self._given(unit) for unit in units], add_special_tokens=False)
        rules = [self._rules.get(unit[0]) for unit in units]
        ids = [rule.token_ids(e.ids) if rule else e.ids for e, rule in zip(encodings, rules, strict=True)]
        lengths = np.fromiter(map(len, ids), dtype=np.uint32, count=len(ids))
        return np.fromiter(chain.from_iterable(ids), dtype=self._dtype, count=int(lengths.sum())), lengths

    def _encode_joined(self, units: list[str], shapes: _Shapes) -> _Tokens | None:
        """The same, from one text of all units; None where that does not give the same tokens for certain.

        A unit costs the tokenizer as much as several words do, whatever is in it. Where every word begins with a token
        that bears the mark of a space, and no other token does, the words of a joined text can be told apart.
        """
        space, line_feed = self._rules[" "], self._rules["\n"]
        if self._begins_word is None or space.changes_tokens or line_feed.put_before:
            return None
        # Every unit begins with a space, which is the mark of its first word: its own separator, or one put there.
        bare = np.flatnonzero((shapes.first != _SPACE) & (shapes.first != _LINE_FEED)).tolist()
        parts = ["".join(units[start:end]) for start, end in pairwise([0, *bare, len(units)])]
        joined = " ".join(parts[1:] if bare[:1] == [0] else parts)
        is_after_line_feed = shapes.first == _LINE_FEED
        if "▁" in joined or joined.count("\n") != is_after_line_feed.sum():
            return None
        joined = joined.replace("\n", " \n" if self.keeps_line_feeds and line_feed.keeps_separator else " ")
        (encoding,) = self.tokenizer.encode_batch_fast([joined.removeprefix(" ")], add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=self._dtype)
        words = np.flatnonzero(self._begins_word[ids])
        num_words = shapes.num_spaces + (shapes.first != _SPACE)
        if len(words) != num_words.sum():
            return None
        starts = words[np.cumsum(num_words) - num_words]
        lengths = np.diff(starts, append=len(ids)).astype(np.uint32)
        if line_feed.dropped_first is not None:
            is_dropped = is_after_line_feed & (ids[starts] == line_feed.dropped_first)
            ids = np.delete(ids, starts[is_dropped])
            lengths -= is_dropped
        return ids, lengths

    def _given(self, unit: str) -> str:
        """What the tokenizer is given for a unit."""
        rule = self._rules.get(unit[0])
        if rule is None:
            return unit
        # A line feed that the tokenizer does not know is given to it as the space it is read as.
        return rule.text(unit if self.keeps_line_feeds or unit[0] != "\n" else " " + unit[1:])

    def _unknown_bytes(self, text: str) -> int:
        encoding: Encoding = self.tokenizer.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return sum(len(text[start:end].encode()) for token, (start, end) in spans if token == self._unknown_id)

    def _find_rule(self, separator: str) -> _Rule | None:
        def encode(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=False).ids

        alone = encode(separator)
        marked = [_Rule(dropped_first=alone[0])] if alone else []
        apart = [_Rule(keeps_separator=False, put_before=tuple(alone))] if alone else []
        for rule in (_Rule(), *marked, _Rule(keeps_separator=False), *apart):
            if all(
                self.tokenizer.decode(
                    encode(first) + rule.token_ids(encode(rule.text(separator + second))), skip_special_tokens=False
                )
                == first + separator + second
                for first, second in _PROBES
            ):
                return rule
        return None


def _begins_word(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.bool_] | None:
    """[vocab_size] whether a token begins a word, for tokenizers that part a text at its spaces and nothing else.

    Those are the ones that put ``▁`` before every word and encode each by itself, as SentencePiece does.
    """
    description = json.loads(tokenizer.to_str())
    pre_tokenizer, normalizer = description["pre_tokenizer"] or {}, description["normalizer"] or {"type": "NFC"}
    if (
        pre_tokenizer.get("type") != "Metaspace"
        or not pre_tokenizer.get("split", True)
        or pre_tokenizer.get("prepend_scheme", "always") != "always"
        or normalizer["type"] not in ("NFC", "NFKC")
        or description["model"].get("dropout")
        # These are looked for in the text as a whole, and may hold spaces.
        or any(not token["special"] for token in description["added_tokens"])
    ):
        return None
    vocab = tokenizer.get_vocab()
    begins = np.zeros(vocab_size, dtype=np.bool_)
    begins[[number for token, number in vocab.items() if token.startswith("▁")]] = True
    # Else a word whose first letter is unknown would begin with an unknown token.
    return begins if "▁" in vocab else None


def tokenizer_sha256(tokenizer_dir: Path) -> str:
    """Hash of ``tokenizer.json``."""
    return hashlib.sha256((tokenizer_dir / "tokenizer.json").read_bytes()).hexdigest()


def _eos_token_id(tokenizer_dir: Path, tokenizer: Tokenizer) -> int:
    config = tokenizer_dir / "tokenizer_config.json"
    names = []
    if config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except ValueError as error:
            raise UserError(f"{config} cannot be read: {error}", "download the tokenizer again") from None
        names.append(named.get("content") if isinstance(named, dict) else named)
    for name in [*names, "</s>", "<|endoftext|>"]:
        if name and (token_id := tokenizer.token_to_id(name)) is not None:
            return token_id
    raise UserError(
        f"the tokenizer in {tokenizer_dir} has no end-of-sequence token", f"name one as eos_token in {config}"
    )
