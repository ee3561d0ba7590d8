"""Losses and gradients that are not finite, on one rank of them all: nothing moves, and training can go on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from non_finite_ranks import FAULTS, Case, seen_on

from daramgpt.engine import LossScaleFloorError, import_deepspeed
from daramgpt.engine.loss_scale import LossScale
from daramgpt.engine.non_finite import carried_by_gradient, guard

BF16: dict[str, Any] = {"bf16": {"enabled": True}}


def zero(stage: int, is_offloaded: bool = False) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage}
    if is_offloaded:
        section["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        # Sub-groups of some parameters each, and every parameter split.
        section |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 2000}
    return {"zero_optimization": section, "zero_force_ds_cpu_optimizer": False}


def fp16(**settings: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, "initial_scale_power": 5, "min_loss_scale": 4, "hysteresis": 1, **settings}}


CASES = {
    **{f"zero-{stage}": Case(zero(stage)) for stage in (0, 1, 2, 3)},
    **{f"zero-{stage}-offload": Case(zero(stage, True)) for stage in (1, 2, 3)},
    **{f"zero-{stage}-bf16": Case(zero(stage) | BF16) for stage in (1, 2, 3)},
    **{f"zero-{stage}-offload-bf16": Case(zero(stage, True) | BF16) for stage in (2, 3)},
    # DeepSpeed has another optimizer for it.
    "zero-1-bf16-in-fp32": Case(zero(1) | BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    # It does not look then.
    "zero-2-bf16-unchecked": Case(zero(2) | {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    "zero-2-offload-bf16-unchecked": Case(zero(2, True) | {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    "zero-0-8-bit": Case(zero(0), "adamw-8bit"),
    "zero-2-8-bit-bf16-unchecked": Case(
        zero(2) | {"bf16": {"enabled": True, "check_grad_overflow": False}}, "adamw-8bit"
    ),
}
if "DARAMGPT_COMPILE" in os.environ:
    CASES |= {
        "zero-0-compiled": Case(zero(0), "deepspeed-cpu-adam"),
        "zero-2-compiled": Case(zero(2, True), "deepspeed-cpu-adam"),
    }
IN_FP16 = {
    **{f"zero-{stage}-fp16": Case(zero(stage) | fp16()) for stage in (1, 2, 3)},
    "zero-2-offload-fp16": Case(zero(2, True) | fp16()),
    "hysteresis": Case(zero(2) | fp16(hysteresis=2)),
    "fixed": Case(zero(2) | fp16(loss_scale=32)),
}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one-rank", "two-ranks"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return seen_on(request.param, CASES | IN_FP16, tmp_path_factory.mktemp(f"ranks-{request.param}"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_moves_by_what_is_not_finite(name: str, fault: str, seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank[name][fault] == {
            "applied": False,
            "is_finite": False,
            "norm_is_finite": False,
            "loss_is_finite": "gradient" in fault,
            "is_intact": True,
            "moved": False,
        }


@pytest.mark.parametrize("name", CASES)
def test_finite_steps_go_on_as_if_nothing_had_been(name: str, seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank[name]["finite"] == {"applied": True, "moved": True, "as_undisturbed": True}


@pytest.mark.parametrize("name", IN_FP16)
def test_fp16_overflows_down_to_the_floor_of_the_loss_scale(name: str, seen: list[dict[str, Any]]) -> None:
    scales = {"hysteresis": [32, 32, 16, 8, 4, 4], "fixed": [32, 32]}.get(name, [32, 16, 8, 4, 4])
    floor = "fixed by fp16.loss_scale at 32" if name == "fixed" else "at its floor, fp16.min_loss_scale = 4"
    for rank in seen:
        assert rank[name] == {
            "applied": True,
            "scales": scales,
            "results": [[False, True]] * (len(scales) - 2),
            "error": f"the gradient overflowed fp16 with the loss scale {floor}",
            "floor": scales[-1],
            "moved": False,
            "is_intact": True,
        }


@pytest.mark.parametrize("factor", [1 / 3, 2 / 7919, 1.0])
def test_a_finite_loss_and_its_gradient_keep_every_bit(factor: float) -> None:
    losses = torch.randn(1000, generator=torch.Generator().manual_seed(5)).mul(torch.logspace(-20, 30, 1000))
    losses[:2] = torch.tensor([0.0, -0.0])
    for value in losses:
        plain, carried = (value.clone().requires_grad_() for _ in range(2))
        scaled, found = plain * factor, carried_by_gradient(carried, factor)
        assert torch.equal(scaled.view(torch.int32), found.view(torch.int32))
        assert torch.equal(*torch.autograd.grad(scaled, plain), *torch.autograd.grad(found, carried))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float) -> None:
    loss = torch.tensor(value, requires_grad=True)
    assert math.isfinite(*torch.autograd.grad(loss * 0.5, loss))
    assert math.isnan(*torch.autograd.grad(carried_by_gradient(loss, 0.5), loss))


@pytest.mark.parametrize("norm", [torch.tensor(2.0), 2.0, torch.tensor(math.inf), math.nan])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_is_asked_before_it_moves(kind: Any, norm: torch.Tensor | float) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    adam = kind([parameter], lr=0.5, fused=True)
    guard(adam, lambda: norm)
    parameter.grad = torch.ones(3)
    adam.step()
    is_finite = math.isfinite(float(norm))
    assert torch.equal(parameter.detach(), torch.ones(3)) is not is_finite
    if kind is torch.optim.AdamW:
        assert adam.state[parameter]["step"].item() == is_finite


def make_scale(tmp_path: Path, **settings: Any) -> tuple[Any, LossScale]:
    import_deepspeed(tmp_path / "log.txt")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    given = {"init_scale": 64, "scale_window": 9, "min_scale": 2, "delayed_shift": 2, "consecutive_hysteresis": False}
    scaler = DynamicLossScaler(**given | settings)
    return scaler, LossScale(scaler)


def test_a_lower_floor_of_the_ds_config_holds_for_a_run_that_goes_on(tmp_path: Path) -> None:
    scaler, scale = make_scale(tmp_path)
    scaler.cur_scale, scaler.cur_hysteresis, scaler.cur_iter = 2.0, 1, 7
    assert isinstance(scale.floor_error(), LossScaleFloorError)
    # Of checkpoints that had the settings too.
    state = {**vars(scaler), **scale.state(), "raise_error_at_min_scale": True}
    later, resumed = make_scale(tmp_path, min_scale=1)
    resumed.restore(state)
    assert resumed.state() == scale.state() != make_scale(tmp_path)[1].state()
    assert (later.min_scale, later.raise_error_at_min_scale, resumed.floor_error()) == (1, False, None)
