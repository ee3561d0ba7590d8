"""Useful tokens per second of the reference loop and of ours, in one run on one machine.

    python -m benchmarks.throughput [--shape small|full] [--json FILE]

The sides run in processes of their own and repeat in turn; medians are reported. README.md defines every key.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import inputs, machine
from benchmarks.sides import BUILDERS, Repetition, Side
from daramgpt import hardware, planner
from daramgpt.engine import import_deepspeed

CURRICULUM_TOKENS = 1.3e9
REFERENCE, OURS = "reference-loop", "daramgpt"
REPETITIONS = {"small": 5, "full": 3}


def row(
    name: str,
    repetitions: Sequence[Repetition],
    peak_memory_bytes: int,
    dtype: str,
    flops_per_token: float,
    gemm_flops_per_second: float,
) -> dict[str, Any]:
    """One row of the result.

    Args:
        name: of the side.
        repetitions: measured, warm.
        peak_memory_bytes: of its process.
        dtype: of its arithmetic.
        flops_per_token: model FLOPs of one useful token.
        gemm_flops_per_second: of square products in that dtype, in this run.
    """
    rates = [repetition.work.useful_tokens / repetition.seconds for repetition in repetitions]
    rate = statistics.median(rates)
    works = [repetition.work for repetition in repetitions]
    return {
        "name": name,
        "useful_tokens_per_second": rate,
        "slowest_and_fastest_repetition": [min(rates), max(rates)],
        "peak_memory_bytes": peak_memory_bytes,
        "micro_batch_tokens": round(sum(w.positions for w in works) / sum(w.forward_passes for w in works)),
        # Not searched for: the search belongs to the planner.
        "largest_micro_batch_tokens": None,
        "padding_share": padding_share(repetitions),
        "dtype": dtype,
        "model_flops_per_token": flops_per_token,
        "roofline_fraction": flops_per_token * rate / gemm_flops_per_second,
        "curriculum_hours": CURRICULUM_TOKENS / rate / 3600,
    }


def padding_share(repetitions: Sequence[Repetition]) -> float:
    """Share of the computed positions that are no useful token."""
    works = [repetition.work for repetition in repetitions]
    return 1 - sum(work.useful_tokens for work in works) / sum(work.positions for work in works)


def measure(shape: str, num_repetitions: int, folder: Path) -> dict[str, Any]:
    """The result without hardware and versions; `folder` takes corpus, shards and teacher."""
    measured = inputs.SHAPES[shape]
    torch.set_num_threads(hardware.detect().num_cores)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {REFERENCE: "fp32", OURS: hardware.choose(hardware.detect()).dtype}
    import_deepspeed(inputs.Inputs(folder).log)
    transformers.logging.disable_progress_bar()
    inputs.make(measured, folder)
    sides = []
    for name in BUILDERS:
        side = Side(name, shape, folder)
        # One after the other: loading two large teachers at once would take the memory of both in fp32.
        side.wait()
        sides.append(side)
    repetitions: dict[str, list[Repetition]] = {side.name: [] for side in sides}
    gemm = dict.fromkeys(dtypes.values(), 0.0)
    for _ in range(num_repetitions):
        for side in sides:
            repetitions[side.name].append(side.repeat())
        for dtype in gemm:
            gemm[dtype] = max(gemm[dtype], planner.gemm_rate(dtype, measured.gemm_sizes, device))
    rows = []
    for side in sides:
        works = [repetition.work for repetition in repetitions[side.name]]
        attended = statistics.fmean(work.attended_tokens for work in works)
        dtype = dtypes[side.name]
        flops = measured.flops_per_token(round(attended))
        rows.append(row(side.name, repetitions[side.name], side.finish(), dtype, flops, gemm[dtype]))
    return result(shape, rows, gemm[dtypes[OURS]])


def result(shape: str, rows: list[dict[str, Any]], gemm_flops_per_second: float) -> dict[str, Any]:
    """The result from its rows, in which reference and ours are found by name."""
    by_name = {entry["name"]: entry for entry in rows}
    ours, reference = by_name[OURS], by_name[REFERENCE]
    return {
        "shape": shape,
        "gemm_flops_per_second": gemm_flops_per_second,
        "padding_share": reference["padding_share"],
        "rows": rows,
        "speedup_over_reference": ours["useful_tokens_per_second"] / reference["useful_tokens_per_second"],
        "not_measured": ["largest_micro_batch_tokens"],
    }


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    header = ("side", "useful tokens/s", "peak memory", "micro-batch", "padding", "of GEMM rate", "curriculum")
    rows = [
        (
            entry["name"],
            f"{entry['useful_tokens_per_second']:,.1f}",
            f"{entry['peak_memory_bytes'] / 1e6:,.0f} MB",
            f"{entry['micro_batch_tokens']:,} tokens",
            f"{entry['padding_share']:.1%}",
            f"{entry['roofline_fraction']:.1%}",
            f"{entry['curriculum_hours']:,.0f} h",
        )
        for entry in result["rows"]
    ]
    return "\n".join(
        [
            machine.format_table(header, rows),
            f"speed-up over the reference loop {result['speedup_over_reference']:.2f}; "
            f"square products {result['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s; "
            "largest micro-batch not searched for",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--shape", choices=sorted(REPETITIONS), default="small", help="size of the models")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="daramgpt-throughput-") as folder:
        measurement = measure(arguments.shape, REPETITIONS[arguments.shape], Path(folder))
    machine.write_result(measurement, arguments.json)
    print(f"{arguments.shape} models, {hardware.detect().describe()}, {time.monotonic() - start:.0f} s")
    print(format_result(measurement))
    return 0


if __name__ == "__main__":
    sys.exit(main())
