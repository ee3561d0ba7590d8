"""What ``teacher.precision = "auto"`` becomes: the rule over given figures, the measurement, and what a plan keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from daramgpt import commands, hardware, planner, recipe
from daramgpt.errors import UserError
from daramgpt.hardware import GIB, Gpu, Machine
from daramgpt.planner import ModelShape
from daramgpt.teacher import DTYPES, choice, quantised
from daramgpt.teacher.choice import Trial

CPU = Machine((), 2, 8 * GIB)
T4 = Machine((Gpu("Tesla T4", 15360 * 2**20, (7, 5)),), 2, 8 * GIB)
TRINITY = ModelShape(n_embd=1920, n_layer=24, vocab_size=51200, num_positions=1024)


def trials(**milliseconds: float) -> dict[str, Trial]:
    sizes = {"int8": 100, "llm_int8": 99, "fp16": 200, "fp32": 400}
    return {name.replace("_", "-"): Trial(value / 1e3, sizes[name]) for name, value in milliseconds.items()}


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"int8": 10.9, "fp16": 10.0}, "int8"),  # memory for a tenth of the time
        ({"int8": 11.1, "fp16": 10.0}, "fp16"),
        ({"int8": 10.5, "llm_int8": 10.0, "fp16": 10.2}, "int8"),  # of equals the more exact
        ({"int8": 15.0, "llm_int8": 10.0, "fp16": 14.0}, "llm-int8"),
        ({"int8": 12.0, "llm_int8": 12.0, "fp16": 11.0, "fp32": 10.0}, "fp16"),
        ({"int8": 20.0, "fp32": 1.0}, "fp32"),
        ({"int8": 1.0}, "int8"),
    ],
)
def test_the_smallest_that_is_nearly_as_fast_is_chosen(measured: dict[str, float], chosen: str) -> None:
    found, verdicts = choice.decide(trials(**measured))
    assert found == chosen
    assert verdicts.keys() | {chosen} == trials(**measured).keys()


def test_each_of_the_others_is_told_what_is_wrong_with_it() -> None:
    _, verdicts = choice.decide(trials(int8=15.0, llm_int8=10.0, fp16=10.0))
    assert verdicts == {"int8": "is 50% slower than llm-int8", "fp16": "takes 2.0 times the memory"}
    assert choice.decide(trials(int8=10, llm_int8=10))[1] == {"llm-int8": "takes as much memory and is less exact"}


def choose(monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> tuple[str, str]:
    """What is chosen where the clock says so."""
    seconds = {name.replace("_", "-"): value / 1e3 for name, value in milliseconds.items()}
    names: dict[int, str] = {}
    make = choice.TrialMlp

    def named(precision: str, *arguments: Any) -> torch.nn.Module:
        layer = make(precision, *arguments)
        names[id(layer)] = precision
        return layer

    monkeypatch.setattr(choice, "TrialMlp", named)
    monkeypatch.setattr(choice, "_forward_seconds", lambda layer, inputs: seconds[names[id(layer)]])
    monkeypatch.setattr(choice, "MEASURE_SECONDS", 0)
    return choice.choose(
        list(seconds),
        width=64,
        num_tokens=128,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        left_out={"fp16": "does not fit"},
    )


def test_the_reason_holds_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, reason = choose(monkeypatch, int8=21, fp32=20)
    assert chosen == "int8"
    for part in ("int8 21 ms, fp32 20 ms", "128 tokens", "64 x 64", "10%", "fp32 takes 3.", "fp16 does not fit"):
        assert part in reason


def test_a_precision_that_fails_is_passed_over_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(choice, "eight_bit_linear", broken)
    chosen, reason = choose(monkeypatch, int8=1, fp32=20)
    assert chosen == "fp32"
    assert "int8 fails here (no kernel image)" in reason
    with pytest.raises(UserError, match=r"teacher\.precision: int8 fails \(no kernel image\)"):
        choose(monkeypatch, int8=1)


@pytest.mark.parametrize("precision", [*quantised.QUANTISED, *DTYPES])
def test_a_trial_layer_is_what_a_teacher_is_made_of(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    inputs = torch.randn(5, 64, generator=generator)
    layer = choice.trial_layer(precision, weight, bias, torch.float32, torch.device("cpu"))
    output = layer(inputs.to(DTYPES.get(precision, torch.float32))).float()
    expected = inputs @ weight.T + bias
    assert (output - expected).norm() < (0.15 if precision == "nf4" else 0.02) * expected.norm()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    num_bytes = quantised.weight_bytes(layer) / weight.numel()
    assert num_bytes == pytest.approx(planner.PRECISION_BYTES[precision], rel=0.25)


@pytest.mark.parametrize("precision", [*quantised.QUANTISED, *DTYPES])
def test_a_trial_mlp_is_one(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(128, 64, generator=generator)
    inputs = torch.randn(5, 64, generator=generator)
    mlp = choice.TrialMlp(precision, weight, torch.float32, torch.device("cpu"))
    output = mlp(inputs.to(DTYPES.get(precision, torch.float32))).float()
    expected = torch.nn.functional.gelu(inputs @ weight.T, approximate="tanh") @ weight
    assert (output - expected).norm() < (0.2 if precision == "nf4" else 0.03) * expected.norm()


def test_a_measurement_is_of_every_candidate_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    found, failures = choice.measure(
        ["int8", "fp32"], (64, 64), num_tokens=32, compute_dtype=torch.float32, device=torch.device("cpu")
    )
    assert list(found) == ["int8", "fp32"] and not failures
    assert all(0 < trial.seconds < 60 for trial in found.values())
    assert found["int8"].weight_bytes < found["fp32"].weight_bytes / 3
    assert torch.equal(state, torch.random.get_rng_state())


def chosen_by_the_planner(machine: Machine, *overrides: str, dtype: str = "fp32") -> tuple[str, str]:
    setup = planner.TrainingSetup(1024, 51200, TRINITY, 1, dtype, hardware.choose(machine).ds_config, machine.device)
    return planner.choose_teacher_precision(recipe.load("daramgpt", list(overrides)), machine, setup)


def test_what_does_not_fit_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def record(candidates: list[str], **arguments: object) -> tuple[str, str]:
        asked.update(arguments, candidates=candidates)
        return candidates[0], "measured"

    monkeypatch.setattr(choice, "choose", record)
    assert chosen_by_the_planner(Machine((), 2, 32 * GIB)) == ("int8", "measured")
    assert asked["candidates"] == ["int8", "fp32"]
    assert (asked["width"], asked["num_tokens"], asked["compute_dtype"]) == (1920, 4096, torch.float32)
    chosen_by_the_planner(Machine((), 2, 7 * GIB))
    assert asked["candidates"] == ["int8"]
    assert "does not fit with 4,096 tokens" in str(asked["left_out"])
    precision, reason = chosen_by_the_planner(Machine((), 2, 3 * GIB))
    assert precision == "nf4" and "with int8 one row needs" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_where_torch_sees_no_gpu_capability_alone_decides() -> None:
    precision, reason = chosen_by_the_planner(T4, dtype="fp16")
    assert precision == hardware.choose(T4).teacher_precision
    assert "by capability alone" in reason


def test_a_run_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that stands is neither measured nor chosen again, and what the user names is not measured at all."""
    from daramgpt.run_directory import RunDirectory

    calls = []

    def measured(*_: object, **__: object) -> tuple[str, str]:
        calls.append(1)
        return "fp32", "because"

    class Shards:
        context_tokens, vocab_size, num_rows = 64, 512, 100

    monkeypatch.setattr(planner, "choose_teacher_precision", measured)
    monkeypatch.setattr(planner, "gemm_rate", lambda *_: 1e11)
    monkeypatch.setattr(commands, "open_shards", lambda run: Shards())
    monkeypatch.setattr(hardware, "detect", lambda: CPU)
    run = RunDirectory(tmp_path / "auto")
    auto = recipe.load("quickstart", ["teacher.precision=auto"])
    lines: list[str] = []
    for _ in range(2):
        commands.plan(auto, run, lines.append)  # type: ignore[arg-type]
    frozen = planner.read_plan(run)
    assert frozen is not None and frozen["teacher_precision"] == "fp32"
    assert len(calls) == 1 and lines.count("teacher_precision: fp32 (because)") == 2
    named = RunDirectory(tmp_path / "named")
    commands.plan(recipe.load("quickstart", ["teacher.precision=llm-int8"]), named, lines.append)  # type: ignore[arg-type]
    frozen = planner.read_plan(named)
    assert frozen is not None and frozen["teacher_precision"] == "llm-int8"
    assert len(calls) == 1
