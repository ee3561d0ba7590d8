"""The sides of the speed measurement, each in a process of its own so that peaks of memory do not mix.

A side is built, warmed up by one repetition, and then runs one repetition whenever it is asked to: the caller asks the
sides in turn, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import reference_loop, sentence_lengths
from benchmarks.inputs import SEED, SHAPES, Inputs, Measured, published_model, token_stream
from benchmarks.machine import SIDE_ENVIRONMENT, PeakMemory
from daramgpt import ds_config, hardware, student, teacher
from daramgpt import recipe as recipes
from daramgpt.engine import Distiller, import_deepspeed
from daramgpt.shards import Feed

# Sentences drawn for the reference loop are more than any measurement asks for, batch by batch.
DRAWN_BATCHES = 400


@dataclass(frozen=True)
class Work:
    """What a repetition did.

    Attributes:
        useful_tokens: tokens of text, seen once, whose next-token distribution entered the loss.
        positions: computed by the models, padding included.
        forward_passes: of the student.
        attended_tokens: mean length, over useful tokens, of the row of text that holds them.
    """

    useful_tokens: int
    positions: int
    forward_passes: int
    attended_tokens: float


@dataclass(frozen=True)
class Repetition:
    """A repetition and the seconds it took."""

    work: Work
    seconds: float


class Side:
    """A side in its own process.

    Args:
        name: a key of `BUILDERS`.
        shape: a key of `benchmarks.inputs.SHAPES`.
        inputs_dir: what `benchmarks.inputs.make` wrote.
    """

    def __init__(self, name: str, shape: str, inputs_dir: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Allocator and OpenMP read their settings when the process starts.
        os.environ.update(SIDE_ENVIRONMENT)
        self._process = context.Process(target=_serve, args=(name, shape, inputs_dir, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.ready = False

    def wait(self) -> None:
        """Until it is built and warm."""
        self._receive()

    def repeat(self) -> Repetition:
        """One repetition."""
        self._connection.send("repeat")
        return self._receive()

    def finish(self) -> int:
        """End the process; its peak of memory in bytes."""
        self._connection.send("finish")
        peak = self._receive()
        self._process.join()
        return peak

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the side {self.name} ended with exit code {self._process.exitcode}; its message stands above"
            ) from None


def _serve(name: str, shape: str, inputs_dir: Path, connection: Connection) -> None:
    torch.set_num_threads(hardware.detect().num_cores)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, memory = Inputs(inputs_dir), PeakMemory(device)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    # For both sides: transformers imports it as well, while a model is loaded.
    import_deepspeed(inputs.log)
    memory.start()
    repetitions = BUILDERS[name](SHAPES[shape], inputs, device)
    next(repetitions)
    memory.restart()
    connection.send("ready")
    while connection.recv() == "repeat":
        _synchronise(device)
        start = time.perf_counter()
        work = next(repetitions)
        _synchronise(device)
        connection.send(Repetition(work, time.perf_counter() - start))
    connection.send(memory.read_bytes())


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reference_loop(measured: Measured, inputs: Inputs, device: torch.device) -> Iterator[Work]:
    shards = inputs.shards()
    student = published_model(measured, measured.student, shards.eos_token_id)
    loop = reference_loop.ReferenceLoop(inputs.teacher_dir, student, device)
    num_sentences = DRAWN_BATCHES * reference_loop.BATCH_SENTENCES
    lengths = sentence_lengths.load().draw(num_sentences, measured.context_tokens, np.random.default_rng(SEED))
    sentences = reference_loop.PaddedSentences(token_stream(shards, sum(lengths)), lengths)
    batches = iter(reference_loop.batches(sentences, shards.eos_token_id))
    while True:
        positions, row_tokens = 0, []
        for _ in range(measured.reference_steps):
            input_ids, mask = next(batches)
            loop.step(input_ids, mask)
            positions += input_ids.numel()
            row_tokens += mask.sum(dim=1).tolist()
        useful = sum(row_tokens)
        attended = sum(tokens * tokens for tokens in row_tokens) / useful
        yield Work(useful, positions, measured.reference_steps, attended)


def _daramgpt(measured: Measured, inputs: Inputs, device: torch.device) -> Iterator[Work]:
    shards, choices, recipe = inputs.shards(), hardware.choose(hardware.detect()), recipes.load("daramgpt")
    frozen = teacher.load(inputs.teacher_dir, choices.teacher_precision, teacher.DTYPES[choices.dtype], device)
    feed = Feed(
        shards,
        measured.micro_batch_rows * measured.micro_batches,
        measured.micro_batch_rows,
        rank=0,
        world_size=1,
        passes=1000,
        seed=SEED,
    )
    distiller = Distiller(
        student.build(measured.student, measured.vocab_size, measured.context_tokens, shards.eos_token_id, SEED),
        recipe.loss,
        recipe.optimizer,
        ds_config.load(choices.ds_config),
        measured.micro_batch_rows,
        measured.micro_batches,
        measured.chunk_tokens,
        frozen,
        inputs.log,
    )
    positions = measured.micro_batch_rows * measured.micro_batches * measured.context_tokens
    for step in range(feed.num_steps):
        num_targets = feed.num_targets(step)
        batches = (feed.batch(step, micro) for micro in range(feed.micro_batches))
        distiller.step(batches, num_targets, recipe.optimizer.learning_rate)
        yield Work(num_targets, positions, measured.micro_batches, measured.context_tokens)


BUILDERS: dict[str, Callable[[Measured, Inputs, torch.device], Iterator[Work]]] = {
    "reference-loop": _reference_loop,
    "daramgpt": _daramgpt,
}
