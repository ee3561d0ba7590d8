"""Train the tokenizer of a teacher that the run makes itself.

Byte-pair encoding on NFC text whose spaces become ``▁`` (Metaspace). What the vocabulary lacks is spelt in bytes, so
that every text survives a round trip; the byte tokens are ordinary ones, lest decoding drop them as special.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from daramgpt.run_directory import write_atomically, write_json

EOS_TOKEN = "</s>"


def train_tokenizer(texts: Iterator[str], vocab_size: int, out_dir: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``AutoTokenizer`` loads.

    Args:
        texts: sentences or paragraphs without line feeds; the same texts give the same file.
        vocab_size: tokens at most, including ``</s>`` (id 0) and 256 bytes; fewer where the text runs out of pairs.
        out_dir: made where it does not exist.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [EOS_TOKEN, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=tokens, min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] == EOS_TOKEN]
    write_atomically(out_dir / "tokenizer.json", json.dumps(description, ensure_ascii=False, indent=1) + "\n")
    write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS_TOKEN,
            "clean_up_tokenization_spaces": False,
        },
    )
