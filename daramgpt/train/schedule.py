"""The learning rate of a step: linear warm-up, plateau, linear decay (Hu et al., MiniCPM, arXiv 2404.06395).

The decay ends at a horizon: with the curriculum, or where the budget's hours will be used up. The second one is placed
anew where a session's end is recorded, and from there the rate goes on without a jump: on the plateau only the
decay's beginning moves, within the decay its slope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from daramgpt.recipe import Schedule

# Of the steps that the hours left would buy: the last ones are not to fall behind the budget.
HOURS_MARGIN = 0.98


@dataclass(frozen=True, slots=True)
class Horizon:
    """Where the decay ends, and where that was decided.

    Attributes:
        end_step: the step after the last one.
        from_step: the first step it holds for.
        from_factor: of the peak rate there.
        budget_hours: by which it was decided; None where the curriculum ends it.
    """

    end_step: int
    from_step: int = 0
    from_factor: float = 1.0
    budget_hours: float | None = None


def learning_rate(peak: float, schedule: Schedule, step: int, horizon: Horizon) -> float:
    """Of step number `step` (from 0)."""
    return peak * rate_factor(schedule, step, horizon)


def rate_factor(schedule: Schedule, step: int, horizon: Horizon) -> float:
    """Share of the peak rate that a step has; continuous but for the steps themselves."""
    end_step, final = horizon.end_step, schedule.final_ratio
    warmup_steps, decay_steps = schedule.warmup_fraction * end_step, schedule.decay_fraction * end_step
    factor, highest = 1.0, 1.0
    if horizon.from_factor < 1.0 and horizon.from_step >= warmup_steps:
        # Placed anew within the decay: from the rate it had reached straight to the end.
        decay_steps, highest = end_step - horizon.from_step, horizon.from_factor
    elif horizon.from_step > end_step - decay_steps:
        decay_steps = end_step - horizon.from_step
    if warmup_steps:
        factor = min(1.0, (step + 1) / warmup_steps)
    left = end_step - step
    if left < decay_steps:
        factor = min(factor, final + (highest - final) * left / decay_steps)
    return factor


def first_horizon(plan: dict[str, Any], budget_hours: float) -> Horizon:
    """Of a run that begins, by the plan alone.

    Args:
        plan: its predicted or probed speed is what the hours are counted by.
        budget_hours: of the recipe.
    """
    schedule, num_steps = Schedule.model_validate(plan["schedule"]), plan["num_steps"]
    measured = [
        trial["hours"]
        for trial in plan.get("probe", {}).get("trials", [])
        if trial["micro_batch_rows"] == plan["micro_batch_rows"] and trial["hours"]
    ]
    hours = (measured or [plan["predicted"].get("hours")])[0]
    if schedule.horizon != "hours" or not hours:
        return Horizon(num_steps)
    step_seconds = 3600 * hours / num_steps
    return placed(schedule, Horizon(num_steps), 0, num_steps, 3600 * budget_hours, step_seconds, budget_hours)


def placed(
    schedule: Schedule,
    old: Horizon,
    step: int,
    num_steps: int,
    seconds_left: float,
    step_seconds: float,
    budget_hours: float,
) -> Horizon:
    """The horizon for the steps from `step` on, by the hours that are left.

    Args:
        schedule: of the recipe.
        old: that the steps before were trained with.
        step: first one that is not trained yet.
        num_steps: of the curriculum, which no horizon goes beyond.
        seconds_left: of the budget.
        step_seconds: of a step as measured, its part of the saves included.
        budget_hours: of the recipe.
    """
    end_step = min(num_steps, step + max(1, int(HOURS_MARGIN * seconds_left / step_seconds)))
    # All was decayed, and then hours were added: up to the plateau again, or there would be nothing to decay.
    factor = 1.0 if step >= old.end_step else rate_factor(schedule, step, old)
    return Horizon(end_step, step, factor, budget_hours)
