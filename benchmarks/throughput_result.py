"""From what the sides of the speed measurement did to its rows, ratios and table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import reference_loop, sentence_lengths
from benchmarks.inputs import Measured
from benchmarks.ladder import LADDER, OURS, PEERS, REFERENCE
from benchmarks.ladder_plan import Settings
from benchmarks.machine import format_cell, format_table
from benchmarks.sides import Repetition

CURRICULUM_TOKENS = 1.3e9


@dataclass
class Measurement:
    """What a side measured.

    Attributes:
        name, dtype: of the row and its arithmetic.
        micro_batch_tokens: positions of a forward pass, of the reference loop the expected ones.
        repetitions: by round.
        peaks: most bytes held in a single step, by positions of its largest forward pass.
        first_loss: of the first step, nats a token; None where it is normalised otherwise.
        largest_tokens: positions of the largest micro-batch; None where the measurement gave none.
    """

    name: str
    dtype: str
    micro_batch_tokens: int
    repetitions: dict[int, Repetition] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    first_loss: float | None = None
    largest_tokens: int | None = None

    def add_peak(self, repetition: Repetition) -> None:
        """Note the memory of a step of a given size."""
        self.peaks[repetition.work.largest_pass] = repetition.peak_memory_bytes

    @property
    def rates(self) -> dict[int, float]:
        """Useful tokens per second by round."""
        return {
            number: repetition.work.useful_tokens / repetition.seconds
            for number, repetition in self.repetitions.items()
        }

    @property
    def positions(self) -> int:
        """Of a forward pass, padding included: mean."""
        works = [repetition.work for repetition in self.repetitions.values()]
        return round(sum(work.positions for work in works) / sum(work.forward_passes for work in works))

    @property
    def padding_share(self) -> float:
        """Share of the computed positions that are no useful token."""
        works = [repetition.work for repetition in self.repetitions.values()]
        return 1 - sum(work.useful_tokens for work in works) / sum(work.positions for work in works)

    @property
    def attended_tokens(self) -> float:
        """Mean length, over useful tokens, of the row of text that holds them."""
        works = [repetition.work for repetition in self.repetitions.values()]
        return sum(work.attended_tokens * work.useful_tokens for work in works) / sum(
            work.useful_tokens for work in works
        )

    @property
    def peak_memory_bytes(self) -> int:
        """Over all repetitions."""
        return max(repetition.peak_memory_bytes for repetition in self.repetitions.values())

    def pairs(self, other: Measurement) -> list[float]:
        """Rate over that of another side in the same round, of all rounds that both were in."""
        theirs = other.rates
        return [rate / theirs[number] for number, rate in self.rates.items() if number in theirs]


def row(
    measurement: Measurement, reference: Measurement | None, flops_per_token: float, gemm_flops_per_second: float
) -> dict[str, Any]:
    """One row of the result.

    Args:
        measurement: of the side.
        reference: of the reference loop, where it was run.
        flops_per_token: model FLOPs of one useful token.
        gemm_flops_per_second: of square products in the row's dtype, in this run.
    """
    rates = list(measurement.rates.values())
    rate = statistics.median(rates)
    pairs = measurement.pairs(reference) if reference else []
    return {
        "name": measurement.name,
        "useful_tokens_per_second": rate,
        "slowest_and_fastest_repetition": [min(rates), max(rates)],
        "over_reference": statistics.median(pairs) if pairs else None,
        "lowest_and_highest_over_reference": [min(pairs), max(pairs)] if pairs else None,
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "micro_batch_tokens": measurement.positions,
        "largest_micro_batch_tokens": measurement.largest_tokens,
        "peaks_by_micro_batch": [[size, peak] for size, peak in sorted(measurement.peaks.items())],
        "padding_share": measurement.padding_share,
        "dtype": measurement.dtype,
        "first_loss": measurement.first_loss,
        "model_flops_per_token": flops_per_token,
        "roofline_fraction": flops_per_token * rate / gemm_flops_per_second,
        "curriculum_hours": CURRICULUM_TOKENS / rate / 3600,
    }


def result(
    shape: str,
    measured: Measured,
    cap_bytes: int,
    settings: Settings,
    measurements: Mapping[str, Measurement],
    left_out: Mapping[str, str],
    gemm_flops_per_second: Mapping[str, float],
    on_gpu: bool,
) -> dict[str, Any]:
    """The result without hardware and versions."""
    reference, ours = measurements.get(REFERENCE), measurements.get(OURS)
    rows = []
    for measurement in measurements.values():
        flops = measured.flops_per_token(round(measurement.attended_tokens))
        rows.append(row(measurement, reference, flops, gemm_flops_per_second[measurement.dtype]))
    order = [*LADDER, *PEERS]
    rows.sort(key=lambda entry: order.index(entry["name"]))
    summary: dict[str, Any] = {
        "padding_share": reference.padding_share if reference else None,
        "speedup_over_reference": statistics.median(ours.pairs(reference)) if ours and reference else None,
        "micro_batch_over_reference": None,
    }
    if ours and reference and ours.largest_tokens and reference.largest_tokens:
        summary["micro_batch_over_reference"] = ours.largest_tokens / reference.largest_tokens
    absent = [key for key, value in summary.items() if value is None]
    absent += sorted({key for entry in rows for key, value in entry.items() if value is None} - {"first_loss"})
    lengths = sentence_lengths.load()
    return {
        "shape": shape,
        "memory_cap_bytes": cap_bytes,
        "plan": asdict(settings),
        "gemm_flops_per_second": gemm_flops_per_second[settings.dtype],
        "gemm_flops_per_second_by_dtype": dict(gemm_flops_per_second),
        "padding_share_of_independent_draws": lengths.padding_share(
            reference_loop.BATCH_SENTENCES, measured.context_tokens
        ),
        "largest_micro_batch_method": "searched under the cap" if on_gpu else "straight line through measured peaks",
        "rows": rows,
        **summary,
        "left_out": dict(left_out),
        "not_measured": absent,
    }


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    header = (
        "side",
        "useful tokens/s",
        "over reference",
        "peak memory",
        "positions a pass",
        "largest",
        "padding",
        "of GEMM rate",
        "curriculum",
    )

    rows = [
        (
            entry["name"],
            f"{entry['useful_tokens_per_second']:,.1f}",
            format_cell(entry["over_reference"], ".2f"),
            f"{entry['peak_memory_bytes'] / 1e6:,.0f} MB",
            f"{entry['micro_batch_tokens']:,}",
            format_cell(entry["largest_micro_batch_tokens"], ","),
            f"{entry['padding_share']:.1%}",
            f"{entry['roofline_fraction']:.1%} {entry['dtype']}",
            f"{entry['curriculum_hours']:,.0f} h",
        )
        for entry in result["rows"]
    ]
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in result["gemm_flops_per_second_by_dtype"].items())
    lines = [
        format_table(header, rows),
        f"speed-up over the reference loop {format_cell(result['speedup_over_reference'], '.2f')}; "
        f"largest micro-batch over its {format_cell(result['micro_batch_over_reference'], '.1f')}, "
        f"in {result['memory_cap_bytes'] / 1e9:g} GB, {result['largest_micro_batch_method']}",
        f"square products in GFLOP/s: {rates}; independent draws of sentences would pad "
        f"{result['padding_share_of_independent_draws']:.1%}",
        *_predictions(result),
    ]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in result["left_out"].items())])


def _predictions(result: dict[str, Any]) -> list[str]:
    """What the plan's arithmetic said of ours, beside what was measured."""
    ours = next((entry for entry in result["rows"] if entry["name"] == OURS), None)
    plan = result["plan"]
    if ours is None or plan["predicted_tokens_per_second"] is None:
        return []
    rate, peak = plan["predicted_tokens_per_second"], plan["predicted_peak_bytes"]
    return [
        f"plan's arithmetic for {OURS}: {rate:,.1f} tokens/s ({rate / ours['useful_tokens_per_second'] - 1:+.1%} of "
        f"measured), peak {peak / 1e6:,.0f} MB ({peak / ours['peak_memory_bytes'] - 1:+.1%})"
    ]
