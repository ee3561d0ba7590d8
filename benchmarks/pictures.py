"""The pictures of README.md and docs/: the ladder from a result of `throughput`, and the memory of a GPU by arithmetic.

    python -m benchmarks.pictures --ladder FILE --teacher DIR [--gpu NAME] [--out DIR]

Of ``--teacher`` only config.json is read. Writes ``ladder.png`` and ``memory.png``; needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command
from daramgpt import planner
from daramgpt import recipe as recipes
from daramgpt.errors import UserError
from daramgpt.planner.gpus import Forecast, machine, reference_bytes
from daramgpt.planner.memory import needed_memory

DOTS_PER_INCH = 110
INK, SOFT, OURS, OTHERS = "#1d2430", "#5c6675", "#1f6feb", "#b8c0cc"


def ladder(result: dict[str, Any], path: Path) -> None:
    """Useful tokens per second of each row, and how many times the reference loop's that is."""
    from matplotlib.figure import Figure

    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 0.45 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    names, speeds = [row["name"] for row in rows], [row["useful_tokens_per_second"] for row in rows]
    colours = [OURS if row["name"] == "daramgpt" else OTHERS for row in rows]
    bars = axes.barh(names, speeds, color=colours, height=0.62)
    times = [f"{row['over_reference']:.1f} ×  ({row['useful_tokens_per_second']:,.0f} tokens/s)" for row in rows]
    axes.bar_label(bars, times, padding=6, color=INK, fontsize=9)
    axes.set_xlim(0, 1.3 * max(speeds))
    hardware = result["hardware"]
    axes.set_title(
        f"useful tokens a second over the reference loop\n{hardware['processor']}, {hardware['summary']}",
        loc="left",
        fontsize=10,
        color=INK,
    )
    _plain(axes)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")


def memory(forecast: Forecast, card_bytes: int, reference_positions: int, path: Path) -> dict[str, dict[str, float]]:
    """Memory of a step of the reference loop, of so many padded positions, and of the planned one.

    Returns:
        What is drawn: gigabytes by component, by bar.
    """
    from matplotlib.figure import Figure

    step = forecast.step
    if step is None or step.teacher is None:
        raise UserError(f"--gpu: one row does not fit on {forecast.name}", "give a larger one")
    fixed, of_position = reference_bytes(step.student, step.teacher)
    weights = 4 * step.teacher.parameters
    drawn: dict[str, dict[str, float]] = {
        f"reference loop, {reference_positions:,} padded positions": {
            "teacher weights": weights,
            "student, gradients, optimizer": fixed - weights,
            "logits and activations": of_position * reference_positions,
        },
        f"DaramGPT, {step.tokens:,} tokens": _grouped(needed_memory(step).device),
    }
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = {"teacher weights": "#7a4fc4", "student, gradients, optimizer": "#d1660a", "logits and activations": OURS}
    for bar, parts in enumerate(reversed(drawn.values())):
        left = 0.0
        for name, size in parts.items():
            axes.barh(bar, size / 1e9, left=left, color=colours[name], height=0.55, label=name if bar else None)
            left += size / 1e9
        axes.text(left + 0.15, bar, f"{left:.1f} GB", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(drawn)), list(reversed(drawn)), fontsize=9)
    axes.axvline(card_bytes / 1e9, color=SOFT, linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.06 * card_bytes / 1e9)
    axes.set_xlabel("GB of GPU memory, by arithmetic", color=SOFT, fontsize=9)
    axes.set_title(
        f"{forecast.name}: what a step holds of the {card_bytes / 1e9:.0f} GB of one",
        loc="left",
        fontsize=10,
        color=INK,
    )
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(0.93, 0.0))
    _plain(axes)
    axes.xaxis.set_visible(True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return {name: {part: size / 1e9 for part, size in parts.items()} for name, parts in drawn.items()}


def _grouped(device: Mapping[str, float]) -> dict[str, float]:
    """Components as those of the reference loop."""
    teacher = device.get("teacher weights", 0)
    student = sum(device.get(name, 0) for name in ("student weights", "gradients", "optimizer"))
    return {
        "teacher weights": teacher,
        "student, gradients, optimizer": student,
        "logits and activations": sum(device.values()) - teacher - student,
    }


def _plain(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0, colors=SOFT, labelsize=9)


def main() -> int:
    parser = command.parser("pictures", __doc__)
    parser.add_argument("--ladder", type=Path, required=True, help="result of benchmarks.throughput")
    parser.add_argument("--teacher", type=Path, required=True, help="folder with the config.json of a GPT-2")
    parser.add_argument("--gpu", default="T4 x 2", help="whose memory is drawn")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="file for what is drawn")
    arguments = parser.parse_args()

    def draw() -> dict[str, Any]:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = _read(arguments.ladder)
        recipe = recipes.load("daramgpt")
        shape = planner.teacher_shape(arguments.teacher)
        context_tokens = min(recipe.curriculum.context_tokens, shape.num_positions)
        forecast = planner.forecast(recipe, arguments.gpu, shape, context_tokens, planner.curriculum_tokens(recipe))
        ladder(result, arguments.out / "ladder.png")
        positions = result["rows"][0]["micro_batch_tokens"]
        card_bytes = machine(arguments.gpu).gpu_memory_bytes
        drawn = memory(forecast, card_bytes, positions, arguments.out / "memory.png")
        return {"ladder": str(arguments.ladder), "memory_gigabytes": drawn}

    return command.run(draw, _format, arguments.json)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict) and found["rows"]
    except (OSError, ValueError, KeyError, AssertionError):
        raise UserError(f"--ladder: {path} is no result of benchmarks.throughput", "give one of its --json") from None
    return found


def _format(result: dict[str, Any]) -> str:
    lines = [f"ladder of {result['ladder']}"]
    for name, parts in result["memory_gigabytes"].items():
        each = ", ".join(f"{part} {size:.2f}" for part, size in parts.items())
        lines.append(f"{name}: {sum(parts.values()):.2f} GB: {each}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
