"""Time and memory of the loss: plain, fused and installed peers, over tokens, vocabulary and dtype.

    python -m benchmarks.loss [--vocab N ...] [--tokens N ...] [--dtype NAME ...] [--repetitions N] [--json FILE]

Every row has a process of its own; those of one size and dtype are alive together and compute in turn. README.md
defines every key.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.loss_sides import (
    BUILDERS,
    DTYPES,
    OBJECTIVE,
    PRODUCTS,
    Case,
    Finished,
    Inputs,
    RefusedError,
    Side,
    fault,
)
from daramgpt import hardware
from daramgpt.errors import UserError
from daramgpt.losses import distillation_loss, distillation_loss_reference

ACCURACY_TOKENS = 512
FUSED = "fused"


def measure(cases: Sequence[Case], repetitions: int, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], Any]:
    """Rows of cases of one size and dtype, and ``left_out``.

    Args:
        cases: `PRODUCTS` first, whose time is the floor of the others.
        repetitions: of each side, after one that warms up.
        say: takes a line of progress.
    """
    sides: dict[str, Side] = {}
    left_out = {}
    memory_bytes = hardware.detect().memory_bytes
    for case in cases:
        if (reason := fault(case, memory_bytes)) is None:
            try:
                say(f"{case.name} {case.dtype} {case.vocab_size:,} x {case.tokens:,}")
                sides[case.name] = Side(case)
                continue
            except RefusedError as error:
                reason = str(error)
        left_out[f"{case.name} {case.dtype} {case.vocab_size}x{case.tokens}"] = reason
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            seconds[name].append(side.repeat())
    floor = statistics.median(seconds[PRODUCTS])
    rows = []
    for case in cases:
        if case.name in sides:
            rows.append(row_of(case, seconds[case.name], floor, sides[case.name].finish()))
    return rows, left_out


def row_of(case: Case, seconds: Sequence[float], floor: float, finished: Finished) -> dict[str, Any]:
    """One row of the result."""
    median = statistics.median(seconds)
    return {
        "name": case.name,
        "dtype": case.dtype,
        "vocab_size": case.vocab_size,
        "tokens": case.tokens,
        "seconds": median,
        "fastest_and_slowest_repetition": [min(seconds), max(seconds)],
        "tokens_per_second": case.tokens / median,
        "floor_share": floor / median,
        # Of the products only the gradients and one buffer of logits would be left.
        "peak_memory_bytes": None if case.name == PRODUCTS else finished.peak_bytes,
        "loss": finished.loss if math.isfinite(finished.loss) else None,
    }


def errors(dtype: str, vocab_size: int, tokens: int, chunk_tokens: int) -> dict[str, Any]:
    """Norm-relative errors of the fused form against the plain form in fp64, on the very same numbers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = Inputs.random(Case(FUSED, dtype, vocab_size, tokens, chunk_tokens), device)
    loss, _, _ = distillation_loss(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.labels,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        objective=OBJECTIVE,
        chunk_tokens=chunk_tokens,
    )
    loss.backward()
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.student_hidden, inputs.student_weight))
    teacher_logits = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T
    kd, ce = distillation_loss_reference(hidden @ weight.T, teacher_logits, inputs.labels, OBJECTIVE)
    expected = OBJECTIVE.kd_weight * kd + OBJECTIVE.ce_weight * ce
    expected.backward()

    def error(found: torch.Tensor | None, value: torch.Tensor | None) -> float:
        assert found is not None and value is not None
        return float((found.double() - value).norm() / value.norm())

    return {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokens": tokens,
        "value": error(loss.detach(), expected.detach()),
        "grad_hidden": error(inputs.student_hidden.grad, hidden.grad),
        "grad_weight": error(inputs.student_weight.grad, weight.grad),
    }


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The result without hardware and versions.

    Raises:
        UserError: a size or a name that cannot be measured.
    """
    numbers = {"--vocab": arguments.vocab, "--tokens": arguments.tokens, "--chunk": [arguments.chunk]}
    numbers["--repetitions"] = [arguments.repetitions]
    for option, values in numbers.items():
        if min(values) < 1:
            raise UserError(f"{option} {min(values)} is too few", "give at least 1")
    rows, left_out = [], {}
    torch.set_num_threads(hardware.detect().num_cores)
    accuracy = [errors(dtype, max(arguments.vocab), ACCURACY_TOKENS, arguments.chunk) for dtype in arguments.dtype]
    for dtype in arguments.dtype:
        for vocab_size in arguments.vocab:
            for tokens in arguments.tokens:
                names = [name for name in BUILDERS if name == PRODUCTS or name in (arguments.rows or BUILDERS)]
                cases = [Case(name, dtype, vocab_size, tokens, arguments.chunk) for name in names]
                measured, refused = measure(cases, arguments.repetitions, say)
                rows += measured
                left_out.update(refused)
    return {
        "objective": {"divergence": OBJECTIVE.divergence, "temperature": OBJECTIVE.temperature},
        "chunk_tokens": arguments.chunk,
        "rows": rows,
        "errors": accuracy,
        "left_out": left_out,
    }


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    header = ("row", "dtype", "vocabulary", "tokens", "seconds", "tokens/s", "of the floor", "memory", "loss")
    cells = [
        (
            row["name"],
            row["dtype"],
            f"{row['vocab_size']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['floor_share']:.2f}",
            "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:,.0f} MB",
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
        )
        for row in result["rows"]
    ]
    lines = [machine.format_table(header, cells)]
    lines += [
        f"fused {e['dtype']} against fp64, {e['tokens']} tokens of {e['vocab_size']:,}: value {e['value']:.1e}, "
        f"gradients {e['grad_hidden']:.1e} (hidden states), {e['grad_weight']:.1e} (weight)"
        for e in result["errors"]
    ]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in result["left_out"].items())])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[51200], metavar="N", help="sizes of the vocabulary")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], metavar="N", help="of a batch")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", choices=sorted(BUILDERS), help="default: all")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens that the fused form takes at a time")
    parser.add_argument("--repetitions", type=int, default=3, help="of each row")
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = run(parsed, lambda line: print(line, file=sys.stderr, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    machine.write_result(result, parsed.json)
    print(f"{hardware.detect().describe()}, {time.monotonic() - start:.0f} s")
    print(format_result(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
