"""The engine against a plain PyTorch loop, and its state through a restart, under every ZeRO stage."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import (
    EOS,
    LOSS,
    MICRO_BATCHES,
    SHAPE,
    STEPS,
    WIDE,
    batches,
    documents,
    forget_moments,
    make_distiller,
    make_student,
    make_teacher,
    num_targets,
    plain_losses,
    run_steps,
)

import daramgpt
from daramgpt import checkpoint, moments, student
from daramgpt.engine import Distiller, StepOutOfMemoryError, import_deepspeed
from daramgpt.errors import UserError
from daramgpt.losses import DistillationHead
from daramgpt.recipe import Shape
from daramgpt.teacher import Teacher

CONFIGS: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_optimization": {"stage": 0}},
    "zero-1": {"zero_optimization": {"stage": 1}},
    "zero-2": {"zero_optimization": {"stage": 2}},
    "zero-2-offload": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "zero-3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take longer than these products."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher()


def check_kind(kind: str) -> None:
    if kind == "deepspeed-cpu-adam" and "DARAMGPT_COMPILE" not in os.environ:
        pytest.skip("DeepSpeed's optimizer is compiled first, which takes minutes; set DARAMGPT_COMPILE=1")


PLAIN_KINDS = ("adamw", "deepspeed-cpu-adam")
KINDS = [(config, kind) for kind in PLAIN_KINDS for config in CONFIGS]
EIGHT_BIT = [(config, "adamw-8bit") for config in CONFIGS]


def shape_for(kind: str) -> Shape:
    return WIDE if kind == "adamw-8bit" else SHAPE


@pytest.fixture(scope="module", params=[None, EOS], ids=["across-documents", "within-documents"])
def document_start_id(request: pytest.FixtureRequest) -> int | None:
    return request.param


@pytest.fixture(scope="module")
def expected_losses(teacher: Teacher, document_start_id: int | None) -> list[float]:
    return plain_losses(teacher, parts=batches if document_start_id is None else documents)


@pytest.mark.parametrize(("config", "kind"), KINDS)
def test_losses_equal_a_plain_loop(
    config: str,
    kind: str,
    teacher: Teacher,
    document_start_id: int | None,
    expected_losses: list[float],
    tmp_path: Path,
) -> None:
    check_kind(kind)
    distiller = make_distiller(CONFIGS[config], teacher, tmp_path / "log.txt", None, document_start_id, kind)
    losses = run_steps(distiller, range(STEPS))
    distiller.close()
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert losses[4] < losses[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_with_8_bit_moments_equal_a_plain_loop_of_bitsandbytes(
    config: str, teacher: Teacher, tmp_path: Path
) -> None:
    model = make_student(WIDE)
    distiller = make_distiller(CONFIGS[config], teacher, tmp_path / "log.txt", model, kind="adamw-8bit")
    losses = run_steps(distiller, range(STEPS))
    widths = {state["state1"].dtype for state in distiller.engine.basic_optimizer.state.values()}
    distiller.close()
    # Without ZeRO each tensor has its own blocks, and the small ones have fp32 moments.
    is_flat = config != "zero-0"
    assert widths <= {torch.uint8, torch.float32} and torch.uint8 in widths
    assert losses == pytest.approx(
        plain_losses(teacher, WIDE, kind="adamw-8bit-flat" if is_flat else "adamw-8bit"), rel=2e-6
    )
    # 8 bits are near fp32 and not fp32 by another name.
    in_fp32 = plain_losses(teacher, WIDE)
    assert losses == pytest.approx(in_fp32, rel=3e-4)
    assert losses != pytest.approx(in_fp32, rel=3e-6)


def test_forgotten_8_bit_moments_are_farther_from_fp32_than_8_bits(teacher: Teacher, tmp_path: Path) -> None:
    distiller = make_distiller(CONFIGS["zero-2"], teacher, tmp_path / "log.txt", make_student(WIDE), kind="adamw-8bit")
    losses = run_steps(distiller, range(2))
    forget_moments(distiller, 2)
    losses += run_steps(distiller, range(2, STEPS))
    distiller.close()
    assert losses != pytest.approx(plain_losses(teacher, WIDE), rel=3e-4)


@pytest.mark.parametrize(("config", "kind"), KINDS + EIGHT_BIT)
@pytest.mark.parametrize("forget_first_moment", [False, True])
def test_restart_from_a_checkpoint_changes_nothing(
    config: str, kind: str, forget_first_moment: bool, teacher: Teacher, tmp_path: Path
) -> None:
    check_kind(kind)
    log, shape = tmp_path / "log.txt", shape_for(kind)
    whole = make_distiller(CONFIGS[config], teacher, log, make_student(shape), kind=kind)
    run_steps(whole, range(3))
    checkpoint.save(tmp_path / "checkpoints", whole, {"step": 3}, keep=2)
    run_steps(whole, range(3, 6))
    expected = whole.gather()
    whole.close()

    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    model = make_student(shape)
    model.load_state_dict(saved.weights(), strict=False)
    resumed = make_distiller(CONFIGS[config], teacher, log, model, kind=kind)
    tensors = {name: saved.tensors(name) for name in checkpoint.TENSOR_FILES}
    if forget_first_moment:
        tensors["exp_avg"] = {name: torch.zeros_like(value) for name, value in tensors["exp_avg"].items()}
    resumed.restore(tensors, 3, saved.state["loss_scaler"])
    run_steps(resumed, range(3, 6))
    found = resumed.gather()
    resumed.close()
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        assert found[group].keys() == expected[group].keys()
    same = all(
        torch.equal(found[group][name], expected[group][name])
        for group in ("weights", "exp_avg", "exp_avg_sq")
        for name in expected[group]
    )
    assert same is not forget_first_moment


@pytest.mark.parametrize(("first", "then"), [("zero-0", "zero-2"), ("zero-2", "zero-0")])
def test_8_bit_moments_are_rounded_where_another_stage_has_other_blocks(
    first: str, then: str, teacher: Teacher, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    before = make_distiller(CONFIGS[first], teacher, log, make_student(WIDE), kind="adamw-8bit")
    run_steps(before, range(3))
    saved = before.gather()
    before.close()
    model = make_student(WIDE)
    model.load_state_dict(saved["weights"], strict=False)
    after = make_distiller(CONFIGS[then], teacher, log, model, kind="adamw-8bit")
    after.restore(saved, 3, {})
    found = after.gather()
    after.close()
    assert all(torch.equal(found["weights"][name], value) for name, value in saved["weights"].items())
    differs = False
    for group in ("exp_avg", "exp_avg_sq"):
        for name, value in saved[group].items():
            # A block may hold numbers of two tensors, so its scale is up to the largest of all.
            bound = 0.01 * max(float(other.abs().max()) for other in saved[group].values())
            assert float((found[group][name] - value).abs().max()) <= bound
            differs |= not torch.equal(found[group][name], value)
    assert differs


@pytest.mark.parametrize("name", moments.NAMES)
@pytest.mark.parametrize("num_numbers", [4096, 70_001])
def test_moments_go_through_fp32_to_the_bit(name: str, num_numbers: int) -> None:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(3)
    parameter = torch.nn.Parameter(torch.zeros(num_numbers))
    adam = AdamW8bit([parameter], lr=1e-3)
    for _ in range(3):
        parameter.grad = torch.randn(num_numbers, generator=generator) * torch.logspace(-12, 2, num_numbers)
        adam.step()
    numbers, table, scales = (adam.state[parameter][key] for key in moments.NAMES[name])
    values = moments.dequantise(numbers, table, scales)
    assert torch.equal(values, dequantize_blockwise(numbers, absmax=scales, code=table, blocksize=256))
    assert torch.equal(moments.dequantise(*reordered(moments.quantise(values, table), table)), values)
    # What bitsandbytes itself would make of them: the first moment has blocks whose largest number is negative.
    anew, quantised = quantize_blockwise(values, code=table, blocksize=256)
    is_same = torch.equal(dequantize_blockwise(anew, quantised), values)
    assert is_same is (name == "exp_avg_sq")


def reordered(quantised: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return quantised[0], table, quantised[1]


def test_moments_that_no_scale_gives_are_rounded_to_the_nearest() -> None:
    from bitsandbytes.functional import create_dynamic_map

    table = create_dynamic_map(signed=True)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(4))
    values[256:512] = 0
    found = moments.dequantise(*reordered(moments.quantise(values, table), table))
    for block, values_of_block in zip(found.split(256), values.split(256), strict=True):
        scale = values_of_block.abs().max()
        nearest = (scale * table - values_of_block[:, None]).abs().amin(dim=1)
        assert torch.allclose((block - values_of_block).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_checkpointed_activations_change_no_weight(config: str, teacher: Teacher, tmp_path: Path) -> None:
    found = []
    for is_checkpointed in (False, True):
        model = make_student()
        if is_checkpointed:
            student.checkpoint_activations(model)
        distiller = make_distiller(CONFIGS[config], teacher, tmp_path / "log.txt", model)
        run_steps(distiller, range(3))
        found.append(distiller.gather()["weights"])
        distiller.close()
    for name, value in found[1].items():
        assert torch.equal(value, found[0][name]), name


@pytest.mark.parametrize("config", CONFIGS)
def test_the_norm_of_the_gradients_is_that_before_clipping(config: str, tmp_path: Path) -> None:
    model = make_student()
    loss = torch.zeros(())
    for input_ids, labels in batches(0):
        logits = model(input_ids).logits.flatten(0, 1)
        loss = loss + torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    (LOSS.ce_weight * loss / num_targets(0)).backward()
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    distiller = make_distiller(CONFIGS[config], None, tmp_path / "log.txt")
    result = distiller.step(batches(0), num_targets(0), 1e-3)
    distiller.close()
    assert result.grad_norm == pytest.approx(float(expected), rel=1e-5)


def test_a_step_says_what_was_flagged_when_all_of_it_was_queued(tmp_path: Path) -> None:
    distiller = make_distiller(CONFIGS["zero-2"], None, tmp_path / "log.txt")
    passes = 0

    def counted() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal passes
        for one in batches(0):
            passes += 1
            yield one

    def flags() -> tuple[bool, ...]:
        assert passes == MICRO_BATCHES
        return True, False, True

    assert distiller.step(counted(), num_targets(0), 1e-3, flags).flags == (True, False, True)
    assert distiller.step(batches(1), num_targets(1), 1e-3).flags == ()
    distiller.close()


@pytest.mark.parametrize("enabled", [None, True])
def test_deepspeed_does_not_wait_for_the_gpu_to_time_it_unless_asked(enabled: bool | None, tmp_path: Path) -> None:
    config = CONFIGS["zero-2"]
    if enabled is not None:
        config = {**config, "timers": {"throughput": {"enabled": enabled}}}
    distiller = make_distiller(config, None, tmp_path / "log.txt")
    run_steps(distiller, range(4))
    has_timed = distiller.engine.tput_timer.total_elapsed_time > 0
    distiller.close()
    assert has_timed is bool(enabled)


@pytest.mark.parametrize("config", ["zero-0", "zero-2"])
@pytest.mark.parametrize("document_start_id", [None, EOS])
def test_a_step_reads_one_tensor_from_the_device(
    config: str, document_start_id: int | None, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host waits for whatever it reads; DeepSpeed's own reads are not ours to choose."""
    distiller = make_distiller(CONFIGS[config], teacher, tmp_path / "log.txt", None, document_start_id)
    run_steps(distiller, range(1))
    readers = []

    def noted(original: Any) -> Any:
        def read(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            readers.append(Path(sys._getframe(1).f_code.co_filename))
            return original(self, *arguments, **options)

        return read

    names = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    targets = num_targets(1)
    readers.clear()
    distiller.step(list(batches(1)), targets, 1e-3, lambda: (True,))
    package = Path(daramgpt.__file__).parent
    ours = [str(reader.relative_to(package)) for reader in readers if package in reader.parents]
    others = [reader for reader in readers if package not in reader.parents and "deepspeed" not in reader.parts]
    monkeypatch.undo()
    distiller.close()
    # On a CPU, where nothing waits, the loss looks at its labels and its gradient.
    assert [reader for reader in ours if not reader.startswith("losses")] == ["engine/__init__.py"]
    assert not others


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_closed_engine_holds_no_memory(
    config: str, fails: bool, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = make_distiller(CONFIGS[config], teacher, tmp_path / "log.txt")
    run_steps(distiller, range(2))
    if fails:
        # Where ZeRO-3 has the modules of a forward pass on a list.
        monkeypatch.setattr(DistillationHead, "forward", failing)
        with pytest.raises(StepOutOfMemoryError, match="no room"):
            run_steps(distiller, range(2, 3))
    held = references(distiller)
    distiller.close()
    assert len(held) > 10 and not any(reference() is not None for reference in held)


def references(distiller: Distiller) -> list[weakref.ref[torch.Tensor]]:
    """Of the parameters, and of the optimizer's tensors."""
    tensors = list(distiller.module.parameters())
    for parameter, state in distiller.engine.basic_optimizer.state.items():
        tensors += [parameter, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    return [weakref.ref(tensor) for tensor in tensors]


def failing(*_: Any) -> None:
    raise torch.OutOfMemoryError("no room")


def test_weights_have_their_hugging_face_names(tmp_path: Path) -> None:
    distiller = make_distiller(CONFIGS["zero-2"], None, tmp_path / "log.txt")
    run_steps(distiller, range(1))
    weights = distiller.gather()["weights"]
    distiller.close()
    missing, unexpected = make_student().load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]
    assert unexpected == []


def test_an_optimizer_that_cannot_be_built_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_deepspeed(tmp_path / "log.txt")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def fails(self: object) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions\nand more")

    monkeypatch.setattr(CPUAdamBuilder, "load", fails)
    with pytest.raises(UserError, match=r"optimizer\.kind.*Ninja is required.*compiler") as raised:
        make_distiller(CONFIGS["zero-2-offload"], None, tmp_path / "log.txt", kind="deepspeed-cpu-adam")
    assert "and more" not in str(raised.value)
