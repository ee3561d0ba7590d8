"""Plans for people: what was chosen and why, memory and time, in a few lines; GPUs as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from daramgpt.planner.gpus import Forecast, reference_bytes
from daramgpt.planner.making import MEMORY_SHARE
from daramgpt.planner.memory import needed_memory
from daramgpt.text_table import counted

# What is chosen from the machine, each with a reason.
CHOICES = ("dtype", "teacher_precision", "ds_config")
# Components smaller than this share of the total are not printed.
SMALLEST_SHARE = 0.01
COLUMNS, INDENT = 80, "  "


def describe(plans: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """Print the plans of a run's trainings, by what is trained, for people; what they share only once."""
    choices = {
        label: {
            key: f"{key}: {plan[key]} ({plan['reasons'].get(key, 'as planned')})"
            for key in CHOICES
            if plan[key] is not None
        }
        for label, plan in plans.items()
    }
    for key in CHOICES:
        lines = {lines[key] for lines in choices.values() if key in lines}
        if len(lines) == 1:
            _say_wrapped(say, lines.pop())
            for own in choices.values():
                own.pop(key, None)
    for label, plan in plans.items():
        say(f"{label}:")
        for line in (*_training_lines(plan), *choices[label].values()):
            _say_wrapped(say, line, INDENT)
    unmeasured: dict[str, list[str]] = {}
    for label, plan in plans.items():
        if "reason" in plan.get("probe", {}):
            unmeasured.setdefault(plan["probe"]["reason"], []).append(label)
    for reason, labels in unmeasured.items():
        _say_wrapped(say, f"micro-batch not measured ({', '.join(labels)}): {reason}")


def _say_wrapped(say: Callable[[str], None], text: str, indent: str = "") -> None:
    """In lines of 80 columns, but for a word that is longer, such as a path."""
    lines = textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent + INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    for line in lines:
        say(line)


def _training_lines(plan: dict[str, Any]) -> list[str]:
    """Of one training, not wrapped yet."""
    predicted, probe = plan["predicted"], plan.get("probe", {})
    rows, context = plan["micro_batch_rows"], plan["context_tokens"]
    parts = sorted(predicted["memory_bytes"].items(), key=lambda item: -item[1])
    total = predicted["memory_total_bytes"]
    lines = [
        f"{counted(plan['num_steps'], 'steps')} of {counted(plan['batch_rows'], 'rows')} of {context} tokens, "
        f"{counted(rows, 'rows')} ({rows * context:,} tokens) a forward pass, "
        f"loss {plan['loss_chunk_tokens']:,} tokens at a time",
        f"memory {total / 1e9:.2f} GB: "
        + ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts if size >= SMALLEST_SHARE * total),
    ]
    if host := sum(predicted.get("host_memory_bytes", {}).values()):
        lines.append(f"and {host / 1e9:.2f} GB of the host's")
    lines.append(
        f"{predicted['model_flops_per_token'] / 1e6:,.1f} MFLOP a token; at this device's "
        f"{predicted['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s no less than {predicted['fewest_hours']:.3f} hours"
    )
    if predicted.get("hours") is not None and predicted.get("tokens_per_second") is not None:
        lines.append(f"by arithmetic {predicted['tokens_per_second']:,.0f} tokens/s, {predicted['hours']:.3f} hours")
    if probe.get("fastest_rows"):
        lines.append(
            f"measured: fastest {counted(probe['fastest_rows'], 'rows')} a forward pass, largest that fits "
            f"{probe['largest_rows']}"
        )
        lines += [
            f"measured with {counted(rows, 'rows')}: {trial['tokens_per_second']:,.1f} tokens/s, "
            f"{trial['hours']:.1f} hours"
            for trial in probe["trials"]
            if trial["micro_batch_rows"] == rows and trial["hours"] is not None
        ]
    return lines


def gpu_table(forecasts: Sequence[Forecast]) -> list[str]:
    """A line a set of GPUs, 80 columns at most."""
    lines = [
        f"{'GPU':<13}{'dtype':<6}{'teacher':<8}{'micro-batch':>12}{'memory':>9}{'tokens/s':>10}"
        f"{'hours':>8}{'largest':>11}"
    ]
    for one in forecasts:
        if one.step is None:
            lines.append(f"{one.name:<13}{'one row does not fit':<40}")
            continue
        lines.append(
            f"{one.name:<13}{one.step.dtype:<6}{one.step.teacher_precision:<8}{one.step.tokens:>12,}"
            f"{one.memory_bytes / 1e9:>6.1f} GB{one.tokens_per_second:>10,.0f}{one.hours:>8.1f}"
            f"{one.largest_tokens:>11,}"
        )
    return [*lines, "micro-batch and largest that fits in tokens; hours by arithmetic, not measured"]


def one_gpu(forecast: Forecast, total_tokens: float) -> list[str]:
    """What the figures of one set rest on: memory by component, time by component, constants, the reference loop."""
    step = forecast.step
    if step is None:
        return [f"{forecast.name}: one row does not fit"]
    from daramgpt.planner.speed import step_seconds

    parts, needed = step_seconds(step, forecast.rates), needed_memory(step)
    whole = sum(parts.values())
    hours = total_tokens / (step.world_size * step.tokens * step.micro_batches) / 3600
    assert step.teacher is not None
    fixed, of_position = reference_bytes(step.student, step.teacher)
    lines = textwrap.wrap(f"{forecast.name}: {forecast.rates.source}", COLUMNS, subsequent_indent=INDENT)
    lines += ["memory of one, MB:"]
    for place, sizes in (("", needed.device), (" (host)", needed.host)):
        lines += [f"  {name + place:<28}{size / 1e6:>10,.0f}" for name, size in sizes.items() if size]
    lines += [f"  {'together':<28}{needed.device_bytes / 1e6:>10,.0f}"]
    lines += [f"hours of {total_tokens / 1e9:.2f}e9 tokens:"]
    lines += [f"  {name:<28}{value * hours:>10.1f}{value / whole:>7.0%}" for name, value in parts.items()]
    lines += [f"  {'together':<28}{forecast.hours:>10.1f}"]
    lines += [
        f"largest micro-batch in {MEMORY_SHARE:.0%} of the card: {forecast.largest_tokens:,} tokens",
        f"reference loop: {fixed / 1e9:.2f} GB, {of_position / 1e6:.2f} MB a position (fp32, logits whole): ",
        f"  {forecast.reference_tokens:,} padded positions"
        + (f": {forecast.largest_tokens / forecast.reference_tokens:.1f} times" if forecast.reference_tokens else ""),
    ]
    return lines
