"""An exported student as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio, phones).

llama.cpp's own converter knows tokenizers by a list of those that others have published, and a student's is not among
them. The file is written here with that project's writer (``gguf``): weights under the names of its GPT-2, and the
tokenizer as one of the two kinds that it has had from the beginning:

* ``llama``, for byte-pair encoding of text whose spaces are ``▁``: it joins, as the merges do, whatever gives the
  piece that was learnt first, here by a score that falls with the place of the piece's merge;
* ``gpt2``, for byte-level byte-pair encoding with GPT-2's way of parting words.

A tokenizer of another kind is refused: a file whose tokens are not those of training would look well and write badly.

``llama`` asks for a token of each byte, to spell what the vocabulary lacks. Where a vocabulary has ``<unk>`` instead,
tokens of bytes are added that have its embedding, and llama.cpp is told never to draw them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daramgpt.errors import UserError
from daramgpt.run_directory import RunDirectory, parse_json, read_text

# Of the matrices; vectors and positions are small, and stay in fp32.
TYPES = ("f32", "f16", "q8_0")
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
# What these do to a text, llama.cpp leaves undone: it hardly matters in text that is in this form already.
_NEGLIGIBLE = {"NFC", "NFKC"}
_BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OTHER_NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: ``llama`` or ``gpt2``.
        tokens: by id.
        scores: by id, of ``llama``; empty for ``gpt2``.
        types: by id, ``gguf.TokenType``.
        merges: of ``gpt2``, two pieces with a space between; empty for ``llama``.
        unknown_id: of the token for what is not known, whose embedding the last `num_added` tokens have; None = none.
    """

    model: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    unknown_id: int | None = None
    num_added: int = 0


def export(run: RunDirectory, weight_type: str, say: Callable[[str], None]) -> Path:
    """Write ``export-<type>.gguf`` beside the run's ``export/``, from what that holds.

    Args:
        run: exported already.
        weight_type: one of `TYPES`.
        say: takes a line.

    Returns:
        The file; it is whole, or as it was before.

    Raises:
        UserError: the library ``gguf`` is not there, the type is none, the tokenizer is of a kind that llama.cpp has
            no equal of, or the file cannot be written.
    """
    if weight_type not in TYPES:
        raise UserError(f"--gguf {weight_type}: there is no such type", f"give {', '.join(TYPES)}")
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf needs the library gguf", "install it: .venv/bin/python -m pip install gguf") from None
    config = parse_json(read_text(run.export / "config.json"))
    vocabulary = read_vocabulary(run.export / "tokenizer.json", config["vocab_size"])
    path = run.export.with_name(f"{run.export.name}-{weight_type}.gguf")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        writer.add_name(run.path.resolve().name)
        _add_shape(writer, config, weight_type)
        _add_vocabulary(writer, vocabulary, config)
        for name, value in _weights(run.export / "model.safetensors"):
            if name == "token_embd.weight" and vocabulary.unknown_id is not None:
                unknown = value[vocabulary.unknown_id]
                value = np.concatenate([value, np.tile(unknown, (vocabulary.num_added, 1))])
            kind = _type_of(name, value, weight_type)
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        # On the disk before it has the name: after a power cut too the file is whole or is not there.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}", "make room there and try again") from None
    finally:
        temporary.unlink(missing_ok=True)
    say(f"export: {path}, {path.stat().st_size / 1e6:,.1f} MB, for llama.cpp")
    return path


def read_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a ``tokenizer.json`` in llama.cpp's terms.

    Args:
        path: that file.
        vocab_size: rows of the embedding; ids that the tokenizer lacks become unused tokens.

    Raises:
        UserError: llama.cpp has no tokenizer that gives the same tokens.
    """
    described = parse_json(read_text(path))
    model, parting = described["model"], described.get("pre_tokenizer") or {}
    if model.get("type") != "BPE":
        raise _unequal(path, f"its model is {model.get('type')}")
    special = {token["id"]: token["content"] for token in described.get("added_tokens") or []}
    pieces = {number: piece for piece, number in model["vocab"].items()} | special
    tokens = [pieces.get(number, f"<unused token {number}>") for number in range(vocab_size)]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    types = [_kind(token, number in special, number in pieces) for number, token in enumerate(tokens)]
    if parting.get("type") == "Metaspace":
        if parting.get("prepend_scheme", "always") != "always":
            raise _unequal(path, "it puts no space before a text")
        if unlike := _normalizers(described.get("normalizer")) - _NEGLIGIBLE:
            raise _unequal(path, f"it changes text by {', '.join(sorted(unlike))}")
        added = [byte for byte in _BYTES if byte not in model["vocab"]]
        unknown_id = model["vocab"].get(model.get("unk_token"))
        if added and unknown_id is None:
            raise _unequal(path, "it has no tokens of single bytes, and none for what it does not know")
        types += [_kind(byte, is_special=False, is_there=True) for byte in added]
        tokens += added
        return Vocabulary("llama", tokens, _scores(tokens, merges), types, [], unknown_id, len(added))
    if parting.get("type") == "ByteLevel" and parting.get("use_regex", True) and not described.get("normalizer"):
        return Vocabulary("gpt2", tokens, [], types, [" ".join(pair) for pair in merges])
    raise _unequal(path, f"it parts text by {parting.get('type') or 'nothing'}")


def _normalizers(described: dict[str, Any] | None) -> set[str]:
    """Names of all that change a text before it is parted."""
    if not described:
        return set()
    if described["type"] == "Sequence":
        return {name for one in described["normalizers"] for name in _normalizers(one)}
    return {described["type"]}


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """A piece is as good as the earliest of the merges that give it; what none gives is never joined."""
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, place)
    return [-float(places.get(token, len(merges))) for token in tokens]


def _kind(token: str, is_special: bool, is_there: bool) -> int:
    from gguf import TokenType

    if is_special:
        return int(TokenType.UNKNOWN if token == "<unk>" else TokenType.CONTROL)
    if not is_there:
        return int(TokenType.UNUSED)
    return int(TokenType.BYTE if token in _BYTES else TokenType.NORMAL)


def _unequal(path: Path, reason: str) -> UserError:
    return UserError(
        f"--gguf: llama.cpp has no tokenizer like {path}: {reason}", "use the student with transformers, from export/"
    )


def _add_shape(writer: Any, config: dict[str, Any], weight_type: str) -> None:
    import gguf

    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    named = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[named[weight_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, config: dict[str, Any]) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(True)
        if vocabulary.num_added:
            num_tokens = len(vocabulary.tokens)
            # The library has no method for it yet.
            writer.add_array(
                "tokenizer.ggml.suppress_tokens", list(range(num_tokens - vocabulary.num_added, num_tokens))
            )
    else:
        writer.add_token_merges(vocabulary.merges)
        writer.add_tokenizer_pre("gpt-2")
    end_id = config["eos_token_id"]
    # The end of one document is what the next has before it; a prompt is the middle of one.
    writer.add_bos_token_id(end_id)
    writer.add_eos_token_id(end_id)
    if vocabulary.unknown_id is not None:
        writer.add_unk_token_id(vocabulary.unknown_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _weights(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's names and fp32 values; the tied head is left out, and matrices are [outputs, inputs]."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            if name == "lm_head.weight":
                continue
            value = file.get_tensor(name).astype(np.float32)
            if name in _OTHER_NAMES:
                yield _OTHER_NAMES[name], value
                continue
            _, _, block, part = name.split(".", 3)
            part, kind = part.rsplit(".", 1)
            # GPT-2 keeps its products' weights as [inputs, outputs].
            yield f"blk.{block}.{_BLOCK_NAMES[part]}.{kind}", np.ascontiguousarray(value.T)


def _type_of(name: str, value: np.ndarray, weight_type: str) -> Any:
    import gguf

    types = gguf.GGMLQuantizationType
    if value.ndim == 1 or name == "position_embd.weight" or weight_type == "f32":
        return types.F32
    if weight_type == "f16":
        return types.F16
    # A block is 32 weights of a row; a narrower student's rows do not come out even.
    block_size, _ = gguf.GGML_QUANT_SIZES[types.Q8_0]
    return types.Q8_0 if value.shape[1] % block_size == 0 else types.F16
