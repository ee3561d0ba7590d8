"""What each setting makes of its seconds and tokens: held-out bits per byte of students of one teacher, on real text.

    python -m benchmarks.quality --teacher DIR --corpus DIR --heldout DIR [--minutes M] [--rates R,R,R]
                                 [--reference-scale S] [--scale S] [--seeds N] [--settings NAME,...]
                                 [--set key=value ...] [--work DIR] [--json FILE] [--picture FILE]

The reference loop is run with each learning rate for a fifth of its minutes, and with the best of them for all. Ours
goes through as much of the same curriculum as ``--scale`` says, by the command `train`, once a setting and seed. All
are measured on the text of ``--heldout``, weighted by bytes, and the time of that is nobody's. What is in ``--work``
already is taken as it is, so that a comparison may be made in several sittings.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

from benchmarks import command, machine
from benchmarks.quality_runs import POINTS, Row, checked, format_gaps, gap_closed, make_recipe, parse_shape, prepared
from benchmarks.quality_sides import Job
from daramgpt.errors import UserError
from daramgpt.ledger import entries

Curve = list[dict[str, float]]
# Each trained beside nothing else, from the same shards; their own keys of the recipe.
SETTINGS: dict[str, list[str]] = {
    "random": ['student.init="random"', "evaluation.baseline=true"],
    "pruned": ['student.init="pruned"'],
    "projected": ['student.init="projected"'],
    "hidden": ['student.init="projected"', "loss.hidden_weight=1.0"],
}
BASELINE = "without teacher"
REFERENCE = "reference loop"
TRIAL_SHARE = 0.2
# Times that a trial is measured: its end decides.
TRIAL_POINTS = 3


class Comparison:
    """All that is measured, in a folder.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._work = arguments, Path(arguments.work)
        self._work.mkdir(parents=True, exist_ok=True)
        self._recipe = self._work / "quality.toml"
        shape = parse_shape(arguments.student)
        self._recipe.write_text(make_recipe(arguments.teacher, arguments.corpus, shape), encoding="utf-8")

    def __call__(self) -> Row:
        rows: list[Row] = []
        if self._arguments.minutes:
            rows += self._reference()
        for seed in range(self._arguments.seeds):
            for name in self._arguments.settings.split(","):
                rows += self._ours(name, seed)
        teacher = self._teacher()
        return {
            "rows": rows,
            "teacher_bits_per_byte": teacher,
            **conclusions(rows),
            "gap_closed": gap_closed(rows, teacher, BASELINE, SETTINGS),
        }

    def _reference(self) -> list[Row]:
        """Trials of each rate, and the whole run with the best."""
        run = self._prepare("reference", [f"curriculum.scale={self._arguments.reference_scale}"], 0)
        seconds = 60 * self._arguments.minutes
        trials = {}
        for rate in (float(text) for text in self._arguments.rates.split(",")):
            curve = self._curve(run, f"trial-{rate:g}", rate, TRIAL_SHARE * seconds, TRIAL_POINTS)
            trials[rate] = curve[-1]["bits_per_byte"]
        best = min(trials, key=lambda rate: trials[rate])
        rows = [_row(f"{REFERENCE}, {rate:g}", 0, self._read(run, f"trial-{rate:g}")) for rate in trials]
        return [*rows, _row(REFERENCE, 0, self._curve(run, "whole", best, seconds, POINTS))]

    def _curve(self, run: Path, name: str, rate: float, seconds: float, points: int) -> Curve:
        path = run / f"{name}.json"
        if not path.is_file():
            command.progress(f"{REFERENCE}: {name}, {seconds / 60:.0f} minutes at {rate:g}")
            job = Job("reference", str(run), str(self._arguments.heldout), 0, points, time.monotonic(), rate, seconds)
            said = _run(job, run / "job.json")
            curve = json.loads(said.rsplit("CURVE ", 1)[1].splitlines()[0])
            path.write_text(json.dumps(curve), encoding="utf-8")
        return self._read(run, name)

    def _read(self, run: Path, name: str) -> Curve:
        curve: Curve = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        return curve

    def _ours(self, name: str, seed: int) -> list[Row]:
        settings = [f"curriculum.scale={self._arguments.scale}", *SETTINGS[name], *self._arguments.set]
        run = self._prepare(f"{name}-{seed}", settings, seed)
        if not (run / "done").is_file():
            command.progress(f"{name}, seed {seed}")
            _run(Job("ours", str(run), str(self._arguments.heldout), seed, POINTS, time.monotonic()), run / "job.json")
            (run / "done").touch()
        rows = [_row(name, seed, _own_curve(run / "metrics.jsonl"))]
        baseline = run / "parts" / "baseline" / "metrics.jsonl"
        if baseline.is_file():
            curve = _own_curve(baseline)
            # It is the second training of its process: its seconds begin where the first one's ended.
            start = rows[0]["curve"][-1]["seconds"]
            rows.append(_row(BASELINE, seed, [{**one, "seconds": one["seconds"] - start} for one in curve]))
        return rows

    def _prepare(self, name: str, settings: list[str], seed: int) -> Path:
        """A run directory with shards and a plan."""
        return prepared(self._recipe, self._work / name, [*settings, f"seed={seed}"], ("prepare", "plan"))

    def _teacher(self) -> float:
        """Bits per byte of the teacher, at full precision."""
        from benchmarks.quality_yardstick import ALL, read
        from daramgpt import teacher
        from daramgpt.evaluation.held_out import measure
        from daramgpt.shards import Shards

        shards = Shards(next(self._work.glob("*/shards")))
        yardstick = read(self._arguments.heldout, shards.tokenizer_dir, shards.eos_token_id, shards.context_tokens)
        loaded = teacher.load(self._arguments.teacher, "fp32", teacher.DTYPES["fp32"])
        found = measure(loaded, yardstick, [ALL], sys.maxsize).bits_per_byte[ALL]
        assert found is not None
        return found


def _run(job: Job, path: Path) -> str:
    job.write(path)
    return checked([sys.executable, "-m", "benchmarks.quality_sides", str(path)])


def _own_curve(metrics: Path) -> Curve:
    return [
        {"seconds": line["own_seconds"], "tokens": line["tokens"], "bits_per_byte": line["bits_per_byte"]["all"]}
        for line in entries(metrics)
        if "own_seconds" in line
    ]


def _row(name: str, seed: int, curve: Curve) -> Row:
    return {"name": name, "seed": seed, **curve[-1], "curve": curve}


def conclusions(rows: list[Row]) -> Row:
    """What the curves say; None where a row for it is missing, or never gets there.

    Returns:
        ``seconds_share``: of the reference loop's seconds, until ours first is where it ends, by setting, the worst of
        the seeds; ``tokens_share``: of the tokens of ``random``, until ``projected`` first is where it ends, the worst
        of the seeds.
    """
    found: Row = {"seconds_share": {}, "tokens_share": None}
    reference = next((row for row in rows if row["name"] == REFERENCE), None)
    for name in SETTINGS:
        own = [row for row in rows if row["name"] == name]
        if reference is not None and own:
            reached = [_reached(row["curve"], reference["bits_per_byte"], "seconds") for row in own]
            found["seconds_share"][name] = _worst(reached, [reference["seconds"]] * len(own))
    by_seed = {(row["name"], row["seed"]): row for row in rows}
    pairs = [
        (by_seed["projected", seed], row)
        for (name, seed), row in by_seed.items()
        if name == "random" and ("projected", seed) in by_seed
    ]
    if pairs:
        reached = [_reached(one["curve"], random["bits_per_byte"], "tokens") for one, random in pairs]
        found["tokens_share"] = _worst(reached, [random["tokens"] for _, random in pairs])
    return found


def _reached(curve: Curve, bits_per_byte: float, what: str) -> float | None:
    """Seconds or tokens at the first point that is no worse."""
    return next((point[what] for point in curve if point["bits_per_byte"] <= bits_per_byte), None)


def _worst(reached: list[float | None], whole: list[float]) -> float | None:
    shares = [None if one is None else one / of for one, of in zip(reached, whole, strict=True)]
    return None if None in shares else max(share for share in shares if share is not None)


def format_result(result: Row) -> str:
    """A line a row, and the conclusions."""
    lines = [
        (
            row["name"],
            str(row["seed"]),
            f"{row['seconds']:,.0f}",
            f"{row['tokens'] / 1e6:,.2f} M",
            f"{row['curve'][0]['bits_per_byte']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        )
        for row in result["rows"]
    ]
    header = ("", "seed", "seconds", "tokens", "first point", "bits/byte")
    parts = [machine.format_table(header, lines), f"teacher {result['teacher_bits_per_byte']:.4f} bits per byte"]
    parts += [
        f"{name}: the reference loop's last figure in {machine.format_cell(share, '.3f')} of its seconds"
        for name, share in result["seconds_share"].items()
    ]
    if result["tokens_share"] is not None:
        parts.append(f"projected: random's last figure in {result['tokens_share']:.3f} of its tokens")
    parts += format_gaps(result["gap_closed"])
    return "\n".join(parts)


def draw(result: Row, path: Path) -> None:
    """Bits per byte over seconds and over tokens, a line a row.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--picture needs matplotlib", "pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["name"] for row in result["rows"]))}
    for what, axes in zip(("seconds", "tokens"), figure.subplots(1, 2, sharey=True), strict=True):
        for row in result["rows"]:
            label = row["name"] if row["seed"] == 0 else None
            xs, ys = ([point[key] for point in row["curve"]] for key in (what, "bits_per_byte"))
            axes.plot(xs, ys, marker=".", color=colours[row["name"]], label=label)
        axes.axhline(result["teacher_bits_per_byte"], color="grey", linestyle=":", label="teacher")
        axes.set(xscale="log", xlabel=what)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        if what == "seconds":
            axes.set_ylabel("held-out bits per byte")
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = command.parser("quality", __doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="directory of a GPT-2")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the four corpora")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of .txt files that neither has seen")
    parser.add_argument("--student", default="128/4/2", help="n_embd/n_head/n_layer")
    parser.add_argument("--minutes", type=float, default=40.0, help="of the reference loop; 0 leaves it out")
    parser.add_argument("--rates", default="5e-5,3e-4,1e-3", help="of the reference loop")
    parser.add_argument("--reference-scale", type=float, default=1.0, help="of the curriculum that it repeats")
    parser.add_argument("--scale", type=float, default=0.1, help="of the curriculum, for ours")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--settings", default="random,projected", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for ours")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--picture", type=Path, help="file for a picture, by matplotlib")
    arguments = parser.parse_args()

    def measure() -> Row:
        unknown = [name for name in arguments.settings.split(",") if name not in SETTINGS]
        if unknown:
            raise UserError(f"--settings: there is no {unknown[0]}", f"give some of {', '.join(SETTINGS)}")
        result = Comparison(arguments)()
        if any(math.isnan(row["bits_per_byte"]) for row in result["rows"]):
            raise UserError("--heldout: a row measured nothing", "give more text")
        if arguments.picture is not None:
            draw(result, arguments.picture)
        return result

    return command.run(measure, format_result, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
