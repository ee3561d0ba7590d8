"""The student: a GPT-2 of the recipe's shape with the teacher's vocabulary."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from daramgpt.recipe import Shape

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedModel


def build(shape: Shape, vocab_size: int, max_positions: int, eos_token_id: int, seed: int) -> GPT2LMHeadModel:
    """A student with random weights (GPT-2's own initialisation), in fp32 on the CPU.

    Args:
        shape: width, heads and blocks.
        vocab_size: the teacher's.
        max_positions: tokens of the longest row.
        eos_token_id: ends a document, and generation.
        seed: of the weights; the global random state is left as it was.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=max_positions,
        n_embd=shape.n_embd,
        n_head=shape.n_head,
        n_layer=shape.n_layer,
        # The same function as transformers' gelu_new, in one kernel instead of several.
        activation_function="gelu_pytorch_tanh",
        # One pass over the data leaves nothing to regularise.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone: torch.manual_seed would seed the GPUs as well.
        torch.default_generator.manual_seed(seed)
        model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight, "head and embedding are one parameter"
    return model


def save(model: PreTrainedModel, model_dir: Path) -> None:
    """Write a model and its configuration as transformers does, but without a word.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not torch.cuda.is_available():
        # transformers imports DeepSpeed on the way, which would warn that it finds no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    model.save_pretrained(model_dir)


def checkpoint_activations(model: GPT2LMHeadModel) -> None:
    """Have each block keep its input alone and compute the rest once more in the backward pass (arXiv 1604.06174).

    A third more FLOPs of the blocks for activations that hardly grow with their number. Values and gradients are the
    same to the bit: nothing in a block is random.
    """
    from torch.utils.checkpoint import checkpoint

    for block in model.transformer.h:
        # Keeping the random state would make the host wait for the GPU in every block.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
