"""Kills at random moments of a training, and damage to its files: does it end bit for bit as if nothing had happened?

    python -m benchmarks.faults --kills N [--ranks 1|2] [--seed N] [--json FILE]

A tiny run with a teacher is trained undisturbed, then killed again and again and continued, then damaged in all ways
that `faults_cases` knows. Linux only.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import command, faults_cases, faults_kills, faults_run, machine
from benchmarks.command import progress


def measure(kills: int, num_ranks: int, seed: int, folder: Path) -> dict[str, Any]:
    """The result."""
    with faults_run.Program() as program:
        prepared = faults_run.prepared(folder, program)
        one = faults_run.planned(prepared, program, 1, folder / "one")
        progress("undisturbed, one rank")
        expected = faults_run.undisturbed(one, folder / "undisturbed")
        planned, expected_of_ranks = one, expected
        if num_ranks > 1:
            planned = faults_run.planned(prepared, program, num_ranks, folder / "ranks")
            progress(f"undisturbed, {num_ranks} ranks")
            expected_of_ranks = faults_run.undisturbed(planned, folder / "undisturbed")
        killed = faults_kills.measure(planned, expected_of_ranks, kills, num_ranks, folder / "killed", seed)
        base = faults_cases.stopped(one, expected, folder / "stopped")
        cases, full_disk = faults_cases.measure(base, expected, folder, program)
    return {"ranks": num_ranks, "steps": max(expected), **killed, **summarised(killed, cases), "full_disk": full_disk}


def summarised(killed: dict[str, Any], cases: list[dict[str, str]]) -> dict[str, Any]:
    """``cases`` and ``lost``: kills, runs and cases after which something was not as in the undisturbed run."""
    lost = sum(case["outcome"] == "lost" for case in cases)
    lost += killed["kills"] - killed["resumed_identical"] + killed["runs_finished"] - killed["runs_identical"]
    return {"cases": cases, "lost": lost}


def format_result(result: dict[str, Any]) -> str:
    """Kills by phase, cases by outcome, and what was lost."""
    kills = [(phase, str(count), f"{result['usual_seconds'][phase]:.3f}") for phase, count in result["phases"].items()]
    cases = [(case["name"], case["outcome"]) for case in result["cases"]]
    return "\n".join(
        [
            machine.format_table(("killed in", "kills", "usual seconds"), kills),
            f"{result['kills']} kills ({result['process_group_kills']} of all processes, {result['single_rank_kills']} "
            f"of one rank), {result['resumed_identical']} with the checkpoint as in the undisturbed run; "
            f"{result['runs_identical']} of {result['runs_finished']} runs ended like it",
            *result["findings"],
            machine.format_table(("case", "outcome"), cases),
            *(f"{case['name']}: {case['said']}" for case in result["cases"] if case["outcome"] == "lost"),
            f"lost: {result['lost']}",
        ]
    )


def main() -> int:
    parser = command.parser("faults", __doc__)
    parser.add_argument("--kills", type=int, required=True, help="how many in all")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="processes of the killed training")
    parser.add_argument("--seed", type=int, default=0, help="of phases and moments")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=faults_run.FOLDER) as folder:
        return command.run(
            lambda: measure(arguments.kills, arguments.ranks, arguments.seed, Path(folder)),
            format_result,
            arguments.json,
        )


if __name__ == "__main__":
    sys.exit(main())
