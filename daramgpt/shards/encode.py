"""Units to tokens, so that the tokens of a text, joined, decode to the text again.

A unit comes with the separator before it, a space or a line feed. Tokenizers treat such a start in four ways, so for
each separator and tokenizer the first rule whose tokens decode rightly on a few probes is chosen, in this order:

* ``whole``: encode separator and unit together. Right for byte-level BPE, and for a space before Metaspace.
* ``marked``: the same, and drop the word mark put before the separator. Right for a line feed before Metaspace,
  which encodes as ``▁ <0x0A> 둘째`` and would decode with a space before the line feed.
* ``bare``: encode the unit alone. Right for tokenizers that put a space before every text.
* ``apart``: the separator's own tokens, then the unit encoded alone.

A tokenizer without any token for the line feed reads it as a space; one that loses the space as well reads units
whole. Encoding unit by unit is what all cores do in one call; no offsets are needed for the bytes of a unit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from daramgpt.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PROBES = (("첫째 문장입니다.", "둘째 문장이다."), ("가나", "다. 라"), ("in 1997", "K리그"))


@dataclass(slots=True)
class Batch:
    """Units to encode; `ends_text` says after which of them a text ends."""

    units: list[str]
    ends_text: list[bool]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a batch.

    Attributes:
        token_ids: [tokens], an EOS after each text that ends here.
        unit_ends: [units], the number of tokens up to the end of each unit, its text's EOS not counted.
        unit_bytes: [units], UTF-8 bytes with the separator.
        num_separators: separators among those bytes.
        num_texts: texts that end here.
        unknown_bytes: text that became unknown tokens.
    """

    token_ids: NDArray[np.uint32]
    unit_ends: NDArray[np.int64]
    unit_bytes: NDArray[np.int64]
    num_separators: int
    num_texts: int
    unknown_bytes: int


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a unit with a certain separator is encoded: what is given to the tokenizer, what of its answer is kept."""

    keeps_separator: bool = True
    dropped_first: int | None = None
    put_before: tuple[int, ...] = ()

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
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self._unknown_id: int | None = self.tokenizer.token_to_id(unknown) if unknown else None
        line_feed, space = self._find_rule("\n"), self._find_rule(" ")
        self.keeps_line_feeds = line_feed is not None
        space = space or _Rule()
        self._rules = {" ": space, "\n": line_feed or space}

    def encode(self, batch: Batch) -> Encoded:
        """Tokens of a batch of units."""
        rules = [self._rules.get(unit[0]) for unit in batch.units]
        texts = [self._given(unit, rule) for unit, rule in zip(batch.units, rules, strict=True)]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [rule.token_ids(e.ids) if rule else e.ids for e, rule in zip(encodings, rules, strict=True)]
        ends_text = np.array(batch.ends_text, dtype=np.int64)
        with_eos = (
            chain(unit_ids, (self.eos_token_id,)) if end else unit_ids
            for unit_ids, end in zip(ids, batch.ends_text, strict=True)
        )
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)) + ends_text
        total = int(lengths.sum())
        return Encoded(
            token_ids=np.fromiter(chain.from_iterable(with_eos), dtype=np.uint32, count=total),
            unit_ends=np.cumsum(lengths) - ends_text,
            unit_bytes=np.fromiter((len(unit.encode()) for unit in batch.units), np.int64, count=len(ids)),
            num_separators=sum(rule is not None for rule in rules),
            num_texts=int(ends_text.sum()),
            unknown_bytes=sum(
                self._unknown_bytes(text)
                for text, unit_ids in zip(texts, ids, strict=True)
                if self._unknown_id is not None and self._unknown_id in unit_ids
            ),
        )

    def _given(self, unit: str, rule: _Rule | None) -> str:
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
