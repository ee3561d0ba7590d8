"""The gradient of the head's weight, summed over chunks in fp32, and scaled before it is cast.

Where products are of low precision and cannot be had wider, on a CPU, two things decide how long it takes. oneDNN
multiplies a row-major gradient of the logits by transposed hidden states in 36 ms, where the other order, which has to
transpose the logits' gradient, takes 61 (bf16 with AMX, 1,024 tokens, D = 768, V = 51,200): so the sum is kept as
[D, V] where there are chunks enough to pay for turning it over at the end. And sums, scales and casts go over blocks
that stay in a core's cache.

Shapes: C tokens of a chunk, V vocabulary, D width of the student.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from daramgpt.losses.objective import softmax_dtype
from daramgpt.losses.workspace import Workspace

# Elements that are widened, added, scaled or cast at a time on a CPU.
CPU_BLOCK_ELEMENTS = 2**18
# Turning the sum over costs as much as its faster products save in two chunks.
FEWEST_TURNED_CHUNKS = 3


class WeightGradient:
    """Σ over chunks of the logits' gradient, transposed, times the hidden states.

    Args:
        shape: (V, D).
        dtype, device: of the weight.
        num_chunks: that will come, at most.
        workspace: for the products of a chunk; its "teacher" buffer is overwritten.
        is_compiled: sums, scales and casts by torch.compile.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        num_chunks: int,
        workspace: Workspace,
        is_compiled: bool = False,
    ) -> None:
        self._shape, self._dtype, self._device, self._workspace = shape, dtype, device, workspace
        self._is_compiled = is_compiled
        self._wide = softmax_dtype(dtype)
        self._in_blocks = device.type == "cpu" and dtype != self._wide
        self._is_turned = self._in_blocks and num_chunks >= FEWEST_TURNED_CHUNKS
        self._total: Tensor | None = None
        # Taken together with the gradient of the hidden states, before any product, this fills the hole that the
        # last step's left in the heap; taken when it is needed, it found smaller tensors there and made the heap grow.
        self._out = None if dtype == self._wide else torch.empty(shape, dtype=dtype, device=device)

    def add(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        """The share of a chunk; both have the weight's dtype."""
        left, right = (hidden_CD.T.contiguous(), grad_CV) if self._is_turned else (grad_CV.T, hidden_CD)
        if self._total is None:
            shape = left.shape[0], right.shape[1]
            if self._dtype == self._wide:
                # It becomes the gradient.
                self._total = torch.empty(shape, dtype=self._wide, device=self._device)
            else:
                self._total = self._workspace.borrow("sum", *shape, self._wide, self._device)
            if has_wide_products(self._device.type, self._dtype):
                self._multiply(left, right, self._total)
            else:
                self._total.copy_(self._product(left, right))
        elif self._dtype == self._wide:
            self._total.addmm_(left, right)
        elif self._is_compiled:
            _compiled(_add)(self._total, self._product(left, right))
        elif self._in_blocks:
            # Adding a narrow tensor would widen it whole first, in memory of its own.
            for total, part in self._blocks(self._total, self._product(left, right)):
                total.add_(self._take("widened product", part.shape, self._wide).copy_(part))
        else:
            self._total.add_(self._product(left, right))

    def scaled(self, factor: Tensor) -> Tensor:
        """[V, D] in the weight's dtype, times a scalar that is never rounded to it; ends the sum."""
        # Handed over rather than kept: autograd adopts it as .grad without a copy.
        (total, self._total), (out, self._out) = (self._total, None), (self._out, None)
        if total is None:
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        if out is None:
            return scale_(total, factor)
        self._scale_and_cast(total.T if self._is_turned else total, factor, out)
        self._workspace.give_back("sum", total)
        return out

    def _scale_and_cast(self, total_VD: Tensor, factor: Tensor, out: Tensor) -> None:
        if self._is_compiled:
            _compiled(_scale_into)(total_VD, factor, out)
        elif not self._in_blocks:
            out.copy_(scale_(total_VD, factor))
        else:
            for part, block in self._blocks(total_VD, out):
                scale_(part, factor)
                # Cast first: half as much is then turned over.
                block.copy_(part.T.to(self._dtype).T if self._is_turned else part)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """In a buffer, as wide as the device gives it."""
        is_wide = has_wide_products(self._device.type, self._dtype)
        shape = torch.Size((left.shape[0], right.shape[1]))
        # The teacher's logits have been used: their buffer takes the product.
        return self._multiply(left, right, self._take("teacher", shape, self._wide if is_wide else self._dtype))

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if out.dtype == self._dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=out.dtype, out=out)

    def _take(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self._workspace.take(name, shape[0], shape[1], dtype, self._device)

    @staticmethod
    def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same rows of all of them."""
        num_rows = max(1, CPU_BLOCK_ELEMENTS // tensors[0].shape[1])
        return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)


def _add(total: Tensor, product: Tensor) -> None:
    total.add_(product)


def _scale_into(total: Tensor, factor: Tensor, out: Tensor) -> None:
    # The factor is a scalar, which alone would not widen the product.
    out.copy_(total * factor.to(total.dtype))


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place by a scalar that is never rounded to a low-precision gradient's dtype."""
    if factor.device.type == "cpu":
        return gradient if factor.item() == 1.0 else gradient.mul_(factor.item())
    # Asking a GPU for the factor would make the host wait. Of one dimension, it takes part in type promotion.
    return torch.mul(gradient, factor.view(1), out=gradient)


@functools.cache
def has_wide_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a product of that dtype can be had without rounding it back: torch 2.8 on CUDA."""
    if dtype == softmax_dtype(dtype):
        return True
    if device_type != "cuda":
        return False
    one = torch.ones(16, 16, dtype=dtype, device=device_type)
    try:
        torch.mm(one, one, out_dtype=softmax_dtype(dtype))
    except (TypeError, RuntimeError):
        return False
    return True
