"""What the measurement of checkpoints runs in processes of their own: saves, a load, the way to a first batch.

Nothing of training is copied: its functions are wrapped where they stand, and the time in each of them is added up.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from benchmarks import inputs, machine
from daramgpt import checkpoint, hardware, malloc, student, train
from daramgpt import recipe as recipes
from daramgpt.engine import Distiller, import_deepspeed
from daramgpt.progress import Console
from daramgpt.recipe import Loss, Recipe
from daramgpt.recipe_changes import settings_that_matter
from daramgpt.run_directory import RunDirectory
from daramgpt.shards import Feed, Shards
from daramgpt.train import Horizon, Position, StopRequest, Training

# Stretches the run: its last step is as far from its first as that of a long one.
PASSES = 1000
# A divisor of `PASSES`, so that the last step has all its rows.
RESUME_ROWS = 8
RESUME_REPETITIONS = 101
ORDERS = ("as-read", "shuffled")
# Where a phase is timed: the owner of a function, the function, the phase.
SAVING: tuple[tuple[Any, str, str], ...] = (
    (Distiller, "gather", "gather"),
    (safetensors.torch, "save_file", "write"),
    (checkpoint, "_describe", "hash"),
    (os, "fsync", "sync"),
    (checkpoint, "fault", "verify"),
    (checkpoint, "prune", "prune"),
)
LOADING: tuple[tuple[Any, str, str], ...] = (
    (checkpoint, "newest", "verify"),
    (checkpoint.Saved, "tensors", "read"),
    (student, "build", "student"),
    (train, "Distiller", "engine"),
    (Distiller, "restore", "restore"),
    (train, "Feed", "feed"),
)


class Phases:
    """Seconds by phase; those of a phase inside another one are the outer one's.

    Attributes:
        seconds: so far, in the order of what is watched.
    """

    def __init__(self, watched: tuple[tuple[Any, str, str], ...]) -> None:
        self._watched, self._is_inside = watched, False
        self.seconds = dict.fromkeys((phase for *_, phase in watched), 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the functions while inside."""
        with ExitStack() as stack:
            for owner, name, phase in self._watched:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), phase)))
            yield

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._is_inside:
                return function(*arguments, **named)
            self._is_inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[phase] += time.perf_counter() - start
                self._is_inside = False

        return timed


@dataclass(frozen=True)
class Timed:
    """One save or load: seconds of all of it, and by phase."""

    seconds: float
    phases: dict[str, float]


@dataclass(frozen=True)
class Setup:
    """A run whose checkpoints are measured.

    Attributes:
        measured: student, vocabulary and row of the shape.
        folder: with the run.
    """

    measured: inputs.Measured
    folder: Path

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.folder / "run")

    def recipe(self) -> Recipe:
        """The full recipe with the shape's student, without a teacher, which no checkpoint holds."""
        settings = [f"student.{key}={value}" for key, value in self.measured.student.model_dump().items()]
        settings += [f"curriculum.context_tokens={self.measured.context_tokens}", f"curriculum.passes={PASSES}"]
        alone = Loss(temperature=1.0, kd_weight=0.0, ce_weight=1.0)
        return recipes.load("daramgpt", settings).model_copy(update={"teacher": None, "loss": alone})

    def plan(self, shards: Shards) -> dict[str, Any]:
        """What training reads of a plan until its loop begins; a step is a row."""
        return {
            "num_threads": hardware.detect().num_cores,
            "num_steps": PASSES * shards.num_rows,
            "batch_rows": 1,
            "micro_batch_rows": 1,
            "world_size": 1,
            "loss_chunk_tokens": 1024,
            "ds_config": "cpu",
            "student": {"vocab_size": self.measured.vocab_size},
        }


def save(setup: Setup, repetitions: int) -> dict[str, Any]:
    """In a process of its own: checkpoints of an engine that has done a step, and other ways to write its state.

    Returns:
        ``saves``: `Timed`, each with an older checkpoint to be removed; ``peak_bytes`` of the first save of all, above
        the engine; ``tensor_bytes``; ``others``: rows; ``left_out``: reasons by name.
    """
    run, recipe, shards = setup.run, setup.recipe(), Shards(setup.run.shards)
    import_deepspeed(run.log)
    plan, memory = setup.plan(shards), machine.PeakMemory(torch.device("cpu"))
    feed = Feed(shards, 1, 1, rank=0, world_size=1, passes=PASSES, seed=recipe.seed)
    saves: list[Timed] = []
    with closing(train.build_distiller(recipe, run, shards, plan, None, None)) as distiller:
        # Moments that are not zeros, and gradients where they lie in training.
        distiller.step([feed.batch(0, 0)], feed.num_targets(0), recipe.optimizer.learning_rate)
        malloc.return_freed_memory()
        memory.start()
        memory.restart()
        for number in range(recipe.checkpoint.keep + repetitions):
            # The last ones of the run: where a long one is.
            position = Position(Horizon(feed.num_steps), feed.num_steps - recipe.checkpoint.keep - repetitions + number)
            settings = {"settings": settings_that_matter(recipe), "shards_sha256": feed.sha256}
            saves.append(_save(run.checkpoints, distiller, {**position.state(), **settings}, recipe.checkpoint.keep))
            if number == 0:
                peak_bytes = memory.read_bytes()
        tensors = distiller.gather()
        size = sum(tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values())
        del tensors
        others, left_out = _other_ways(distiller, setup.folder / "others", repetitions)
    measured = saves[recipe.checkpoint.keep :]
    return {
        "saves": measured,
        "peak_bytes": peak_bytes,
        "tensor_bytes": size,
        "others": others,
        "left_out": left_out,
    }


def _save(checkpoints: Path, distiller: Distiller, state: dict[str, Any], keep: int) -> Timed:
    phases = Phases(SAVING)
    with phases.watching():
        start = time.perf_counter()
        checkpoint.save(checkpoints, distiller, state, keep)
        seconds = time.perf_counter() - start
    return Timed(seconds, phases.seconds)


def _other_ways(distiller: Distiller, folder: Path, repetitions: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of what writes the same state without any of our checks, and why one of them is not there."""

    def save_tensors() -> None:
        torch.save(distiller.gather(), folder / "state.pt")

    def save_engine() -> None:
        distiller.engine.save_checkpoint(str(folder), tag="engine")

    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name, write in (("torch.save", save_tensors), ("DeepSpeed", save_engine)):
        seconds, synced = [], []
        try:
            for _ in range(repetitions):
                folder.mkdir()
                start = time.perf_counter()
                write()
                seconds.append(time.perf_counter() - start)
                for file in filter(Path.is_file, folder.rglob("*")):
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
                synced.append(time.perf_counter() - start)
                size = bytes_of(folder)
                shutil.rmtree(folder)
        except (RuntimeError, ValueError, AttributeError, ImportError, AssertionError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            left_out[name] = str(error).strip().partition("\n")[0] or type(error).__name__
            continue
        rows.append({"name": name, "seconds": statistics.median(seconds), "bytes": size})
        rows.append({"name": f"{name}, synced", "seconds": statistics.median(synced), "bytes": size})
    return rows, left_out


def load(setup: Setup) -> Timed:
    """In a process of its own: training, from its beginning to where its loop would take the first step."""
    run, recipe, shards = setup.run, setup.recipe(), Shards(setup.run.shards)
    import_deepspeed(run.log)
    plan, phases = setup.plan(shards), Phases(LOADING)
    reached: list[tuple[float, int]] = []

    def loop(*arguments: Any) -> Callable[[], str]:
        seconds = time.perf_counter() - start
        reached.append((seconds, next(one for one in arguments if isinstance(one, Position)).step))
        return lambda: "interrupted"

    with phases.watching(), mock.patch.object(train, "Loop", loop):
        console, stop, start = Console(silent=True), StopRequest(None), time.perf_counter()
        train.train(Training("student", recipe, run, plan, shards, None, stop, console, run.ledger, "here"))
    ((seconds, step),) = reached
    assert step == plan["num_steps"] - 1, f"went on from step {step} of {plan['num_steps']}"
    return Timed(seconds, phases.seconds)


def resume(setup: Setup) -> list[dict[str, Any]]:
    """In a process of its own: from shards opened anew to a first batch, at the beginning, middle and end of a run."""
    path = setup.run.shards
    num_steps = PASSES * Shards(path).num_rows // RESUME_ROWS
    steps = (0, num_steps // 2, num_steps - 1)
    found: dict[tuple[str, int], list[float]] = {(order, step): [] for order in ORDERS for step in steps}
    for _ in range(RESUME_REPETITIONS):
        # In turn: what else the machine does then falls on all of them.
        for (order, step), seconds in found.items():
            start = time.perf_counter()
            feed = Feed(Shards(path), RESUME_ROWS, RESUME_ROWS, 0, 1, PASSES, inputs.SEED, order)
            feed.batch(step, 0)
            seconds.append(time.perf_counter() - start)
    assert feed.num_steps == num_steps
    return [
        {"order": order, "step": step, "seconds": statistics.median(seconds)}
        for (order, step), seconds in found.items()
    ]


def bytes_of(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
