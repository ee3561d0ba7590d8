"""The softmax arithmetic for torch.compile: plain formulas, from which the compiler makes loops that fuse.

Where `daramgpt.losses.softmax` and `row_kernels` go through a block once for each operation, the compiled form reads
the logits two or three times and writes their gradient once. It needs Triton or a C++ compiler, and a while for every
new objective; values agree with the other forms to rounding, not to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from daramgpt.losses.divergences import divergence_and_gradient
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
) -> None:
    """A block of `daramgpt.losses.softmax.softmax_arithmetic` with a teacher; the compiler has its own buffers."""
    assert teacher_BV is not None
    # One tensor handed over as two that share memory would be read after it is written.
    if gradient_BV is not None and gradient_BV.data_ptr() == student_BV.data_ptr():
        gradient_BV = student_BV
    for tensor in (student_BV, teacher_BV, rows.soft_factor, rows.hard_factor):
        # One kernel for blocks of any number of rows: the last one has fewer.
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    shift, hard_sum, divergence = _kernel(objective)(
        student_BV, teacher_BV, rows.soft_factor, rows.hard_factor, gradient_BV
    )
    rows.student_shift.copy_(shift)
    rows.hard_sum.copy_(hard_sum)
    rows.divergence.copy_(divergence)


@functools.cache
def _kernel(objective: Objective) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def arithmetic(
        student_BV: Tensor,
        teacher_BV: Tensor,
        soft_factor: Tensor,
        hard_factor: Tensor,
        gradient_BV: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        temperature = objective.temperature
        student, shift = _shifted(student_BV)
        exponential = student.exp()
        if temperature == 1:
            hard = exponential
        elif temperature == 2:
            hard = exponential.square()
        else:
            hard = (temperature * student).exp()
        hard_sum = hard.sum(dim=1, keepdim=True)
        divergence, soft = _divergence(student, exponential, _shifted(teacher_BV)[0], objective)
        gradient = hard * (hard_factor / hard_sum) + soft_factor * soft
        if gradient_BV is not None:
            gradient_BV.copy_(gradient)
        return shift, hard_sum, divergence

    return torch.compile(arithmetic, fullgraph=True)


def _divergence(
    student: Tensor, student_exponential: Tensor, teacher: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The divergence of each row [B, 1] and its gradient by s [B, V], of shifted logits."""
    student_sum = student_exponential.sum(dim=1, keepdim=True)
    if objective.divergence != "forward-kl":
        student_log = student - student_sum.log()
        return divergence_and_gradient(student_log, torch.log_softmax(teacher, dim=1), objective)
    teacher_exponential = teacher.exp()
    teacher_sum = teacher_exponential.sum(dim=1, keepdim=True)
    expected = (teacher_exponential * (teacher - student)).sum(dim=1, keepdim=True) / teacher_sum
    divergence = expected + student_sum.log() - teacher_sum.log()
    return divergence, student_exponential / student_sum - teacher_exponential / teacher_sum


def _shifted(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Logits less their row maximum, wide; the maximum."""
    logits = logits_BV.to(softmax_dtype(logits_BV.dtype))
    maximum = logits.amax(dim=1, keepdim=True)
    return logits - maximum, maximum
