"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio.

They are somebody else's services: one that fails is left out from then on, and the training goes on. accelerate has
trackers for all three, but they need its own state of the ranks, which sets the number of threads and moves variables
of the environment: the arithmetic of a run would depend on who watches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from daramgpt.errors import UserError

PROJECT = "daramgpt"


def require(names: Sequence[str]) -> None:
    """Nothing where the packages of all trackers are installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed", f"pip install {name}, or take it out of report_to")


class _TensorBoard:
    """Its writer, with the calls of a run of the other two."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class Trackers:
    """The trackers of one training.

    Args:
        names: of `recipe.Recipe.report_to`.
        folder: for what they keep on the disk.
        run_name: of the training, the same in each of its sessions; a tracker goes on with what it has of that name.
        first_step: that this session begins with; what a tracker has beyond it is replaced where it can be.
        settings: shown beside the curves.
        say: takes a line where a tracker fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        run_name: str,
        first_step: int,
        settings: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._open: dict[str, Any] = {}
        plain = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str))}
        for name in names:
            self._try(name, partial(self._begin, name, folder, run_name, first_step, plain))

    def _begin(self, name: str, folder: Path, run_name: str, first_step: int, settings: dict[str, Any]) -> None:
        if name == "tensorboard":
            self._open[name] = _TensorBoard(folder / name / run_name, first_step)
            return
        service = import_module(name)
        options: dict[str, Any] = {"project": PROJECT, "name": run_name, "resume": "allow", "config": settings}
        if name == "wandb":
            folder.mkdir(parents=True, exist_ok=True)
            options |= {"id": run_name, "dir": str(folder)}
        self._open[name] = service.init(**options)

    def log(self, entry: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``; of its values, those that are numbers."""
        values = _numbers(entry)
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, values, step=entry["step"]))

    def close(self) -> None:
        """Finish what was begun."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open.clear()

    def _try(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        # Whatever a service or its client does is no reason to lose a training.
        except Exception as error:
            self._open.pop(name, None)
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._say(f"report_to: {name} failed and is left out from here on ({reason}); metrics.jsonl has everything")


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in entry.items():
        parts = {f"{key}/{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
        found |= {
            name: one for name, one in parts.items() if isinstance(one, (int, float)) and not isinstance(one, bool)
        }
    found.pop("step", None)
    return found
