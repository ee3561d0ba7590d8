"""What memory and time follow from: the shapes of both models and of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daramgpt.ds_config import offloads
from daramgpt.errors import UserError
from daramgpt.recipe import Shape

PRECISION_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "llm-int8": 1.0, "nf4": 0.5}
QUANTISED = ("int8", "llm-int8", "nf4")


@dataclass(frozen=True)
class ModelShape:
    """What memory and FLOPs follow from.

    Attributes:
        n_embd, n_layer: of a GPT-2.
        vocab_size: rows of its head, which is tied to the embedding.
        num_positions: rows of its position embedding.
        n_head: None where only memory and FLOPs are asked for, which do not depend on it.
    """

    n_embd: int
    n_layer: int
    vocab_size: int
    num_positions: int
    n_head: int | None = None

    @property
    def block_matrices(self) -> int:
        """Weights of the products of all blocks: attention 4 D², MLP 8 D²."""
        return 12 * self.n_layer * self.n_embd**2

    @property
    def block_parameters(self) -> int:
        """Of all blocks: the products' weights, biases and norms 13 D a block, final norm 2 D."""
        return self.block_matrices + 13 * self.n_layer * self.n_embd + 2 * self.n_embd

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.n_embd

    @property
    def embedding_parameters(self) -> int:
        return (self.vocab_size + self.num_positions) * self.n_embd

    @property
    def parameters(self) -> int:
        return self.block_parameters + self.embedding_parameters

    def forward_flops(self, context_tokens: int) -> float:
        """FLOPs a token of the forward pass: 2 a weight of blocks and head, and causal attention."""
        return 2.0 * (self.block_parameters + self.head_parameters) + self.attention_flops(context_tokens)

    def attention_flops(self, context_tokens: int) -> float:
        """FLOPs a token of causal attention's two products, forward."""
        return 2.0 * self.n_layer * context_tokens * self.n_embd


@dataclass(frozen=True)
class Step:
    """One optimizer step on one rank.

    Attributes:
        teacher: None trains by plain cross-entropy.
        teacher_precision: of the teacher's blocks.
        dtype: of the student's arithmetic.
        micro_batch_rows: rows of `context_tokens` a forward pass.
        micro_batches: forward passes.
        chunk_tokens: of the fused loss.
        optimizer_kind: of the recipe.
        ds_config: DeepSpeed's part of the configuration, as from `daramgpt.ds_config.load`.
        world_size: ranks that ZeRO splits its state over.
        device: ``"cpu"`` or ``"cuda"``.
        is_by_document: with a mask of documents.
        recomputes: the student's blocks keep no activations.
        compared_blocks: of the teacher, from 1, that hidden states of the student are compared with.
    """

    student: ModelShape
    teacher: ModelShape | None
    teacher_precision: str
    dtype: str
    context_tokens: int
    micro_batch_rows: int
    micro_batches: int
    chunk_tokens: int
    optimizer_kind: str = "adamw"
    ds_config: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    device: str = "cpu"
    is_by_document: bool = False
    recomputes: bool = False
    compared_blocks: tuple[int, ...] = ()

    @property
    def projection_parameters(self) -> int:
        """Of the maps from the student's width to the teacher's, which are trained along."""
        if self.teacher is None:
            return 0
        return len(self.compared_blocks) * (self.student.n_embd + 1) * self.teacher.n_embd

    @property
    def trained_parameters(self) -> int:
        return self.student.parameters + self.projection_parameters

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.micro_batch_rows * self.context_tokens

    @property
    def width_bytes(self) -> int:
        """Of a number of the student's arithmetic."""
        return int(PRECISION_BYTES[self.dtype])

    @property
    def zero_stage(self) -> int:
        return int(self.ds_config.get("zero_optimization", {}).get("stage", 0))

    @property
    def is_offloaded(self) -> bool:
        """The optimizer lives in the memory of the CPU."""
        return offloads(self.ds_config, "optimizer")


def step_flops(student: ModelShape, teacher: ModelShape | None, context_tokens: int) -> float:
    """Model FLOPs a trained token: three forward passes of the student, one of the teacher."""
    flops = 3.0 * student.forward_flops(context_tokens)
    return flops + (teacher.forward_flops(context_tokens) if teacher else 0.0)


def recipe_shape(shape: Shape, vocab_size: int, context_tokens: int) -> ModelShape:
    """Of a model that the recipe trains: it has the run's vocabulary and as many positions as a row has tokens."""
    return ModelShape(shape.n_embd, shape.n_layer, vocab_size, context_tokens, shape.n_head)


def teacher_shape(model_dir: Path) -> ModelShape:
    """Shape of a teacher from its config alone.

    Raises:
        UserError: the config cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir)
        return ModelShape(
            config.hidden_size,
            config.num_hidden_layers,
            config.vocab_size,
            config.max_position_embeddings,
            config.num_attention_heads,
        )
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"teacher.model: {model_dir}: {reason}", "give a causal language model") from None
