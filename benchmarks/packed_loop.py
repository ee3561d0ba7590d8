"""A plain training loop on packed rows, with the loss left open: what stands between the reference loop and ours.

Every loss here is the mean over target tokens of T² · KL(teacher ‖ student) + 0.1 · cross-entropy, with the constants
of the reference loop; only TRL's has no cross-entropy. The rows that a loss is given are packed: no position is
padding, so none is masked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedModel

from benchmarks.reference_loop import CE_WEIGHT, TEMPERATURE
from daramgpt.engine import DistillationModel
from daramgpt.recipe import Loss
from daramgpt.teacher import Teacher

# Of all sides, so that they compute the same.
REFERENCE_LOSS = Loss(temperature=TEMPERATURE, kd_weight=1.0, ce_weight=CE_WEIGHT)
# Of the loss, in fp16: its gradients would otherwise leave the range. Fixed, for nothing here trains for long.
FP16_LOSS_SCALE = 1024.0

# Student, [B, T] ids and [B, T] labels → mean loss of a token.
LossOf = Callable[[GPT2LMHeadModel, Tensor, Tensor], Tensor]


def whole_logits(teacher: PreTrainedModel) -> LossOf:
    """The reference loop's loss as it was meant, divided by the number of tokens; logits of both models whole."""
    divergence = torch.nn.KLDivLoss(reduction="batchmean")

    def loss(student: GPT2LMHeadModel, input_ids: Tensor, labels: Tensor) -> Tensor:
        student_logits = student(input_ids).logits.flatten(0, 1)
        with torch.no_grad():
            teacher_logits = teacher(input_ids).logits.flatten(0, 1)
        kd = divergence(
            torch.log_softmax(student_logits / TEMPERATURE, dim=-1), torch.softmax(teacher_logits / TEMPERATURE, dim=-1)
        )
        return TEMPERATURE**2 * kd + CE_WEIGHT * F.cross_entropy(student_logits, labels.flatten())

    return loss


def fused(student: GPT2LMHeadModel, teacher: Teacher, chunk_tokens: int) -> LossOf:
    """This package's own head: hidden states in, logits never whole."""
    model = DistillationModel(student, REFERENCE_LOSS, chunk_tokens)

    def loss(student: GPT2LMHeadModel, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = teacher.hidden_states(input_ids)
        total, *_ = model(input_ids, labels, hidden, teacher.head_weight, teacher.head_bias)
        return total / labels.numel()

    return loss


def trl_gkd(teacher: Teacher) -> LossOf:
    """TRL's loss of generalised knowledge distillation (Agarwal et al., arXiv 2306.13649) at β = 0: forward KL.

    As in its trainer the logits of both models are whole and no cross-entropy is added.

    Raises:
        ImportError: TRL is not installed, or has no such trainer.
    """
    from trl.experimental.gkd import GKDTrainer

    def loss(student: GPT2LMHeadModel, input_ids: Tensor, labels: Tensor) -> Tensor:
        student_logits = student(input_ids).logits
        with torch.no_grad():
            teacher_logits = F.linear(teacher.hidden_states(input_ids), teacher.head_weight, teacher.head_bias)
        kd = GKDTrainer.generalized_jsd_loss(
            student_logits, teacher_logits, labels=labels, beta=0.0, temperature=TEMPERATURE
        )
        return TEMPERATURE**2 * kd

    return loss


def liger_jsd(teacher: Teacher, device: torch.device) -> LossOf:
    """Liger's fused linear JSD (Hsu et al., arXiv 2410.10989) at β = 0, forward KL, in its default chunks.

    Compiled, as it comes, on a GPU; not on a CPU, where the compiler needs one for C++.

    Raises:
        ImportError: Liger is not installed, or has no such head.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    head = LigerFusedLinearJSDLoss(
        weight_hard_loss=CE_WEIGHT,
        weight_soft_loss=TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=device.type == "cuda",
    )

    def loss(student: GPT2LMHeadModel, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = student.transformer(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        teacher_hidden = teacher.hidden_states(input_ids).flatten(0, 1)
        return head(
            hidden,
            student.lm_head.weight,
            teacher_hidden,
            teacher.head_weight,
            labels.flatten(),
            teacher_bias=teacher.head_bias,
        )

    return loss


class PackedLoop:
    """A student, its loss and AdamW, with fp32 master weights where the student is not in fp32.

    Args:
        student: in the dtype of its arithmetic, on its device.
        loss: of a batch.
    """

    def __init__(self, student: GPT2LMHeadModel, loss: LossOf) -> None:
        self.student, self._loss = student.train(), loss
        self._weights = list(student.parameters())
        dtype = self._weights[0].dtype
        self._has_masters = dtype != torch.float32
        self._loss_scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
        self._masters = self._weights
        if self._has_masters:
            self._masters = [torch.nn.Parameter(weight.detach().float()) for weight in self._weights]
        self.optimizer = torch.optim.AdamW(self._masters, lr=5e-5)

    def step(self, input_ids: Tensor, labels: Tensor) -> float:
        """One training step; the loss of a token."""
        device = self._weights[0].device
        loss = self._loss(self.student, input_ids.to(device), labels.to(device))
        (loss * self._loss_scale).backward()
        if self._has_masters:
            for master, weight in zip(self._masters, self._weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float().div_(self._loss_scale), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._has_masters:
            with torch.no_grad():
                for master, weight in zip(self._masters, self._weights, strict=True):
                    weight.copy_(master)
        return loss.item()
