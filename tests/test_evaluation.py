"""Held-out measurement against direct arithmetic, sampling, and the printed result."""

from __future__ import annotations

import logging as python_logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from daramgpt import generate, results_table, student, text_table
from daramgpt.errors import UserError
from daramgpt.evaluation import held_out
from daramgpt.generate import Sampling
from daramgpt.recipe import Shape

VOCAB = 300


@dataclass
class FakeText:
    """Held-out rows by stage: (input_ids, labels, text bytes) a batch."""

    batches: dict[str, list[tuple[torch.Tensor, torch.Tensor, int]]]

    def heldout(self, stage_name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        return iter(self.batches[stage_name])


def batch(seed: int, rows: int = 2, length: int = 12, padded: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    if padded:
        labels[-1, -padded:] = -100
    return tokens[:, :-1], labels, 37 + seed


def build(seed: int, width: int = 16) -> GPT2LMHeadModel:
    model = student.build(Shape(n_embd=width, n_head=2, n_layer=2), VOCAB, 16, 0, seed).eval()
    # Weights larger than at the start of training, so that distributions differ from each other and from uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def text() -> FakeText:
    return FakeText({"web": [batch(1), batch(2, padded=5)], "empty": [], "wiki": [batch(3, rows=3)]})


def logits(
    model: GPT2LMHeadModel, text: FakeText, stages: tuple[str, ...], cuts: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and targets [N] of all target tokens, made whole; rows cut at `cuts` are passed piece by piece."""
    batches = [one for stage in stages for one in text.batches[stage]]
    with torch.no_grad():
        whole = torch.cat(
            [
                torch.cat([model(piece).logits for piece in ids.tensor_split(cuts, dim=1)], dim=1).flatten(0, 1)
                for ids, _, _ in batches
            ]
        )
    targets = torch.cat([labels.flatten() for _, labels, _ in batches])
    return whole[targets != -100].double(), targets[targets != -100]


def test_bits_per_byte_are_total_nats_over_raw_bytes(text: FakeText, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of 5 tokens, so that a batch takes several and the last is short.
    monkeypatch.setattr(held_out, "CHUNK_LOGITS", 5 * VOCAB)
    model = build(0)
    measured = held_out.measure(held_out.CausalModel(model), text, ["web", "empty", "wiki"], 10**6)
    for stages, name, num_bytes in ((("web",), "web", 77), (("wiki",), "wiki", 40), (("web", "wiki"), "all", 117)):
        nats = F.cross_entropy(*logits(model, text, stages), reduction="sum")
        assert measured.bits_per_byte[name] == pytest.approx(float(nats) / math.log(2) / num_bytes, rel=1e-5)
    assert measured.bits_per_byte["empty"] is None
    assert measured.text["web"] == {"text_bytes": 77, "tokens": 43}
    assert measured.kl_to_teacher is None and measured.top1_agreement is None
    assert measured.tokens_per_second is not None and measured.tokens_per_second > 0


def test_closeness_is_to_the_teacher_and_exact_for_itself(text: FakeText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "CHUNK_LOGITS", 7 * VOCAB)
    teacher, small = build(0, width=24), build(1)
    stages = ("web", "wiki")
    teacher_model = held_out.CausalModel(teacher)
    # The teacher comes last in the dictionary, and must be computed first all the same.
    found = held_out.compare(
        {"small": held_out.CausalModel(small), "teacher": teacher_model}, text, stages, 10**6, teacher_model
    )
    p, q = logits(teacher, text, stages)[0], logits(small, text, stages)[0]
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["small"].kl_to_teacher == pytest.approx(float(kl), rel=1e-4)
    assert found["small"].top1_agreement == pytest.approx(float(agreement))
    assert (found["teacher"].kl_to_teacher, found["teacher"].top1_agreement) == (0.0, 1.0)
    alone = held_out.measure(held_out.CausalModel(small), text, stages, 10**6, teacher_model)
    assert alone.kl_to_teacher == found["small"].kl_to_teacher


def test_within_documents_is_measured_what_each_document_alone_would_give(text: FakeText) -> None:
    begins, cuts, stages = 7, (3, 4, 9), ("web", "wiki")
    for ids, _, _ in (one for stage in stages for one in text.batches[stage]):
        ids[ids == begins] = begins + 1
        ids[:, cuts] = begins
    teacher, small = build(0, width=24), build(1)
    teacher_model, small_model = held_out.CausalModel(teacher), held_out.CausalModel(small)
    measured = held_out.measure(small_model, text, stages, 10**6, teacher_model, begins)
    (p, targets), (q, _) = logits(teacher, text, stages, cuts), logits(small, text, stages, cuts)
    nats = float(F.cross_entropy(q, targets, reduction="sum"))
    assert measured.bits_per_byte["all"] == pytest.approx(nats / math.log(2) / 117, rel=1e-5)
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert measured.kl_to_teacher == pytest.approx(float(kl), rel=1e-4)
    across = held_out.measure(small_model, text, stages, 10**6)
    assert across.bits_per_byte["all"] != pytest.approx(nats / math.log(2) / 117, rel=1e-3)


def test_a_limit_stops_between_batches(text: FakeText) -> None:
    measured = held_out.measure(held_out.CausalModel(build(0)), text, ["web"], 1)
    assert measured.text["web"] == {"text_bytes": 38, "tokens": 24}


def test_nothing_held_out_gives_no_figure() -> None:
    measured = held_out.measure(held_out.CausalModel(build(0)), FakeText({"web": []}), ["web"], 10)
    assert measured.bits_per_byte == {"web": None, "all": None}
    assert measured.tokens_per_second is None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 1 to 256 are the bytes, so that each Hangul syllable takes three tokens; 0 ends the text."""
    vocab = {"</s>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


class Speller(torch.nn.Module):
    """A model that always goes on with the next byte of a text; it sees where it is by counting the tokens it got."""

    def __init__(self, says: str, num_prompt_tokens: int) -> None:
        super().__init__()
        self.config = student.build(Shape(n_embd=8, n_head=1, n_layer=1), 258, 64, 0, 0).config
        self.device = torch.device("cpu")
        self.script = [257 if byte == 32 else byte + 1 for byte in says.encode()] + [0]
        self.seen = -num_prompt_tokens

    def forward(self, ids: torch.Tensor, past_key_values: object, use_cache: bool) -> object:
        self.seen += ids.shape[1]
        hot = F.one_hot(torch.tensor([[self.script[self.seen]]]), 258).float() * 1e4
        cache = type("Cache", (), {"get_seq_length": lambda _: self.seen})()
        return type("Output", (), {"logits": hot, "past_key_values": cache})()


def test_streamed_pieces_are_whole_syllables() -> None:
    tokenizer = byte_tokenizer()
    prompt, says = "다람쥐", "가 숲에"
    speller = Speller(says, len(tokenizer.encode(prompt)))
    pieces = list(generate.stream(speller, tokenizer, prompt, 50, Sampling(temperature=0)))
    assert pieces == ["가", " ", "숲", "에"]


class Letters:
    """A tokenizer that gives every id a letter of its own; 0 ends the text."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) - 0xAC00 for letter in text]

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(chr(0xAC00 + one) for one in ids)


def endless(seed: int) -> GPT2LMHeadModel:
    """A model of 16 positions that never ends a text."""
    model = build(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.lm_head = torch.nn.Linear(16, VOCAB)
    with torch.no_grad():
        model.lm_head.bias[0] = -1e9
    return model


def test_generation_goes_on_past_the_positions_and_repeats_with_a_seed() -> None:
    sampling = [Sampling(temperature=1.0, top_p=1.0, seed=seed) for seed in (1, 1, 2)]
    texts = ["".join(generate.stream(endless(0), Letters(), "가각갂", 60, one)) for one in sampling]
    assert len(texts[0]) == 60
    assert texts[0] == texts[1] != texts[2]


def test_cached_steps_draw_what_whole_passes_would() -> None:
    model = endless(3)
    ids = [5, 6, 7]
    with torch.no_grad():
        for _ in range(13):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    streamed = "".join(generate.stream(model, Letters(), Letters().decode(ids[:3]), 13, Sampling(temperature=0)))
    assert streamed == Letters().decode(ids[3:])


def test_a_broken_byte_does_not_stop_the_stream() -> None:
    tokenizer = byte_tokenizer()
    speller = Speller("", 3)
    speller.script = [0xFF + 1, *(byte + 1 for byte in b"a"), tokenizer.convert_tokens_to_ids("▁"), 0]
    assert "".join(generate.stream(speller, tokenizer, "가", 9, Sampling(temperature=0))).endswith(" ")


def test_drawing_keeps_to_the_nucleus_and_to_top_k() -> None:
    probabilities = torch.tensor([0.15, 0.5, 0.3, 0.05])
    generator = torch.Generator().manual_seed(0)

    def drawn(sampling: Sampling) -> set[int]:
        return {generate.draw(probabilities.log(), sampling, generator) for _ in range(300)}

    base = Sampling(temperature=1.0, top_p=1.0)
    assert drawn(base) == {0, 1, 2, 3}
    # 0.5 alone does not reach 0.6, so the token that crosses it belongs to the nucleus.
    assert drawn(replace(base, top_p=0.6)) == {1, 2}
    assert drawn(replace(base, top_k=3)) == {0, 1, 2}
    assert drawn(replace(base, temperature=0)) == {1}


def test_generating_without_an_export_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model in"):
        generate.Writer.load(tmp_path)


def evaluation(num_stages: int = 5) -> dict[str, object]:
    bits = {f"stage-{number}": 1.5 for number in range(num_stages)}
    row = {
        "name": "student without teacher",
        "parameters": 68_461_056,
        "bytes": 273_844_224,
        "bits_per_byte": {**bits, "stage-1": None, "all": 1.23456},
        "kl_to_teacher": 0.4321,
        "top1_agreement": 0.612,
        "tokens_per_second": 12345.6,
    }
    teacher = {**row, "name": "teacher", "kl_to_teacher": None, "parameters": 1_164_000_000}
    sample = {"prompt": "오늘 아침에", "model": "student", "text": " 비가 내렸다." * 20}
    return {"rows": [teacher, row], "samples": [sample], "state": "partial", "step": 7}


@pytest.mark.parametrize(("width", "num_stages"), [(100, 5), (80, 5), (80, 12)])
def test_printed_result_keeps_to_its_width_and_lines_up(width: int, num_stages: int) -> None:
    lines = results_table.format_evaluation(evaluation(num_stages), width).splitlines()
    assert max(map(text_table.width_of, lines)) <= max(width, text_table.width_of(results_table.LEGEND))
    head, _, teacher, student_line = lines[:4]
    assert text_table.width_of(head) == text_table.width_of(teacher) == text_table.width_of(student_line)
    assert "1.2346" in student_line and "61.2%" in student_line and "–" in teacher
    assert any(line.startswith("partial: measured at step 7") for line in lines)
    assert sum(text_table.width_of(line) > width - 10 for line in lines) >= 1


def point(step: int, ended: str | None, **bits_per_byte: float) -> dict[str, Any]:
    line = {"step": step, "tokens": 100 * step, "bits_per_byte": bits_per_byte}
    return {**line, "stage_ended": ended} if ended else line


def test_what_each_stage_gave_and_took() -> None:
    lines = [
        {"step": 1, "tokens": 100},
        point(2, "a", a=2.0, b=3.0, all=2.5),
        point(3, None, a=2.1, b=2.5, all=2.3),
        point(4, "b", a=2.25, b=2.0, all=2.125),
        # Trained after the checkpoint that is measured.
        point(6, "c", a=9.0, b=9.0, all=9.0),
        {"step": 5, "stage_ended": "damaged"},
    ]
    rows = results_table.forgetting(lines, step=5)
    assert [(row["after"], row["step"], row["tokens"]) for row in rows] == [("a", 2, 200), ("b", 4, 400)]
    assert results_table.forgetting_cells(rows) == [
        ["after", "a", "b", "all"],
        ["a", "2.0000", "3.0000", "2.5000"],
        ["b", "2.2500", "2.0000", "2.1250"],
        ["since its own end", "+0.2500", "+0.0000", ""],
    ]
    assert results_table.forgetting([{"step": 1}], step=5) == []


def test_generating_asks_nothing_of_transformers_that_it_warns_of() -> None:
    from transformers.utils import logging

    said: list[str] = []
    handler = python_logging.Handler(python_logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    # Said once a process: another test may have heard it.
    logging.warning_once.cache_clear()
    logging.add_handler(handler)
    try:
        model = student.build(Shape(n_embd=8, n_head=1, n_layer=1), 258, 64, 0, 0).eval()
        list(generate.stream(model, byte_tokenizer(), "다", 8, Sampling(seed=1)))
    finally:
        logging.remove_handler(handler)
    assert said == []
