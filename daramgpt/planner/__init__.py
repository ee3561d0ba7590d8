"""The plan of a run: what shapes its arithmetic, with the memory and the hours that arithmetic says it takes.

Micro-batch, loss chunk, threads and schedule are chosen once and frozen in ``plan.json``: the same plan gives the same
weights, on the same machine to the bit. `memory` predicts bytes from shapes, component by component; `timing` times
parts of the models on the machine at hand, `speed` adds them up; `making` chooses; `probe` measures what was chosen
where that pays; `gpus` does the arithmetic for machines that are not at hand, by the `rates` of their data sheets.
"""

from __future__ import annotations

from daramgpt.planner.description import describe, gpu_table, one_gpu
from daramgpt.planner.gpus import curriculum_tokens, forecast, names
from daramgpt.planner.making import (
    CPU_MICRO_BATCH_TOKENS,
    MEMORY_SHARE,
    RatesOf,
    TrainingSetup,
    make_plan,
    predicted_anew,
)
from daramgpt.planner.memory import Memory, needed_memory
from daramgpt.planner.plan_file import (
    PLAN_KEYS,
    read_plan,
    with_micro_batch,
    with_recipe,
    with_smaller_micro_batch,
)
from daramgpt.planner.probe import Trial
from daramgpt.planner.rates import Rates, gemm_rate, of_gpu
from daramgpt.planner.shapes import PRECISION_BYTES, ModelShape, Step, recipe_shape, step_flops, teacher_shape
from daramgpt.planner.speed import step_seconds, tokens_per_second
from daramgpt.planner.teacher_choice import choose_teacher_precision
from daramgpt.planner.timing import Timings, measure

__all__ = [
    "CPU_MICRO_BATCH_TOKENS",
    "MEMORY_SHARE",
    "PLAN_KEYS",
    "PRECISION_BYTES",
    "Memory",
    "ModelShape",
    "Rates",
    "RatesOf",
    "Step",
    "Timings",
    "TrainingSetup",
    "Trial",
    "choose_teacher_precision",
    "curriculum_tokens",
    "describe",
    "forecast",
    "gemm_rate",
    "gpu_table",
    "make_plan",
    "measure",
    "names",
    "needed_memory",
    "of_gpu",
    "one_gpu",
    "predicted_anew",
    "read_plan",
    "recipe_shape",
    "step_flops",
    "step_seconds",
    "teacher_shape",
    "tokens_per_second",
    "with_micro_batch",
    "with_recipe",
    "with_smaller_micro_batch",
]
