"""What a student begins with: as good as its shape allows, made once, the same each time, refused before the run."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from test_run import RECIPE, Run, assert_same
from torch.nn import functional as F

from daramgpt import initialisation, ledger, student
from daramgpt import recipe as recipes
from daramgpt.commands import initial_weights
from daramgpt.doctor import needs
from daramgpt.doctor.finding import Check
from daramgpt.engine import PROJECTIONS
from daramgpt.errors import UserError
from daramgpt.initialisation import pruning
from daramgpt.initialisation.attention_fit import Head, fit_attention
from daramgpt.initialisation.layers import evenly
from daramgpt.initialisation.least_squares import Fit, factors, fit, moments, square_root
from daramgpt.initialisation.pruning import largest, measure
from daramgpt.initialisation.teacher_states import centred, walk
from daramgpt.recipe import Recipe, Shape, Student, validate
from daramgpt.run_directory import RunDirectory
from daramgpt.teacher.activations import fuse_gelu
from daramgpt.tokenizer import train_tokenizer
from daramgpt.train import StopRequest

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
    initialisation.project(teacher, model, input_ids, lambda line: None, lambda: None)
    return model


def pruned(teacher: Any, shape: Shape, input_ids: torch.Tensor) -> Any:
    model = student.build(shape, VOCAB, CONTEXT, 0, seed=4).eval()
    initialisation.prune(teacher, model, input_ids, lambda line: None, lambda: None)
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


def test_moments_of_some_inputs_are_those_of_a_fit_by_them_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(shape, generator=generator) + 3 for shape in ((5000, 7), (5000, 2)))
    sample_weights = torch.rand(5000, generator=generator)
    some = torch.tensor([5, 0, 3])
    whole = moments(lambda place: inputs[place], targets, sample_weights)
    found, expected = whole.of(some).fit(0.1), fit(inputs[:, some], targets, sample_weights, 0.1)
    torch.testing.assert_close(found.weight, expected.weight)
    torch.testing.assert_close(found.bias, expected.bias)


def test_the_walk_sees_the_states_of_the_model(teacher: Any, input_ids: torch.Tensor) -> None:
    with torch.no_grad():
        states = teacher(input_ids[:6], output_hidden_states=True).hidden_states
    for number, one in enumerate(walk(teacher, input_ids[:6])):
        torch.testing.assert_close(one.before, centred(states[number]).flatten(0, 1), rtol=1e-4, atol=1e-4)
        if number + 1 < TEACHER.n_layer:
            torch.testing.assert_close(one.after, centred(states[number + 1]).flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_head_averages_what_came_before_at_each_of_the_tokens_that_are_looked_at() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (Fit(torch.randn(8, 4, generator=generator), torch.randn(4, generator=generator)) for _ in "qk")
    # A length that does not divide by the stride.
    stream = torch.randn(3, 10, 8, generator=generator)
    found = Head(query, key).mixed(stream.flatten(0, 1), 3, 4).view(3, 3, 8)
    for row in range(3):
        for place, token in enumerate((0, 4, 8)):
            seen = stream[row, : token + 1]
            weights = F.softmax(query(stream[row, token : token + 1]) @ key(seen).T / 2, -1)
            torch.testing.assert_close(found[row, place], (weights @ seen)[0])


@torch.no_grad()
def test_attention_hardly_follows_what_is_noise(teacher: Any, input_ids: torch.Tensor) -> None:
    """Fitted closely it learns the texts that it was fitted on, and the student ends farther from its teacher."""
    rows, width, num_heads = input_ids[:4], 16, 2
    generator = torch.Generator().manual_seed(5)
    stream, wanted = (torch.randn(rows.numel(), width, generator=generator) for _ in range(2))
    model = student.build(Shape(n_embd=width, n_head=num_heads, n_layer=1), VOCAB, CONTEXT, 0, 0)
    attention = model.transformer.h[0].attn
    states = [next(walk(teacher, rows))]
    weights = fit_attention(states, stream, wanted, torch.ones(len(stream)), len(rows), num_heads, lambda: None)
    attention.load_state_dict(weights, strict=False)
    added = attention(stream.view(len(rows), -1, width))[0].flatten(0, 1)
    assert 0.9 < (wanted - added).square().sum() / wanted.square().sum() < 1


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


def test_a_student_pruned_to_the_teachers_shape_is_the_teacher(teacher: Any, input_ids: torch.Tensor) -> None:
    same = pruned(teacher, TEACHER, input_ids[:16])
    with torch.no_grad():
        torch.testing.assert_close(same(input_ids[:4]).logits, teacher(input_ids[:4]).logits, rtol=1e-4, atol=1e-4)


def test_pruning_leaves_what_the_teacher_does_not_use(teacher: Any, input_ids: torch.Tensor) -> None:
    """Channels, a head and neurons without any effect."""
    plain = copy.deepcopy(teacher)
    body = plain.transformer
    unused, used = torch.arange(0, 32, 2), torch.arange(1, 32, 2)
    for norm in (body.ln_f, *(norm for block in body.h for norm in (block.ln_1, block.ln_2))):
        norm.weight[unused], norm.bias[unused] = 0.0, 0.0
    for block in body.h:
        # The second head goes, and of the others' eight dimensions one half.
        block.attn.c_attn.weight[:, 8:16], block.attn.c_attn.bias[8:16] = 0.0, 0.0
        block.attn.c_attn.weight[:, 72:80], block.attn.c_attn.bias[72:80] = 0.0, 0.0
        block.mlp.c_fc.weight[:, 64:], block.mlp.c_fc.bias[64:] = 0.0, 0.0
    found = measure(plain, input_ids[:16], lambda: None)
    assert largest(found.channels, 16).tolist() == used.tolist()
    for values, queries_keys, neurons in zip(found.values, found.queries_keys, found.neurons, strict=True):
        assert not values[1].any() and not queries_keys[1].any()
        assert largest(values.norm(dim=1), 3).tolist() == [0, 2, 3]
        assert largest(neurons, 64).tolist() == list(range(64))
    small = pruned(plain, Shape(n_embd=16, n_head=2, n_layer=2), input_ids[:16])
    torch.testing.assert_close(small.transformer.wte.weight, body.wte.weight[:, used])
    # The first block and the last.
    for new, old in zip(small.transformer.h, (body.h[0], body.h[3]), strict=True):
        torch.testing.assert_close(new.ln_1.weight, old.ln_1.weight[used])
        torch.testing.assert_close(new.mlp.c_fc.weight, old.mlp.c_fc.weight[used][:, :64])
        torch.testing.assert_close(new.mlp.c_proj.weight, old.mlp.c_proj.weight[:64][:, used])


def test_a_pruned_head_keeps_its_logits(teacher: Any, input_ids: torch.Tensor) -> None:
    """Of heads of eight dimensions, four of which do nothing, four are enough."""
    plain = copy.deepcopy(teacher)
    idle = torch.tensor([head * 8 + place for head in range(4) for place in (0, 3, 4, 6)])
    for block in plain.transformer.h:
        for first in (0, 32, 64):
            block.attn.c_attn.weight[:, first + idle], block.attn.c_attn.bias[first + idle] = 0.0, 0.0
    new = student.build(Shape(n_embd=16, n_head=4, n_layer=4), VOCAB, CONTEXT, 0, seed=4).eval().transformer.h[1].attn
    old = plain.transformer.h[1].attn
    channels = torch.arange(16)
    old.c_attn.weight[16:], old.c_proj.weight[:, 16:], old.c_proj.bias[16:] = 0.0, 0.0, 0.0
    found = measure(plain, input_ids[:16], lambda: None)
    with torch.no_grad():
        pruning._copy_attention(old, new, channels, 4, found.queries_keys[1], found.values[1])
        states = torch.randn(2, CONTEXT, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(new(states[..., :16])[0], old(states)[0][..., :16], rtol=1e-4, atol=1e-5)


def test_a_head_wider_than_the_teachers_is_filled_with_nothing(teacher: Any, input_ids: torch.Tensor) -> None:
    model = pruned(teacher, Shape(n_embd=32, n_head=2, n_layer=2), input_ids[:16])
    weight = model.transformer.h[0].attn.c_attn.weight.view(32, 3, 2, 16)
    assert weight[..., :8].any() and not weight[..., 8:].any()


@pytest.mark.parametrize(
    ("old", "new", "taken"), [(12, 4, [0, 4, 7, 11]), (4, 4, [0, 1, 2, 3]), (6, 2, [0, 5]), (5, 1, [0])]
)
def test_blocks_are_taken_evenly(old: int, new: int, taken: list[int]) -> None:
    assert evenly(old, new) == taken


def test_layers_are_those_of_the_model(teacher: Any, input_ids: torch.Tensor) -> None:
    model = student.build(Shape(n_embd=32, n_head=4, n_layer=2), VOCAB, CONTEXT - 4, 0, seed=4).eval()
    assert initialisation.take_layers(teacher, model) == [0, 3]
    shortened = copy.deepcopy(teacher)
    shortened.transformer.h = torch.nn.ModuleList([teacher.transformer.h[0], teacher.transformer.h[3]])
    with torch.no_grad():
        rows = input_ids[:2, : CONTEXT - 4]
        torch.testing.assert_close(model(rows).logits, shortened(rows).logits)


@pytest.mark.parametrize(
    ("changes", "shape", "said"),
    [
        ({"model_type": "llama"}, TEACHER, "GPT-2"),
        ({"activation_function": "relu"}, TEACHER, "GELU"),
        ({"scale_attn_by_inverse_layer_idx": True}, TEACHER, "scale of attention"),
        ({}, Shape(n_embd=64, n_head=4, n_layer=4), "64/4/4"),
        ({}, Shape(n_embd=32, n_head=4, n_layer=5), "larger than the teacher"),
        ({"init": "pruned"}, Shape(n_embd=16, n_head=8, n_layer=4), "16/8/4"),
    ],
    ids=str,
)
def test_teachers_that_cannot_be_begun_from(teacher: Any, changes: dict[str, Any], shape: Shape, said: str) -> None:
    config = type(teacher.config)(**teacher.config.to_dict())
    one = Student(**{"init": "projected", **shape.model_dump()})
    if "init" in changes:
        initialisation.check(config, one)
        one = one.model_copy(update=changes)
    else:
        for key, value in changes.items():
            setattr(config, key, value)
    with pytest.raises(UserError, match=said) as caught:
        initialisation.check(config, one)
    assert "student.init" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "GPT-2"),
        ({"n_embd": 64}, "n_embd 64, the student 32; set student.n_embd = 64"),
        ({"n_head": 2}, "n_head 2, the student 4; set student.n_head = 2"),
        ({"n_inner": 64}, "n_inner 64, the student 128"),
        ({"vocab_size": 50}, "vocab_size 50, the student 96"),
        ({"n_layer": 2}, "n_layer 2, the student 3; set student.n_layer = 2"),
        ({"n_positions": 12}, "n_positions 12, the student 24; set curriculum.context_tokens = 12"),
    ],
    ids=str,
)
def test_models_whose_blocks_do_not_fit(teacher: Any, changes: dict[str, Any], said: str) -> None:
    config = type(teacher.config)(**teacher.config.to_dict())
    one = Student(n_embd=32, n_head=4, n_layer=3, init="layers", init_model="there")
    initialisation.check_layers(config, one, VOCAB, CONTEXT)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=said) as caught:
        initialisation.check_layers(config, one, VOCAB, CONTEXT)
    assert "student.init_model: there" in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"init": "layers"}, {"init_model": "x"}, {"init": "pruned", "init_model": "x"}], ids=str
)
def test_a_model_to_begin_from_is_given_where_it_is_needed(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="init_model"):
        Student(**options)


def recipe_of(teacher_dir: Path, **options: Any) -> Recipe:
    stage = {"name": "web", "corpus": "web", "take": "8KB", "unit": "sentence"}
    return validate(
        {
            "name": "test",
            "curriculum": {"context_tokens": CONTEXT, "stages": [stage]},
            "teacher": {"model": str(teacher_dir)},
            "student": {"n_embd": 32, "n_head": 4, "n_layer": 2, **options},
        },
        "test",
    )


def saved(model: Any, folder: Path, *lines: str) -> Path:
    """As a Hugging Face directory with a tokenizer of these lines."""
    model.save_pretrained(folder)
    train_tokenizer(iter(lines), 300, folder)
    return folder


def test_the_doctor_knows_by_configurations_alone(teacher: Any, tmp_path: Path) -> None:
    folder = saved(teacher, tmp_path / "teacher", "한 줄이다")
    same = saved(teacher, tmp_path / "same", "한 줄이다")
    other = saved(teacher, tmp_path / "other", "다른 줄이다, 아주 다른 줄이다")
    for path in (folder, same, other):
        (path / "model.safetensors").unlink()

    def found(**options: Any) -> Check | None:
        return next(needs.initialisation(recipe_of(folder, **options)), None)

    assert found() is None
    for options, said in (
        ({"init": "auto"}, "begins with weights projected from the teacher"),
        ({"init": "auto", "n_embd": 64}, "begins with random weights (student.init"),
    ):
        check = found(**options)
        assert check is not None and not check.blocks and said in check.text, check
    for options in ({"init": "projected"}, {"init": "pruned"}, {"init": "layers", "init_model": str(same)}):
        check = found(**options)
        assert check is not None and not check.blocks, check
    for options, said in (
        ({"init": "projected", "n_embd": 64}, "larger than the teacher"),
        ({"init": "layers", "init_model": str(tmp_path)}, f"student.init_model: {tmp_path} holds no config.json"),
        ({"init": "layers", "init_model": "./none"}, "student.init_model: there is no folder"),
        ({"init": "layers", "init_model": str(other)}, "another tokenizer"),
        ({"init": "layers", "init_model": str(same), "n_head": 2}, "n_head 4, the student 2"),
    ):
        check = found(**options)
        assert check is not None and check.blocks and said in check.text, check


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose teacher is trained, and whose student is to be projected from it."""
    run = Run(tmp_path_factory.mktemp("prepared"))
    text = RECIPE.replace("[student]", '[student]\ninit = "projected"\ncalibration_tokens = 2048')
    (run.folder / "tiny.toml").write_text(text.replace("baseline = true", "baseline = false"), encoding="utf-8")
    run("prepare")
    run("plan")
    run("train", "--hours", "0.000001")
    # The teacher's first step; another session has its end.
    process = run.start("train")
    while process.poll() is None and not (run.directory.part("teacher").export / "model.safetensors").is_file():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in (run.directory.checkpoints, run.directory.ledger, run.directory.initial_weights, run.directory.metrics):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert not run.directory.initial_weights.exists()
    return run


@pytest.fixture
def begun(prepared: Run, tmp_path: Path) -> Run:
    shutil.copytree(prepared.folder, tmp_path, dirs_exist_ok=True)
    return Run(tmp_path)


def reasons(run: Run) -> list[tuple[str, str]]:
    return [(session.training, session.reason) for session in ledger.sessions(run.directory.ledger)]


ONE_STEP = ("--hours", "0.000001")
MADE, STEPPED = ("initial weights", "done"), ("student", "deadline")


def test_a_run_begins_with_them_once_and_their_time_counts(begun: Run) -> None:
    # Made to their end whatever the hours of the session, as its first step is.
    said = begun("train", *ONE_STEP)
    assert said.count("before any training") == 1
    [note] = [note for note in ledger.notes(begun.directory.ledger) if "projected" in note.get("what", "")]
    assert note["bits_per_byte"] < note["random_bits_per_byte"]
    assert reasons(begun) == [MADE, STEPPED]
    made, _ = ledger.sessions(begun.directory.ledger)
    assert made.seconds >= note["seconds"] - 0.1 > 0
    status = begun.status()
    assert status["state"] == "deadline" and status["hours_used"] * 3600 > made.seconds
    assert "initial weights" in begun("status")
    assert "before any training" not in begun("train", *ONE_STEP)
    assert reasons(begun) == [MADE, STEPPED, STEPPED]


def test_auto_is_projected_where_the_teacher_allows_it(begun: Run) -> None:
    recipe = begun.directory.recipe
    recipe.write_text(recipe.read_text(encoding="utf-8").replace('"projected"', '"auto"'), encoding="utf-8")
    assert "before any training" in begun("train", *ONE_STEP)
    # The session after knows the checkpoint for its own.
    assert "goes on from step 1" in begun("train", *ONE_STEP)
    assert reasons(begun) == [MADE, STEPPED, STEPPED]


def test_auto_is_random_beside_a_smaller_teacher(teacher: Any, tmp_path: Path) -> None:
    saved(teacher, tmp_path, "한 줄이다")
    lines: list[str] = []
    run, console = RunDirectory(tmp_path / "run"), lines.append
    found = initial_weights.settled("student", recipe_of(tmp_path, init="auto", n_embd=64), run, console)  # type: ignore[arg-type]
    assert found.student.init == "random"
    assert len(lines) == 1 and "random weights" in lines[0] and "larger than the teacher (32/4/4)" in lines[0]


def test_projections_of_hidden_states_begin_fitted(begun: Run) -> None:
    text = begun.directory.recipe.read_text(encoding="utf-8")
    assert "hidden_weight = 0.0" in text
    begun.directory.recipe.write_text(text.replace("hidden_weight = 0.0", "hidden_weight = 2.0"), encoding="utf-8")
    begun("train", *ONE_STEP)
    names = load(begun.directory.initial_weights.read_bytes()).keys()
    assert [name for name in names if name.startswith(PROJECTIONS)]
    [first, *_] = ledger.entries(begun.directory.metrics)
    # Two directions at random have a cosine of 0.
    assert 0 < first["hidden"] < 0.6
    assert not any(name.startswith(PROJECTIONS) for name in begun.weights())


def test_damaged_weights_are_made_again(begun: Run) -> None:
    begun("train", *ONE_STEP)
    path = begun.directory.initial_weights
    good, stepped = path.read_bytes(), begun.weights()
    weights = load(good)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    made_from = facts["made_from"]
    assert initial_weights.stand(path, made_from) and not initial_weights.stand(path, f"{made_from} ")
    middle = len(good) // 2
    for damaged in (good[:middle], good[:-1], b"x", good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]):
        path.write_bytes(damaged)
        assert not initial_weights.stand(path, made_from)
    name = "transformer.wte.weight"
    for other in (
        {name: weights[name][:1]},
        {**weights, name: weights[name].flatten()},
        {**weights, "x": weights[name]},
    ):
        save_file({key: value.clone() for key, value in other.items()}, path, facts)
        assert not initial_weights.stand(path, made_from)
    shutil.rmtree(begun.directory.checkpoints)
    begun.directory.metrics.unlink()
    assert "made again" in begun("train", *ONE_STEP)
    assert_same(load(path.read_bytes()), weights)
    assert_same(begun.weights(), stepped)


def test_what_fails_on_a_gpu_is_made_on_the_cpu(begun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun("train", *ONE_STEP)
    path, lines, places = begun.directory.initial_weights, [], []
    expected = load(path.read_bytes())
    path.unlink()
    original = initial_weights._make

    def make(*arguments: Any) -> None:
        places.append(arguments[-1].type)
        if places[-1] == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")
        original(*arguments)

    monkeypatch.setattr(initial_weights, "_make", make)
    monkeypatch.setattr(initial_weights, "_device", lambda: torch.device("cuda", 0))
    recipe, console = recipes.load(str(begun.directory.recipe)), lines.append
    run: Any = begun.directory
    initial_weights.ensure("student", recipe, run, run, "here", StopRequest(None), console)  # type: ignore[arg-type]
    assert places == ["cuda", "cpu"]
    assert any("failed on the GPU (CUDA out of memory. Tried to);" in line for line in lines)
    assert_same(load(path.read_bytes()), expected)
    assert [one.reason for one in ledger.sessions(begun.directory.ledger)][-1] == "done"


@pytest.mark.parametrize("fault", [RuntimeError("no such product"), UserError("no teacher", "give one")])
def test_what_fails_on_a_cpu_or_by_the_user_is_not_tried_again(
    begun: Run, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    tried: list[Any] = []

    def make(*arguments: Any) -> None:
        tried.append(arguments)
        raise fault

    monkeypatch.setattr(initial_weights, "_make", make)
    device = "cpu" if isinstance(fault, RuntimeError) else "cuda"
    monkeypatch.setattr(initial_weights, "_device", lambda: torch.device(device))
    recipe, run = recipes.load(str(begun.directory.recipe)), begun.directory
    with pytest.raises(type(fault)):
        initial_weights.ensure("student", recipe, run, run, "here", StopRequest(None), print)  # type: ignore[arg-type]
    assert len(tried) == 1 and [one.reason for one in ledger.sessions(run.ledger)] == ["failed"]


def test_a_signal_stops_the_making_and_the_next_start_does_it_again(begun: Run) -> None:
    process = begun.start("train")
    while process.poll() is None and not sessions_begun(begun):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert reasons(begun) == [("initial weights", "interrupted")]
    assert begun.status()["state"] == "interrupted"
    assert not begun.directory.initial_weights.exists()
    begun("train", *ONE_STEP)
    assert reasons(begun) == [("initial weights", "interrupted"), MADE, STEPPED]


def test_a_kill_leaves_what_was_used(begun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process would leave it that dies on its way."""
    monkeypatch.setattr(initial_weights, "BEAT_SECONDS", 0.0)
    session = initial_weights._Session(begun.directory, "here", StopRequest(None))
    time.sleep(0.01)
    session.tick()
    [died] = ledger.sessions(begun.directory.ledger)
    assert died.seconds >= 0.01 and died.reason == ledger.DIED
    begun("train", *ONE_STEP)
    assert reasons(begun) == [("initial weights", "died"), MADE, STEPPED]


@pytest.mark.slow
def test_both_ranks_begin_with_them(begun: Run) -> None:
    """The first one makes them, and both train what one process would."""
    begun.start("train", *ONE_STEP).wait(300)
    alone = begun.weights()
    shutil.rmtree(begun.directory.checkpoints)
    for path in (
        begun.directory.initial_weights,
        begun.directory.plan,
        begun.directory.metrics,
        begun.directory.ledger,
    ):
        path.unlink()
    begun("plan", "--num-gpus", "2")
    begun._said(begun.start("train", *ONE_STEP).wait(300), 0)
    assert reasons(begun) == [MADE, STEPPED]
    for name, value in begun.weights().items():
        assert value.allclose(alone[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.slow
def test_two_ranks_stop_for_a_signal_in_the_making(begun: Run) -> None:
    begun.directory.plan.unlink()
    begun("plan", "--num-gpus", "2")
    process = begun.start("train")
    while process.poll() is None and not begun.directory.session_recipe(None).is_file():
        time.sleep(0.01)
    # What the launcher writes for a signal; the ranks have not begun yet.
    begun.directory.stop_request.touch()
    assert process.wait(100) == 0, (begun.folder / "output.txt").read_text(encoding="utf-8")
    assert reasons(begun) == [("initial weights", "interrupted")]


def sessions_begun(run: Run) -> bool:
    return any(session.training == "initial weights" for session in ledger.sessions(run.directory.ledger))


@pytest.mark.parametrize("is_pickled", [False, True], ids=["safetensors", "bin"])
def test_a_run_begins_with_blocks_of_another_model(begun: Run, is_pickled: bool) -> None:
    text = begun.directory.recipe.read_text(encoding="utf-8")
    text = text.replace('init = "projected"', f'init = "layers"\ninit_model = "{begun.folder}/other"')
    begun.directory.recipe.write_text(text, encoding="utf-8")
    folder = begun.folder / "other"
    vocab_size = json.loads((begun.directory.part("teacher").export / "config.json").read_text())["vocab_size"]
    model = student.build(Shape(n_embd=16, n_head=2, n_layer=3), vocab_size, 40, 0, seed=9)
    model.save_pretrained(folder)
    shutil.copy(begun.directory.shards / "tokenizer" / "tokenizer.json", folder)
    if is_pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").rename(folder / "away.json")
    assert "holds no tokenizer.json" in begun("train", code=2)
    (folder / "away.json").rename(folder / "tokenizer.json")
    said = begun("train", *ONE_STEP)
    assert "blocks 1 of 3" in said and "before any training" in said
    expected = student.build(Shape(n_embd=16, n_head=2, n_layer=1), vocab_size, 32, 0, seed=1)
    initialisation.take_layers(model, expected)
    with safe_open(begun.directory.initial_weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), expected.state_dict()[name]), name
