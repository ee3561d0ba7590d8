"""Useful tokens per second from the reference loop to ours, one idea after the other, in one run on one machine.

    python -m benchmarks.throughput [--shape small|full] [--rows NAME,...] [--repetitions N] [--memory-cap GB]
                                    [--ds-config NAME] [--json FILE]

The sides run in processes of their own and repeat in turn; a ratio is the median over rounds of the ratio within a
round, for a machine may run half as fast a minute later. README.md defines every row and key.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import command, inputs, ladder, largest_micro_batch
from benchmarks.inputs import Measured
from benchmarks.ladder import OURS, REFERENCE
from benchmarks.ladder_plan import Settings, plan
from benchmarks.side_process import answer_of
from benchmarks.sides import LeftOutError, OutOfMemoryError, Side
from benchmarks.throughput_result import Measurement, format_result, result
from daramgpt import hardware, planner
from daramgpt import recipe as recipes
from daramgpt.engine import import_deepspeed
from daramgpt.errors import UserError

REPETITIONS = {"small": 5, "full": 3}
MEMORY_CAP_GIGABYTES = 16.0

Say = Callable[[str], None]


class GemmRates:
    """Best rates of square products in this run, by dtype."""

    def __init__(self, dtypes: Sequence[str], sizes: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._rates = {dtype: dict.fromkeys(sizes, 0.0) for dtype in dtypes}

    def measure(self) -> None:
        """All sizes the first time, then the fastest again: large products take seconds on a CPU."""
        for dtype, rates in self._rates.items():
            sizes = list(rates) if not any(rates.values()) else [max(rates, key=lambda size: rates[size])]
            for size in sizes:
                rates[size] = max(rates[size], planner.gemm_rate(dtype, [size], self._device))

    def best(self) -> dict[str, float]:
        """FLOP/s by dtype."""
        return {dtype: max(rates.values()) for dtype, rates in self._rates.items()}


class Sides:
    """Starts sides and keeps what they measured.

    Args:
        shape, folder, settings, cap_bytes: see `benchmarks.sides.Side`.
        measured: of that shape.
        say: takes a line of progress.
    """

    def __init__(
        self, shape: str, measured: Measured, folder: Path, settings: Settings, cap_bytes: int, say: Say
    ) -> None:
        self._shape, self._folder, self._settings, self._cap_bytes = shape, folder, settings, cap_bytes
        self._measured, self._say = measured, say
        self._has_gpu = torch.cuda.is_available()
        self.measurements: dict[str, Measurement] = {}
        self.left_out: dict[str, str] = {}

    def start(self, name: str) -> Side | None:
        """A side, warm; None where it cannot be had, which is noted."""
        if reason := ladder.missing_peer(name):
            self.left_out[name] = reason
            return None
        start = time.monotonic()
        try:
            side = self._new(name)
            measurement = Measurement(name, ladder.dtype_of(name, self._settings), side.row.micro_batch_tokens)
            first_tokens = self._measured.context_tokens // 4
            sizes = largest_micro_batch.warm_up_sizes(
                side.row.micro_batch_tokens, side.row.chunk_tokens, side.row.unit_tokens, first_tokens
            )
            for size in sizes:
                repetition = side.step(size)
                measurement.add_peak(repetition)
                if measurement.first_loss is None:
                    measurement.first_loss = repetition.work.loss
        except LeftOutError as error:
            self.left_out[name] = str(error)
            return None
        except OutOfMemoryError:
            self.left_out[name] = "out of memory"
            return None
        self.measurements[name] = measurement
        self._say(f"{name}: warm after {time.monotonic() - start:.0f} s")
        return side

    def repeat(self, side: Side, number: int) -> None:
        """A repetition in the round of that number."""
        repetition = side.step()
        self.measurements[side.name].repetitions[number] = repetition
        rate = repetition.work.useful_tokens / repetition.seconds
        self._say(f"{side.name}: round {number + 1}, {rate:,.1f} useful tokens/s ({repetition.seconds:.1f} s)")

    def finish(self, side: Side) -> None:
        """End a side, and find its largest micro-batch."""
        measurement, row = self.measurements[side.name], side.row
        if self._has_gpu:
            side.finish()
            measurement.largest_tokens = self._search(side.name, row.micro_batch_tokens, row.unit_tokens)
        else:
            sizes = list(measurement.peaks)
            for size in largest_micro_batch.later_sizes(row.micro_batch_tokens, row.chunk_tokens, sizes):
                measurement.add_peak(side.step(size))
            side.finish()
            measurement.largest_tokens = largest_micro_batch.by_line(
                measurement.peaks, row.chunk_tokens, self._cap_bytes, row.unit_tokens
            )
        self._say(f"{side.name}: largest micro-batch {measurement.largest_tokens}")

    def _new(self, name: str) -> Side:
        return Side(name, self._shape, self._folder, self._settings, self._cap_bytes)

    def _search(self, name: str, start_tokens: int, unit_tokens: int) -> int:
        side: Side | None = None

        def fits(tokens: int) -> bool:
            # A side that ran out of memory is gone; what it held could not be trusted anyway.
            nonlocal side
            try:
                side = side or self._new(name)
                side.step(tokens)
            except OutOfMemoryError:
                side = None
                return False
            return True

        found = largest_micro_batch.by_search(fits, start_tokens, unit_tokens)
        if side is not None:
            side.finish()
        return found


def groups(names: Sequence[str], most_alive: int) -> Iterator[list[str]]:
    """Rows to be alive together, at most so many, with reference and ours in every group.

    Args:
        names: in the order of the ladder.
        most_alive: where it leaves no place for others, each row is alone.
    """
    anchors = [name for name in names if name in (REFERENCE, OURS)]
    others = [name for name in names if name not in anchors]
    if len(names) <= most_alive:
        yield list(names)
        return
    places = most_alive - len(anchors)
    if places < 1:
        yield from ([name] for name in names)
        return
    for start in range(0, len(others), places):
        group = {*anchors, *others[start : start + places]}
        yield [name for name in names if name in group]


def measure(
    shape: str,
    names: Sequence[str],
    num_repetitions: int,
    cap_bytes: int,
    config_name: str | None,
    folder: Path,
    say: Say,
) -> dict[str, Any]:
    """The result without hardware and versions; `folder` takes corpus, shards and teacher."""
    measured, here = inputs.SHAPES[shape], hardware.detect()
    torch.set_num_threads(here.num_cores)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    import_deepspeed(inputs.Inputs(folder).log)
    transformers.logging.disable_progress_bar()
    made = inputs.make(measured, folder)
    on_gpu = device.type == "cuda"
    cap_bytes = min(cap_bytes, here.gpu_memory_bytes if on_gpu else here.memory_bytes)
    step_tokens = recipes.load("daramgpt").optimizer.batch_tokens if on_gpu else measured.step_tokens
    # As a run plans: with the allocator's settings, which decide how fast the parts of a step are.
    settings = answer_of(plan, measured, made, cap_bytes, step_tokens, config_name)
    say(f"inputs made, plan: {settings}")
    sides = Sides(shape, measured, folder, settings, cap_bytes, say)
    dtypes = [ladder.dtype_of(name, settings) for name in (REFERENCE, OURS)]
    gemm = GemmRates(sorted(set(dtypes)), measured.gemm_sizes, device)
    # A GPU keeps its pace, and its memory belongs to one side.
    most_alive = 1 if on_gpu else max(1, here.memory_bytes // measured.side_bytes)
    alive: dict[str, Side] = {}
    number = 0
    for group in groups(names, most_alive):
        for name in [name for name in alive if name not in group]:
            sides.finish(alive.pop(name))
        for name in group:
            # One after the other: loading two large teachers at once would take the memory of both in fp32.
            if name not in alive and (side := sides.start(name)):
                alive[name] = side
        for turn in range(num_repetitions):
            for name in group:
                if name in alive:
                    # Where each is alone, rounds of the same number are compared.
                    sides.repeat(alive[name], turn if on_gpu else number + turn)
            gemm.measure()
        number += num_repetitions
    for side in alive.values():
        sides.finish(side)
    return result(shape, measured, cap_bytes, settings, sides.measurements, sides.left_out, gemm.best(), on_gpu)


def run(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """The result without hardware and versions.

    Raises:
        UserError: the arguments name no row, or what cannot be.
    """
    names = ladder.names(arguments.rows)
    num_repetitions = REPETITIONS[arguments.shape] if arguments.repetitions is None else arguments.repetitions
    if num_repetitions < 1:
        raise UserError(f"--repetitions {num_repetitions} is too few", "give 1 or more")
    if arguments.memory_cap <= 0:
        raise UserError(f"--memory-cap {arguments.memory_cap:g} is no memory", "give gigabytes, such as 16")
    with tempfile.TemporaryDirectory(prefix="daramgpt-throughput-") as folder:
        cap_bytes = round(arguments.memory_cap * 1e9)
        return measure(arguments.shape, names, num_repetitions, cap_bytes, arguments.ds_config, Path(folder), say)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("throughput", __doc__)
    parser.add_argument("--shape", choices=sorted(REPETITIONS), default="small", help="size of the models")
    parser.add_argument("--rows", help="names of rows, with commas between them (default: all)")
    parser.add_argument("--repetitions", type=int, help=f"of each side (default: {REPETITIONS})")
    parser.add_argument(
        "--memory-cap",
        type=float,
        default=MEMORY_CAP_GIGABYTES,
        help="gigabytes that a row may take, on a GPU really (default: 16)",
    )
    parser.add_argument(
        "--ds-config", help="name or file, for the rows in low precision (default: what plan would take)"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    start = time.monotonic()

    def say(line: str) -> None:
        command.progress(f"{time.monotonic() - start:5.0f} s  {line}")

    return command.run(lambda: run(parsed, say), format_result, parsed.json, f"{parsed.shape} models")


if __name__ == "__main__":
    sys.exit(main())
