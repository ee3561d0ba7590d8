"""A residual stream in fp32 around 16-bit products.

What every block adds to the residual stream is small beside it, so in bf16 the stream itself loses more than all
products: more than half of the KL that a bf16 teacher has to an fp32 one. A quantised teacher, whose rows are rounded
already, keeps the stream and its norms in fp32; products, attention and activations see 16 bits. The price is memory
traffic alone, some 28 bytes a channel, block and token, and in fp16 a stream that cannot overflow at 65504.

torch promotes ``stream + products`` to the wider of both, so it is enough to widen what enters the stream first and to
narrow what leaves it: through hooks, whatever the architecture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def widen_residual_stream(model: nn.Module, embedding: nn.Module, compute_dtype: torch.dtype) -> None:
    """Keep the residual stream of `model` in fp32, its products in `compute_dtype`.

    Args:
        model: a decoder whose blocks add to a stream that starts at `embedding` and is read through norms.
        embedding: of its tokens.
        compute_dtype: of everything else; nothing is done when that is fp32.
    """
    if compute_dtype == torch.float32:
        return

    def narrow(module: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(part.to(compute_dtype) for part in output)
        return output.to(compute_dtype)

    embedding.register_forward_hook(lambda module, arguments, output: output.float())
    for module in model.modules():
        # Rotary embeddings follow the stream's dtype, and would make queries and keys wider than values.
        if is_norm(module) or hasattr(module, "inv_freq"):
            module.register_forward_hook(narrow)


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales channels: layer norm, RMS norm or the like, by whatever name."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 1
