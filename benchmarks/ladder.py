"""The rows of the speed measurement: from the reference loop to ours, one idea after the other, and peers.

A row is something that trains: `Row.step` runs one repetition, at the row's own micro-batch or at one of another size,
and says what it did. All packed rows read the same rows of the same shards with the same first weights of the student.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch.nn import Module
from transformers import AutoModelForCausalLM

from benchmarks import packed_loop, reference_loop, sentence_lengths
from benchmarks.inputs import SEED, Inputs, Measured, published_model, token_stream
from benchmarks.ladder_plan import Settings
from daramgpt import ds_config, student, teacher
from daramgpt import recipe as recipes
from daramgpt.engine import Distiller
from daramgpt.errors import UserError
from daramgpt.shards import Feed

REFERENCE, PACKING, FUSED, LOW_PRECISION, OURS = LADDER = (
    "reference-loop",
    "+packing",
    "+fused-head",
    "+low-precision-teacher",
    "daramgpt",
)
# The module of each, which the extra `peers` brings.
PEERS = {"trl-gkd": "trl", "liger-jsd": "liger_kernel"}
TRL, LIGER = PEERS
LIGER_CHUNK_TOKENS = 1024
# Of the positions of the reference loop. Sixteen sentences drawn independently are padded more than this, sixteen
# neighbours in a text, which are alike in length, somewhat less.
REFERENCE_PADDING = 0.66
# A GPU takes so many times the steps in a repetition, which would be too short to time otherwise.
GPU_REFERENCE_STEPS, GPU_STEPS = 20, 4
# Sentences drawn for the reference loop are more than any measurement asks for, batch by batch.
DRAWN_REPETITIONS = 100


@dataclass(frozen=True)
class Work:
    """What a repetition did.

    Attributes:
        useful_tokens: tokens of text, seen once, whose next-token distribution entered the loss.
        positions: computed by the models, padding included.
        forward_passes: of the student.
        largest_pass: positions of the largest of them.
        attended_tokens: mean length, over useful tokens, of the row of text that holds them.
        loss: of the first step, nats a useful token; None where the loss is normalised otherwise.
    """

    useful_tokens: int
    positions: int
    forward_passes: int
    largest_pass: int
    attended_tokens: float
    loss: float | None


class Row(Protocol):
    """Something that trains.

    Attributes:
        micro_batch_tokens: positions of its own micro-batch; of the reference loop the expected ones.
        chunk_tokens: positions from which on its loss takes no more memory; 0 where it always does.
        unit_tokens: what its micro-batch is a multiple of.
    """

    micro_batch_tokens: int
    chunk_tokens: int
    unit_tokens: int

    def step(self, tokens: int | None = None) -> Work:
        """A repetition, or one step with a micro-batch of so many positions; out of memory it raises."""
        ...


def names(asked: str | None) -> list[str]:
    """Rows of a comma-separated list in the order of the ladder; all when None.

    Raises:
        UserError: an unknown name.
    """
    known = [*LADDER, *PEERS]
    wanted = known if asked is None else [name.strip() for name in asked.split(",")]
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f'--rows: there is no row "{unknown[0]}"', f"choose from {', '.join(known)}")
    return [name for name in known if name in wanted]


def missing_peer(name: str) -> str | None:
    """Why a row cannot be had; None where nothing is known against it."""
    module = PEERS.get(name)
    if module is None or importlib.util.find_spec(module) is not None:
        return None
    return f"{module} is not installed (extra: peers)"


def dtype_of(name: str, settings: Settings) -> str:
    """Of a row's arithmetic."""
    return "fp32" if name in (REFERENCE, PACKING, FUSED) else settings.dtype


def build(name: str, measured: Measured, inputs: Inputs, settings: Settings, device: torch.device) -> Row:
    """A row, its models loaded.

    Raises:
        ImportError: a peer that is not there.
    """
    if name == REFERENCE:
        return ReferenceRow(measured, inputs, device)
    if name == OURS:
        return DaramgptRow(measured, inputs, settings, device)
    return PackedRow(name, measured, inputs, settings, device)


class ReferenceRow:
    """The reference loop on padded sentences."""

    chunk_tokens = 0

    def __init__(self, measured: Measured, inputs: Inputs, device: torch.device) -> None:
        shards, lengths = inputs.shards(), sentence_lengths.load()
        model = published_model(measured, measured.student, shards.eos_token_id)
        self._loop = reference_loop.ReferenceLoop(inputs.teacher_dir, model, device)
        self._steps = measured.reference_steps * (GPU_REFERENCE_STEPS if device.type == "cuda" else 1)
        batch, longest = reference_loop.BATCH_SENTENCES, measured.context_tokens
        self.micro_batch_tokens = round(lengths.expectation(batch, longest)[0] / (1 - REFERENCE_PADDING))
        self.unit_tokens = self.micro_batch_tokens // batch
        groups = lengths.representative(batch, self._steps, longest, REFERENCE_PADDING, np.random.default_rng(SEED))
        drawn = [length for _ in range(DRAWN_REPETITIONS) for length in next(groups)]
        self._stream = token_stream(shards, sum(drawn))
        sentences = reference_loop.PaddedSentences(self._stream, drawn)
        self._batches = iter(reference_loop.batches(sentences, shards.eos_token_id))

    def step(self, tokens: int | None = None) -> Work:
        """A repetition, or one step on sentences of one length."""
        if tokens is not None:
            length, num_sentences = self.unit_tokens, max(1, tokens // self.unit_tokens)
            text = self._stream.repeat(1 + num_sentences * length // len(self._stream))
            input_ids = text[: num_sentences * length].view(num_sentences, length)
            self._loop.step(input_ids, torch.ones_like(input_ids))
            return Work(input_ids.numel(), input_ids.numel(), 1, input_ids.numel(), length, None)
        positions, row_tokens = list[int](), list[int]()
        for _ in range(self._steps):
            input_ids, mask = next(self._batches)
            self._loop.step(input_ids, mask)
            positions.append(input_ids.numel())
            row_tokens += mask.sum(dim=1).tolist()
        useful = sum(row_tokens)
        attended = sum(tokens * tokens for tokens in row_tokens) / useful
        return Work(useful, sum(positions), self._steps, max(positions), attended, None)


class PackedRow:
    """A plain loop on packed rows, with as many positions a step as the reference loop has."""

    def __init__(self, name: str, measured: Measured, inputs: Inputs, settings: Settings, device: torch.device) -> None:
        shards = inputs.shards()
        self._steps = measured.reference_steps * (GPU_REFERENCE_STEPS if device.type == "cuda" else 1)
        self.unit_tokens = measured.context_tokens
        self.micro_batch_tokens = measured.reference_rows * measured.context_tokens
        self._rows = _full_rows(inputs, measured.reference_rows)
        dtype = dtype_of(name, settings)
        self.chunk_tokens = 0
        if name == PACKING:
            model = published_model(measured, measured.student, shards.eos_token_id)
            published = AutoModelForCausalLM.from_pretrained(inputs.teacher_dir, dtype=torch.float32)
            cast(Module, published).to(device).eval()
            loss = packed_loop.whole_logits(published)
        else:
            model = student.build(
                measured.student, measured.vocab_size, measured.context_tokens, shards.eos_token_id, SEED
            )
            cast(Module, model).to(device, teacher.DTYPES[dtype])
            precision = dtype if name == FUSED else settings.teacher_precision
            frozen = teacher.load(inputs.teacher_dir, precision, teacher.DTYPES[dtype], device)
            if name == TRL:
                loss = packed_loop.trl_gkd(frozen)
            elif name == LIGER:
                loss, self.chunk_tokens = packed_loop.liger_jsd(frozen, device), LIGER_CHUNK_TOKENS
            else:
                loss = packed_loop.fused(model, frozen, settings.reference_chunk_tokens)
                self.chunk_tokens = settings.reference_chunk_tokens
        cast(Module, model).to(device)
        self._loop = packed_loop.PackedLoop(model, loss)
        self._is_first = True

    def step(self, tokens: int | None = None) -> Work:
        """A repetition, or one step; the first of all without dropout, so that its loss can be compared."""
        self._loop.student.train(not self._is_first)
        self._is_first = False
        useful, loss, passes = 0, None, 1 if tokens is not None else self._steps
        for _ in range(passes):
            input_ids, labels = next(self._rows) if tokens is None else _cut(self._rows, tokens)
            value = self._loop.step(input_ids, labels)
            loss = value if loss is None else loss
            useful += labels.numel()
        return Work(useful, useful, passes, labels.numel(), input_ids.shape[1], loss)


class DaramgptRow:
    """What ``python -m daramgpt train`` runs, with the planned micro-batch and the reference loop's loss."""

    def __init__(self, measured: Measured, inputs: Inputs, settings: Settings, device: torch.device) -> None:
        shards, recipe = inputs.shards(), recipes.load("daramgpt")
        self.chunk_tokens, self.unit_tokens = settings.chunk_tokens, measured.context_tokens
        self.micro_batch_tokens = settings.micro_batch_rows * measured.context_tokens
        self._steps = GPU_STEPS if device.type == "cuda" else 1
        self._micro_batches, self._learning_rate = settings.micro_batches, recipe.optimizer.learning_rate
        self._rows = _full_rows(inputs, settings.micro_batch_rows)
        frozen = teacher.load(inputs.teacher_dir, settings.teacher_precision, teacher.DTYPES[settings.dtype], device)
        self._distiller = Distiller(
            student.build(measured.student, measured.vocab_size, measured.context_tokens, shards.eos_token_id, SEED),
            packed_loop.REFERENCE_LOSS,
            recipe.optimizer,
            ds_config.load(settings.ds_config),
            settings.micro_batch_rows,
            settings.micro_batches,
            settings.chunk_tokens,
            frozen,
            inputs.log,
        )

    def step(self, tokens: int | None = None) -> Work:
        """A repetition, or one optimizer step whose micro-batches are all the same batch of that size."""
        useful, loss, steps = 0, None, 1 if tokens is not None else self._steps
        for _ in range(steps):
            if tokens is None:
                batches = [next(self._rows) for _ in range(self._micro_batches)]
            else:
                batches = [_cut(self._rows, tokens)] * self._micro_batches
            num_targets = sum(labels.numel() for _, labels in batches)
            taken = self._distiller.step(iter(batches), num_targets, self._learning_rate)
            loss = packed_loop.REFERENCE_LOSS.total(taken.kd, taken.ce, taken.hidden) if loss is None else loss
            useful += num_targets
        input_ids = batches[0][0]
        return Work(useful, useful, steps * self._micro_batches, input_ids.numel(), input_ids.shape[1], loss)


Batch = tuple[torch.Tensor, torch.Tensor]


def _full_rows(inputs: Inputs, num_rows: int) -> Iterator[Batch]:
    """Batches of [num_rows, T] ids and labels in the order of the text, rows left out that hold padding."""
    shards = inputs.shards()
    feed = Feed(shards, 1, 1, rank=0, world_size=1, passes=1000, seed=SEED)
    full = (feed.batch(step, 0) for step in range(feed.num_steps) if feed.num_targets(step) == shards.context_tokens)
    while rows := list(itertools.islice(full, num_rows)):
        yield torch.cat([input_ids for input_ids, _ in rows]), torch.cat([labels for _, labels in rows])


def _cut(rows: Iterator[Batch], tokens: int) -> Batch:
    """A batch of so many tokens: the beginning of one row, or whole rows."""
    input_ids, labels = next(rows)
    context_tokens = input_ids.shape[1]
    if tokens <= context_tokens:
        return input_ids[:1, :tokens], labels[:1, :tokens]
    assert tokens % context_tokens == 0, (tokens, context_tokens)
    times = -(-tokens // input_ids.numel())
    batches = [(input_ids, labels), *(next(rows) for _ in range(times - 1))]
    num_rows = tokens // context_tokens
    return torch.cat([ids for ids, _ in batches])[:num_rows], torch.cat([marks for _, marks in batches])[:num_rows]
