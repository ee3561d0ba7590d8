"""What each precision of the teacher costs in quality, and what it saves in memory and time.

    python -m benchmarks.teacher --teacher DIR --corpus DIR [--tokens N] [--rows NAME,...] [--seconds N] [--json FILE]
    python -m benchmarks.teacher --shape full [--tokens N] [--rows NAME,...] [--json FILE]

Every row is a precision and a compute dtype in a process of its own. All rows compute the same batches of real text in
turn; each batch gives a time, and its hidden states give KL and agreement with the fp32 row, over the whole vocabulary
but a few positions at a time. README.md defines every key.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks import command, inputs
from benchmarks.machine import format_cell, format_table
from benchmarks.teacher_agreement import Head, Sums, compare
from benchmarks.teacher_sides import (
    REFERENCE,
    Configuration,
    Loaded,
    Side,
    configurations,
    require_rss_anon,
    save_tiny_model,
)
from benchmarks.teacher_tokens import FULL, given_text, random_tokens
from daramgpt import hardware, teacher
from daramgpt.engine import import_deepspeed
from daramgpt.errors import UserError

Answer = TypeVar("Answer")
# At the full shape, whose weights are random, memory is what there is to learn.
TOKENS = {"given": 100_000, "full": 0}


def measure(
    teacher_dir: Path,
    batches: NDArray[np.int64],
    rows: Sequence[Configuration],
    folder: Path,
    most_seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """``checkpoint_bytes``, ``rows`` and ``left_out`` of the result.

    Args:
        teacher_dir: Hugging Face directory.
        batches: [number, B, T] token ids; without any, teachers are loaded one by one and nothing more.
        rows: the reference first.
        folder: takes a log and a tiny model.
        most_seconds: of forward passes, after which a row gets no further batch.

    Raises:
        UserError: the reference cannot be loaded, or has too small a vocabulary.
    """
    require_rss_anon()
    save_tiny_model(folder / "tiny")
    capable = hardware.detect()
    left_out: dict[str, str] = {}
    sides: list[Side] = []
    try:
        for row in rows:
            if (fault := hardware.dtype_fault(capable, row.compute_dtype)) is None:
                sides.append(Side(row, teacher_dir, folder / "tiny", folder / "log.txt"))
            else:
                left_out[row.name] = fault
        # All at once while they import their libraries, one by one while they load.
        _keep(sides, Side.wait, left_out)
        loaded = _keep(sides, lambda side: _load(side, len(batches) > 0, say), left_out)
        sums = _compare_batches(sides, batches, most_seconds, say) if len(batches) else [Sums() for _ in sides]
    finally:
        for side in sides:
            side.end()
    return {
        "checkpoint_bytes": loaded[0].checkpoint_bytes,
        "rows": [
            row_of(side.configuration, measured, total)
            for side, measured, total in zip(sides, loaded, sums, strict=True)
        ],
        "left_out": left_out,
    }


def _keep(sides: list[Side], step: Callable[[Side], Answer], left_out: dict[str, str]) -> list[Answer]:
    """What each side answers to a step; those that refuse are ended and left out, but the reference must not."""
    answers = []
    for side in list(sides):
        try:
            answers.append(step(side))
        except UserError as error:
            if side.configuration.name == REFERENCE:
                raise
            left_out[side.configuration.name] = error.fault
            side.end()
            sides.remove(side)
    return answers


def _load(side: Side, stays: bool, say: Callable[[str], None]) -> Loaded:
    """Load a side, which makes room for the next one at once when it is not to stay."""
    say(f"loading {side.configuration.name}")
    loaded = side.load()
    if not stays:
        side.end()
    return loaded


def _compare_batches(
    sides: Sequence[Side], batches: NDArray[np.int64], most_seconds: float, say: Callable[[str], None]
) -> list[Sums]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = []
    for side in sides:
        weight, bias = side.head()
        if batches.max() >= len(weight):
            raise UserError(
                f"the tokenizer gives token {batches.max()}, the teacher has {len(weight)}",
                "give a teacher directory whose tokenizer belongs to it",
            )
        heads.append(
            Head(torch.from_numpy(weight).to(device), None if bias is None else torch.from_numpy(bias).to(device))
        )
    sums = [Sums() for _ in sides]
    for number, batch in enumerate(batches):
        # The reference always goes on: the others are compared with it.
        going = [index for index, total in enumerate(sums) if not index or sum(total.seconds) < most_seconds]
        hidden = []
        for index in going:
            output = sides[index].run(batch)
            sums[index].seconds.append(output.seconds)
            hidden.append(torch.from_numpy(output.hidden).to(device).flatten(0, 1))
        compare(hidden, [heads[index] for index in going], [sums[index] for index in going])
        say(f"batch {number + 1} of {len(batches)}, {len(going)} rows")
        if len(going) == 1 < len(sides):
            break
    return sums


def row_of(configuration: Configuration, loaded: Loaded, sums: Sums) -> dict[str, Any]:
    """One row of the result."""
    kl = sums.kl / sums.tokens if sums.tokens else math.nan
    rates: list[float] = []
    if sums.seconds:
        batch_tokens = sums.tokens / len(sums.seconds)
        # The first batch faults in the buffers.
        rates = [batch_tokens / seconds for seconds in sums.seconds[1:] or sums.seconds]
    return {
        "name": configuration.name,
        "precision": configuration.precision,
        "compute_dtype": configuration.compute_dtype,
        "kl_to_fp32": kl if math.isfinite(kl) else None,
        "top1_agreement": sums.agreed / sums.tokens if math.isfinite(kl) else None,
        "tokens": sums.tokens,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "slowest_and_fastest_repetition": [min(rates), max(rates)] if rates else None,
        "weight_bytes": loaded.weight_bytes,
        "load_peak_bytes": loaded.peak_bytes,
        "load_peak_share": loaded.peak_bytes / loaded.checkpoint_bytes,
        "load_peak_device_bytes": loaded.device_peak_bytes,
    }


def save_full_teacher(folder: Path) -> None:
    """The real teacher's shape with random weights, as sharded fp32 safetensors.

    Raises:
        UserError: too little room.
    """
    width = FULL.teacher.n_embd
    # Embeddings and the matrices of the blocks, in fp32; the rest is within the margin.
    model_bytes = 4 * width * (FULL.vocab_size + FULL.context_tokens + 12 * width * FULL.teacher.n_layer)
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < 1.1 * model_bytes:
        raise UserError(
            f"{folder.parent} has {free_bytes / 1e9:.1f} GB free, the full teacher takes {model_bytes / 1e9:.1f} GB",
            "set TMPDIR to a folder with more room",
        )
    inputs.published_model(FULL, FULL.teacher, eos_token_id=0).save_pretrained(folder, max_shard_size="1GB")


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    header = ("row", "computes in", "KL to fp32", "top-1", "tokens", "tokens/s", "weights", "loading", "of checkpoint")

    cells = [
        (
            row["name"],
            row["compute_dtype"],
            format_cell(row["kl_to_fp32"], ".2e"),
            format_cell(row["top1_agreement"], ".3%"),
            f"{row['tokens']:,}",
            format_cell(row["tokens_per_second"], ",.0f"),
            f"{row['weight_bytes'] / 1e6:,.1f} MB",
            f"{row['load_peak_bytes'] / 1e6:,.1f} MB",
            f"{row['load_peak_share']:.2f}",
        )
        for row in result["rows"]
    ]
    lines = [
        format_table(header, cells),
        f"KL in nats a token at T = 1 over {result['text']}; batches of {result['batch_tokens']:,} tokens; "
        f"fp32 checkpoint {result['checkpoint_bytes'] / 1e6:,.1f} MB",
    ]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in result["left_out"].items())])


def run(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The result without hardware and versions.

    Raises:
        UserError: anything named by the arguments is missing or unusable.
    """
    num_tokens = TOKENS[arguments.shape] if arguments.tokens is None else arguments.tokens
    rows = configurations(arguments.rows.split(",") if arguments.rows else None)
    if num_tokens < (1 if arguments.shape == "given" else 0):
        raise UserError(f"--tokens {num_tokens} is too few", "give more")
    transformers.logging.disable_progress_bar()
    # transformers imports it when it saves a model, and its import prints.
    import_deepspeed(folder / "log.txt")
    if arguments.shape == "full":
        teacher_dir = folder / "teacher"
        say("writing a teacher of the full shape")
        save_full_teacher(teacher_dir)
        batches, text = random_tokens(num_tokens), "random tokens"
    else:
        if arguments.teacher is None or arguments.corpus is None:
            raise UserError("--teacher and --corpus are missing", "name both folders, or give --shape full")
        teacher_dir = teacher.resolve(str(arguments.teacher))
        batches, text = given_text(teacher_dir, arguments.corpus, num_tokens), "text of the corpora"
    return {
        "shape": arguments.shape,
        "text": text,
        "batch_tokens": batches[0].size if len(batches) else 0,
        **measure(teacher_dir, batches, rows, folder, arguments.seconds, say),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("teacher", __doc__)
    parser.add_argument("--teacher", type=Path, help="folder of the teacher, with its tokenizer")
    parser.add_argument("--corpus", type=Path, help="folder that holds the corpora")
    parser.add_argument(
        "--shape", choices=sorted(TOKENS), default="given", help="full: the real teacher's, random weights"
    )
    parser.add_argument(
        "--tokens", type=int, help=f"at least so many (default: {TOKENS['given']:,}; full: {TOKENS['full']})"
    )
    parser.add_argument("--rows", help="names of rows, with commas between them (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of forward passes of a row, at most; one batch at least"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="daramgpt-teacher-") as folder:
        return command.run(lambda: run(parsed, Path(folder), command.progress), format_result, parsed.json)


if __name__ == "__main__":
    sys.exit(main())
