"""The learning rate of a step."""

from __future__ import annotations

from daramgpt.recipe import Schedule


def learning_rate(peak: float, schedule: Schedule, step: int, num_steps: int) -> float:
    """Of step number `step` (from 0): linear warm-up, plateau, linear decay (arXiv 2404.06395)."""
    warmup_steps = schedule.warmup_fraction * num_steps
    decay_steps = schedule.decay_fraction * num_steps
    factor = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = num_steps - step
    if left < decay_steps:
        factor = min(factor, schedule.final_ratio + (1 - schedule.final_ratio) * left / decay_steps)
    return peak * factor
