"""The student's head and the loss behind it, fused: hidden states and head weights in, loss and gradients out.

Every result is a *sum* over the target tokens, in nats: whoever adds up micro-batches and ranks divides once, by the
number of targets of them all.

The logits of both models never exist whole. The fused form goes through the tokens in chunks: product with the head,
softmax arithmetic, gradient of the logits in place of the logits, and at once the products that turn it into the
gradients of hidden states and head weight. So

* memory beyond inputs and gradients is the logits of a chunk, whatever the number of tokens;
* no product is computed twice: the gradient is ready when the forward ends, and the backward only scales it;
* it is kept unnormalised, and scaled before it is cast to the weight's dtype: under a loss scale nothing is lost to
  the range of fp16;
* the gradient of a low-precision weight is summed over chunks in fp32.

Products take some hundreds of rows: each chunk adds to the whole gradient of the weight, which goes through memory.

Shapes: N tokens, V vocabulary, D width of the student, Dt width of the teacher, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from daramgpt.losses.objective import IGNORED_LABEL, Objective, softmax_dtype
from daramgpt.losses.softmax import softmax_arithmetic
from daramgpt.losses.weight_gradient import WeightGradient, has_wide_products, scale_
from daramgpt.losses.workspace import Workspace

# Rows of a low-precision product with the head's V rows as its inner dimension: oneDNN takes 24 ms for 512 rows of
# D = 768 with AMX, 90 ms for 1,024.
CPU_DEEP_PRODUCT_ROWS = 512


class DistillationHead(torch.nn.Module):
    """The student's head and the loss behind it, fused.

    The weight is this module's own parameter: under ZeRO-3 it is gathered for this forward. To tie it to the
    embedding, hand over the embedding's parameter itself.

    Args:
        weight: [V, D].
        objective: what is minimised.
        chunk_tokens: C; more makes larger products and takes 2 · C · V elements of the hidden states' dtype.
        is_compiled: as of `distillation_loss`.
    """

    def __init__(
        self,
        weight: torch.nn.Parameter,
        *,
        objective: Objective | None = None,
        chunk_tokens: int = 1024,
        is_compiled: bool = False,
    ) -> None:
        super().__init__()
        assert chunk_tokens >= 1, f"chunk_tokens {chunk_tokens}"
        self.weight = weight
        self.objective = objective or Objective()
        self.chunk_tokens = chunk_tokens
        self.is_compiled = is_compiled
        self.workspace = Workspace()

    def forward(
        self,
        student_hidden: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of every target token; see `distillation_loss` for shapes and results."""
        return distillation_loss(
            student_hidden,
            self.weight,
            labels,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            objective=self.objective,
            chunk_tokens=self.chunk_tokens,
            workspace=self.workspace,
            is_compiled=self.is_compiled,
        )


def distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    objective: Objective,
    chunk_tokens: int = 1024,
    workspace: Workspace | None = None,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, its divergence term and its cross-entropy term over the target tokens, logits never whole.

    Args:
        student_hidden: [N, D], of the weight's dtype.
        student_weight: [V, D].
        labels: [N], token ids; -100 leaves a token out of both terms.
        teacher_hidden: [N, Dt], or None for plain cross-entropy; no gradient flows into it.
        teacher_weight: [V, Dt], with `teacher_hidden`; of its dtype.
        teacher_bias: [V] of the same dtype, or None.
        objective: divergence, temperature and weights.
        chunk_tokens: tokens that are taken at a time.
        workspace: buffers to reuse over calls.
        is_compiled: the softmax arithmetic by torch.compile, which needs Triton or a C++ compiler.

    Returns:
        loss = kd_weight · kd + ce_weight · ce, kd (T² included), ce: scalars, sums over the target tokens, in nats,
        fp32 (fp64 for fp64 hidden states). Only the first carries a gradient, and its backward runs once.
    """
    assert student_hidden.shape[:-1] == labels.shape and labels.dim() == 1, "hidden [N, D] goes with labels [N]"
    assert (teacher_hidden is None) == (teacher_weight is None), "the teacher's hidden states go with its head"
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.detach(), teacher_weight, teacher_bias)
    way = _Way(objective, chunk_tokens, workspace or Workspace(), is_compiled)
    if torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad):
        results = _FusedHead.apply(student_hidden, student_weight, labels, teacher, way)
        return results[0], results[1], results[2]
    kd, ce, _, _ = _run_chunks(student_hidden, student_weight, labels, teacher, way, (False, False))
    return objective.kd_weight * kd + objective.ce_weight * ce, kd, ce


@dataclass(frozen=True)
class _Way:
    """How the chunks are gone through: `distillation_loss` has the meaning of each."""

    objective: Objective
    chunk_tokens: int
    workspace: Workspace
    is_compiled: bool


class _FusedHead(torch.autograd.Function):
    """Computes gradients in the forward and scales them in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        way: _Way,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kd, ce, *gradients = _run_chunks(hidden_ND, weight_VD, labels_N, teacher, way, ctx.needs_input_grad[:2])
        ctx.gradients = gradients
        ctx.mark_non_differentiable(kd, ce)
        return way.objective.kd_weight * kd + way.objective.ce_weight * ce, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients were handed over by an earlier backward")
        # Handed over rather than kept: autograd then adopts them as .grad without a copy.
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return (
            None if grad_hidden is None else scale_(grad_hidden, grad_output),
            None if grad_weight is None else grad_weight.scaled(grad_output),
            None,
            None,
            None,
        )


@torch.no_grad()
def _run_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None,
    way: _Way,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, WeightGradient | None]:
    """kd and ce sums, and the unnormalised gradients of hidden states and weight where needed, else None.

    The gradient of the weight is a sum over chunks, that of the hidden states has one chunk to a row.
    """
    dtype, device, vocab_size = hidden_ND.dtype, hidden_ND.device, len(weight_VD)
    objective, workspace = way.objective, way.workspace
    logits_dtype = _logits_dtype(hidden_ND)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    grad_hidden = torch.zeros_like(hidden_ND) if needs[0] else None
    grad_weight = None
    if needs[1]:
        num_chunks = -(-len(labels_N) // way.chunk_tokens)
        # Of the weight no more than this is kept: under ZeRO-3 it is here for the forward alone.
        grad_weight = WeightGradient(weight_VD.shape, weight_VD.dtype, device, num_chunks, workspace, way.is_compiled)
    for chunk in _chunks(labels_N, way.chunk_tokens):
        hidden_CD, num_rows = hidden_ND[chunk], len(labels_N[chunk])
        student_CV = workspace.take("student", num_rows, vocab_size, logits_dtype, device)
        _scaled_logits(student_CV, hidden_CD, weight_VD, None, objective.temperature)
        teacher_CV = None
        if teacher is not None:
            # The teacher may compute in another dtype than the student.
            teacher_CV = workspace.take("teacher", num_rows, vocab_size, _logits_dtype(teacher[0]), device)
            _scaled_logits(teacher_CV, teacher[0][chunk], teacher[1], teacher[2], objective.temperature)
        grad_CV = None
        if any(needs):
            name = "student" if logits_dtype == dtype else "gradient"
            grad_CV = workspace.take(name, num_rows, vocab_size, dtype, device)
        # fp64 costs nothing on the few sums and keeps them independent of the chunk size.
        sums += softmax_arithmetic(
            student_CV, teacher_CV, labels_N[chunk], objective, grad_CV, workspace, way.is_compiled
        )
        if grad_CV is not None and grad_hidden is not None:
            _deep_product(grad_CV, weight_VD, grad_hidden[chunk])
        if grad_CV is not None and grad_weight is not None:
            grad_weight.add(grad_CV, hidden_CD)
    kd, ce = sums.to(softmax_dtype(dtype)).unbind()
    return kd.clone(), ce.clone(), grad_hidden, grad_weight


def _chunks(labels_N: Tensor, chunk_tokens: int) -> Iterator[slice]:
    """Those that hold targets, where asking is free: a GPU would have to be waited for."""
    for start in range(0, len(labels_N), chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, len(labels_N)))
        if labels_N.device.type != "cpu" or bool((labels_N[chunk] != IGNORED_LABEL).any()):
            yield chunk


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    """Of the product of hidden states and head."""
    return softmax_dtype(hidden.dtype) if has_wide_products(hidden.device.type, hidden.dtype) else hidden.dtype


def _scaled_logits(out_CV: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
    """Logits divided by the temperature, into `out_CV`; rounded once where that is of low precision."""
    if hidden.dtype == out_CV.dtype:
        start, beta = (out_CV, 0.0) if bias is None else (bias, 1 / temperature)
        torch.addmm(start, hidden, weight.T, beta=beta, alpha=1 / temperature, out=out_CV)
        return
    # A power of two rounds nothing: the hidden states are divided, which are few.
    is_exact = math.frexp(temperature)[0] == 0.5
    torch.mm(hidden / temperature if is_exact else hidden, weight.T, out_dtype=out_CV.dtype, out=out_CV)
    if bias is not None:
        out_CV.add_(bias / temperature if is_exact else bias)
    if not is_exact:
        out_CV.mul_(1 / temperature)


def _deep_product(grad_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """Gradient of the hidden states of a chunk."""
    num_rows = len(grad_CV)
    if grad_CV.device.type == "cpu" and grad_CV.dtype != softmax_dtype(grad_CV.dtype):
        num_rows = CPU_DEEP_PRODUCT_ROWS
    for grad, out in zip(grad_CV.split(num_rows), out_CD.split(num_rows), strict=True):
        torch.mm(grad, weight_VD, out=out)
