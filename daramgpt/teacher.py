"""The frozen teacher: tokens in, hidden states and head weight out, its blocks in a chosen precision.

The logits of a teacher are never made here: the loss multiplies hidden states by the head weight chunk by chunk.
In the 8-bit precisions the linear layers of the blocks are bitsandbytes' own ``Linear8bitLt`` over ``Int8Params``;
the head, the embeddings and the norms keep the compute dtype.

``llm-int8``  bitsandbytes' LLM.int8 (Dettmers et al., arXiv 2208.07339): activations are quantised too.
``int8``      weight-only: the same int8 rows and fp32 row scales, dequantised before the product. It runs on every
              device, and at thousands of tokens a batch the dequantisation is a small part of the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from daramgpt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from daramgpt.attention import Documents

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EIGHT_BIT = ("int8", "llm-int8")


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


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory of a teacher: a local one as it is, a hub id downloaded to the Hugging Face cache.

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

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
            )
        )
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
    model_dir: Path, precision: str, compute_dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Teacher:
    """Load a causal language model as a frozen teacher.

    Args:
        model_dir: a Hugging Face directory.
        precision: ``int8``, ``llm-int8``, or a dtype of `DTYPES` that then overrides `compute_dtype`.
        compute_dtype: of activations, embeddings and head.
        device: CPU when None.

    Raises:
        UserError: not a causal language model, or weights missing or broken.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = device or torch.device("cpu")
    if precision in DTYPES:
        compute_dtype = DTYPES[precision]
    elif precision not in EIGHT_BIT:
        raise UserError(f"teacher.precision: {precision} is not available", f"use {', '.join((*EIGHT_BIT, *DTYPES))}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=compute_dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"teacher.model: {model_dir}: {reason}", "give a complete causal language model") from None
    model: PreTrainedModel
    model, loading = loaded
    # transformers starts what a file lacks at random and only warns.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"teacher.model: {model_dir} has no weights for {missing[0]}", "give a complete causal language model"
        )
    model.eval().requires_grad_(False)
    if getattr(model.config, "activation_function", None) == "gelu_new":
        _fuse_gelu(model)
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"teacher.model: {model_dir} has no output embedding", "give a causal language model")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if precision in EIGHT_BIT:
        _quantise_blocks(model, head, precision)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    return Teacher(
        model=model,
        head_weight=head.weight.detach(),
        head_bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
        precision=precision,
        num_parameters=num_parameters,
        weight_bytes=_weight_bytes(model),
        max_positions=int(model.config.max_position_embeddings),
    )


def _fuse_gelu(model: nn.Module) -> None:
    """transformers' ``gelu_new`` is several memory-bound kernels; torch's tanh GELU is the same function in one."""
    for module in model.modules():
        if type(getattr(module, "act", None)).__name__ == "NewGELUActivation":
            module.act = nn.GELU(approximate="tanh")


def _quantise_blocks(model: nn.Module, head: nn.Module, precision: str) -> None:
    """Replace every linear layer but the head by bitsandbytes' 8-bit one, layer by layer."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is head or not isinstance(child, (nn.Linear, Conv1D)):
                continue
            # GPT-2's Conv1D keeps its weight as [in, out].
            weight = child.weight.data.T if isinstance(child, Conv1D) else child.weight.data
            setattr(parent, name, eight_bit_linear(weight.contiguous(), child.bias, precision))


def eight_bit_linear(weight: torch.Tensor, bias: torch.Tensor | None, precision: str) -> nn.Module:
    """A frozen ``Linear8bitLt`` that holds `weight` [out, in] as int8 rows with fp32 row scales."""
    import bitsandbytes as bnb

    kind = _weight_only_linear() if precision == "int8" else bnb.nn.Linear8bitLt
    layer = kind(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        has_fp16_weights=False,
        # LLM.int8's outlier threshold: activation columns beyond it are multiplied in 16 bits.
        threshold=0.0 if precision == "int8" else 6.0,
        device="meta",
    )
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(weight.device)  # type: ignore[misc]
    if bias is not None:
        layer.bias = nn.Parameter(bias.data, requires_grad=False)
    return layer.requires_grad_(False)


@cache
def _weight_only_linear() -> type[nn.Module]:
    """The weight-only forward over bitsandbytes' storage; made on first use, as importing bitsandbytes is slow."""
    import bitsandbytes as bnb

    class WeightOnlyLinear8bit(bnb.nn.Linear8bitLt):
        """``Linear8bitLt`` whose int8 rows are dequantised into the product; activations keep their dtype."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, scales = self.weight.data, self.weight.SCB  # type: ignore[attr-defined]
            weight = _buffer(rows.shape, x.dtype, x.device)
            weight.copy_(rows)
            weight.mul_((scales / 127.0).to(x.dtype).unsqueeze(1))
            return nn.functional.linear(x, weight, self.bias)

    return WeightOnlyLinear8bit


_buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def _buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One scratch matrix that all layers dequantise into: page faults of fresh ones cost more than the arithmetic."""
    key, size = (dtype, device), shape.numel()
    if key not in _buffers or _buffers[key].numel() < size:
        _buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return _buffers[key][:size].view(shape)


def _weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and of the row scales that bitsandbytes keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            total += scales.numel() * scales.element_size()
    return total
