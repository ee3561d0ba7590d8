"""The frozen teacher: tokens in, hidden states and head weight out, its blocks in a chosen precision.

The logits of a teacher are never made here: the loss multiplies hidden states by the head weight chunk by chunk.
In the quantised precisions the linear layers of the blocks are bitsandbytes' own, the head and the embeddings keep the
compute dtype, the residual stream and its norms fp32.

Weights are read tensor by tensor from memory-mapped safetensors and quantised one at a time, so that loading holds
little more than the quantised model itself: 0.36 of the fp32 checkpoint at 24 x 1920 in int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from daramgpt import malloc
from daramgpt.blocks import blocks_of
from daramgpt.errors import UserError
from daramgpt.teacher.activations import fuse_gelu
from daramgpt.teacher.half_accumulation import check as check_half_accumulation
from daramgpt.teacher.identity import fingerprint
from daramgpt.teacher.pickled import converted, default_cache, is_pickled
from daramgpt.teacher.quantised import (
    EIGHT_BIT,
    QUANTISED,
    eight_bit_linear,
    non_finite_weight,
    num_parameters,
    quantisation,
    refit,
    weight_bytes,
)
from daramgpt.teacher.residual import is_norm
from daramgpt.vector_math import choose_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from daramgpt.attention import Documents

__all__ = [
    "DTYPES",
    "EIGHT_BIT",
    "QUANTISED",
    "Teacher",
    "converted",
    "eight_bit_linear",
    "fingerprint",
    "load",
    "max_positions",
    "resolve",
]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Tokens that show whether a teacher gives finite values: few, as half precision is slow on many a CPU.
TRIAL_TOKENS = 8
# Whoever computes with a teacher imports this first.
choose_kernels()


@dataclass(frozen=True)
class Teacher:
    """A frozen function from tokens to hidden states, and the head that turns those into logits.

    Attributes:
        model: the quantised transformers model; only its body is ever run.
        head_weight: [V, D] in the compute dtype.
        head_bias: [V], or None.
        precision: of the blocks.
        num_parameters: of the model before quantisation, shared weights once.
        weight_bytes: of all parameters as they are held now, scales included.
        max_positions: longest row it has positions for.
    """

    model: PreTrainedModel
    head_weight: torch.Tensor
    head_bias: torch.Tensor | None
    precision: str
    num_parameters: int
    weight_bytes: int
    max_positions: int

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """[B, T] token ids → [B, T, D] hidden states after the last norm.

        Args:
            documents: of these rows, where each is to be seen alone; None looks across them.
        """
        inputs = {} if documents is None else documents.model_inputs(self.head_weight.dtype)
        return self.model.base_model(input_ids, use_cache=False, **inputs).last_hidden_state

    @torch.no_grad()
    def states(
        self, input_ids: torch.Tensor, blocks: Sequence[int], documents: Documents | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What `hidden_states` gives, and what several blocks hand on.

        Args:
            input_ids, documents: as of `hidden_states`.
            blocks: numbers, from 1. A block's states are taken where the next one reads them, behind its first norm,
                which takes channels that carry little for what they are; those of the last are the hidden states.

        Returns:
            [B, T, D] hidden states, and [B, T, D] of each of the blocks.
        """
        stack = blocks_of(self.model)
        kept: dict[int, torch.Tensor] = {}

        def keep(number: int, states: torch.Tensor) -> None:
            kept[number] = states

        handles = [
            _first_norm(stack[number]).register_forward_hook(lambda module, inputs, output, n=number: keep(n, output))
            for number in blocks
            if number < len(stack)
        ]
        try:
            hidden = self.hidden_states(input_ids, documents)
        finally:
            for handle in handles:
                handle.remove()
        return hidden, [kept.get(number, hidden) for number in blocks]

    @torch.no_grad()
    def check_finite(self) -> None:
        """Run a few tokens from all over the vocabulary and look at hidden states and logits.

        Raises:
            UserError: some are not finite.
        """
        num_tokens = min(TRIAL_TOKENS, self.max_positions)
        ids = torch.arange(num_tokens, device=self.head_weight.device) * (len(self.head_weight) // num_tokens)
        hidden = self.hidden_states(ids.unsqueeze(0))
        logits = F.linear(hidden[:, -1], self.head_weight, self.head_bias)
        if bool(hidden.isfinite().all()) and bool(logits.isfinite().all()):
            return
        dtype = self.head_weight.dtype
        arithmetic = {value: key for key, value in DTYPES.items()}[dtype]
        damaged = non_finite_weight(self.model)
        cause = f": {damaged} is not finite" if damaged else ""
        mend = "give an undamaged checkpoint"
        if dtype == torch.float16:
            mend = "fp16 ends at 65504: take a ds_config without fp16, or --set teacher.precision=fp32"
        raise UserError(
            f"teacher.precision: {self.precision} computed in {arithmetic} gives values that are not finite{cause}",
            mend,
        )

    def check_documents(self, context_tokens: int) -> None:
        """Refuse a teacher that cannot be shown documents one by one in rows of this length.

        Raises:
            UserError: its own attention has a window, which a mask of documents would take the place of.
        """
        window = getattr(self.model.config, "sliding_window", None)
        if window is not None and window < context_tokens:
            raise UserError(
                f'curriculum.attention: "document" is not possible with a teacher that sees {window} tokens back',
                f'use "causal", or curriculum.context_tokens of at most {window}',
            )


def _first_norm(block: torch.nn.Module) -> torch.nn.Module:
    """Of a block: what its attention reads goes through it."""
    return next(module for module in block.children() if is_norm(module))


def resolve(model: str, revision: str | None = None, only_config: bool = False) -> Path:
    """The directory of a teacher: a local one as it is, a hub id downloaded to the Hugging Face cache.

    Args:
        model: folder, or hub id.
        revision: of the hub id.
        only_config: leaves weights and tokenizer on the hub, for what needs the shape alone.

    Raises:
        UserError: no such directory, and the hub has none of that name or cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"teacher.model: {path} holds no config.json", "give the folder of a Hugging Face model")
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f'teacher.model: there is no folder "{model}"', "correct the path, or give a hub id owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if only_config else ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client's own, httpx's and OSError's all mean the same to the user
        raise UserError(
            f'teacher.model: "{model}" is no folder here and could not be fetched from the hub '
            f"({type(error).__name__})",
            "check the name and the network, or download it and give its folder",
        ) from None


def max_positions(model_dir: Path) -> int:
    """Longest row a teacher has positions for, from its config alone.

    Raises:
        UserError: the directory holds no readable config.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"teacher.model: {model_dir}/config.json: {error}", "give a causal language model") from None
    return int(config.max_position_embeddings)


def load(
    model_dir: Path,
    precision: str,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    cache_dir: Path | None = None,
    half_accumulation: bool = False,
) -> Teacher:
    """Load a causal language model as a frozen teacher and see that it gives finite values.

    Args:
        model_dir: a Hugging Face directory.
        precision: one of `QUANTISED`, or a dtype of `DTYPES` that then overrides `compute_dtype`.
        compute_dtype: of activations, embeddings and head.
        device: CPU when None.
        cache_dir: holds the safetensors that pickled weights are converted to; the user's cache when None.
        half_accumulation: an experiment for the P100, see the module of that name.

    Raises:
        UserError: not a causal language model, weights missing, broken or unsafe, or values that are not finite.
    """
    if precision in DTYPES:
        compute_dtype = DTYPES[precision]
    elif precision not in QUANTISED:
        raise UserError(f"teacher.precision: {precision} is not available", f"use {', '.join((*QUANTISED, *DTYPES))}")
    if half_accumulation:
        check_half_accumulation(precision, compute_dtype, device or torch.device("cpu"))
    weights_dir = converted(model_dir, cache_dir or default_cache()) if is_pickled(model_dir) else model_dir
    # A weight is many times what its quantised form is, and comes in once.
    with malloc.large_blocks_returned():
        model = _pretrained(model_dir, weights_dir, precision, compute_dtype, device or torch.device("cpu"))
    model.eval().requires_grad_(False)
    if getattr(model.config, "activation_function", None) == "gelu_new":
        fuse_gelu(model)
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"teacher.model: {model_dir} has no output embedding", "give a causal language model")
    if precision in QUANTISED:
        refit(model, precision, compute_dtype, half_accumulation)
    teacher = Teacher(
        model=model,
        head_weight=head.weight.detach(),
        head_bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
        precision=precision,
        num_parameters=num_parameters(model),
        weight_bytes=weight_bytes(model),
        max_positions=int(model.config.max_position_embeddings),
    )
    teacher.check_finite()
    return teacher


def _pretrained(
    model_dir: Path, weights_dir: Path, precision: str, compute_dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model of `model_dir` on `device`; the faults of its files are the user's and named by that directory."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    is_quantised = precision in QUANTISED
    mend = "give a complete causal language model"
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(
                f"teacher.model: {model_dir} is quantised already", "give the original; it is quantised as it is read"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights_dir,
            config=config,
            # Rows are quantised from what the file holds, not from that rounded to the compute dtype first.
            dtype=torch.float32 if is_quantised else compute_dtype,
            quantization_config=quantisation(precision, compute_dtype) if is_quantised else None,
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"teacher.model: {model_dir}: {reason}", mend) from None
    model: PreTrainedModel
    model, loading = loaded
    # transformers starts what a file lacks at random and only warns.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"teacher.model: {model_dir} has no weights for {missing[0]}", mend)
    return model
