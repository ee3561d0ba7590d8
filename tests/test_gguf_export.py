"""The student as a GGUF file: its weights and tokens are the export's, and what llama.cpp cannot do is refused."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from daramgpt import export as exporter
from daramgpt import gguf_export, recipe, student, tokenizer
from daramgpt.errors import UserError
from daramgpt.run_directory import RunDirectory

TEXTS = ["다람쥐가 도토리를 숲에 묻었다.", "오늘 아침에 비가 내렸다.", "도서관에서 책을 읽었다."] * 5


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """An exported student of 64 channels, two blocks, 32 positions."""
    run = RunDirectory(tmp_path / "run")
    tokenizer.train_tokenizer(iter(TEXTS), 400, run.shards / "tokenizer")
    words = AutoTokenizer.from_pretrained(run.shards / "tokenizer")
    small = recipe.load("quickstart", ["student.n_embd=64", "student.n_head=2", "student.n_layer=2"])
    # More rows than the tokenizer has tokens, as embeddings often have.
    model = student.build(small.student, len(words) + 3, 32, words.eos_token_id, seed=3)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    exporter.save_model(model, run.shards / "tokenizer", run.export)
    return run


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def forward(path: Path, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of a file's GPT-2, in numpy, by llama.cpp's names and meanings: products are weight @ input."""
    reader = gguf.GGUFReader(path)
    weights = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    facts = fields(path)
    heads, eps = facts["gpt2.attention.head_count"], facts["gpt2.attention.layer_norm_epsilon"]

    def norm(value: np.ndarray, name: str) -> np.ndarray:
        centred = value - value.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def product(value: np.ndarray, name: str) -> np.ndarray:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    stream = weights["token_embd.weight"][ids] + weights["position_embd.weight"][: len(ids)]
    for block in range(facts["gpt2.block_count"]):
        at = f"blk.{block}"
        query, key, value = (
            part.reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for part in np.split(product(norm(stream, f"{at}.attn_norm"), f"{at}.attn_qkv"), 3, axis=-1)
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        seen = (share / share.sum(-1, keepdims=True)) @ value
        stream = stream + product(seen.transpose(1, 0, 2).reshape(len(ids), -1), f"{at}.attn_output")
        up = product(norm(stream, f"{at}.ffn_norm"), f"{at}.ffn_up")
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        stream = stream + product(gelu, f"{at}.ffn_down")
    return norm(stream, "output_norm") @ weights["token_embd.weight"].T


@pytest.mark.parametrize(("weight_type", "tolerance"), [("f32", 1e-4), ("f16", 0.02), ("q8_0", 0.3)])
def test_the_file_s_weights_are_the_student_s(run: RunDirectory, weight_type: str, tolerance: float) -> None:
    said: list[str] = []
    path = gguf_export.export(run, weight_type, said.append)
    assert path == run.path / f"export-{weight_type}.gguf" and path.name in said[0]
    ids = AutoTokenizer.from_pretrained(run.export).encode(TEXTS[0], add_special_tokens=False)[:30]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(run.export)(torch.tensor([ids])).logits[0].numpy()
    found = forward(path, ids)
    assert np.abs(found - wanted).max() < tolerance
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_up.weight"] == weight_type.upper() and kinds["position_embd.weight"] == "F32"
    assert list(run.path.glob(".*")) == []


def pieces_by_score(text: str, facts: dict[str, Any]) -> list[int]:
    """What llama.cpp's ``llama`` tokenizer makes of a text: the best pair by score joins, the leftmost of equals."""
    tokens, scores = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[ids[a + b]], -place) for place, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
        if not pairs:
            break
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{value:02X}>"] for value in piece.encode()]
    return found


def test_the_file_s_tokens_are_those_of_training(run: RunDirectory) -> None:
    facts, words = fields(gguf_export.export(run, "f16", lambda _: None)), AutoTokenizer.from_pretrained(run.export)
    assert facts["tokenizer.ggml.model"] == "llama" and facts["tokenizer.ggml.add_space_prefix"] is True
    assert facts["tokenizer.ggml.add_bos_token"] is False
    assert facts["tokenizer.ggml.eos_token_id"] == words.eos_token_id
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(words) + 3
    for text in (*TEXTS[:3], "다람쥐 😀 두  칸", "숲에서 책", "뷁!", "비가\n내렸다"):
        assert pieces_by_score(text, facts) == words.encode(text, add_special_tokens=False), text
    kinds = gguf.TokenType
    assert types[words.eos_token_id] == kinds.CONTROL and types[-1] == kinds.UNUSED
    assert types[words.convert_tokens_to_ids("<0x41>")] == kinds.BYTE
    assert types[words.convert_tokens_to_ids("▁")] == kinds.NORMAL


def change(run: RunDirectory, alter: Callable[[dict[str, Any]], None]) -> None:
    path = run.export / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    alter(described)
    path.write_text(json.dumps(described), encoding="utf-8")


def test_byte_level_tokenizers_go_in_with_their_merges(run: RunDirectory) -> None:
    def alter(described: dict[str, Any]) -> None:
        described["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        described["normalizer"] = None

    change(run, alter)
    facts = fields(gguf_export.export(run, "f16", lambda _: None))
    assert facts["tokenizer.ggml.model"] == "gpt2" and facts["tokenizer.ggml.pre"] == "gpt-2"
    merges = json.loads((run.export / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert [tuple(one.split(" ")) for one in facts["tokenizer.ggml.merges"]] == [tuple(pair) for pair in merges]


def _without_bytes(described: dict[str, Any]) -> None:
    """What were bytes are pieces that never come, the first of them what is not known."""
    model = described["model"]
    pieces = {piece.replace("<0x", "<none"): number for piece, number in model["vocab"].items()}
    pieces["<unk>"] = pieces.pop("<none00>")
    model |= {"vocab": pieces, "unk_token": "<unk>", "byte_fallback": False}


def _without_bytes_and_unknown(described: dict[str, Any]) -> None:
    _without_bytes(described)
    described["model"]["unk_token"] = None


def test_what_a_vocabulary_does_not_know_is_spelt_in_tokens_that_are_never_drawn(run: RunDirectory) -> None:
    change(run, _without_bytes)
    path = gguf_export.export(run, "f32", lambda _: None)
    facts, words = fields(path), AutoTokenizer.from_pretrained(run.export)
    tokens, num_tokens, unknown_id = facts["tokenizer.ggml.tokens"], len(words) + 3, words.get_vocab()["<unk>"]
    assert tokens[num_tokens:] == [f"<0x{value:02X}>" for value in range(256)]
    assert facts["tokenizer.ggml.suppress_tokens"] == list(range(num_tokens, num_tokens + 256))
    assert len(facts["tokenizer.ggml.scores"]) == len(facts["tokenizer.ggml.token_type"]) == len(tokens)
    [embedding] = (one.data for one in gguf.GGUFReader(path).tensors if one.name == "token_embd.weight")
    assert embedding.shape[0] == len(tokens) and (embedding[num_tokens:] == embedding[unknown_id]).all()
    for text in ("비가 내렸다.", "비가 😀 내렸다."):
        own = words.encode(text, add_special_tokens=False)
        theirs = [unknown_id if one >= num_tokens else one for one in pieces_by_score(text, facts)]
        # A letter of four bytes is four times unknown.
        assert list(dict.fromkeys(theirs)) == list(dict.fromkeys(own))
        assert len(theirs) == len(own) + 3 * own.count(unknown_id)


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda described: described["model"].update(type="Unigram"), "its model is Unigram"),
        (lambda described: described["pre_tokenizer"].update(type="Whitespace"), "it parts text by Whitespace"),
        (lambda described: described.update(pre_tokenizer=None), "it parts text by nothing"),
        (lambda described: described["pre_tokenizer"].update(prepend_scheme="never"), "puts no space before a text"),
        (lambda described: described.update(normalizer={"type": "Lowercase"}), "it changes text by Lowercase"),
        (_without_bytes_and_unknown, "it has no tokens of single bytes, and none for what it does not know"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_equal_of_is_refused(
    run: RunDirectory, alter: Callable[[dict[str, Any]], None], reason: str
) -> None:
    change(run, alter)
    with pytest.raises(UserError, match=f"tokenizer.json: .*{reason}.*; use the student with transformers"):
        gguf_export.export(run, "f16", lambda _: None)
    assert not list(run.path.glob("*.gguf"))


def test_what_a_user_can_mend_is_said(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--gguf q4: there is no such type; give f32, f16, q8_0"):
        gguf_export.export(run, "q4", lambda _: None)
    path = gguf_export.export(run, "f16", lambda _: None)
    before = path.read_bytes()

    def full(self: gguf.GGUFWriter, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        with pytest.raises(UserError, match=r"export-f16.gguf could not be written: .*No space left.*; make room"):
            gguf_export.export(run, "f16", lambda _: None)
    assert path.read_bytes() == before and list(run.path.glob(".*")) == []
    original = builtins.__import__

    def missing(name: str, *arguments: Any, **others: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return original(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="--gguf needs the library gguf; install it"):
        gguf_export.export(run, "f16", lambda _: None)
