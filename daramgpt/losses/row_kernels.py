"""The forward KL's softmax arithmetic for a GPU, where each operation goes through memory once more.

torch's softmax is one kernel, which reads a row three times and writes it once. What it leaves unsaid, ln Σeᶻ of a row,
is a logit less the logarithm of its probability, best at the most probable one. With q, p of the student's and the
teacher's scaled logits s, t: KL = Σp·t − Σp·s + ln Σeˢ − ln Σeᵗ, and with a = kd_weight · T and, at T = 2,
c = ce_weight / Σq² the gradient by the logits is q · (a + c·q) − a·p, but for the labels' own share.

Bytes a token and vocabulary entry of fp32 logits at T = 2:

* q, p: 16 each; their maxima: 4 each;
* −a·p in place: 8; its products with t and with s, summed: 8 each;
* Σq²: 4; a + c·q: 8; the gradient: 12, and 2 or 4 to write it.

That is 90 to 92. Of fp16 logits the softmax costs 10, in place of 16, and both products want them widened first, at 6:
90 too. Without a teacher and at T = 1: 16 + 4 + 6 or 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daramgpt.losses.objective import Objective, softmax_dtype
from daramgpt.losses.rows import Rows
from daramgpt.losses.workspace import Workspace


def block(
    student_BV: Tensor,
    teacher_BV: Tensor | None,
    rows: Rows,
    objective: Objective,
    gradient_BV: Tensor | None,
    workspace: Workspace,
) -> Tensor | None:
    """A block of `daramgpt.losses.softmax.softmax_arithmetic`, for the forward KL or for no teacher.

    Returns:
        Σp(t − s) over all targets, or None without a teacher.
    """
    temperature = objective.temperature
    probabilities, student_log_sum = _softmax(student_BV, "student probabilities", workspace)
    # s is taken less its ln Σeˢ: the sum of eˢ is then 1.
    rows.student_shift.copy_(student_log_sum)
    divergence, soft = None, None
    if teacher_BV is not None:
        soft, teacher_log_sum = _softmax(teacher_BV, "teacher probabilities", workspace)
        torch.sub(student_log_sum, teacher_log_sum, out=rows.divergence)
        # A weight of zero leaves the divergence out of the gradient, not out of what is reported.
        factor = objective.kd_weight * temperature or 1.0
        soft.mul_(rows.target * -factor)
        teacher_part = torch.dot(soft.view(-1), _widened(teacher_BV, workspace).view(-1))
        student_part = torch.dot(soft.view(-1), _widened(student_BV, workspace).view(-1))
        divergence = (student_part - teacher_part) / factor
        if not objective.kd_weight:
            soft = None
    _finish(student_BV, probabilities, soft, rows, temperature, gradient_BV, workspace)
    return divergence


def _softmax(logits_BV: Tensor, name: str, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Probabilities, in the buffer of that name, and ln Σe^logit [B, 1]."""
    wide = softmax_dtype(logits_BV.dtype)
    num_rows, vocab_size = logits_BV.shape
    out = workspace.take(name, num_rows, vocab_size, wide, logits_BV.device)
    probabilities = torch.softmax(logits_BV, dim=1, dtype=wide, out=out)
    largest, index = probabilities.max(dim=1, keepdim=True)
    return probabilities, logits_BV.gather(1, index).to(wide) - largest.log()


def _widened(logits_BV: Tensor, workspace: Workspace) -> Tensor:
    """Themselves, or a copy in a buffer that the next call overwrites."""
    return (
        logits_BV
        if logits_BV.dtype == softmax_dtype(logits_BV.dtype)
        else _spare(logits_BV, workspace).copy_(logits_BV)
    )


def _spare(student_BV: Tensor, workspace: Workspace) -> Tensor:
    """The logits' own memory once they have been used, or a buffer where they are narrow."""
    wide = softmax_dtype(student_BV.dtype)
    if student_BV.dtype == wide:
        return student_BV
    num_rows, vocab_size = student_BV.shape
    return workspace.take("widened logits", num_rows, vocab_size, wide, student_BV.device)


def _finish(
    student_BV: Tensor,
    probabilities: Tensor,
    soft: Tensor | None,
    rows: Rows,
    temperature: float,
    gradient_BV: Tensor | None,
    workspace: Workspace,
) -> None:
    """Σqᵀ of each row, and the whole gradient but for the labels' own share; `soft` is −a·p."""
    spare = _spare(student_BV, workspace)
    if temperature == 1:
        rows.hard_sum.fill_(1.0)
    elif temperature == 2:
        # The squares need not be written down.
        torch.linalg.vector_norm(probabilities, dim=1, keepdim=True, out=rows.hard_sum).square_()
    else:
        hard = torch.pow(probabilities, temperature, out=spare)
        torch.sum(hard, dim=1, keepdim=True, out=rows.hard_sum)
    if gradient_BV is None:
        return
    linear, hard_factor = rows.soft_factor, rows.hard_factor / rows.hard_sum
    if temperature == 1:
        factor = hard_factor if soft is None else hard_factor + linear
    elif temperature == 2:
        none = torch.zeros_like(linear) if soft is None else linear
        factor = torch.addcmul(none, probabilities, hard_factor, out=spare)
    else:
        hard = spare.mul_(hard_factor)
        if soft is None:
            gradient_BV.copy_(hard)
            return
        soft, factor = soft.add_(hard), linear
    if soft is None:
        torch.mul(probabilities, factor, out=gradient_BV)
    else:
        torch.addcmul(soft, probabilities, factor, out=gradient_BV)
