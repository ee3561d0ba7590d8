"""What ``python -m daramgpt plan`` fixes for the rows of the speed measurement: precision, micro-batch, chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.inputs import Inputs, Measured
from daramgpt import ds_config, hardware, planner
from daramgpt import recipe as recipes
from daramgpt.errors import UserError
from daramgpt.run_directory import RunDirectory


@dataclass(frozen=True)
class Settings:
    """What the plan of a run fixes, as far as rows depend on it.

    Attributes:
        dtype, teacher_precision, ds_config: as in ``plan.json``.
        micro_batch_rows, micro_batches: of a step of ours.
        chunk_tokens: of our loss, at that micro-batch.
        reference_chunk_tokens: of our loss at the micro-batch of the reference loop.
        predicted_tokens_per_second, predicted_peak_bytes: of `daramgpt` by the plan's arithmetic; the peak without
            libraries, as it is measured. None where nothing was predicted.
    """

    dtype: str
    teacher_precision: str
    ds_config: str
    micro_batch_rows: int
    micro_batches: int
    chunk_tokens: int
    reference_chunk_tokens: int
    predicted_tokens_per_second: float | None = None
    predicted_peak_bytes: int | None = None


def plan(
    measured: Measured, inputs: Inputs, memory_limit_bytes: int, step_tokens: int, config_name: str | None = None
) -> Settings:
    """What ``python -m daramgpt plan`` chooses by arithmetic for these models on this machine.

    Args:
        measured, inputs: models and data.
        memory_limit_bytes: of the device.
        step_tokens: of an optimizer step.
        config_name: of the ds_config; None = as the machine suggests.

    Raises:
        UserError: there is no such ds_config, or the machine has not its precision.
    """
    machine, shards = hardware.detect(), inputs.shards()
    chosen = hardware.choose(machine)
    config_name = config_name or chosen.ds_config
    dtype = ds_config.dtype(ds_config.load(config_name))
    if fault := hardware.dtype_fault(machine, dtype):
        raise UserError(f"--ds-config {config_name}: {fault}", f"use {chosen.ds_config}")
    shape = measured.student
    recipe = recipes.load(
        "daramgpt",
        [
            f"optimizer.batch_tokens={step_tokens}",
            f"curriculum.context_tokens={measured.context_tokens}",
            *(f"student.{key}={value}" for key, value in shape.model_dump().items()),
        ],
    )
    setup = planner.TrainingSetup(
        context_tokens=measured.context_tokens,
        vocab_size=measured.vocab_size,
        teacher=planner.teacher_shape(inputs.teacher_dir),
        world_size=1,
        dtype=dtype,
        ds_config=config_name,
        device=machine.device,
    )
    precision, reason = planner.choose_teacher_precision(recipe, machine, setup)
    frozen = planner.make_plan(
        recipe,
        RunDirectory(inputs.path / "run"),
        setup,
        teacher_precision=precision,
        num_rows=shards.num_rows,
        num_threads=machine.num_cores,
        memory_limit_bytes=memory_limit_bytes,
        # Only hours follow from it.
        flops_per_second=1.0,
        reasons={**chosen.reasons, "teacher_precision": reason},
        rates=partial(planner.measure, recipe=recipe, device=torch.device(machine.device)),
    )
    predicted = frozen["predicted"]
    chunk_tokens, rows = frozen["loss_chunk_tokens"], frozen["micro_batch_rows"]
    return Settings(
        dtype=dtype,
        teacher_precision=precision,
        ds_config=config_name,
        micro_batch_rows=rows,
        micro_batches=frozen["batch_rows"] // rows,
        chunk_tokens=chunk_tokens,
        reference_chunk_tokens=min(chunk_tokens, measured.reference_rows * measured.context_tokens),
        predicted_tokens_per_second=predicted["tokens_per_second"],
        predicted_peak_bytes=predicted["memory_total_bytes"] - predicted["memory_bytes"].get("libraries", 0),
    )
