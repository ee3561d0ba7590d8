"""The loss of hidden states: against plain formulas in fp64, inside the engine, and in a run with its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import (
    COMPARING,
    EOS,
    OPTIMIZER,
    SHAPE,
    STEPS,
    Case,
    batches,
    losses_on,
    make_student,
    make_teacher,
    num_targets,
)
from test_engine import CONFIGS
from tiny_training import Training, make_texts
from torch.nn import functional as F

from daramgpt import checkpoint, recipe, student
from daramgpt.blocks import block_pairs, blocks_of, matching_blocks
from daramgpt.engine import PROJECTIONS, DistillationModel, Distiller
from daramgpt.errors import UserError
from daramgpt.export import restore_student
from daramgpt.initialisation import fit_projections
from daramgpt.losses import HiddenStateLoss, distillation_loss_reference
from daramgpt.planner import read_plan
from daramgpt.recipe import Loss, Shape
from daramgpt.teacher import Teacher, load

N, D, E, PAIRS = 50, 16, 24, 2


def states(dtype: torch.dtype, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Student's and teacher's states of each pair, and labels of which some are left out."""
    generator = torch.Generator().manual_seed(seed)
    own = [torch.randn(N, D, generator=generator, dtype=torch.float64) * 3 for _ in range(PAIRS)]
    other = [torch.randn(N, E, generator=generator, dtype=torch.float64) + 0.5 for _ in range(PAIRS)]
    labels = torch.randint(0, 9, (N,), generator=generator)
    labels[::7] = -100
    return [one.to(dtype).requires_grad_() for one in own], [one.to(dtype) for one in other], labels


def plain(loss: Any, own: list[torch.Tensor], other: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """1 - cosine by torch, in fp64, of the same numbers."""
    total = torch.zeros((), dtype=torch.float64)
    for projection, mine, theirs in zip(loss.projections, own, other, strict=True):
        projected = F.linear(mine.double(), projection.weight.double(), projection.bias.double())
        total = total + (1 - F.cosine_similarity(projected, theirs.double(), dim=1))[labels != -100].sum()
    return total / len(own)


def gradients(value: torch.Tensor, loss: Any, own: list[torch.Tensor]) -> list[torch.Tensor]:
    found = torch.autograd.grad(value, [*own, *loss.parameters()])
    return [one.double() for one in found]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_value_and_gradients_are_those_of_plain_formulas(dtype: torch.dtype, bound: float) -> None:
    loss = HiddenStateLoss(D, E, PAIRS, seed=3, chunk_tokens=16).to(dtype)
    own, other, labels = states(dtype)
    value = loss(own, other, labels)
    expected = plain(loss, own, other, labels)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(expected.item(), rel=bound)
    for found, wanted in zip(gradients(value, loss, own), gradients(expected, loss, own), strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < bound


def test_fp16_gradients_survive_a_division_by_many_tokens_under_a_loss_scale() -> None:
    loss = HiddenStateLoss(D, E, PAIRS, chunk_tokens=16).half()
    own, other, labels = states(torch.float16)
    tokens, scale = 1e6, 65536.0
    found = gradients(loss(own, other, labels) / tokens * scale, loss, own)
    wanted = gradients(plain(loss, own, other, labels) / tokens * scale, loss, own)
    for one, expected in zip(found, wanted, strict=True):
        assert float((one - expected).norm() / expected.norm()) < 5e-3


def test_tokens_that_are_left_out_change_nothing() -> None:
    loss = HiddenStateLoss(D, E, PAIRS, chunk_tokens=16)
    own, other, labels = states(torch.float32)
    kept = labels != -100
    value = loss(own, other, labels)
    for found, few in zip(gradients(value, loss, own)[:PAIRS], own, strict=True):
        assert not found[~kept].any() and found[kept].any()
        assert few.grad is None
    alone = loss([one[kept] for one in own], [one[kept] for one in other], labels[kept])
    assert value.item() == pytest.approx(alone.item(), rel=1e-6)


def test_states_of_nothing_give_finite_values() -> None:
    loss = HiddenStateLoss(D, E, 1)
    own = [torch.zeros(4, D, requires_grad=True)]
    value = loss(own, [torch.zeros(4, E)], torch.zeros(4, dtype=torch.int64))
    assert value.item() == pytest.approx(4.0)
    assert all(bool(one.isfinite().all()) for one in gradients(value, loss, own))


def test_a_teacher_hands_on_what_its_next_block_reads() -> None:
    model = student.build(Shape(n_embd=24, n_head=2, n_layer=3), 61, 12, EOS, seed=2).eval()
    for block in model.transformer.h:
        block.ln_1.weight.data.uniform_(0.5, 2)
    frozen = Teacher(model, model.lm_head.weight, None, "fp32", 0, 0, 12)
    ids = torch.randint(0, 61, (2, 12))
    hidden, found = frozen.states(ids, [1, 3, 2])
    with torch.no_grad():
        whole = model.transformer(ids, output_hidden_states=True)
        expected = [model.transformer.h[1].ln_1(whole.hidden_states[1]), whole.last_hidden_state]
        expected.append(model.transformer.h[2].ln_1(whole.hidden_states[2]))
    assert torch.equal(hidden, whole.last_hidden_state)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted)
    assert not any(block.ln_1._forward_hooks for block in blocks_of(model))


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen3"])
def test_teachers_of_other_architectures_hand_on_states(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    if kind == "qwen3":
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(kind, vocab_size=61, max_position_embeddings=16, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    teacher = load(tmp_path, "fp32")
    hidden, (first, last) = teacher.states(torch.randint(0, 61, (2, 12)), [1, 2])
    assert first.shape == hidden.shape == (2, 12, 32)
    assert torch.equal(last, hidden) and not torch.equal(first, hidden)


def test_blocks_stand_evenly_over_the_teachers() -> None:
    assert matching_blocks(4, 24) == [6, 12, 18, 24]
    assert matching_blocks(2, 3) == [2, 3]
    assert block_pairs(None, 4, 24) == [(1, 6), (2, 12), (3, 18), (4, 24)]
    assert block_pairs(None, 4, 1)[-1] == (4, 1)
    assert block_pairs([(4, 24)], 4, 24) == [(4, 24)]
    with pytest.raises(UserError, match="hidden_blocks: there is no pair 4, 25"):
        block_pairs([(4, 25)], 4, 24)


def plain_losses(teacher: Teacher) -> list[float]:
    """Losses of each step by transformers, plain formulas and torch's AdamW."""
    model = make_student()
    compared = HiddenStateLoss(SHAPE.n_embd, teacher.head_weight.shape[1], 2, seed=0)
    parameters = [*model.parameters(), *compared.parameters()]
    groups = [
        {"params": [p for p in parameters if (p.dim() >= 2) is is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, OPTIMIZER.weight_decay), (False, 0.0))
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2))
    losses = []
    for step in range(STEPS):
        adam.zero_grad()
        total = torch.zeros(())
        for input_ids, labels in batches(step):
            with torch.no_grad():
                seen = teacher.model.transformer(input_ids).last_hidden_state
            output = model(input_ids, output_hidden_states=True)
            kd, ce = distillation_loss_reference(
                output.logits.flatten(0, 1), (seen @ teacher.head_weight.T).flatten(0, 1), labels.flatten(), 2.0
            )
            # The teacher of one block: both of the student's stand for it. The last state is in front of the last norm.
            last: list[torch.Tensor] = []
            handle = model.transformer.ln_f.register_forward_pre_hook(
                lambda module, inputs, kept=last: kept.append(*inputs)
            )
            model(input_ids)
            handle.remove()
            own = [output.hidden_states[1].flatten(0, 1), last[0].flatten(0, 1)]
            hidden = plain(compared, own, [seen.flatten(0, 1)] * 2, labels.flatten())
            loss = (kd + 0.1 * ce + COMPARING.hidden_weight * hidden) / num_targets(step)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
        adam.step()
        losses.append(float(total))
    return losses


def distiller_for(
    config: str, teacher: Teacher, folder: Path, weights: Any = None, loss: Loss = COMPARING
) -> Distiller:
    model = make_student()
    if weights is not None:
        own = {name: value for name, value in weights.items() if not name.startswith(PROJECTIONS)}
        model.load_state_dict(own, strict=False)
    log = folder / "log.txt"
    return Distiller(model, loss, OPTIMIZER, CONFIGS[config], 2, 4, 7, teacher, log, weights=weights)


def steps(distiller: Distiller, numbers: range) -> list[float]:
    results = [distiller.step(batches(step), num_targets(step), OPTIMIZER.learning_rate) for step in numbers]
    return [COMPARING.total(one.kd, one.ce, one.hidden) for one in results]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


@pytest.fixture(scope="module")
def expected(teacher: Teacher) -> list[float]:
    return plain_losses(teacher)


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_equal_a_plain_loop_under_every_stage(
    config: str, teacher: Teacher, expected: list[float], tmp_path: Path
) -> None:
    distiller = distiller_for(config, teacher, tmp_path)
    losses = steps(distiller, range(STEPS))
    distiller.close()
    assert losses == pytest.approx(expected, rel=1e-5)


def test_two_ranks_train_what_one_does(expected: list[float], tmp_path: Path) -> None:
    cases = {config: Case(CONFIGS[config], compares=True) for config in ("zero-0", "zero-2-offload", "zero-3")}
    for config, losses in losses_on(2, cases, tmp_path).items():
        assert losses == pytest.approx(expected, rel=1e-5), config


@pytest.mark.parametrize("config", CONFIGS)
def test_projections_are_restored_with_their_moments(
    config: str, teacher: Teacher, expected: list[float], tmp_path: Path
) -> None:
    distiller = distiller_for(config, teacher, tmp_path)
    steps(distiller, range(2))
    tensors, scaler = distiller.gather(), distiller.loss_scaler()
    distiller.close()
    distiller = distiller_for(config, teacher, tmp_path, tensors["weights"])
    distiller.restore(tensors, 2, scaler)
    losses = steps(distiller, range(2, STEPS))
    distiller.close()
    assert losses == pytest.approx(expected[2:], rel=1e-5)


@pytest.mark.parametrize("config", ["zero-0", "zero-2"])
def test_a_run_may_take_the_loss_up_or_leave_it_on_the_way(config: str, teacher: Teacher, tmp_path: Path) -> None:
    for first, then in ((Loss(), COMPARING), (COMPARING, Loss())):
        distiller = distiller_for(config, teacher, tmp_path, loss=first)
        steps(distiller, range(2))
        tensors = distiller.gather()
        distiller.close()
        distiller = distiller_for(config, teacher, tmp_path, tensors["weights"], then)
        distiller.restore(tensors, 2, {})
        result = distiller.step(batches(2), num_targets(2), OPTIMIZER.learning_rate)
        assert result.applied and (result.hidden > 0) is (then is COMPARING)
        distiller.close()


def test_fitted_projections_begin_nearer_than_random_ones(teacher: Teacher) -> None:
    model = make_student()
    pairs = [(1, 1), (2, 1)]
    rows = torch.cat([batch for step in range(4) for batch, _ in batches(step)])
    found = fit_projections(teacher, model, rows, pairs, lambda: None)
    module = DistillationModel(model, COMPARING, 64, False, 24, [1, 2])
    hidden, states_of_teacher = teacher.states(rows, [1, 1])

    def loss() -> float:
        with torch.no_grad():
            labels = torch.zeros_like(rows)
            given = (hidden, teacher.head_weight, None, states_of_teacher)
            return module(rows, labels, *given)[3].item() / rows.numel()

    before = loss()
    module.take_along(found)
    assert before > 0.9 and loss() < 0.5
    with torch.no_grad():
        own = model.transformer(rows, output_hidden_states=True).hidden_states[1].flatten(0, 1)
        wanted = states_of_teacher[0].flatten(0, 1)
        weights = 1 / wanted.square().mean(1)
        design = torch.cat([own, torch.ones(len(own), 1)], 1)
        best = torch.linalg.lstsq(design * weights.sqrt()[:, None], wanted * weights.sqrt()[:, None]).solution
        first = module.hidden_states.projections[0]  # type: ignore[union-attr, index]
        errors = [
            float((weights[:, None] * (predicted - wanted).square()).sum())
            for predicted in (F.linear(own, first.weight, first.bias), design @ best)  # type: ignore[union-attr, arg-type]
        ]
    assert errors[0] < 1.02 * errors[1]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


def test_a_run_goes_on_from_a_checkpoint_to_the_bit_and_exports_the_student_alone(texts: Path, tmp_path: Path) -> None:
    section = {"loss": {"hidden_weight": 2.0}}
    whole = Training(texts, tmp_path / "whole", "cpu", sections=section)
    assert whole(whole.plan) == "done"
    metrics = [json.loads(line) for line in whole.run.metrics.read_text().splitlines()]
    assert metrics[-1]["hidden"] < metrics[0]["hidden"]
    for line in metrics:
        assert line["loss"] == pytest.approx(whole.recipe.loss.total(line["kd"], line["ce"], line["hidden"]))
    saved = checkpoint.newest(whole.run.checkpoints)
    assert saved is not None
    trained_along = [name for name in saved.tensors("weights") if name.startswith(PROJECTIONS)]
    assert len(trained_along) == 2
    assert saved.tensors("weights").keys() - set(trained_along) == saved.weights().keys()
    restore_student(whole.recipe.student, saved.weights(), whole.shards.tokenizer_dir)

    again = Training(texts, tmp_path / "again", "cpu", sections=section, every_minutes=1e-9)
    assert again({**again.plan, "num_steps": again.plan["num_steps"]}) == "done"
    middle = sorted(again.run.checkpoints.glob("step-*"))[0]
    for newer in again.run.checkpoints.glob("step-*"):
        if newer != middle:
            for file in newer.iterdir():
                file.unlink()
            newer.rmdir()
    (again.run.checkpoints / "latest").unlink()
    again.run.metrics.unlink()
    assert again(again.plan) == "done"
    resumed = checkpoint.newest(again.run.checkpoints)
    assert resumed is not None
    for name, value in saved.tensors("weights").items():
        assert value.equal(resumed.tensors("weights")[name]), name


def test_a_plan_counts_the_projections(texts: Path, tmp_path: Path) -> None:
    without = Training(texts, tmp_path / "without", "cpu")
    with_it = Training(texts, tmp_path / "with", "cpu", sections={"loss": {"hidden_weight": 2.0}})
    numbers = 1 * (16 + 1) * 24
    found = [read_plan(one.run)["predicted"]["memory_bytes"] for one in (without, with_it)]  # type: ignore[index]
    assert found[1]["optimizer"] - found[0]["optimizer"] == 12 * numbers
    assert found[1]["student weights"] - found[0]["student weights"] == 4 * numbers


@pytest.mark.parametrize(
    ("blocks", "fault"),
    [
        ([[5, 1]], "names block 5 of a student of 4"),
        ([[0, 1]], "counted from 1"),
        ([[1, 2], [1, 3]], "stands there twice"),
        ([], "at least 1"),
    ],
)
def test_blocks_that_cannot_be_are_refused_by_name(blocks: list[list[int]], fault: str) -> None:
    with pytest.raises(UserError, match="loss") as caught:
        recipe.load("daramgpt", [f"loss.hidden_blocks={json.dumps(blocks)}"])
    assert fault in str(caught.value)


def test_a_recipe_with_pairs_is_written_and_read_back(tmp_path: Path) -> None:
    given = recipe.load("daramgpt", ["loss.hidden_weight=1.5", "loss.hidden_blocks=[[2, 12], [4, 24]]"])
    (tmp_path / "again.toml").write_text(recipe.dump(given), encoding="utf-8")
    again = recipe.load(str(tmp_path / "again.toml"))
    assert again.loss == given.loss
    assert "hidden states" in again.loss.formula and "hidden" not in Loss().formula
