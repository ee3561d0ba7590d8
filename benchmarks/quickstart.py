"""What the teacher is worth to the student of the quickstart, over several seeds.

    python -m benchmarks.quickstart [--seeds N] [--runs DIR] [--json FILE]

Runs the quickstart whole for each seed, which makes corpus, tokenizer, teacher and student anew, and compares held-out
bits per byte: the distilled student against the same student without a teacher, and the 8-bit teacher against the full
one. Runs that DIR holds already are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine

COMMANDS = ("prepare", "plan", "train", "evaluate")
MODELS = ("teacher", "teacher int8", "student", "student without teacher")


def run_seed(seed: int, runs: Path) -> dict[str, float]:
    """Bits per byte over all stages, by model, of the quickstart with this seed."""
    run = runs / f"seed{seed}"
    for command in COMMANDS:
        line = [sys.executable, "-m", "daramgpt", command, "quickstart", "--run", str(run), "--set", f"seed={seed}"]
        subprocess.run(line, check=True, env={**os.environ, **machine.SIDE_ENVIRONMENT}, stdout=subprocess.DEVNULL)
    rows = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row["bits_per_byte"]["all"] for row in rows}


def summarise(by_seed: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Rows by model and seed, and what decides: the gap and the spread between seeds.

    ``gap`` is the smallest lead of the distilled student over seeds, ``spread`` the larger of both students' ranges.
    """
    rows = [
        {"name": name, "seed": seed, "bits_per_byte": values[name]}
        for name in MODELS
        for seed, values in by_seed.items()
    ]
    gaps = [values["student without teacher"] - values["student"] for values in by_seed.values()]
    spreads = [
        max(values[name] for values in by_seed.values()) - min(values[name] for values in by_seed.values())
        for name in ("student", "student without teacher")
    ]
    losses = [values["teacher int8"] / values["teacher"] - 1 for values in by_seed.values()]
    return {"rows": rows, "gap": min(gaps), "spread": max(spreads), "int8_loss": max(losses, key=abs)}


def format_result(result: dict[str, Any]) -> str:
    """Models down, seeds across, and the verdict's figures."""
    seeds = sorted({row["seed"] for row in result["rows"]})
    cells = []
    for name in MODELS:
        values = [row["bits_per_byte"] for row in result["rows"] if row["name"] == name]
        cells.append((name, *(f"{value:.4f}" for value in values), f"{statistics.fmean(values):.4f}"))
    table = machine.format_table(("bits per byte", *(f"seed {seed}" for seed in seeds), "mean"), cells)
    return (
        f"{table}\nsmallest lead of the distilled student {result['gap']:.4f}, "
        f"spread between seeds {result['spread']:.4f}; 8-bit teacher {result['int8_loss']:+.4%} at most"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="folder of the run directories")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    result = summarise({seed: run_seed(seed, arguments.runs) for seed in range(arguments.seeds)})
    machine.write_result(result, arguments.json)
    print(format_result(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
