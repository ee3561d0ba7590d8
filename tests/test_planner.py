"""The plan: parameters as in the real model, batches that divide, memory by component, faults by file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from daramgpt import planner, recipe
from daramgpt.errors import UserError
from daramgpt.planner import ModelShape, TrainingSetup
from daramgpt.run_directory import RunDirectory, write_json

TRINITY = ModelShape(n_embd=1920, n_layer=24, vocab_size=51200, num_positions=1024)
STUDENT = ModelShape(n_embd=768, n_layer=4, vocab_size=51200, num_positions=1024)
SETUP = TrainingSetup(256, 4096, ModelShape(192, 4, 4096, 256), 1, "fp32", "cpu", "cpu")


@pytest.mark.parametrize(
    ("shape", "n_head", "parameters"),
    [(STUDENT, 8, 68_461_056), (TRINITY, 16, None), (ModelShape(48, 3, 321, 40), 4, None)],
    ids=["student", "teacher", "small"],
)
def test_parameters_are_those_of_the_real_model(shape: ModelShape, n_head: int, parameters: int | None) -> None:
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.num_positions,
        n_embd=shape.n_embd,
        n_head=n_head,
        n_layer=shape.n_layer,
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    assert shape.parameters == model.num_parameters()
    assert parameters in (None, shape.parameters)
    blocks = sum(parameter.numel() for parameter in model.transformer.h.parameters())
    final_norm = sum(parameter.numel() for parameter in model.transformer.ln_f.parameters())
    assert shape.block_parameters == blocks + final_norm


def test_flops_of_the_reference_run_are_about_2_8_gflop_a_token() -> None:
    flops = planner.step_flops(STUDENT, TRINITY, 1024)
    assert flops == 3 * STUDENT.forward_flops(1024) + TRINITY.forward_flops(1024)
    assert flops == pytest.approx(2.8e9, rel=0.05)
    assert planner.step_flops(STUDENT, None, 1024) == 3 * STUDENT.forward_flops(1024)
    # Attention alone grows with the context, by causal query-key and value products: 2 D a layer and position.
    assert STUDENT.forward_flops(1024) - STUDENT.forward_flops(512) == 2 * 4 * 768 * 512


def make(folder: Path, *overrides: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "num_rows": 1000,
        "memory_limit_bytes": 8 * 10**9,
        "flops_per_second": 1e11,
        "num_threads": 2,
        "teacher_precision": "int8",
        "rates": lambda step: planner.of_gpu("T4", "fp32"),
        "reasons": {"dtype": "a", "teacher_precision": "b", "ds_config": "c"},
    }
    settled = {name: changes.pop(name) for name in list(changes) if hasattr(SETUP, name)}
    wanted = recipe.load("quickstart", ["optimizer.batch_tokens=8192", *overrides])
    return planner.make_plan(wanted, RunDirectory(folder), replace(SETUP, **settled), **given | changes)


def test_the_plan_is_frozen_and_described(tmp_path: Path) -> None:
    plan = make(tmp_path)
    assert planner.read_plan(RunDirectory(tmp_path)) == plan
    assert plan["num_steps"] == math.ceil(1000 / plan["batch_rows"])
    assert plan["batch_rows"] * 256 == 8192
    assert plan["predicted"]["memory_total_bytes"] == sum(plan["predicted"]["memory_bytes"].values())
    student = recipe.load("quickstart").student
    assert plan["student"]["parameters"] == ModelShape(student.n_embd, student.n_layer, 4096, 256).parameters
    assert make(tmp_path, teacher=None)["teacher_precision"] is None


def test_what_trainings_share_is_described_once(tmp_path: Path) -> None:
    plan = make(tmp_path)
    other = {**make(tmp_path, teacher=None), "ds_config": "another", "num_steps": 7}
    lines: list[str] = []
    planner.describe({"student": plan, "without a teacher": other}, lines.append)
    dtype, precision = (f"{key}: {plan[key]} ({plan['reasons'][key]})" for key in ("dtype", "teacher_precision"))
    assert lines[:3] == [dtype, precision, "student:"]
    assert f"{plan['num_steps']:,} steps" in lines[3]
    assert [line for line in lines if "ds_config" in line] == [
        f"  ds_config: {name} ({plan['reasons']['ds_config']})" for name in (plan["ds_config"], "another")
    ]


def test_passes_lengthen_the_plan(tmp_path: Path) -> None:
    assert make(tmp_path, "curriculum.passes=3")["num_steps"] == math.ceil(3000 / 32)


@settings(max_examples=60, deadline=None)
@given(
    batch_tokens=st.integers(8, 10**6),
    context_tokens=st.integers(8, 2048),
    world_size=st.integers(1, 8),
    rows=st.none() | st.integers(1, 50),
    num_rows=st.integers(1, 10**6),
    dtype=st.sampled_from(["fp32", "fp16"]),
    memory_gigabytes=st.integers(4, 80),
)
def test_batch_ranks_and_micro_batch_divide(
    tmp_path_factory: pytest.TempPathFactory,
    batch_tokens: int,
    context_tokens: int,
    world_size: int,
    rows: int | None,
    num_rows: int,
    dtype: str,
    memory_gigabytes: int,
) -> None:
    overrides = [f"optimizer.batch_tokens={batch_tokens}"]
    if rows is not None:
        overrides.append(f"engine.micro_batch_rows={rows}")
    plan = make(
        tmp_path_factory.getbasetemp() / "plans",
        *overrides,
        context_tokens=context_tokens,
        world_size=world_size,
        num_rows=num_rows,
        dtype=dtype,
        device="cpu" if dtype == "fp32" else "cuda",
        memory_limit_bytes=memory_gigabytes * 10**9,
    )
    micro = plan["micro_batch_rows"]
    assert plan["batch_rows"] % (micro * world_size) == 0
    assert (plan["num_steps"] - 1) * plan["batch_rows"] < num_rows <= plan["num_steps"] * plan["batch_rows"]
    # As near to the tokens asked for as whole rows allow.
    slack = world_size * (rows or 1)
    asked = max(1, batch_tokens // context_tokens)
    assert asked <= plan["batch_rows"] < asked + slack
    if rows is None:
        assert plan["predicted"]["memory_total_bytes"] <= memory_gigabytes * 10**9
    else:
        assert micro == rows
    assert 1 <= plan["loss_chunk_tokens"] <= max(256, micro * context_tokens)


def test_a_larger_memory_takes_a_larger_micro_batch(tmp_path: Path) -> None:
    wanted = {"dtype": "fp16", "device": "cuda", "context_tokens": 1024, "vocab_size": 51200, "teacher": TRINITY}
    sizes = [
        make(tmp_path, "optimizer.batch_tokens=262144", memory_limit_bytes=gigabytes * 10**9, **wanted)
        for gigabytes in (4, 8, 80)
    ]
    rows = [plan["micro_batch_rows"] for plan in sizes]
    assert rows == sorted(rows) and rows[0] < rows[-1]


def test_a_memory_too_small_for_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 rows of 256 tokens need .* GB, 85% of the device's 0\.0 GB") as caught:
        make(tmp_path, memory_limit_bytes=10**7)
    assert "curriculum.context_tokens" in caught.value.mend
    assert planner.read_plan(RunDirectory(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '{"num_steps": 3}', "[" * 100_000, "\udcff"])
def test_a_plan_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    run.plan.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"plan\.json") as caught:
        planner.read_plan(run)
    assert str(run.plan) in caught.value.fault and "plan again" in caught.value.mend


def test_a_plan_without_one_key_names_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    plan = make(tmp_path)
    for key in ("num_steps", "batch_rows", "micro_batch_rows", "world_size", "num_threads", "loss_chunk_tokens"):
        write_json(run.plan, {name: value for name, value in plan.items() if name != key})
        with pytest.raises(UserError, match=key):
            planner.read_plan(run)


def test_the_shape_of_a_teacher_comes_from_its_config(tmp_path: Path) -> None:
    GPT2Config(vocab_size=321, n_positions=40, n_embd=48, n_head=4, n_layer=3).save_pretrained(tmp_path)
    assert planner.teacher_shape(tmp_path) == ModelShape(48, 3, 321, 40, n_head=4)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"teacher\.model"):
        planner.teacher_shape(tmp_path)


def test_speed_is_predicted_where_rates_are_known(tmp_path: Path) -> None:
    plan = make(tmp_path)
    predicted = plan["predicted"]
    step_tokens = plan["batch_rows"] * plan["context_tokens"]
    assert predicted["tokens_per_second"] == pytest.approx(step_tokens / sum(predicted["seconds_per_step"].values()))
    assert predicted["hours"] == pytest.approx(1000 * 256 / predicted["tokens_per_second"] / 3600)
    # What is not a product comes on top of the products.
    rate = predicted["rates"]["product_flops_per_second"]
    assert predicted["tokens_per_second"] < rate / predicted["model_flops_per_token"]
    without = make(tmp_path, rates=None)
    assert "hours" not in without["predicted"]
    assert without["micro_batch_rows"] == plan["micro_batch_rows"]


def test_time_follows_the_work() -> None:
    """Products scale with the models, softmax with the vocabulary, nothing but communication with the ranks."""
    rates = planner.of_gpu("T4", "fp16")
    step = planner.Step(STUDENT, TRINITY, "int8", "fp16", 1024, 4, 2, 655, ds_config={}, device="cuda")
    seconds = planner.step_seconds(step, rates)
    products = sum(value for name, value in seconds.items() if name.endswith(("products", "teacher head")))
    flops = planner.step_flops(STUDENT, TRINITY, 0) * step.tokens * step.micro_batches
    # Biases and norms are no products.
    assert products * rates.product_flops_per_second == pytest.approx(flops, rel=1e-3)
    twice = planner.step_seconds(replace(step, micro_batches=4), rates)
    assert {name for name in seconds if twice[name] != pytest.approx(2 * seconds[name])} == {"optimizer"}
    assert twice["optimizer"] == seconds["optimizer"]
    alone = planner.step_seconds(replace(step, teacher=None), rates)
    assert seconds.keys() - alone.keys() == {
        "teacher products",
        "teacher head",
        "teacher attention",
        "teacher elementwise",
        "teacher dequantisation",
    }
    assert alone["softmax"] < seconds["softmax"]
    recomputed = planner.step_seconds(replace(step, recomputes=True), rates)
    assert recomputed["student products"] == pytest.approx(4 / 3 * seconds["student products"])
    documents = planner.step_seconds(replace(step, is_by_document=True), rates)
    assert documents["student attention"] == pytest.approx(2 * seconds["student attention"])


def test_another_micro_batch_is_predicted_anew(tmp_path: Path) -> None:
    plan = make(tmp_path, "engine.micro_batch_rows=8")
    # As a probe leaves it: the micro-batch exchanged, the predictions of another one.
    other = planner.with_micro_batch(plan, 2)
    wanted = recipe.load("quickstart", ["optimizer.batch_tokens=8192"])
    found = planner.predicted_anew(other, wanted, SETUP, 1000, lambda step: planner.of_gpu("T4", "fp32"))
    assert {key: found[key] for key in other if key != "predicted"} == {
        key: other[key] for key in other if key != "predicted"
    }
    assert found["predicted"] == make(tmp_path, "engine.micro_batch_rows=2")["predicted"]
    assert found["predicted"]["memory_total_bytes"] < plan["predicted"]["memory_total_bytes"]


def test_what_is_printed_of_a_plan_fits_a_terminal(tmp_path: Path) -> None:
    """Long reasons are wrapped, and a reason not to measure says of which trainings."""
    reasons = {"dtype": "short", "teacher_precision": "measured: " + "int8 20 ms; " * 20, "ds_config": "c"}
    plan = {**make(tmp_path, reasons=reasons), "probe": {"reason": "engine.probe is off"}}
    rows = plan["micro_batch_rows"]
    trial = {"micro_batch_rows": rows, "tokens_per_second": 1234.5, "hours": 99.9}
    probed = {**plan, "probe": {"fastest_rows": rows, "largest_rows": 32, "trials": [trial]}}
    lines: list[str] = []
    planner.describe({"teacher": plan, "student": probed, "without a teacher": plan}, lines.append)
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "micro-batch not measured (teacher, without a teacher): engine.probe is off"
    assert f"  measured with {rows} rows: 1,234.5 tokens/s, 99.9 hours" in lines
    assert reasons["teacher_precision"].split() == " ".join(lines).partition("int8 (")[2].partition(")")[0].split()
