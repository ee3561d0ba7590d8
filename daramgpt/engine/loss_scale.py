"""The loss scale of an fp16 engine: its state in a checkpoint, and its floor.

An overflow is how a dynamic scale finds its value: the step is skipped and the scale halves. An overflow with nothing
left to halve would come again with the same rows for ever.
"""

from __future__ import annotations

from typing import Any

# What changes from step to step. The rest are settings, of the ds_config of the day.
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScaleFloorError(Exception):
    """An fp16 overflow that no smaller loss scale can follow; nothing has moved.

    Every rank raises it.

    Attributes:
        floor: of the loss scale: ``fp16.min_loss_scale`` of the ds_config, or its fixed ``fp16.loss_scale``.
        is_fixed: whether it is the latter.
    """

    def __init__(self, floor: float, is_fixed: bool) -> None:
        where = (
            f"fixed by fp16.loss_scale at {floor:g}" if is_fixed else f"at its floor, fp16.min_loss_scale = {floor:g}"
        )
        super().__init__(f"the gradient overflowed fp16 with the loss scale {where}")
        self.floor, self.is_fixed = floor, is_fixed


class LossScale:
    """DeepSpeed's loss scaler.

    Args:
        scaler: of an fp16 engine's optimizer.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        if scaler.dynamic:
            # DeepSpeed would raise a plain Exception in the middle of its step.
            scaler.raise_error_at_min_scale = False

    @property
    def value(self) -> float:
        return float(self._scaler.cur_scale)

    def state(self) -> dict[str, Any]:
        """Empty where the scale is fixed."""
        return {key: getattr(self._scaler, key) for key in _STATE} if self._scaler.dynamic else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; what else is in there is left out."""
        if self._scaler.dynamic:
            vars(self._scaler).update({key: state[key] for key in _STATE if key in state})

    def floor_error(self) -> LossScaleFloorError | None:
        """What an overflow of the step to come has to end in; None where the scale, or its hysteresis, can still go."""
        scaler = self._scaler
        if not scaler.dynamic:
            return LossScaleFloorError(scaler.cur_scale, is_fixed=True)
        if scaler.cur_scale > scaler.min_scale or (scaler.delayed_shift != 1 and scaler.cur_hysteresis > 1):
            return None
        return LossScaleFloorError(scaler.cur_scale, is_fixed=False)
