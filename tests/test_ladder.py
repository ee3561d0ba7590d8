"""The ladder of the speed measurement: do its rows do the same work, and does it find the largest micro-batch?"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import inputs, ladder, largest_micro_batch, packed_loop, reference_loop, sentence_lengths, throughput
from benchmarks.inputs import Inputs, Measured
from benchmarks.ladder import FUSED, LIGER, LOW_PRECISION, OURS, PACKING, REFERENCE, TRL, Work
from benchmarks.ladder_plan import Settings, plan
from benchmarks.sides import LeftOutError, Ready, Repetition
from daramgpt import student
from daramgpt.errors import UserError
from daramgpt.losses import distillation_loss_reference
from daramgpt.recipe import Shape

CPU = torch.device("cpu")
TINY = Measured(
    teacher=Shape(n_embd=48, n_head=2, n_layer=2),
    student=Shape(n_embd=24, n_head=2, n_layer=1),
    vocab_size=inputs.TRAINED_VOCAB_SIZE,
    context_tokens=64,
    micro_batch_rows=1,
    reference_steps=2,
    reference_rows=2,
    step_tokens=256,
    gemm_sizes=(64,),
    side_bytes=1,
    text_megabytes=0.2,
)
SETTINGS = Settings("fp32", "fp32", "cpu", 2, 2, 128, 32)
TOKENS = 48


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    made = inputs.make(TINY, tmp_path_factory.mktemp("ladder"))
    # A random teacher is nearly uniform: there would be little to tell one loss from another.
    model = GPT2LMHeadModel.from_pretrained(made.teacher_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(made.teacher_dir)
    return made


@pytest.fixture(scope="module")
def terms(made: Inputs) -> tuple[float, float]:
    """T² · KL and cross-entropy a token of the first tokens of the text, in fp64, from plain models."""
    shards = made.shards()
    input_ids, labels = next(ladder._full_rows(made, 1))
    input_ids, labels = input_ids[:, :TOKENS], labels[:, :TOKENS]
    model = student.build(TINY.student, TINY.vocab_size, TINY.context_tokens, shards.eos_token_id, inputs.SEED)
    plain_teacher = GPT2LMHeadModel.from_pretrained(made.teacher_dir)
    with torch.no_grad():
        student_logits, teacher_logits = (
            plain.double().eval()(input_ids).logits[0] for plain in (model, plain_teacher)
        )
    kd, ce = distillation_loss_reference(student_logits, teacher_logits, labels[0], reference_loop.TEMPERATURE)
    assert kd.item() / TOKENS > 0.5, "the teacher has something to teach"
    return kd.item() / TOKENS, ce.item() / TOKENS


def _build(name: str, made: Inputs, settings: Settings = SETTINGS) -> ladder.Row:
    return ladder.build(name, TINY, made, settings, CPU)


@pytest.mark.parametrize("name", [PACKING, FUSED, LOW_PRECISION, OURS])
def test_packed_rows_have_one_loss(name: str, made: Inputs, terms: tuple[float, float]) -> None:
    row = _build(name, made)
    work = row.step(TOKENS)
    kd, ce = terms
    assert work.loss == pytest.approx(kd + reference_loop.CE_WEIGHT * ce, rel=1e-4)
    assert work.useful_tokens == work.positions == TOKENS * work.forward_passes
    # The teacher is frozen and the student is not.
    following = row.step(TOKENS).loss
    assert following is not None and following != work.loss


def test_low_precision_changes_the_loss_by_its_rounding(made: Inputs, terms: tuple[float, float]) -> None:
    settings = Settings("bf16", "int8", "cpu-bf16", 2, 1, 128, 32)
    kd, ce = terms
    for name in (LOW_PRECISION, OURS):
        assert _build(name, made, settings).step(TOKENS).loss == pytest.approx(
            kd + reference_loop.CE_WEIGHT * ce, rel=0.02
        )


@pytest.mark.parametrize(("name", "module"), list(ladder.PEERS.items()))
def test_peers_have_the_same_loss(name: str, module: str, made: Inputs, terms: tuple[float, float]) -> None:
    pytest.importorskip(module)
    kd, ce = terms
    weights = {TRL: 0.0, LIGER: reference_loop.CE_WEIGHT}
    assert _build(name, made).step(TOKENS).loss == pytest.approx(kd + weights[name] * ce, rel=1e-4)


def test_reference_loop_and_packing_divide_differently_what_is_the_same(made: Inputs) -> None:
    """One sentence without padding: the article divides the KL by sentences, the packed loop by tokens."""
    eos_token_id = made.shards().eos_token_id
    input_ids, labels = next(ladder._full_rows(made, 1))

    def quiet_student() -> GPT2LMHeadModel:
        return inputs.published_model(TINY, TINY.student, eos_token_id).eval()

    article = reference_loop.ReferenceLoop(made.teacher_dir, quiet_student(), CPU)
    article.student.eval()
    divided_by_sentences = article.step(input_ids, torch.ones_like(input_ids))
    with torch.no_grad():
        model = quiet_student()
        shifted = model(input_ids, labels=input_ids).loss.item()
        by_label = torch.nn.functional.cross_entropy(model(input_ids).logits[0], labels[0]).item()
        mean = packed_loop.whole_logits(GPT2LMHeadModel.from_pretrained(made.teacher_dir).eval())(
            model, input_ids, labels
        ).item()
    weight = reference_loop.CE_WEIGHT
    kl = (divided_by_sentences - weight * shifted) / input_ids.numel()
    assert kl == pytest.approx(mean - weight * by_label, rel=1e-4)


def test_reference_row_pads_as_said(made: Inputs) -> None:
    row = _build(REFERENCE, made)
    tokens, _ = sentence_lengths.load().expectation(16, TINY.context_tokens)
    for work in (row.step(), row.step()):
        assert work.forward_passes == TINY.reference_steps and work.loss is None
        assert work.useful_tokens / work.forward_passes == pytest.approx(tokens, rel=0.02)
        assert 1 - work.useful_tokens / work.positions == pytest.approx(ladder.REFERENCE_PADDING, abs=0.005)
    sized = row.step(8 * row.unit_tokens)
    assert sized.positions == sized.useful_tokens == 8 * row.unit_tokens


def test_rows_have_their_micro_batch(made: Inputs) -> None:
    packed, ours = _build(FUSED, made), _build(OURS, made)
    assert packed.micro_batch_tokens == 128 and ours.micro_batch_tokens == 128
    assert packed.step().positions == TINY.reference_steps * 128
    work = ours.step()
    assert (work.positions, work.forward_passes) == (SETTINGS.micro_batches * 128, SETTINGS.micro_batches)


def test_plan_is_the_planners(made: Inputs) -> None:
    settings = plan(TINY, made, memory_limit_bytes=4 * 10**9, step_tokens=TINY.step_tokens)
    assert settings.micro_batch_rows * settings.micro_batches * TINY.context_tokens == TINY.step_tokens
    assert 1 <= settings.reference_chunk_tokens <= TINY.reference_rows * TINY.context_tokens


def test_another_ds_config_may_be_planned_for(made: Inputs) -> None:
    for name, dtype in (("cpu", "fp32"), ("cpu-bf16", "bf16")):
        settings = plan(TINY, made, 4 * 10**9, TINY.step_tokens, name)
        assert (settings.ds_config, settings.dtype) == (name, dtype)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--ds-config p100-16gb: a CPU has no fast fp16"):
            plan(TINY, made, 4 * 10**9, TINY.step_tokens, "p100-16gb")


def test_expectation_of_padding_is_exact() -> None:
    lengths = sentence_lengths.SentenceLengths({1: 2, 4: 1, 9: 1})
    draws = list(itertools.product([1, 1, 4, 6], repeat=3))
    tokens, positions = lengths.expectation(3, longest=6)
    assert tokens == pytest.approx(np.mean([sum(draw) for draw in draws]))
    assert positions == pytest.approx(np.mean([3 * max(draw) for draw in draws]))
    assert lengths.padding_share(3, 6) == pytest.approx(1 - tokens / positions)


def test_representative_groups_are_not_one_sided() -> None:
    """Means over many groups are those asked for, and the same seed gives the same groups."""
    lengths = sentence_lengths.load()
    tokens, _ = lengths.expectation(16, 1024)

    def groups(seed: int) -> list[list[int]]:
        return list(itertools.islice(lengths.representative(16, 2, 1024, 0.66, np.random.default_rng(seed)), 60))

    drawn = groups(0)
    assert drawn == groups(0) and drawn != groups(1)
    sums = [sum(group) for group in drawn]
    positions = [16 * (max(group[:16]) + max(group[16:])) for group in drawn]
    assert np.mean(sums) == pytest.approx(2 * tokens, rel=0.01)
    assert 1 - sum(sums) / sum(positions) == pytest.approx(0.66, abs=0.004)


def test_a_line_leaves_out_what_the_chunk_hides() -> None:
    peaks = {256: 100, 1024: 1000, 2048: 2000}
    assert largest_micro_batch.by_line(peaks, 1024, 10_000, 1024) == 10 * 1024
    assert largest_micro_batch.by_line(peaks, 1024, 10_500, 1024) == 10 * 1024, "whole rows"
    assert largest_micro_batch.by_line({256: 100, 1024: 1000}, 1024, 10_000, 1024) is None
    assert largest_micro_batch.by_line({1024: 1000, 2048: 1000}, 0, 10_000, 1) is None


def test_sizes_for_a_line_hold_the_whole_chunk() -> None:
    sizes, later = largest_micro_batch.warm_up_sizes, largest_micro_batch.later_sizes
    # Loss buffers full at 655 positions: a quarter of the micro-batch has them, and no more steps are needed.
    assert sizes(4096, 655, 1024, 256) == [256, 1024, 4096]
    assert later(4096, 655, [256, 1024, 4096]) == []
    # A chunk of the whole micro-batch: only a larger one tells.
    assert sizes(1024, 1024, 1024, 256) == [256, 1024]
    assert later(1024, 1024, [256, 1024]) == [2048]
    # Sizes above a row are whole rows.
    assert sizes(16384, 1500, 1024, 256) == [256, 4096, 16384]
    assert sizes(4096, 1500, 1024, 256) == [256, 2048, 4096]


@pytest.mark.parametrize("limit", [5, 64, 100, 1000, 65536])
def test_search_finds_the_limit(limit: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    found = largest_micro_batch.by_search(fits, start_tokens=256, unit_tokens=64)
    assert found % 64 == 0 and found <= limit
    assert limit - found < max(64, found * largest_micro_batch.RESOLUTION + 64)
    assert len(tried) == len(set(tried)) and len(tried) <= 16


def test_anchors_are_in_every_group() -> None:
    names = [*ladder.LADDER, *ladder.PEERS]
    assert list(throughput.groups(names, 7)) == [names]
    split = list(throughput.groups(names, 4))
    assert all(REFERENCE in group and OURS in group and len(group) <= 4 for group in split)
    assert {name for group in split for name in group} == set(names)
    assert list(throughput.groups(names, 1)) == [[name] for name in names]


@pytest.mark.parametrize(
    "arguments", [["--rows", "fused"], ["--repetitions", "0"], ["--memory-cap", "-1"], ["--rows", ""]]
)
def test_bad_arguments_are_named_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and arguments[0] in captured.err and not captured.out


def test_rows_keep_the_order_of_the_ladder() -> None:
    assert ladder.names(f"{OURS}, {REFERENCE}") == [REFERENCE, OURS]
    assert ladder.names(None)[: len(ladder.LADDER)] == list(ladder.LADDER)
    with pytest.raises(UserError, match="packing"):
        ladder.names("packing")


def test_a_missing_peer_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "PEERS", {"gone": "no_such_module_at_all"})
    reason = ladder.missing_peer("gone")
    assert reason is not None and "no_such_module_at_all" in reason
    assert ladder.missing_peer(OURS) is None


def test_master_weights_step_as_fp32_would() -> None:
    """Small updates that a bf16 weight alone would lose add up in its master."""
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_head=2, n_layer=1, resid_pdrop=0, embd_pdrop=0)
    model = GPT2LMHeadModel(config).to(torch.bfloat16)
    loop = packed_loop.PackedLoop(model, lambda student, ids, labels: student(ids).logits.float().logsumexp(-1).mean())
    before = model.transformer.wte.weight.detach().clone()
    ids = torch.arange(8)[None]
    losses = [loop.step(ids, ids) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.transformer.wte.weight)
    assert all(parameter.dtype == torch.float32 for parameter in loop.optimizer.param_groups[0]["params"])


class FakeSide:
    """Peaks of a line, a gigabyte and 100 kilobytes a position; seconds that grow with every step of any side."""

    steps = 0
    alive = 0

    def __init__(self, name: str, *_: object) -> None:
        if name == TRL:
            raise LeftOutError("ImportError: none here")
        self.name, self.row = name, Ready(100, 0, 10)
        FakeSide.alive += 1

    def step(self, tokens: int | None = None) -> Repetition:
        FakeSide.steps += 1
        positions = tokens or 100
        useful = 34 if self.name == REFERENCE else positions
        return Repetition(
            Work(useful, positions, 1, positions, 20.0, 2.0), float(FakeSide.steps), 10**9 + 10**5 * positions
        )

    def finish(self) -> None:
        FakeSide.alive -= 1


def test_sides_are_asked_in_turn_and_ended(made: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "Side", FakeSide)
    monkeypatch.setattr(inputs, "make", lambda measured, folder: made)
    monkeypatch.setitem(inputs.SHAPES, "small", TINY)
    monkeypatch.setattr(ladder, "missing_peer", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = [REFERENCE, PACKING, FUSED, OURS, TRL]
    monkeypatch.setattr(throughput.GemmRates, "measure", lambda rates: None)
    monkeypatch.setattr(throughput.GemmRates, "best", lambda rates: {"fp32": 1e12, "bf16": 1e12, "fp16": 1e12})
    lines: list[str] = []
    measured = throughput.measure("small", names, 2, 2 * 10**9, None, tmp_path, lines.append)
    assert FakeSide.alive == 0
    assert [row["name"] for row in measured["rows"]] == names[:-1]
    assert measured["left_out"] == {TRL: "ImportError: none here"}
    # 1 GB + 100 KB · tokens = 2 GB.
    assert [row["largest_micro_batch_tokens"] for row in measured["rows"]] == [10_000] * 4
    rounds = [line.split(":")[0] for line in lines if "round 1" in line]
    assert rounds == names[:-1]
