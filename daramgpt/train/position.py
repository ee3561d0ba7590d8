"""Where a training stands: what a checkpoint holds beside the engine's tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from daramgpt.train.schedule import Horizon


@dataclass(slots=True)
class Position:
    """All that the loop knows, but for the engine.

    Attributes:
        step: optimizer steps trained; the number of the next one.
        tokens: targets of those steps.
        skipped_steps: that fp16 overflowed in; their rows were fed again.
        horizon: where the learning rate's decay ends.
        passed_over: steps whose rows drove the loss scale to its floor, and that are left out.
    """

    horizon: Horizon
    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    passed_over: list[int] = field(default_factory=list)

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer took."""
        return self.step - sum(step < self.step for step in self.passed_over)

    @classmethod
    def read(cls, state: dict[str, Any], num_steps: int) -> Position:
        """Of a checkpoint; one that names no horizon has that of the curriculum."""
        horizon = Horizon(**state["horizon"]) if "horizon" in state else Horizon(num_steps)
        return cls(
            horizon, state["step"], state["tokens"], state.get("skipped_steps", 0), list(state.get("passed_over", []))
        )

    def state(self) -> dict[str, Any]:
        """As JSON values, as `read` takes them."""
        return asdict(self)
