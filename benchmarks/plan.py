"""What `plan` predicts by arithmetic, before any probe, against what training then measures.

    python -m benchmarks.plan [--rows NAME,...] [--steps N] [--json FILE]

Peak memory and tokens per second of several pairs of models on this CPU. The constants of memory were fitted on the
shapes under `FITTED_ON`, which holds three rows of the table: they are marked. Those of speed are measured anew before
each row, on tensors of sizes of their own. README.md defines every key.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.machine import SIDE_ENVIRONMENT
from daramgpt import ds_config, hardware, planner, student, teacher
from daramgpt import recipe as recipes
from daramgpt.engine import Distiller, import_deepspeed
from daramgpt.planner import ModelShape, Step
from daramgpt.recipe import Shape
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
    dtype: str

    def step(self) -> Step:
        def shape(of: Shape) -> ModelShape:
            return ModelShape(of.n_embd, of.n_layer, self.vocab_size, self.context_tokens)

        return Step(
            student=shape(self.student),
            teacher=shape(self.teacher) if self.teacher else None,
            teacher_precision="int8",
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


# For people, who may want to know.
FITTED_ON = (
    "student 384/6/4 alone, vocabulary 16,000, rows of 512, fp32",
    "student 256/4/6 of teacher 512/8/6, vocabulary 8,000, rows of 512, fp32 and bf16",
    "the rows pair, wide and alone in bf16: what bf16 products copy",
)
_PAIR = Row(
    "pair",
    Shape(n_embd=640, n_head=10, n_layer=6),
    Shape(n_embd=320, n_head=5, n_layer=4),
    16384,
    512,
    4,
    2,
    1024,
    "fp32",
)
_WIDE = Row(
    "wide",
    Shape(n_embd=768, n_head=12, n_layer=4),
    Shape(n_embd=512, n_head=8, n_layer=3),
    24576,
    256,
    8,
    1,
    1024,
    "fp32",
)
_ALONE = Row("alone", None, Shape(n_embd=512, n_head=8, n_layer=6), 8192, 512, 8, 1, 2048, "fp32")
_DEEP = Row(
    "deep",
    Shape(n_embd=512, n_head=8, n_layer=8),
    Shape(n_embd=384, n_head=6, n_layer=6),
    20480,
    512,
    4,
    2,
    1024,
    "fp32",
)
ROWS = [
    replace(row, dtype=dtype, name=f"{row.name}-{dtype}")
    for row in (_PAIR, _WIDE, _ALONE, _DEEP)
    for dtype in ("fp32", "bf16")
]


def measure(row: Row, num_steps: int, folder: Path) -> dict[str, Any]:
    """One row of the result: prediction, then measurement, each in a process of its own."""
    rates = _in_process(_rates, row.dtype)
    step = row.step()
    needed = planner.needed_memory(step)
    speed = planner.tokens_per_second(step, rates)
    teacher_dir = folder / row.name.rpartition("-")[0]
    if row.teacher is not None and not teacher_dir.is_dir():
        _in_process(_write_teacher, row, teacher_dir)
    measured = _in_process(_train, row, num_steps, teacher_dir if row.teacher else None, folder / "log.txt")
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
        "rates": asdict(rates),
        "is_fitted_on": row.dtype == "bf16" and row.name != "deep-bf16",
        "predicted_seconds": planner.step_seconds(step, rates),
    }


def _in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a fresh process with the allocator's settings of a run."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    os.environ.update(SIDE_ENVIRONMENT)
    process = context.Process(target=_answer, args=(theirs, work, *arguments))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__} ended with exit code {process.exitcode}; see above") from None
    process.join()
    return answer


def _answer(connection: Connection, work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(hardware.detect().num_cores)
    connection.send(work(*arguments))


def _rates(dtype: str) -> planner.Rates:
    return planner.measure(dtype, torch.device("cpu"))


def _write_teacher(row: Row, path: Path) -> None:
    assert row.teacher is not None
    student.build(row.teacher, row.vocab_size, row.context_tokens, 0, SEED).save_pretrained(path)


def _train(row: Row, num_steps: int, teacher_dir: Path | None, log: Path) -> dict[str, Any]:
    """Seconds of each step but the first, and the peak of the process's resident memory."""
    import_deepspeed(log)
    recipe = recipes.load("daramgpt")
    loaded = None if teacher_dir is None else teacher.load(teacher_dir, "int8", teacher.DTYPES[row.dtype])
    distiller = Distiller(
        student.build(row.student, row.vocab_size, row.context_tokens, 0, SEED),
        recipe.loss if loaded is not None else recipes.Loss(temperature=1.0, kd_weight=0.0, ce_weight=1.0),
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


def format_result(result: dict[str, Any]) -> str:
    """The table."""
    header = ("row", "memory predicted", "measured", "error", "tokens/s predicted", "measured", "error")
    rows = [
        (
            entry["name"] + (" *" if entry["is_fitted_on"] else ""),
            f"{entry['predicted_peak_memory_bytes'] / 1e6:,.0f} MB",
            f"{entry['measured_peak_memory_bytes'] / 1e6:,.0f} MB",
            f"{entry['memory_error']:+.1%}",
            f"{entry['predicted_tokens_per_second']:,.0f}",
            f"{entry['measured_tokens_per_second']:,.0f}",
            f"{entry['speed_error']:+.1%}",
        )
        for entry in result["rows"]
    ]
    return f"{machine.format_table(header, rows)}\n* its memory gave a constant of the arithmetic"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS), help="names, with commas between")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a row, after one that warms up")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    found, left_out = [], {}
    with tempfile.TemporaryDirectory(prefix="daramgpt-plan-") as folder:
        for row in ROWS:
            if row.name not in arguments.rows.split(","):
                continue
            if row.dtype == "bf16" and not hardware.detect().cpu_has_bf16:
                left_out[row.name] = "this CPU has no instructions for bf16 products"
                continue
            found.append(measure(row, arguments.steps, Path(folder)))
    result = {"steps": arguments.steps, "rows": found, "left_out": left_out}
    machine.write_result(result, arguments.json)
    print(format_result(result))
    for name, reason in left_out.items():
        print(f"{name} left out: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
