"""Steps with a loss or a gradient that is not finite on one rank, under several configurations of DeepSpeed.

As a program it is one rank of those that RANK and WORLD_SIZE name: it takes a folder for its log and a file of `Case`
objects as JSON, and prints what it has seen of each. One process serves all cases, because it takes longer to start
than to train.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from distilling import OPTIMIZER, SHAPE, WIDE, batches, make_distiller, make_student, make_teacher, num_targets
from rank_processes import run_on_ranks

from daramgpt.engine import DistillationModel, Distiller, LossScaleFloorError, StepResult, import_deepspeed, leave_ranks
from daramgpt.teacher import Teacher

ANSWER = "SEEN "
# What the last rank has once, in the first micro-batch of a step.
FAULTS = ("teacher", "loss", "gradient", "infinite-gradient")


@dataclass(frozen=True)
class Case:
    """Steps of one configuration.

    Attributes:
        ds_config: DeepSpeed's part.
        kind: of the optimizer.
    """

    ds_config: dict[str, Any]
    kind: str = "adamw"

    def distiller(self, log: Path) -> Distiller:
        model = make_student(WIDE if self.kind == "adamw-8bit" else SHAPE)
        return make_distiller(self.ds_config, make_teacher(), log, model, kind=self.kind)

    def seen(self, log: Path) -> dict[str, Any]:
        """What came of the bad steps between the first good one and two more; JSON."""
        undisturbed = self.distiller(log)
        for step in range(3):
            one_step(undisturbed, step)
        expected = snapshot(undisturbed)
        undisturbed.close()

        distiller = self.distiller(log)
        start = snapshot(distiller)
        is_first_applied = one_step(distiller, 0).applied
        seen: dict[str, Any] = {}
        before = snapshot(distiller)
        for fault in FAULTS:
            with caused(fault, distiller):
                result = one_step(distiller, 1)
            seen[fault] = {
                "applied": result.applied,
                "is_finite": result.is_finite,
                "norm_is_finite": math.isfinite(result.grad_norm),
                "loss_is_finite": math.isfinite(result.kd),
                "is_intact": distiller.is_intact,
                "moved": not is_same(before, snapshot(distiller)),
            }
        results = [one_step(distiller, step) for step in (1, 2)]
        seen["finite"] = {
            "applied": is_first_applied and all(result.applied and result.is_finite for result in results),
            "moved": not is_same(start, before),
            "as_undisturbed": is_same(expected, snapshot(distiller)),
        }
        distiller.close()
        return seen

    def seen_in_fp16(self, log: Path) -> dict[str, Any]:
        """Loss scales and results of one good step and of overflows until the floor, and of a good step then; JSON."""
        distiller = self.distiller(log)
        is_first_applied = one_step(distiller, 0).applied
        before = snapshot(distiller)
        scales, results, error = [distiller.loss_scale()], [], None
        while error is None and len(scales) < 10:
            with caused("gradient", distiller):
                try:
                    result = one_step(distiller, 1)
                    results.append((result.applied, result.is_finite))
                except LossScaleFloorError as raised:
                    error = raised
            scales.append(distiller.loss_scale())
        moved, is_intact = not is_same(before, snapshot(distiller)), distiller.is_intact
        is_next_applied = one_step(distiller, 1).applied
        moved_next = not is_same(before, snapshot(distiller))
        distiller.close()
        return {
            "applied": is_first_applied and is_next_applied and moved_next,
            "scales": scales,
            "results": results,
            "error": str(error),
            "floor": error and error.floor,
            "moved": moved,
            "is_intact": is_intact,
        }


def one_step(distiller: Distiller, step: int) -> StepResult:
    rows = batches(step, distiller.rank, distiller.world_size)
    return distiller.step(rows, num_targets(step), OPTIMIZER.learning_rate)


@contextlib.contextmanager
def caused(fault: str, distiller: Distiller) -> Iterator[None]:
    """It happens while this is entered, on the last rank."""
    calls = 0

    def is_due() -> bool:
        nonlocal calls
        calls += 1
        return calls == 1

    def hidden_states(*arguments: Any) -> torch.Tensor:
        hidden = hidden_before(*arguments)
        if is_due():
            hidden = hidden.clone()
            hidden[0, -1, 0] = math.inf
        return hidden

    def forward(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        loss, kd, *others = forward_before(*arguments, **options)
        # Its own gradient is finite.
        return (loss + math.inf, kd + math.inf, *others) if is_due() else (loss, kd, *others)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        bad = value.clone()
        if is_due():
            bad.view(-1)[0] = math.nan if fault == "gradient" else math.inf
        return bad

    if distiller.rank != distiller.world_size - 1:
        yield
        return
    hidden_before, forward_before = Teacher.hidden_states, DistillationModel.forward
    hook = None
    if fault == "teacher":
        Teacher.hidden_states = hidden_states  # type: ignore[method-assign]
    elif fault == "loss":
        DistillationModel.forward = forward  # type: ignore[assignment, method-assign]
    else:
        hook = distiller.module.transformer.h[0].mlp.c_fc.bias.register_hook(gradient)
    yield
    assert calls > 0, fault
    Teacher.hidden_states, DistillationModel.forward = hidden_before, forward_before  # type: ignore[method-assign]
    if hook is not None:
        hook.remove()


def snapshot(distiller: Distiller) -> list[torch.Tensor]:
    """Copies of all that a step moves: what this rank holds of weights, and of the optimizer's weights and state."""
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in distiller.module.parameters()]
    for flat, state in distiller.engine.basic_optimizer.state.items():
        tensors += [flat, *(torch.as_tensor(state[key]) for key in sorted(state))]
    return [tensor.detach().clone() for tensor in tensors]


def is_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def seen_on(num_ranks: int, cases: dict[str, Case], folder: Path) -> list[dict[str, Any]]:
    """What each rank has seen of each case, by its name.

    Raises:
        AssertionError: a rank failed, or they gave no answer in ten minutes.
    """
    given = folder / "cases.json"
    given.write_text(json.dumps({name: asdict(case) for name, case in cases.items()}))
    said = run_on_ranks(__file__, num_ranks, folder, folder, given)
    return [json.loads(text.rsplit(ANSWER, 1)[1].splitlines()[0]) for text in said]


def allow_fp16(log: Path) -> None:
    """On a CPU too, where DeepSpeed refuses it for the want of fast products."""
    accelerator = import_deepspeed(log).accelerator.get_accelerator()
    vars(accelerator)["is_fp16_supported"] = lambda: True


def main() -> None:
    torch.set_num_threads(1)
    cases = {name: Case(**fields) for name, fields in json.loads(Path(sys.argv[2]).read_text()).items()}
    log = Path(sys.argv[1]) / f"log-{os.environ['RANK']}.txt"
    allow_fp16(log)
    # DeepSpeed collects garbage at each beginning and end, which would go through all that is imported.
    gc.freeze()
    seen = {}
    for name, case in cases.items():
        seen[name] = case.seen_in_fp16(log) if "fp16" in case.ds_config else case.seen(log)
    print(ANSWER + json.dumps(seen))
    leave_ranks()


if __name__ == "__main__":
    main()
