"""What a student's blocks hand on beside what its teacher's do: 1 - cosine, through a learned projection.

The article that this project starts from wanted such a loss and gave it up because the widths differed. As in FitNets
(Romero et al., arXiv 1412.6550) a linear map carries the student's states to the teacher's width; the cosine is
DistilBERT's (Sanh et al., arXiv 1910.01108). The maps are trained along and belong to no exported student.

Like the head, this goes through the tokens in chunks and has its gradients when the forward pass ends: states of the
teacher's width are there for a chunk alone, and no product is computed twice. The gradient by a projected state is of
the size of 1 / width; it is kept that many times larger until the backward pass, so that fp16 holds it.

Shapes: N tokens, D width of the student, Dt width of the teacher, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from daramgpt.losses.objective import IGNORED_LABEL, softmax_dtype
from daramgpt.losses.weight_gradient import WeightGradient, scale_
from daramgpt.losses.workspace import Workspace

# Of a state's squares, below which a cosine is no direction any more.
LEAST_SQUARES = 1e-12


class HiddenStateLoss(nn.Module):
    """Projections of several of the student's blocks, and the loss behind them.

    Args:
        student_width, teacher_width: D and Dt.
        num_pairs: blocks of the student that have one of the teacher's.
        seed: of the projections; the global random state is left as it was.
        chunk_tokens: C.
    """

    def __init__(
        self, student_width: int, teacher_width: int, num_pairs: int, seed: int = 0, chunk_tokens: int = 1024
    ) -> None:
        super().__init__()
        assert num_pairs >= 1 and chunk_tokens >= 1
        generator, workspace = torch.Generator().manual_seed(seed), Workspace()
        self.projections = nn.ModuleList(
            Projection(student_width, teacher_width, generator, chunk_tokens, workspace) for _ in range(num_pairs)
        )

    def forward(self, student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Sum over the target tokens of the mean over the pairs.

        Args:
            student_states: [N, D] of each pair.
            teacher_states: [N, Dt] of each pair; no gradient flows into them.
            labels: [N]; -100 leaves a token out.

        Returns:
            A scalar, fp32 (fp64 for fp64 states).
        """
        pairs = zip(self.projections, student_states, teacher_states, strict=True)
        losses = [projection(own, others, labels) for projection, own, others in pairs]
        return torch.stack(losses).sum() / len(losses)


class Projection(nn.Module):
    """One of them: [N, D] → [N, Dt], and 1 - cosine to what the teacher has there.

    Args:
        student_width, teacher_width: D and Dt.
        generator: of the weights.
        chunk_tokens: C.
        workspace: buffers that projections share.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        generator: torch.Generator,
        chunk_tokens: int,
        workspace: Workspace,
    ) -> None:
        super().__init__()
        weight = torch.randn(teacher_width, student_width, generator=generator) / student_width**0.5
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(teacher_width))
        self._chunk_tokens, self._workspace = chunk_tokens, workspace

    def forward(self, student_states: Tensor, teacher_states: Tensor, labels: Tensor) -> Tensor:
        """Sum over the target tokens; shapes as of `HiddenStateLoss.forward`."""
        way = self._chunk_tokens, self._workspace
        found: Tensor = _Cosines.apply(student_states, self.weight, self.bias, teacher_states.detach(), labels, way)
        return found


class _Cosines(torch.autograd.Function):
    """Computes gradients in the forward and scales them in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight: Tensor,
        bias: Tensor,
        teacher_NE: Tensor,
        labels_N: Tensor,
        way: tuple[int, Workspace],
    ) -> Tensor:
        chunk_tokens, workspace = way
        needs_gradients = any(ctx.needs_input_grad)
        wide = softmax_dtype(states_ND.dtype)
        width = len(bias)
        total = torch.zeros((), dtype=torch.float64, device=states_ND.device)
        grad_states = torch.zeros_like(states_ND)
        grad_bias = torch.zeros(width, dtype=wide, device=states_ND.device)
        num_chunks = -(-len(labels_N) // chunk_tokens)
        grad_weight = WeightGradient(weight.shape, weight.dtype, weight.device, num_chunks, workspace)
        for first in range(0, len(labels_N), chunk_tokens):
            chunk = slice(first, min(first + chunk_tokens, len(labels_N)))
            is_target = (labels_N[chunk] != IGNORED_LABEL).to(wide).unsqueeze(1)
            projected = torch.addmm(bias, states_ND[chunk], weight.T).to(wide)
            size = projected.square().sum(1, keepdim=True).clamp_(min=LEAST_SQUARES).sqrt_()
            projected /= size
            wanted = teacher_NE[chunk].to(wide, copy=True)
            wanted /= wanted.square().sum(1, keepdim=True).clamp_(min=LEAST_SQUARES).sqrt_()
            cosine = (projected * wanted).sum(1, keepdim=True)
            total += ((1 - cosine) * is_target).sum()
            if needs_gradients:
                # Of 1 - cosine by the projected state, times the width.
                by_projected = projected.mul_(cosine).sub_(wanted).mul_(width * is_target / size)
                grad_bias += by_projected.sum(0)
                narrow = by_projected.to(weight.dtype)
                torch.mm(narrow, weight, out=grad_states[chunk])
                grad_weight.add(narrow, states_ND[chunk])
        ctx.gradients = (grad_states, grad_weight, grad_bias) if needs_gradients else None
        ctx.dtype = bias.dtype
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of the hidden states were handed over by an earlier backward")
        (grad_states, grad_weight, grad_bias), ctx.gradients = ctx.gradients, None
        factor = grad_output / len(grad_bias)
        return (
            scale_(grad_states, factor),
            grad_weight.scaled(factor),
            scale_(grad_bias, factor).to(ctx.dtype),
            None,
            None,
            None,
        )
