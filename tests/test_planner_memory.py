"""The arithmetic of memory against tensors that exist: of an engine, of a forward pass, of a teacher."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from daramgpt import student as students
from daramgpt import teacher as teachers
from daramgpt.engine import Distiller
from daramgpt.losses import DistillationHead
from daramgpt.planner import ModelShape, Step, needed_memory
from daramgpt.planner import memory as arithmetic
from daramgpt.recipe import Loss, Optimizer, Shape

SHAPE = Shape(n_embd=64, n_head=4, n_layer=3)
VOCABULARY, CONTEXT = 1000, 32
TRINITY = ModelShape(n_embd=1920, n_layer=24, vocab_size=51200, num_positions=1024)
STUDENT = ModelShape(n_embd=768, n_layer=4, vocab_size=51200, num_positions=1024)
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
T4X2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7, "overlap_comm": True}}


def step(**changes: Any) -> Step:
    given: dict[str, Any] = {
        "student": ModelShape(SHAPE.n_embd, SHAPE.n_layer, VOCABULARY, CONTEXT),
        "teacher": None,
        "teacher_precision": "int8",
        "dtype": "fp32",
        "context_tokens": CONTEXT,
        "micro_batch_rows": 2,
        "micro_batches": 1,
        "chunk_tokens": 32,
    }
    return Step(**given | changes)


def full(**changes: Any) -> Step:
    given: dict[str, Any] = {
        "student": STUDENT,
        "teacher": TRINITY,
        "dtype": "fp16",
        "context_tokens": 1024,
        "micro_batch_rows": 4,
        "micro_batches": 8,
        "chunk_tokens": 655,
        "ds_config": T4X2,
        "device": "cuda",
    }
    return step(**given | changes)


def live_bytes(known: set[int]) -> int:
    """Of all tensors but the known ones, shared memory once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.untyped_storage().data_ptr() not in known:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


def known_storages() -> set[int]:
    gc.collect()
    return {thing.untyped_storage().data_ptr() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}


@pytest.mark.parametrize(
    ("stage", "offload", "dtype"),
    [
        (0, False, "fp32"),
        (1, False, "fp32"),
        (2, False, "fp32"),
        (2, True, "fp32"),
        (2, True, "bf16"),
        (1, False, "bf16"),
    ],
)
def test_states_are_those_of_the_engine(tmp_path: Path, stage: int, offload: bool, dtype: str) -> None:
    config: dict[str, Any] = {
        **(BF16 if dtype == "bf16" else {}),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000, **(OFFLOAD if offload else {})},
        "zero_force_ds_cpu_optimizer": False,
    }
    known = known_storages()
    model = students.build(SHAPE, VOCABULARY, CONTEXT, 0, 0)
    distiller = Distiller(model, Loss(), Optimizer(), config, 2, 1, 32, None, tmp_path / "log.txt")
    del model
    held = live_bytes(known)
    distiller.close()
    of_device, of_host = arithmetic._states(step(ds_config=config, dtype=dtype))
    expected = sum(of_device.values()) + sum(of_host.values())
    if not offload and dtype == "fp32":
        # Those come with the first backward pass.
        expected -= of_device["gradients"]
    assert held == pytest.approx(expected, rel=0.02)


def test_activations_are_what_the_backward_pass_keeps() -> None:
    model = students.build(SHAPE, VOCABULARY, CONTEXT, 0, 0)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    one = step()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.transformer(torch.zeros(2, CONTEXT, dtype=torch.int64), use_cache=False).last_hidden_state
    kept[hidden.untyped_storage().data_ptr()] = hidden
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # Besides a few numbers a row: statistics of norms and attention.
    assert num_bytes == pytest.approx(one.tokens * arithmetic._activation_bytes(one), rel=0.05)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_teacher_weighs_what_is_loaded(tmp_path: Path, precision: str) -> None:
    students.build(SHAPE, VOCABULARY, CONTEXT, 0, 0).save_pretrained(tmp_path)
    loaded = teachers.load(tmp_path, precision)
    one = step(teacher=ModelShape(SHAPE.n_embd, SHAPE.n_layer, VOCABULARY, CONTEXT), teacher_precision=precision)
    buffer_bytes = 4 * SHAPE.n_embd**2 * 4 if precision == "int8" else 0
    assert arithmetic._teacher_weights(one) == pytest.approx(loaded.weight_bytes + buffer_bytes, rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_loss_keeps_the_buffers_that_are_counted(dtype: str, has_teacher: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    kind = teachers.DTYPES[dtype]
    hidden, weight = torch.ones(64, 16, dtype=kind), torch.ones(30_000, 16, dtype=kind, requires_grad=True)
    head = DistillationHead(torch.nn.Parameter(weight), chunk_tokens=32)
    other = (torch.ones(64, 24, dtype=kind), torch.ones(30_000, 24, dtype=kind)) if has_teacher else ()
    loss, *_ = head(hidden.requires_grad_(), torch.zeros(64, dtype=torch.int64), *other)
    loss.backward()
    torch.set_num_threads(threads)
    one = step(
        student=ModelShape(16, 1, 30_000, CONTEXT),
        teacher=ModelShape(24, 1, 30_000, CONTEXT) if has_teacher else None,
        dtype=dtype,
    )
    # But for a block that widens a product.
    assert head.workspace.num_bytes == pytest.approx(arithmetic._loss_buffers(one), rel=0.25)


def test_components_of_the_full_pair() -> None:
    needed = needed_memory(full())
    parts = needed.device
    assert parts["student weights"] == 2 * STUDENT.parameters
    assert parts["optimizer"] == 12 * STUDENT.parameters
    assert parts["activations"] == 4096 * (16 * 4 + 2) * 768 * 2
    # Wide logits of the student, their gradient, the teacher's logits or the product in their place, the sum of such
    # products, two blocks.
    assert parts["loss buffers"] == 655 * 51200 * (4 + 2) + 2 * 51200 * 768 * 4 + 2 * 2**26
    assert 1.2e9 < parts["teacher weights"] < 1.4e9
    assert needed.host_bytes == 0 and needed.device_bytes == sum(parts.values())


def test_only_activations_and_what_passes_grow_with_the_micro_batch() -> None:
    one, two = (needed_memory(full(micro_batch_rows=rows)).device for rows in (4, 8))
    assert {name for name in one if one[name] != two[name]} == {"activations", "teacher activations", "workspace"}
    assert two["activations"] == 2 * one["activations"]


def test_ranks_share_what_zero_shards() -> None:
    alone, both = (needed_memory(full(world_size=ranks)).device for ranks in (1, 2))
    assert both["optimizer"] == alone["optimizer"] / 2 and both["gradients"] == alone["gradients"] / 2
    assert both["student weights"] == alone["student weights"]
    third = {"zero_optimization": {"stage": 3}}
    whole = needed_memory(full(world_size=2, ds_config=third)).device
    assert whole["student weights"] == both["student weights"] / 2


def test_an_offloaded_optimizer_is_the_hosts() -> None:
    config = {"zero_optimization": {**T4X2["zero_optimization"], **OFFLOAD}}
    needed, kept = needed_memory(full(ds_config=config)), needed_memory(full())
    assert needed.host["optimizer"] == kept.device["optimizer"] and needed.device["optimizer"] == 0
    assert needed.device_bytes < kept.device_bytes
    # On a CPU there is one memory.
    cpu = needed_memory(full(ds_config=config, device="cpu"))
    assert cpu.host == {} and cpu.device["optimizer"] == kept.device["optimizer"]
    assert cpu.device["libraries"] == arithmetic.LIBRARY_BYTES


def test_settings_that_cost_or_save_memory() -> None:
    plain = needed_memory(full())
    recomputed = needed_memory(full(recomputes=True)).device
    assert recomputed["activations"] == 4096 * (1 * 4 + 2) * 768 * 2
    # Those of the one block that is computed anew.
    kept = plain.device["workspace"] + 4096 * 16 * 768 * 2
    assert recomputed["workspace"] <= kept and sum(recomputed.values()) < plain.device_bytes
    documents = needed_memory(full(is_by_document=True)).device
    assert documents["document mask"] == 4 * 1024**2 * 3
    eight_bit = needed_memory(full(optimizer_kind="adamw-8bit")).device
    assert eight_bit["optimizer"] == pytest.approx(STUDENT.parameters * (4 + 2 + 8 / 256), abs=1)
    alone = needed_memory(replace(full(), teacher=None)).device
    assert plain.device.keys() - alone.keys() == {"teacher weights", "teacher activations"}
    assert alone["loss buffers"] <= plain.device["loss buffers"]
