"""What all sides of a speed measurement read, made once: token shards of real text, and a teacher on the disk.

The text is the package's own corpus, read by the real readers and tokenised into real shards; the teacher has the
shape that is measured and random weights, for speed does not depend on their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from daramgpt import recipe as recipes
from daramgpt.curriculum import texts
from daramgpt.planner import ModelShape, step_flops
from daramgpt.quickstart import write_corpus
from daramgpt.recipe import Shape
from daramgpt.run_directory import RunDirectory
from daramgpt.shards import Feed, Shards, prepare
from daramgpt.tokenizer import train_tokenizer

TRAINED_VOCAB_SIZE = 4096
SEED = 0


@dataclass(frozen=True)
class Measured:
    """A pair of models, and how much of their work is measured.

    Attributes:
        vocab_size: of both models; at least that of the tokenizer.
        context_tokens: of a packed row; the longest sentence of the reference loop too.
        micro_batch_rows: of a training whose micro-batch is not planned.
        reference_steps: steps of the reference loop in a repetition, and of the rows that have its micro-batch.
        reference_rows: packed rows with as many positions as a batch of the reference loop, about.
        step_tokens: of an optimizer step of ours, which the plan cuts into micro-batches; on a CPU.
        gemm_sizes: of the square products that give the machine's rate.
        side_bytes: of memory for each side that is alive on a CPU, about, with its part of what they share.
        text_megabytes: of corpus that is made.
    """

    teacher: Shape
    student: Shape
    vocab_size: int
    context_tokens: int
    micro_batch_rows: int
    reference_steps: int
    reference_rows: int
    step_tokens: int
    gemm_sizes: tuple[int, ...]
    side_bytes: int
    text_megabytes: float

    def flops_per_token(self, attended_tokens: int) -> float:
        """Model FLOPs of training on one useful token, in rows of `attended_tokens`."""
        student, teacher = (
            ModelShape(shape.n_embd, shape.n_layer, self.vocab_size, self.context_tokens)
            for shape in (self.student, self.teacher)
        )
        return step_flops(student, teacher, attended_tokens)


SHAPES = {
    "small": Measured(
        teacher=Shape(n_embd=320, n_head=8, n_layer=6),
        student=Shape(n_embd=128, n_head=4, n_layer=2),
        vocab_size=TRAINED_VOCAB_SIZE,
        context_tokens=512,
        micro_batch_rows=8,
        reference_steps=2,
        reference_rows=2,
        step_tokens=4096,
        gemm_sizes=(1024, 2048),
        side_bytes=1_000_000_000,
        text_megabytes=2.0,
    ),
    "full": Measured(
        teacher=Shape(n_embd=1920, n_head=16, n_layer=24),
        student=Shape(n_embd=768, n_head=8, n_layer=4),
        vocab_size=51200,
        context_tokens=1024,
        micro_batch_rows=2,
        reference_steps=1,
        reference_rows=1,
        step_tokens=4096,
        gemm_sizes=(2048, 4096, 8192),
        side_bytes=7_000_000_000,
        text_megabytes=2.0,
    ),
}


@dataclass(frozen=True)
class Inputs:
    """A folder with all that is read: ``run/shards`` and ``teacher``."""

    path: Path

    @property
    def teacher_dir(self) -> Path:
        """Hugging Face directory."""
        return self.path / "teacher"

    @property
    def log(self) -> Path:
        """Takes what DeepSpeed prints."""
        return self.path / "log.txt"

    def shards(self) -> Shards:
        """Token shards of the text."""
        return Shards(self.path / "run" / "shards")


def make(measured: Measured, path: Path) -> Inputs:
    """Write corpus, tokenizer, shards and teacher under `path`."""
    run, tokenizer_dir = RunDirectory(path / "run"), path / "tokenizer"
    recipe = recipes.load("quickstart", [f"curriculum.scale={measured.text_megabytes / 6.5}"])
    write_corpus(run.corpora, measured.text_megabytes, SEED)
    train_tokenizer(texts(recipe, run.corpora, 10**6), TRAINED_VOCAB_SIZE, tokenizer_dir)
    prepare(recipe, run, tokenizer_dir, measured.context_tokens, say=lambda line: None)
    inputs = Inputs(path)
    shards = inputs.shards()
    assert shards.vocab_size <= measured.vocab_size
    published_model(measured, measured.teacher, shards.eos_token_id).save_pretrained(inputs.teacher_dir)
    return inputs


def published_model(measured: Measured, shape: Shape, eos_token_id: int) -> GPT2LMHeadModel:
    """A GPT-2 of this shape as transformers makes it when nothing else is said, with random weights, in fp32."""
    config = GPT2Config(
        vocab_size=measured.vocab_size,
        n_positions=measured.context_tokens,
        n_embd=shape.n_embd,
        n_head=shape.n_head,
        n_layer=shape.n_layer,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(config)


def token_stream(shards: Shards, num_tokens: int) -> torch.Tensor:
    """[num_tokens] ids of the text in the order of the shards, fewer where it ends."""
    feed = Feed(shards, 1, 1, rank=0, world_size=1, passes=1, seed=SEED)
    rows = min(feed.num_steps, -(-num_tokens // shards.context_tokens))
    return torch.cat([feed.batch(row, 0)[0][0] for row in range(rows)])[:num_tokens]
