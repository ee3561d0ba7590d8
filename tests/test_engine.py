"""The engine against a plain PyTorch loop, and its state through a restart, under every ZeRO stage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from daramgpt import checkpoint, student
from daramgpt.engine import Distiller, import_deepspeed
from daramgpt.errors import UserError
from daramgpt.losses import distillation_loss_reference
from daramgpt.recipe import Loss, Optimizer, Shape
from daramgpt.teacher import Teacher

VOCAB, CONTEXT, ROWS, MICRO, EOS = 61, 12, 4, 2, 0
SHAPE = Shape(n_embd=16, n_head=2, n_layer=2)
LOSS = Loss(temperature=2.0, kd_weight=1.0, ce_weight=0.1)
OPTIMIZER = Optimizer(learning_rate=3e-3, clip_norm=0.5, weight_decay=0.1)
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


def make_student() -> Any:
    return student.build(SHAPE, VOCAB, CONTEXT, EOS, seed=1)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    model = student.build(Shape(n_embd=24, n_head=2, n_layer=1), VOCAB, CONTEXT, EOS, seed=2)
    model.eval().requires_grad_(False)
    # Sharper than a random model's nearly uniform distribution, so that the KL has something to teach.
    model.lm_head.weight.mul_(8)
    return Teacher(model, model.lm_head.weight, None, "fp32", 0, 0, CONTEXT)


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    tokens = torch.randint(0, VOCAB, (ROWS // MICRO, CONTEXT + 1), generator=generator)
    tokens[tokens % 5 == 0] = EOS
    labels = tokens[:, 1:].clone()
    # Micro-batches of unequal weight: what a mean of means gets wrong.
    labels[0, : 5 * micro] = -100
    return tokens[:, :-1], labels


def num_targets(step: int) -> int:
    return sum(int((batch(step, micro)[1] != -100).sum()) for micro in range(MICRO))


def batches(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return (batch(step, micro) for micro in range(MICRO))


def documents(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of a step, each a row of its own length."""
    for input_ids, labels in batches(step):
        for row, targets in zip(input_ids, labels, strict=True):
            starts = [place for place in range(1, CONTEXT) if row[place] == EOS]
            for piece in zip(row.tensor_split(starts), targets.tensor_split(starts), strict=True):
                yield piece[0][None], piece[1][None]


def make_distiller(
    config: str,
    teacher: Teacher | None,
    log: Path,
    model: Any = None,
    document_start_id: int | None = None,
    kind: str = "adamw",
) -> Distiller:
    rows, student_model = ROWS // MICRO, model or make_student()
    optimizer = OPTIMIZER.model_copy(update={"kind": kind})
    return Distiller(student_model, LOSS, optimizer, CONFIGS[config], rows, MICRO, 7, teacher, log, document_start_id)


def check_kind(kind: str) -> None:
    if kind == "deepspeed-cpu-adam" and "DARAMGPT_COMPILE" not in os.environ:
        pytest.skip("DeepSpeed's optimizer is compiled first, which takes minutes; set DARAMGPT_COMPILE=1")


KINDS = [*((config, "adamw") for config in CONFIGS), *((config, "deepspeed-cpu-adam") for config in CONFIGS)]


@pytest.fixture(scope="module", params=[None, EOS], ids=["across-documents", "within-documents"])
def document_start_id(request: pytest.FixtureRequest) -> int | None:
    return request.param


@pytest.fixture(scope="module")
def plain_losses(teacher: Teacher, document_start_id: int | None) -> list[float]:
    """Losses of the same steps by transformers, torch's AdamW and the plain loss; documents are passed one by one."""
    parts = batches if document_start_id is None else documents
    model = make_student()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
    )
    losses = []
    for step in range(5):
        adam.zero_grad()
        total = torch.zeros(())
        for input_ids, labels in parts(step):
            teacher_logits = teacher.hidden_states(input_ids) @ teacher.head_weight.T
            kd, ce = distillation_loss_reference(
                model(input_ids).logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels.flatten(), LOSS.temperature
            )
            loss = (LOSS.kd_weight * kd + LOSS.ce_weight * ce) / num_targets(step)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        adam.step()
        losses.append(float(total))
    return losses


def run_steps(distiller: Distiller, first: int, last: int) -> list[float]:
    results = [distiller.step(batches(step), num_targets(step), OPTIMIZER.learning_rate) for step in range(first, last)]
    return [LOSS.kd_weight * result.kd + LOSS.ce_weight * result.ce for result in results]


@pytest.mark.parametrize(("config", "kind"), KINDS)
def test_losses_equal_a_plain_loop(
    config: str, kind: str, teacher: Teacher, document_start_id: int | None, plain_losses: list[float], tmp_path: Path
) -> None:
    check_kind(kind)
    distiller = make_distiller(config, teacher, tmp_path / "log.txt", document_start_id=document_start_id, kind=kind)
    losses = run_steps(distiller, 0, 5)
    distiller.close()
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert losses[4] < losses[0]


@pytest.mark.parametrize(("config", "kind"), KINDS)
@pytest.mark.parametrize("forget_moments", [False, True])
def test_restart_from_a_checkpoint_changes_nothing(
    config: str, kind: str, forget_moments: bool, teacher: Teacher, tmp_path: Path
) -> None:
    check_kind(kind)
    whole = make_distiller(config, teacher, tmp_path / "log.txt", kind=kind)
    run_steps(whole, 0, 3)
    checkpoint.save(tmp_path / "checkpoints", whole, {"step": 3}, keep=2)
    run_steps(whole, 3, 6)
    expected = whole.gather()["weights"]
    whole.close()

    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    model = make_student()
    model.load_state_dict(saved.weights(), strict=False)
    resumed = make_distiller(config, teacher, tmp_path / "log.txt", model, kind=kind)
    tensors = {name: saved.tensors(name) for name in checkpoint.TENSOR_FILES}
    if forget_moments:
        tensors["exp_avg"] = {name: torch.zeros_like(value) for name, value in tensors["exp_avg"].items()}
    resumed.restore(tensors, 3, saved.state["loss_scaler"])
    run_steps(resumed, 3, 6)
    found = resumed.gather()["weights"]
    resumed.close()
    assert found.keys() == expected.keys()
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    assert same is not forget_moments


def test_weights_have_their_hugging_face_names(tmp_path: Path) -> None:
    distiller = make_distiller("zero-2", None, tmp_path / "log.txt")
    run_steps(distiller, 0, 1)
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
        make_distiller("zero-2-offload", None, tmp_path / "log.txt", kind="deepspeed-cpu-adam")
    assert "and more" not in str(raised.value)
