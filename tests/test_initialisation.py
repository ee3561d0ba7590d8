"""A student projected from its teacher: as good as its shape allows, made once, the same each time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import RECIPE, Run
from torch.nn import functional as F

from daramgpt import initialisation, ledger, student
from daramgpt.errors import UserError
from daramgpt.initialisation.least_squares import factors, fit, square_root
from daramgpt.initialisation.teacher_states import centred, walk
from daramgpt.recipe import Shape
from daramgpt.teacher.activations import fuse_gelu

VOCAB, CONTEXT = 96, 24
TEACHER = Shape(n_embd=32, n_head=4, n_layer=4)


@pytest.fixture(scope="module")
def teacher() -> Any:
    """Of random weights, large enough that each part matters to its logits."""
    model = student.build(TEACHER, VOCAB, CONTEXT, 0, seed=1).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for name, value in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith("bias"):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        elif "h." in name:
            value.mul_(8)
        else:
            value.mul_(20)
    fuse_gelu(model)
    return model


@pytest.fixture(scope="module")
def input_ids(teacher: Any) -> torch.Tensor:
    """Text of the teacher's own: the first half is to calibrate on."""
    torch.manual_seed(3)
    rows = torch.randint(VOCAB, (256, 1))
    for _ in range(CONTEXT - 1):
        choices = F.softmax(teacher(rows).logits[:, -1] * 2, -1)
        rows = torch.cat([rows, torch.multinomial(choices, 1)], 1)
    return rows


def projected(teacher: Any, shape: Shape, input_ids: torch.Tensor) -> Any:
    model = student.build(shape, VOCAB, CONTEXT, 0, seed=4).eval()
    initialisation.project(teacher, model, input_ids, lambda line: None)
    return model


@torch.no_grad()
def kl_to(teacher: Any, model: Any, input_ids: torch.Tensor) -> float:
    """Nats a token."""
    p, q = (F.log_softmax(one(input_ids).logits, -1) for one in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_least_squares_finds_an_affine_map_and_obeys_its_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias = (torch.randn(shape, generator=generator) for shape in ((500, 7), (7, 3), (3,)))
    targets = inputs @ weight + bias
    targets[400:] += 100
    sample_weights = torch.cat([torch.ones(400), torch.zeros(100)])
    found = fit(inputs, targets, sample_weights, 0.0)
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bias, bias, rtol=1e-4, atol=1e-4)
    assert float((found(inputs[400:]) - targets[400:]).abs().min()) > 90


def test_factors_keep_most_of_a_product_for_their_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2000, 8, generator=generator) @ torch.randn(8, 8, generator=generator) for _ in "qk")
    logits = queries @ keys.T

    def lost(rank: int) -> float:
        a, b = factors(square_root(queries), square_root(keys), rank)
        return float((queries @ a @ b.T @ keys.T - logits).square().sum() / logits.square().sum())

    assert lost(8) < 1e-6
    assert lost(4) < float((queries[:, :4] @ keys[:, :4].T - logits).square().sum() / logits.square().sum())
    assert 0 < lost(6) < lost(4) < lost(2) < 1


def test_the_walk_sees_the_states_of_the_model(teacher: Any, input_ids: torch.Tensor) -> None:
    with torch.no_grad():
        states = teacher(input_ids[:6], output_hidden_states=True).hidden_states
    for number, one in enumerate(walk(teacher, input_ids[:6])):
        torch.testing.assert_close(one.before, centred(states[number]).flatten(0, 1), rtol=1e-4, atol=1e-4)
        if number + 1 < TEACHER.n_layer:
            torch.testing.assert_close(one.after, centred(states[number + 1]).flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_student_of_the_teachers_shape_is_nearly_the_teacher(teacher: Any, input_ids: torch.Tensor) -> None:
    random = student.build(TEACHER, VOCAB, CONTEXT, 0, seed=4).eval()
    plain = copy.deepcopy(teacher)
    # A scale of the last norm, channel by channel, is none in other channels while head and embedding are one.
    plain.transformer.ln_f.reset_parameters()
    same = projected(plain, TEACHER, input_ids[:128])
    assert kl_to(plain, same, input_ids[128:]) < 0.03 * kl_to(plain, random, input_ids[128:])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(n_embd=16, n_head=2, n_layer=2),
        Shape(n_embd=24, n_head=3, n_layer=3),
        # One head that is wider than a teacher's, and more heads than the teacher has in a block.
        Shape(n_embd=16, n_head=1, n_layer=4),
        Shape(n_embd=16, n_head=8, n_layer=4),
    ],
    ids=str,
)
def test_a_smaller_student_is_nearer_to_the_teacher_than_a_random_one(
    teacher: Any, input_ids: torch.Tensor, shape: Shape
) -> None:
    random = student.build(shape, VOCAB, CONTEXT, 0, seed=4).eval()
    model = projected(teacher, shape, input_ids[:128])
    assert kl_to(teacher, model, input_ids[128:]) < 0.7 * kl_to(teacher, random, input_ids[128:])


def test_it_is_the_same_each_time(teacher: Any, input_ids: torch.Tensor) -> None:
    shape = Shape(n_embd=16, n_head=2, n_layer=2)
    one, other = (projected(teacher, shape, input_ids[:64]).state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("changes", "shape", "said"),
    [
        ({"model_type": "llama"}, TEACHER, "GPT-2"),
        ({"activation_function": "relu"}, TEACHER, "GELU"),
        ({"scale_attn_by_inverse_layer_idx": True}, TEACHER, "scale of attention"),
        ({}, Shape(n_embd=64, n_head=4, n_layer=4), "64/4/4"),
        ({}, Shape(n_embd=32, n_head=4, n_layer=5), "larger than the teacher"),
    ],
    ids=str,
)
def test_teachers_that_cannot_be_projected(teacher: Any, changes: dict[str, Any], shape: Shape, said: str) -> None:
    config = type(teacher.config)(**teacher.config.to_dict())
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=said) as caught:
        initialisation.check(config, shape)
    assert "student.init" in str(caught.value)


def test_a_run_begins_with_it_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    text = RECIPE.replace("[student]", '[student]\ninit = "projected"\ncalibration_tokens = 2048')
    (tmp_path / "tiny.toml").write_text(text, encoding="utf-8")
    run("prepare")
    run("plan")
    run("train", "--hours", "0.000001")
    # The teacher's first step; its end, and the student's first, take further sessions.
    said = run("train")
    assert said.count("before any training") == 1
    notes = [note for note in ledger.notes(run.directory.ledger) if "projected" in note.get("what", "")]
    assert len(notes) == 1 and notes[0]["seconds"] > 0
    assert notes[0]["bits_per_byte"] < notes[0]["random_bits_per_byte"]
    assert run.directory.initial_weights.is_file()
    assert not run.directory.part("baseline").initial_weights.exists()
    assert "before any training" not in run("train")
