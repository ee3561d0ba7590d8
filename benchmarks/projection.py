"""What it takes to begin a student with its teacher's weights: seconds and memory, by the shapes alone.

    python -m benchmarks.projection [--shape full|small] [--init projected|pruned] [--tokens N] [--json FILE]

Teacher and tokens are random, for neither time nor memory depends on what they are; how good a student begins is what
`benchmarks.quality` and `benchmarks.sweep` measure. On a GPU where there is one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.machine import PeakMemory
from daramgpt import hardware
from daramgpt.recipe import Student


def measure(shape: str, init: str, num_tokens: int) -> dict[str, Any]:
    """The result without hardware and versions."""
    import torch

    from benchmarks.inputs import SEED, SHAPES
    from daramgpt import initialisation, student
    from daramgpt.teacher.activations import fuse_gelu

    measured = SHAPES[shape]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = PeakMemory(device)
    memory.start()
    pair: list[Any] = [
        student.build(of, measured.vocab_size, measured.context_tokens, 0, SEED)
        for of in (measured.teacher, measured.student)
    ]
    teacher, model = (one.to(device).eval() for one in pair)
    teacher.requires_grad_(False)
    fuse_gelu(teacher)
    num_rows = -(-num_tokens // measured.context_tokens)
    rows = torch.randint(
        measured.vocab_size, (num_rows, measured.context_tokens), generator=torch.Generator().manual_seed(SEED)
    ).to(device)
    weights_bytes = sum(value.numel() * value.element_size() for one in pair for value in one.parameters())
    memory.restart()
    make = initialisation.project if init == "projected" else initialisation.prune
    began = time.monotonic()
    make(teacher, model, rows, command.progress, lambda: None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        "shape": shape,
        "init": init,
        "tokens": rows.numel(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.detect().describe(),
        "seconds": time.monotonic() - began,
        "weights_bytes": weights_bytes,
        "peak_memory_bytes": memory.read_bytes(),
    }


def format_result(result: dict[str, Any]) -> str:
    """One line."""
    return (
        f"{result['init']}, {result['shape']} shape, {result['tokens']:,} tokens: {result['seconds']:,.1f} s, "
        f"{result['peak_memory_bytes'] / 1e9:,.2f} GB at most, of them {result['weights_bytes'] / 1e9:,.2f} GB weights"
    )


def main(given: Sequence[str] | None = None) -> int:
    parser = command.parser("projection", __doc__)
    parser.add_argument("--shape", choices=("full", "small"), default="full", help="of teacher and student")
    parser.add_argument("--init", choices=("projected", "pruned"), default="projected")
    default = Student.model_fields["calibration_tokens"].default
    parser.add_argument("--tokens", type=int, default=default, help="to calibrate on; default: the recipe's")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args(given)
    return command.run(
        lambda: measure(arguments.shape, arguments.init, arguments.tokens), format_result, arguments.json
    )


if __name__ == "__main__":
    sys.exit(main())
