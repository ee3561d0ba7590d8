"""Distillation losses: a fused, chunked language-model head beside its plain reference.

The loss of a token is ``kd_weight · T² · KL(teacher ‖ student) + ce_weight · cross-entropy``, the KL between both
distributions softened by the temperature T (Hinton, Vinyals & Dean, arXiv 1503.02531; T² keeps the size of the
gradient when T changes). Every result here is a *sum* over the target tokens, in nats: whoever adds up micro-batches
and ranks divides once, by the number of targets of them all.

The plain form holds the logits of both models whole: 0.8 GB each for 4,096 tokens of a 51,200-token vocabulary in
fp32, and as much again for every intermediate. The fused form takes hidden states and head weights, and goes through
the tokens in chunks: product with the head, softmax arithmetic, gradient of the logits in place of the logits, and at
once the products that turn it into the gradients of hidden states and head weight. So

* memory beyond inputs and gradients is three buffers of [chunk, vocabulary], whatever the number of tokens;
* no product is computed twice: the gradient is ready when the forward ends, and the backward only scales it;
* it is kept unnormalised, and scaled in the precision it was summed in *before* it is cast to the weight's: under a
  loss scale nothing is lost to the range of fp16.

Large temporaries cost more than the arithmetic on a CPU (each call would fault their pages in anew), so the buffers
live as long as the head, and softmax arithmetic walks over them in blocks of rows that stay in the cache.

Shapes: N tokens, V vocabulary, D width of the student, Dt width of the teacher, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
# Bytes of one [rows, V] operand of the softmax arithmetic on a CPU: three of them fit a last-level cache of 16 MiB or
# more. Blocks of one or two rows were three times slower: too little for all cores.
CPU_BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Objective:
    """What is minimised for a token: ``kd_weight · T² · KL + ce_weight · cross-entropy``."""

    temperature: float = 2.0
    kd_weight: float = 1.0
    ce_weight: float = 0.1

    def __post_init__(self) -> None:
        assert self.temperature > 0, f"temperature {self.temperature}"


def distillation_loss_reference(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Both terms in their plain form, differentiable: what the fused form is tested against.

    Args:
        student_logits: [N, V].
        teacher_logits: [N, V], or None for plain cross-entropy.
        labels: [N], token ids; -100 leaves a token out of both terms.
        temperature: T, softens both distributions in the KL and neither in the cross-entropy.

    Returns:
        T² · KL(teacher ‖ student) and cross-entropy, each summed over the target tokens, in nats; fp32, or fp64
        when the student's logits are.
    """
    wide = _softmax_dtype(student_logits.dtype)
    targets = labels != IGNORED_LABEL
    student = student_logits[targets].to(wide)
    ce = torch.nn.functional.cross_entropy(student, labels[targets], reduction="sum")
    if teacher_logits is None:
        return torch.zeros_like(ce), ce
    student_log = torch.log_softmax(student / temperature, dim=-1)
    teacher_log = torch.log_softmax(teacher_logits[targets].to(wide) / temperature, dim=-1)
    kl = torch.nn.functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    return temperature**2 * kl, ce


@dataclass
class Workspace:
    """Buffers that outlive a call, so that their pages are faulted in once."""

    _buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def take(self, name: str, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[num_rows, num_columns] of the buffer of that name, grown when needed; its content is arbitrary."""
        key, size = (name, dtype, device), num_rows * num_columns
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(key, None)
            # A buffer born in inference mode could not be written in training.
            with torch.inference_mode(False):
                buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(num_rows, num_columns)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class DistillationHead(torch.nn.Module):
    """The student's head and the loss behind it, fused.

    The weight is this module's own parameter: under ZeRO-3 it is gathered for this forward. To tie it to the
    embedding, hand over the embedding's parameter itself.

    Args:
        weight: [V, D].
        temperature, kd_weight, ce_weight: see `Objective`.
        chunk_tokens: C; more makes larger products and takes 3 · C · V · 4 bytes.
    """

    def __init__(
        self,
        weight: torch.nn.Parameter,
        *,
        temperature: float = 2.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.1,
        chunk_tokens: int = 1024,
    ) -> None:
        super().__init__()
        assert chunk_tokens >= 1, f"chunk_tokens {chunk_tokens}"
        self.weight = weight
        self.objective = Objective(temperature, kd_weight, ce_weight)
        self.chunk_tokens = chunk_tokens
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, its KL term and its cross-entropy term over the target tokens, logits never whole.

    Args:
        student_hidden: [N, D], of the weight's dtype.
        student_weight: [V, D].
        labels: [N], token ids; -100 leaves a token out of both terms.
        teacher_hidden: [N, Dt], or None for plain cross-entropy; no gradient flows into it.
        teacher_weight: [V, Dt], with `teacher_hidden`; of its dtype.
        teacher_bias: [V], or None.
        objective: temperature and weights.
        chunk_tokens: tokens that are taken at a time.
        workspace: buffers to reuse over calls.

    Returns:
        loss = kd_weight · kd + ce_weight · ce, kd (T² included), ce: scalars, sums over the target tokens, in nats,
        fp32 (fp64 for fp64 hidden states). Only the first carries a gradient, and its backward runs once.
    """
    assert student_hidden.shape[:-1] == labels.shape and labels.dim() == 1, "hidden [N, D] goes with labels [N]"
    assert (teacher_hidden is None) == (teacher_weight is None), "the teacher's hidden states go with its head"
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.detach(), teacher_weight, teacher_bias)
    workspace = workspace or Workspace()
    if torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad):
        results = _FusedHead.apply(student_hidden, student_weight, labels, teacher, objective, chunk_tokens, workspace)
        return results[0], results[1], results[2]
    kd, ce, _, _ = _run_chunks(
        student_hidden, student_weight, labels, teacher, objective, chunk_tokens, workspace, (False, False)
    )
    return objective.kd_weight * kd + objective.ce_weight * ce, kd, ce


class _FusedHead(torch.autograd.Function):
    """Computes gradients in the forward and scales them in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        objective: Objective,
        chunk_tokens: int,
        workspace: Workspace,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kd, ce, *gradients = _run_chunks(
            hidden_ND, weight_VD, labels_N, teacher, objective, chunk_tokens, workspace, ctx.needs_input_grad[:2]
        )
        ctx.gradients, ctx.dtypes = gradients, (hidden_ND.dtype, weight_VD.dtype)
        ctx.mark_non_differentiable(kd, ce)
        return objective.kd_weight * kd + objective.ce_weight * ce, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused head's gradients were handed over by an earlier backward")
        # Handed over rather than kept: autograd then adopts them as .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        # Asking a GPU for the factor would make the host wait; there the pass is cheap.
        if grad_output.device.type != "cpu" or grad_output.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        cast = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        del gradients
        return cast[0], cast[1], None, None, None, None, None


@torch.no_grad()
def _run_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None,
    objective: Objective,
    chunk_tokens: int,
    workspace: Workspace,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """kd and ce sums, and the unnormalised gradients of hidden states and weight where needed, else None.

    The gradient of a low-precision weight is summed over chunks, and returned, in fp32.
    """
    wide, device = _softmax_dtype(hidden_ND.dtype), hidden_ND.device
    num_tokens, vocab_size = len(labels_N), len(weight_VD)
    # fp64 costs nothing on the few sums and keeps them independent of the chunk size.
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    grad_hidden = torch.zeros_like(hidden_ND, dtype=wide) if needs[0] else None
    grad_weight: Tensor | None = None
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        labels_C, hidden_CD, num_rows = labels_N[chunk], hidden_ND[chunk], chunk.stop - start
        # Only where asking is free: a GPU would have to be waited for.
        if device.type == "cpu" and not bool((labels_C != IGNORED_LABEL).any()):
            continue
        student_CV = workspace.take("student", num_rows, vocab_size, wide, device)
        _scaled_logits(student_CV, hidden_CD, weight_VD, None, objective.temperature, workspace)
        teacher_CV = None
        if teacher is not None:
            teacher_CV = workspace.take("teacher", num_rows, vocab_size, wide, device)
            _scaled_logits(teacher_CV, teacher[0][chunk], teacher[1], teacher[2], objective.temperature, workspace)
        sums += _softmax_arithmetic(student_CV, teacher_CV, labels_C, objective, any(needs), workspace)
        grad_CV = student_CV
        if any(needs) and hidden_CD.dtype != wide:
            grad_CV = workspace.take("narrow", num_rows, vocab_size, hidden_CD.dtype, device).copy_(student_CV)
        if grad_hidden is not None:
            if hidden_CD.dtype == wide:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[chunk])
            else:
                grad_hidden[chunk] = grad_CV @ weight_VD
        if needs[1]:
            if grad_weight is None:
                grad_weight = torch.zeros_like(weight_VD, dtype=wide)
            if hidden_CD.dtype == wide:
                grad_weight.addmm_(grad_CV.T, hidden_CD)
            else:
                product_VD = workspace.take("product", vocab_size, hidden_CD.shape[1], hidden_CD.dtype, device)
                grad_weight += torch.mm(grad_CV.T, hidden_CD, out=product_VD)
    if needs[1] and grad_weight is None:
        grad_weight = torch.zeros_like(weight_VD, dtype=wide)
    kd, ce = sums.to(wide).unbind()
    return kd.clone(), ce.clone(), grad_hidden, grad_weight


def _scaled_logits(
    out_CV: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, workspace: Workspace
) -> None:
    """Logits divided by the temperature, into `out_CV`."""
    if hidden.dtype == out_CV.dtype:
        torch.addmm(out_CV, hidden, weight.T, beta=0, alpha=1 / temperature, out=out_CV)
    else:
        narrow_CV = workspace.take("narrow", len(hidden), len(weight), hidden.dtype, out_CV.device)
        out_CV.copy_(torch.mm(hidden, weight.T, out=narrow_CV))
        if temperature != 1:
            out_CV.mul_(1 / temperature)
    if bias is not None:
        out_CV.add_(bias, alpha=1 / temperature)


def _softmax_arithmetic(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    objective: Objective,
    make_gradient: bool,
    workspace: Workspace,
) -> Tensor:
    """[2] sums of kd and ce in fp64; the student's scaled logits give way to the gradient of the true ones."""
    num_rows, vocab_size = student_CV.shape
    block_rows = num_rows
    if student_CV.device.type == "cpu":
        block_rows = max(1, CPU_BLOCK_BYTES // (vocab_size * student_CV.element_size()))
    spare_BV = workspace.take("spare", min(block_rows, num_rows), vocab_size, student_CV.dtype, student_CV.device)
    parts = [
        _block_arithmetic(
            student_CV[start : start + block_rows],
            None if teacher_CV is None else teacher_CV[start : start + block_rows],
            spare_BV,
            labels_C[start : start + block_rows],
            objective,
            make_gradient,
        )
        for start in range(0, num_rows, block_rows)
    ]
    return torch.stack(parts).sum(dim=0)


def _block_arithmetic(
    student: Tensor, teacher: Tensor | None, spare: Tensor, labels: Tensor, objective: Objective, make_gradient: bool
) -> Tensor:
    """As `_softmax_arithmetic`, for a block of rows [B, V]; overwrites both models' scaled logits.

    With s, t the scaled logits less their row maximum, q = eˢ/Σeˢ, p = eᵗ/Σeᵗ:
    KL = Σp(t − s) − ln Σeᵗ + ln Σeˢ, and T² · KL has the gradient T · (q − p) by the student's logits z = T·s;
    the cross-entropy needs e^z = (eˢ)ᵀ, a power and no second exponential of V terms.
    """
    temperature = objective.temperature
    spare = spare[: len(labels)]
    targets = (labels != IGNORED_LABEL).unsqueeze(1)
    index = labels.clamp(min=0).unsqueeze(1)
    student.sub_(student.amax(dim=1, keepdim=True))
    label_logit = student.gather(1, index).mul_(temperature)
    kd = torch.zeros_like(label_logit)
    if teacher is not None:
        teacher.sub_(teacher.amax(dim=1, keepdim=True))
        torch.sub(teacher, student, out=spare)
        teacher_sum = teacher.exp_().sum(dim=1, keepdim=True)
        kd = spare.mul_(teacher).sum(dim=1, keepdim=True).div_(teacher_sum).sub_(teacher_sum.log())
    soft_sum = student.exp_().sum(dim=1, keepdim=True)
    if teacher is not None:
        kd.add_(soft_sum.log()).mul_(temperature**2)
    if temperature == 1:
        hard, hard_sum = student, soft_sum
    else:
        hard = torch.pow(student, temperature, out=spare)
        hard_sum = hard.sum(dim=1, keepdim=True)
    ce = hard_sum.log().sub_(label_logit)
    if make_gradient:
        # What leaves a token out, here and below, is a factor per row: it costs no pass over V.
        hard_factor = targets * (objective.ce_weight / hard_sum)
        soft_factor = targets * (objective.kd_weight * temperature / soft_sum) if teacher is not None else None
        if hard is student:
            student.mul_(hard_factor if soft_factor is None else hard_factor + soft_factor)
        else:
            student.mul_(0.0 if soft_factor is None else soft_factor).addcmul_(hard, hard_factor)
        if teacher is not None:
            student.addcmul_(teacher, targets * (-objective.kd_weight * temperature / teacher_sum))
        student.scatter_add_(1, index, -objective.ce_weight * targets.to(student.dtype))
    return torch.cat([kd, ce], dim=1).masked_fill_(~targets, 0.0).sum(dim=0, dtype=torch.float64)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
