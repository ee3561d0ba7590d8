"""What is measured on held-out text while a student is trained, and what is concluded from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import BATCH_ROWS, CONTEXT, MICRO_ROWS, Training, make_texts
from torch.nn import functional as F

from daramgpt import ds_config
from daramgpt.checkpoint import newest
from daramgpt.engine import DistillationModel
from daramgpt.export import restore_student
from daramgpt.ledger import sessions
from daramgpt.train import StopRequest, held_out
from daramgpt.train.held_out import has_plateaued

STAGES = {
    "curriculum": {
        "context_tokens": CONTEXT,
        "heldout_fraction": 0.2,
        "stages": [
            {"name": "first", "corpus": "web", "take": "3KB", "unit": "sentence"},
            {"name": "second", "corpus": "web", "take": "5KB", "unit": "sentence"},
        ],
    }
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


def trained(
    texts: Path, folder: Path, evaluation: dict[str, Any], config: str = "cpu", **sections: dict[str, Any]
) -> Training:
    sections = {**STAGES, "evaluation": evaluation, **sections}
    training = Training(texts, folder, without_fp16(config, folder), sections=sections)
    assert training(training.plan) == "done"
    return training


def without_fp16(name: str, folder: Path) -> str:
    """A ds_config, or a file of the same in fp32: most CPUs have no fp16."""
    config = ds_config.load(name)
    if "fp16" not in config:
        return name
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "fp16"}))
    return str(path)


def points(training: Training) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in training.run.metrics.read_text().splitlines()]
    return {line["step"]: line for line in lines if "bits_per_byte" in line}


@pytest.fixture(scope="module")
def measured(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return trained(texts, tmp_path_factory.mktemp("measured"), {"points": 4})


def test_points_stand_evenly_and_where_a_stage_ends(measured: Training) -> None:
    shards, found, num_steps = measured.shards, points(measured), measured.plan["num_steps"]
    first_end = -(-shards.stages[0].num_rows // BATCH_ROWS)
    assert 0 < first_end < num_steps
    assert {step: line.get("stage_ended") for step, line in found.items() if "stage_ended" in line} == {
        first_end: "first",
        num_steps: "second",
    }
    # A quarter of the way each, at the first step that has reached it.
    assert sorted(found) == sorted({first_end, *(-(-num_steps * part // 4) for part in range(1, 5))})
    said = (measured.run.path / "said.txt").read_text()
    assert f"first ends at step {first_end}: {found[first_end]['bits_per_byte']['all']:.4f} bits per byte" in said


def test_a_point_is_the_bits_per_byte_of_the_model_that_the_step_left(measured: Training) -> None:
    saved = newest(measured.run.checkpoints)
    assert saved is not None
    model = restore_student(measured.recipe.student, saved.weights(), measured.shards.tokenizer_dir)
    nats, all_bytes, expected = 0.0, 0, {}
    for stage in measured.shards.stages:
        own = 0.0
        for input_ids, labels, _ in measured.shards.heldout(stage.name):
            with torch.no_grad():
                logits = model(input_ids).logits
            own += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        expected[stage.name] = own / math.log(2) / stage.heldout_text_bytes
        nats, all_bytes = nats + own, all_bytes + stage.heldout_text_bytes
    expected["all"] = nats / math.log(2) / all_bytes
    last = points(measured)[measured.plan["num_steps"]]["bits_per_byte"]
    assert last == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", ["cpu", "cpu-bf16", "zero3-offload"])
def test_measuring_changes_no_weight(texts: Path, tmp_path: Path, config: str) -> None:
    often = trained(texts, tmp_path / "often", {"points": 10**6}, config)
    never = trained(texts, tmp_path / "never", {"points": 0}, config)
    assert len(points(often)) == often.plan["num_steps"] and not points(never)
    for name, value in never.weights().items():
        assert value.equal(often.weights()[name]), name


def test_documents_are_measured_alone_where_they_are_trained_so(texts: Path, tmp_path: Path) -> None:
    curriculum = {**STAGES["curriculum"], "attention": "document"}
    training = trained(texts, tmp_path, {"points": 1}, curriculum=curriculum)
    saved = newest(training.run.checkpoints)
    assert saved is not None
    model = restore_student(training.recipe.student, saved.weights(), training.shards.tokenizer_dir)
    nats, eos = 0.0, training.shards.eos_token_id
    for stage in training.shards.stages:
        for input_ids, labels, _ in training.shards.heldout(stage.name):
            for row, targets in zip(input_ids, labels, strict=True):
                starts = [place for place in range(1, CONTEXT) if row[place] == eos]
                for piece, target in zip(row.tensor_split(starts), targets.tensor_split(starts), strict=True):
                    with torch.no_grad():
                        nats += float(F.cross_entropy(model(piece[None]).logits[0], target, reduction="sum"))
    num_bytes = sum(stage.heldout_text_bytes for stage in training.shards.stages)
    last = points(training)[training.plan["num_steps"]]["bits_per_byte"]["all"]
    assert last == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_no_more_of_a_stage_is_measured_than_was_asked_for(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "READ_ROWS", 1)
    training = trained(texts, tmp_path, {"points": 1, "point_tokens": 2 * CONTEXT})
    saved = newest(training.run.checkpoints)
    assert saved is not None
    model = restore_student(training.recipe.student, saved.weights(), training.shards.tokenizer_dir)
    nats, text_bytes = 0.0, 0
    for number, (input_ids, labels, credited) in enumerate(training.shards.heldout("first", 1)):
        if number < 2:
            with torch.no_grad():
                nats += float(F.cross_entropy(model(input_ids).logits[0], labels[0], reduction="sum"))
            text_bytes += credited
    assert number > 2
    last = points(training)[training.plan["num_steps"]]["bits_per_byte"]["first"]
    assert last == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


FLAT = {"schedule": {"warmup_fraction": 0.0, "decay_fraction": 0.25}, "optimizer": {"learning_rate": 1e-9}}


def flat(texts: Path, folder: Path, stops: bool) -> Training:
    optimizer = {**FLAT["optimizer"], "batch_tokens": MICRO_ROWS * CONTEXT}
    sections = {**STAGES, "schedule": FLAT["schedule"], "optimizer": optimizer}
    return Training(texts, folder, "cpu", sections={**sections, "evaluation": {"points": 1000, "plateau_stop": stops}})


@pytest.fixture
def _wide_window(monkeypatch: pytest.MonkeyPatch) -> None:
    # A run of some dozen steps has no five of them in a tenth of it.
    monkeypatch.setattr(held_out, "PLATEAU_SHARE", 0.25)
    monkeypatch.setattr(held_out, "PLATEAU_POINTS", 3)


@pytest.mark.usefixtures("_wide_window")
def test_a_plateau_is_said_once_a_stage_and_ends_nothing(texts: Path, tmp_path: Path) -> None:
    training = flat(texts, tmp_path, stops=False)
    assert training(training.plan) == "done"
    said = (training.run.path / "said.txt").read_text()
    assert said.count("first gains no more") <= 1 and said.count("second gains no more") == 1
    assert max(points(training)) == training.plan["num_steps"]


@pytest.mark.slow
@pytest.mark.usefixtures("_wide_window")
def test_where_asked_to_the_decay_begins_at_the_plateau_also_after_a_restart(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = flat(texts, tmp_path / "whole", stops=True)
    assert whole(whole.plan) == "done"
    ended = max(points(whole))
    assert ended < whole.plan["num_steps"]
    rates = [json.loads(line)["lr"] for line in whole.run.metrics.read_text().splitlines()]
    constant = rates.count(1e-9)
    # A quarter of what the run then has is its decay.
    assert constant == pytest.approx(0.75 * ended, abs=2) and rates[-1] < 0.5 * rates[0]
    assert rates == sorted(rates, reverse=True)

    # Stopped before every step: each session has the points of those before it from the metrics alone.
    again = flat(texts, tmp_path / "again", stops=True)
    monkeypatch.setattr(StopRequest, "reason", lambda *_: "interrupted")
    num_sessions = 0
    while again(again.plan) != "done":
        num_sessions += 1
        assert num_sessions < 100
    assert num_sessions > 5
    assert [json.loads(line)["lr"] for line in again.run.metrics.read_text().splitlines()] == rates
    for name, value in whole.weights().items():
        assert value.equal(again.weights()[name]), name


def falling(num_points: int, share: float) -> list[tuple[int, float]]:
    """Points 10 steps apart that fall by so much of 2 bits over 100 steps."""
    return [(10 * number, 2.0 - 2.0 * share * number / 10) for number in range(num_points)]


def test_what_a_plateau_is() -> None:
    assert has_plateaued(falling(20, 0.001), 190, 100)
    assert has_plateaued(falling(20, -0.01), 190, 100)
    assert not has_plateaued(falling(20, 0.01), 190, 100)
    # Not seen for long enough, or too rarely.
    assert not has_plateaued(falling(10, 0.0), 90, 100)
    assert not has_plateaued(falling(20, 0.0)[::5], 150, 100)
    # Ups and downs are nothing to go by, nor is what was before the window.
    noisy = [(step, value + (-1) ** number * 0.05) for number, (step, value) in enumerate(falling(20, 0.05))]
    assert not has_plateaued(noisy, 190, 100)
    steep = [(step, value + 1.0) for step, value in falling(8, 0.5)]
    assert has_plateaued([*steep, *((80 + 10 * number, 2.0) for number in range(12))], 190, 100)
    # At the same bits a byte, a plateau of a tenth of the run is one of any run.
    tenfold = [(10 * step, value) for step, value in falling(20, 0.001)]
    assert has_plateaued(tenfold, 1900, 1000)


def test_damaged_metrics_are_no_points(texts: Path, tmp_path: Path) -> None:
    training = Training(texts, tmp_path, "cpu", sections={**STAGES, "evaluation": {"points": 4}})
    lines = [
        "[1, 2]",
        '{"step": 0}',
        '{"step": 0, "stage": 3, "bits_per_byte": {}}',
        "\x00",
        '{"step": 0, "stage": "a"}',
    ]
    lines += ['{"step": 0, "stage": "first", "bits_per_byte": {"first": "x"}}', '{"step": "0", "bits_per_byte": 1}']
    training.run.metrics.write_text("\n".join(lines) + "\n")
    assert training(training.plan) == "done"
    assert points(training)[training.plan["num_steps"]]["bits_per_byte"]["all"] is not None


@pytest.mark.parametrize("config", ["cpu", "zero3-offload"])
def test_a_point_that_does_not_fit_is_left_out(
    texts: Path, tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, num_points = DistillationModel.forward, 0

    def failing(self: DistillationModel, *arguments: Any, **options: Any) -> Any:
        nonlocal num_points
        if not self.training:
            num_points += 1
            if num_points == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(DistillationModel, "forward", failing)
    training = trained(texts, tmp_path / "disturbed", {"points": 2}, config)
    assert training.plan["num_steps"] in points(training) and num_points > 1
    assert len(training.losses()) == training.plan["num_steps"]
    assert "held-out text is not measured" in (training.run.path / "said.txt").read_text()
    assert [session.reason for session in sessions(training.run.ledger)] == ["done"]
    monkeypatch.undo()
    undisturbed = trained(texts, tmp_path / "undisturbed", {"points": 2}, config)
    for name, value in undisturbed.weights().items():
        assert value.equal(training.weights()[name]), name
