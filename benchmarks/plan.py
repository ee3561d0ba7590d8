"""What `plan` predicts by arithmetic, before any probe, against what training then measures.

    python -m benchmarks.plan [--shape small|full|calibration] [--rows NAME,...] [--steps N] [--json FILE]

Peak memory and tokens per second of pairs of models on this CPU, each predicted and then trained in a process of its
own. What is predicted is not fitted to any row of `small` and `full`: the constants of memory come from the rows of
`calibration` (`FITTED_ON` says which), and before each row a process times the parts of its models, as
``python -m daramgpt plan`` does. README.md defines every key.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, machine
from benchmarks.inputs import SHAPES
from benchmarks.side_process import answer_of
from daramgpt import ds_config, hardware, planner, student, teacher
from daramgpt import recipe as recipes
from daramgpt.engine import Distiller, import_deepspeed
from daramgpt.errors import UserError
from daramgpt.planner import ModelShape, Step
from daramgpt.recipe import Loss, Recipe, Shape
from daramgpt.train import peak_memory_bytes

SEED = 0


@dataclass(frozen=True)
class Row:
    """A pair of models and a step of theirs; `teacher` None trains by plain cross-entropy."""

    name: str
    teacher: Shape | None
    student: Shape
    vocab_size: int
    context_tokens: int
    micro_batch_rows: int
    micro_batches: int
    chunk_tokens: int
    dtype: str = "fp32"
    teacher_precision: str = "int8"

    def step(self) -> Step:
        def shape(of: Shape) -> ModelShape:
            return planner.recipe_shape(of, self.vocab_size, self.context_tokens)

        return Step(
            student=shape(self.student),
            teacher=shape(self.teacher) if self.teacher else None,
            teacher_precision=self.teacher_precision,
            dtype=self.dtype,
            context_tokens=self.context_tokens,
            micro_batch_rows=self.micro_batch_rows,
            micro_batches=self.micro_batches,
            chunk_tokens=self.chunk_tokens,
            ds_config=ds_config.load(self.ds_config),
            device="cpu",
        )

    @property
    def ds_config(self) -> str:
        return "cpu-bf16" if self.dtype == "bf16" else "cpu"

    def recipe(self) -> Recipe:
        """What else shapes the step."""
        recipe = recipes.load("daramgpt")
        if self.teacher is None:
            alone = Loss(temperature=1.0, kd_weight=0.0, ce_weight=1.0)
            recipe = recipe.model_copy(update={"teacher": None, "loss": alone})
        return recipe


def _shape(n_embd: int, n_head: int, n_layer: int) -> Shape:
    return Shape(n_embd=n_embd, n_head=n_head, n_layer=n_layer)


def _in_both_dtypes(*rows: Row) -> list[Row]:
    return [replace(row, dtype=dtype, name=f"{row.name}-{dtype}") for row in rows for dtype in ("fp32", "bf16")]


_FULL = SHAPES["full"]
_FULL_ROW = Row("full", _FULL.teacher, _FULL.student, _FULL.vocab_size, _FULL.context_tokens, 4, 1, 1024)
ROWS = {
    "small": _in_both_dtypes(
        Row("pair", _shape(640, 10, 6), _shape(320, 5, 4), 16384, 512, 4, 2, 1024),
        Row("wide", _shape(768, 12, 4), _shape(512, 8, 3), 24576, 256, 8, 1, 1024),
        Row("alone", None, _shape(512, 8, 6), 8192, 512, 8, 1, 2048),
        Row("deep", _shape(512, 8, 8), _shape(384, 6, 6), 20480, 512, 4, 2, 1024),
    ),
    "full": [
        *_in_both_dtypes(_FULL_ROW),
        replace(_FULL_ROW, name="full-bf16-teacher-bf16", dtype="bf16", teacher_precision="bf16"),
    ],
    "calibration": _in_both_dtypes(
        Row("narrow", _shape(512, 8, 6), _shape(256, 4, 6), 8000, 512, 4, 2, 1024),
        Row("lone", None, _shape(384, 6, 4), 16000, 512, 8, 1, 1024),
        Row("broad", _shape(1280, 20, 4), _shape(640, 10, 3), 40000, 512, 8, 1, 1024),
    ),
}
# For people, who may want to know: rows of `calibration`, and nothing else, gave these constants.
FITTED_ON = {
    "daramgpt.planner.memory.HEAP_SHARES": "narrow, lone, broad, by dtype",
}


def measure(row: Row, num_steps: int, folder: Path) -> dict[str, Any]:
    """One row of the result: prediction, then measurement, each in a process of its own."""
    start = time.perf_counter()
    timings = answer_of(_timings, row)
    timing_seconds, step = time.perf_counter() - start, row.step()
    needed = planner.needed_memory(step)
    speed = planner.tokens_per_second(step, timings)
    teacher_dir = folder / row.name.partition("-")[0]
    if row.teacher is not None and not teacher_dir.is_dir():
        answer_of(_write_teacher, row, teacher_dir)
    measured = answer_of(_train, row, num_steps, teacher_dir if row.teacher else None, folder / "log.txt")
    measured_speed = step.tokens * step.micro_batches / statistics.median(measured["seconds"])
    return {
        "name": row.name,
        "dtype": row.dtype,
        "predicted_peak_memory_bytes": needed.device_bytes,
        "measured_peak_memory_bytes": measured["peak_memory_bytes"],
        "memory_error": needed.device_bytes / measured["peak_memory_bytes"] - 1,
        "predicted_tokens_per_second": speed,
        "measured_tokens_per_second": measured_speed,
        "slowest_and_fastest_step": [
            step.tokens * step.micro_batches / seconds
            for seconds in (max(measured["seconds"]), min(measured["seconds"]))
        ],
        "speed_error": speed / measured_speed - 1,
        "predicted_bytes": needed.device,
        "teacher_precision": row.teacher_precision if row.teacher else None,
        "rates": asdict(timings),
        "timing_seconds": timing_seconds,
        "predicted_seconds": planner.step_seconds(step, timings),
    }


def _timings(row: Row) -> planner.Timings:
    return planner.measure(row.step(), row.recipe(), torch.device("cpu"))


def _write_teacher(row: Row, path: Path) -> None:
    assert row.teacher is not None
    student.build(row.teacher, row.vocab_size, row.context_tokens, 0, SEED).save_pretrained(path)


def _train(row: Row, num_steps: int, teacher_dir: Path | None, log: Path) -> dict[str, Any]:
    """Seconds of each step but the first, and the peak of the process's resident memory."""
    import_deepspeed(log)
    recipe, loaded = row.recipe(), None
    if teacher_dir is not None:
        loaded = teacher.load(teacher_dir, row.teacher_precision, teacher.DTYPES[row.dtype])
        # Of training: pages of a checkpoint that is read are the system's to take back.
        machine.PeakMemory(torch.device("cpu")).restart()
    distiller = Distiller(
        student.build(row.student, row.vocab_size, row.context_tokens, 0, SEED),
        recipe.loss,
        recipe.optimizer,
        ds_config.load(row.ds_config),
        row.micro_batch_rows,
        row.micro_batches,
        row.chunk_tokens,
        loaded,
        log,
    )
    generator = torch.Generator().manual_seed(SEED)
    shape = (row.micro_batches, row.micro_batch_rows, row.context_tokens + 1)
    seconds = []
    for _ in range(num_steps + 1):
        ids = torch.randint(1, row.vocab_size, shape, generator=generator)
        start = time.perf_counter()
        targets = row.micro_batches * row.micro_batch_rows * row.context_tokens
        distiller.step(((part[:, :-1], part[:, 1:]) for part in ids), targets, recipe.optimizer.learning_rate)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "peak_memory_bytes": peak_memory_bytes()}


def run(shape: str, names: str | None, num_steps: int, folder: Path) -> dict[str, Any]:
    """The result without hardware and versions.

    Args:
        shape: a key of `ROWS`.
        names: of rows, with commas between; None = all.
        num_steps: a row.
        folder: takes teachers.

    Raises:
        UserError: an unknown name, or no step.
    """
    known = [row.name for row in ROWS[shape]]
    wanted = known if names is None else [name.strip() for name in names.split(",")]
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f'--rows: there is no row "{unknown[0]}"', f"choose from {', '.join(known)}")
    if num_steps < 1:
        raise UserError(f"--steps {num_steps} is too few", "give 1 or more")
    found, left_out = [], {}
    for row in ROWS[shape]:
        if row.name not in wanted:
            continue
        if row.dtype == "bf16" and not hardware.detect().cpu_has_bf16:
            left_out[row.name] = "this CPU has no instructions for bf16 products"
            continue
        command.progress(row.name)
        found.append(measure(row, num_steps, folder))
    return {"shape": shape, "steps": num_steps, "rows": found, "left_out": left_out, "fitted_on": FITTED_ON}


def format_result(result: dict[str, Any]) -> str:
    """The table, and what was left out."""
    header = ("row", "memory predicted", "measured", "error", "tokens/s predicted", "measured", "error")
    rows = [
        (
            entry["name"],
            f"{entry['predicted_peak_memory_bytes'] / 1e6:,.0f} MB",
            f"{entry['measured_peak_memory_bytes'] / 1e6:,.0f} MB",
            f"{entry['memory_error']:+.1%}",
            f"{entry['predicted_tokens_per_second']:,.0f}",
            f"{entry['measured_tokens_per_second']:,.0f}",
            f"{entry['speed_error']:+.1%}",
        )
        for entry in result["rows"]
    ]
    lines = [f"{name} left out: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join([machine.format_table(header, rows), *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("plan", __doc__)
    parser.add_argument("--shape", choices=list(ROWS), default="small", help="which rows (default: small)")
    parser.add_argument("--rows", help="names, with commas between (default: all of the shape)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a row, after one that warms up")
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="daramgpt-plan-") as folder:
        return command.run(
            lambda: run(parsed.shape, parsed.rows, parsed.steps, Path(folder)), format_result, parsed.json
        )


if __name__ == "__main__":
    sys.exit(main())
