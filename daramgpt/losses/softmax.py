"""Softmax arithmetic of the fused head: scaled logits of both models in, sums and the gradient of the logits out.

It walks over a chunk in blocks of rows: on a CPU so few that a block's operands stay in the cores' own caches, where
a pass is several times faster than through memory; on a GPU so many that a kernel fills it. Low-precision logits are
widened, and their gradient narrowed, a block at a time, so that only narrow numbers travel.

The forward KL, the default, is written for few passes; on a GPU, where each pass goes through memory, in `row_kernels`.
With s, t the scaled logits less their row maximum, q = eˢ/Σeˢ, p = eᵗ/Σeᵗ: KL = Σp(t − s) − ln Σeᵗ + ln Σeˢ, and
T² · KL has the gradient T · (q − p) by the student's logits z = T·s. The cross-entropy needs e^z = (eˢ)ᵀ, for T = 1 and
2 no further exponential of V terms.

The other divergences are in `divergences`, the same arithmetic for torch.compile in `compiled`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from daramgpt.losses import compiled, row_kernels
from daramgpt.losses.divergences import divergence_and_gradient, normal_exponential
from daramgpt.losses.objective import IGNORED_LABEL, Objective, softmax_dtype
from daramgpt.losses.rows import Rows
from daramgpt.losses.workspace import Workspace

# Elements of a block [rows, V] for each core: three operands of 4 bytes fit 2 MiB, a usual second-level cache. Half as
# many, and the start of threads shows; some more, and a pass takes twice as long.
CPU_BLOCK_ELEMENTS = 112 * 1024
# A thread of the compiled form takes whole rows, so that starting it must not show.
COMPILED_BLOCK_ELEMENTS = 3 * 2**20
# 64 MiB an operand: fills a large GPU.
GPU_BLOCK_ELEMENTS = 2**24


def softmax_arithmetic(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    objective: Objective,
    gradient_CV: Tensor | None,
    workspace: Workspace,
    is_compiled: bool = False,
) -> Tensor:
    """Sums of kd and ce over the target tokens, and the gradient of the student's logits.

    Args:
        student_CV: logits divided by T; overwritten when they are wide.
        teacher_CV: likewise, or None.
        labels_C: token ids; -100 leaves a token out.
        objective: divergence, temperature and weights.
        gradient_CV: takes the gradient by the logits as they were before their division by T; may be `student_CV`
            itself. None: not wanted.
        workspace: for the buffers of a block.
        is_compiled: by torch.compile.

    Returns:
        [2], fp64.
    """
    vocab_size, wide = student_CV.shape[1], softmax_dtype(student_CV.dtype)
    compute, block_elements = _form(student_CV.device, teacher_CV is not None, objective, is_compiled)
    block_rows = max(1, block_elements // vocab_size)
    targets = labels_C != IGNORED_LABEL
    index_C1 = labels_C.clamp(min=0).unsqueeze(1)
    label_logit = student_CV.gather(1, index_C1).to(wide)
    rows = Rows.empty(targets.to(wide), objective)
    students = student_CV.split(block_rows)
    teachers = [None] * len(students) if teacher_CV is None else teacher_CV.split(block_rows)
    gradients = [None] * len(students) if gradient_CV is None else gradient_CV.split(block_rows)
    parts = [
        compute(student, teacher, block, objective, gradient, workspace)
        for student, teacher, block, gradient in zip(students, teachers, rows.split(block_rows), gradients, strict=True)
    ]
    if gradient_CV is not None:
        # By index, not by scatter: that takes as long as all passes together on a CPU, in bf16.
        entries = (torch.arange(len(labels_C), device=labels_C.device), index_C1.squeeze(1))
        label_gradient = gradient_CV[entries] - rows.hard_factor.squeeze(1)
        gradient_CV.index_put_(entries, label_gradient.to(gradient_CV.dtype))
    temperature = objective.temperature
    ce = rows.hard_sum.log_() - temperature * (label_logit - rows.student_shift)
    # Not a product: what a row that is left out holds need not be finite.
    by_row = torch.cat([rows.divergence, ce], dim=1).masked_fill_(~targets.unsqueeze(1), 0.0)
    kd, ce = by_row.sum(dim=0, dtype=torch.float64).unbind()
    if whole_blocks := [part for part in parts if part is not None]:
        kd = kd + torch.stack(whole_blocks).sum(dtype=torch.float64)
    return torch.stack([temperature**2 * kd, ce])


def _form(
    device: torch.device, has_teacher: bool, objective: Objective, is_compiled: bool
) -> tuple[Callable[..., Tensor | None], int]:
    """What computes a block, and the logits of a block."""
    block_elements = GPU_BLOCK_ELEMENTS
    # torch 2.13's compiler fails at the formulas without a teacher, where there is least to gain.
    if is_compiled and has_teacher:
        return compiled.block, COMPILED_BLOCK_ELEMENTS if device.type == "cpu" else block_elements
    if device.type == "cpu":
        block_elements = CPU_BLOCK_ELEMENTS * torch.get_num_threads()
    is_plain = not has_teacher or objective.divergence == "forward-kl"
    return row_kernels.block if is_plain and _has_row_kernels(device) else _block, block_elements


def _has_row_kernels(device: torch.device) -> bool:
    """Whether a softmax in one kernel is faster than passes over a block: it is not where blocks stay in a cache."""
    return device.type != "cpu"


def _block(
    student_BV: Tensor,
    teacher_BV: Tensor | None,
    rows: Rows,
    objective: Objective,
    gradient_BV: Tensor | None,
    workspace: Workspace,
) -> Tensor | None:
    """As `softmax_arithmetic`, for a block of rows; a part of the divergence summed over all of them, if any."""
    student, student_max = _shifted(student_BV, "student block", workspace)
    rows.student_shift.copy_(student_max)
    exponential = workspace.take("exponential", len(student), student.shape[1], student.dtype, student.device)
    part, soft, linear = None, None, None
    if teacher_BV is None:
        torch.exp(student, out=exponential)
    else:
        teacher, _ = _shifted(teacher_BV, "teacher block", workspace)
        if objective.divergence == "forward-kl":
            part, soft, linear = _forward_kl(student, teacher, exponential, rows, objective)
            exponential = teacher
        else:
            soft = _other_divergence(student, teacher, exponential, rows, objective)
    _finish(student, exponential, soft, linear, rows, objective.temperature, gradient_BV)
    return part


def _shifted(logits_BV: Tensor, name: str, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Logits less their row maximum, in place when they are wide, else in the buffer of that name; the maximum."""
    wide = softmax_dtype(logits_BV.dtype)
    if logits_BV.dtype != wide:
        logits_BV = workspace.take(name, len(logits_BV), logits_BV.shape[1], wide, logits_BV.device).copy_(logits_BV)
    maximum = logits_BV.amax(dim=1, keepdim=True)
    return logits_BV.sub_(maximum), maximum


def _forward_kl(
    student: Tensor, teacher: Tensor, spare: Tensor, rows: Rows, objective: Objective
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σp(t − s) over all targets; −a·p and a/Σeˢ with a = kd_weight · T: that and eˢ · the last are the gradient.

    −a·p is in `spare`; `teacher` gives way to eˢ.
    """
    # A weight of zero leaves the divergence out of the gradient, not out of what is reported.
    factor = objective.kd_weight * objective.temperature or 1.0
    teacher_exponential = torch.exp(teacher, out=spare)
    teacher_sum = teacher_exponential.sum(dim=1, keepdim=True)
    soft = teacher_exponential.mul_(rows.target * -factor / teacher_sum)
    # One pass over both operands; rows that are left out are zero already.
    part = torch.dot(soft.view(-1), teacher.sub_(student).view(-1)) / -factor
    student_sum = torch.exp(student, out=teacher).sum(dim=1, keepdim=True)
    torch.sub(student_sum.log(), teacher_sum.log(), out=rows.divergence)
    if not objective.kd_weight:
        return part, None, None
    return part, soft, rows.soft_factor / student_sum


def _other_divergence(student: Tensor, teacher: Tensor, spare: Tensor, rows: Rows, objective: Objective) -> Tensor:
    """Gradient of kd_weight · T² · divergence by the logits z; eˢ goes into `spare`."""
    student_sum = normal_exponential(student, out=spare).sum(dim=1, keepdim=True)
    student_log = student - student_sum.log()
    teacher_log = torch.log_softmax(teacher, dim=1)
    divergence, gradient = divergence_and_gradient(student_log, teacher_log, objective)
    rows.divergence.copy_(divergence)
    return gradient.mul_(rows.soft_factor)


def _finish(
    student: Tensor,
    exponential: Tensor,
    soft: Tensor | None,
    linear: Tensor | None,
    rows: Rows,
    temperature: float,
    gradient_BV: Tensor | None,
) -> None:
    """Σ(eˢ)ᵀ of each row, and the whole gradient but for the labels' own share.

    Args:
        student: scaled logits less their maximum; overwritten.
        exponential: eˢ.
        soft: the gradient of the divergence, but for what `linear` gives; overwritten.
        linear: factor of eˢ in the gradient of the divergence.
        rows: of the block.
        temperature: T.
        gradient_BV: takes ce_weight · softmax(z) and the gradient of the divergence.
    """
    hard_sum = rows.hard_sum
    hard = exponential
    if temperature == 1:
        torch.sum(exponential, dim=1, keepdim=True, out=hard_sum)
    elif temperature == 2:
        # The squares need not be written down.
        torch.linalg.vector_norm(exponential, dim=1, keepdim=True, out=hard_sum).square_()
    else:
        hard = student.mul_(temperature).exp_()
        torch.sum(hard, dim=1, keepdim=True, out=hard_sum)
    if gradient_BV is None:
        return
    hard_factor = rows.hard_factor / hard_sum
    if temperature == 2:
        factor_BV = torch.mul(exponential, hard_factor, out=student)
        if linear is not None:
            factor_BV.add_(linear)
        result = factor_BV.mul_(exponential) if soft is None else soft.addcmul_(factor_BV, exponential)
    else:
        if temperature == 1:
            result = torch.mul(exponential, hard_factor if linear is None else hard_factor + linear, out=student)
        else:
            result = hard.mul_(hard_factor)
            if linear is not None:
                result.add_(exponential.mul_(linear))
        if soft is not None:
            result.add_(soft)
    if result.data_ptr() != gradient_BV.data_ptr():
        gradient_BV.copy_(result)
