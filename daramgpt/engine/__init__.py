"""The student under DeepSpeed: module, optimizer, resolved config, steps, and its state as plain tensors.

The teacher stays outside: the engine casts, moves and shards whatever it wraps. Only this package imports deepspeed.

A step leaves the device to itself: kernels are queued without waiting, and the host reads one small tensor at the end,
with the losses, the gradient norm and what the ranks have to agree on. DeepSpeed's own waits are what its configuration
asks for: under ZeRO it looks at the gradients' norm before its optimizer moves, with an offloaded optimizer it fetches
the gradients and their norms, and with overlap_comm it waits for the GPU after every backward pass.

Before each backward pass the processes of several ranks ask each other, without their devices, whether one has run out
of memory: a rank that fails where no other waits for it takes them all out of the step, with nothing lost. Where others
may wait already, in a backward pass, in the optimizer, and where ZeRO-3 gathers parameters, they cannot be called back.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from pydantic import ValidationError

from daramgpt import ds_config as ds_configs
from daramgpt.attention import Documents
from daramgpt.blocks import block_pairs, blocks_of
from daramgpt.engine.loss_scale import LossScale, LossScaleFloorError
from daramgpt.engine.module import PROJECTIONS, DistillationModel, consecutive_positions, objective_of
from daramgpt.engine.non_finite import carried_by_gradient, guard
from daramgpt.engine.optimizer import client_optimizer
from daramgpt.engine.out_of_memory import StepOutOfMemoryError, is_out_of_memory
from daramgpt.engine.ranks import Hosts, import_deepspeed, join_ranks, leave_ranks, without_rank
from daramgpt.engine.state import EngineState, forget_modules
from daramgpt.errors import UserError
from daramgpt.recipe import Loss, Optimizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from daramgpt.teacher import Teacher

__all__ = [
    "PROJECTIONS",
    "DistillationModel",
    "Distiller",
    "LossScaleFloorError",
    "StepOutOfMemoryError",
    "StepResult",
    "client_optimizer",
    "import_deepspeed",
    "is_out_of_memory",
    "join_ranks",
    "leave_ranks",
    "objective_of",
    "without_rank",
]

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks.

    Attributes:
        kd, ce: nats a target token; kd includes T².
        hidden: 1 - cosine of hidden states, a target token; 0 where they are not compared.
        grad_norm: before clipping; infinite or NaN where `applied` is False.
        applied: False where a loss or a gradient, of any rank, was not finite: no weight, moment or step count moved.
        is_finite: False where the same rows would give the same again: in bf16 and fp32. In fp16 it was an overflow,
            which the loss scale has answered.
        flags: those that were asked for, set where any rank set them.
    """

    kd: float
    ce: float
    hidden: float
    grad_norm: float
    applied: bool
    is_finite: bool
    flags: tuple[bool, ...] = ()


class Distiller:
    """A student and its optimizer inside a DeepSpeed engine.

    Args:
        student: fp32 on the CPU; holds the checkpoint's weights when a run goes on.
        loss, optimizer: of the recipe.
        ds_config: DeepSpeed's own part of the configuration (`daramgpt.ds_config.load`).
        micro_batch_rows: rows a forward pass on this rank.
        micro_batches: forward passes a step on this rank.
        chunk_tokens: tokens the loss takes at a time.
        teacher: None trains by plain cross-entropy.
        log: file that takes what DeepSpeed prints.
        document_start_id: token that begins a document, where no model is to look across documents; None lets them.
        loss_is_compiled: its softmax arithmetic by torch.compile.
        seed: of what is trained along with the student, where `weights` does not hold it.
        weights: as from `gather`; of them, those that are trained along are taken.

    Attributes:
        is_intact: False from the moment the optimizer begins to move until the step's result is there: what a fault
            leaves in between is no state to go on from, or one of a step that nobody has counted.

    Raises:
        UserError: DeepSpeed refuses the configuration, or the loss compares blocks that are not there.
    """

    def __init__(
        self,
        student: GPT2LMHeadModel,
        loss: Loss,
        optimizer: Optimizer,
        ds_config: dict[str, Any],
        micro_batch_rows: int,
        micro_batches: int,
        chunk_tokens: int,
        teacher: Teacher | None,
        log: Path,
        document_start_id: int | None = None,
        loss_is_compiled: bool = False,
        seed: int = 0,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        deepspeed = join_ranks(log)
        self.teacher, self.document_start_id = teacher, document_start_id
        pairs: list[tuple[int, int]] = []
        if teacher is not None and loss.hidden_weight:
            pairs = block_pairs(loss.hidden_blocks, len(blocks_of(student)), len(blocks_of(teacher.model)))
        self._teacher_blocks = [other for _, other in pairs]
        width = 0 if teacher is None else teacher.head_weight.shape[1]
        self.module = DistillationModel(
            student, loss, chunk_tokens, loss_is_compiled, width, [own for own, _ in pairs], seed
        )
        self.module.take_along(weights or {})
        self.is_intact = True
        self._micro_batches, self._is_in_head = micro_batches, False
        self._gathers = ds_config.get("zero_optimization", {}).get("stage") == 3
        config = {
            # DeepSpeed's timer waits for the GPU before and after every forward pass.
            "timers": {"throughput": {"enabled": False}},
            **ds_config,
            "train_micro_batch_size_per_gpu": micro_batch_rows,
            "gradient_accumulation_steps": micro_batches,
            # DeepSpeed's default is 1.0, so 0 (off) is written too.
            "gradient_clipping": optimizer.clip_norm,
            "steps_per_print": 2**31,
        }
        if int(os.environ["WORLD_SIZE"]) == 1:
            config = ds_configs.for_one_rank(config)
        if optimizer.kind == "adamw-8bit":
            # DeepSpeed lets only the optimizers of its own list under ZeRO, unless told to.
            config["zero_allow_untested_optimizer"] = True
        self.half = config.get("fp16", {}).get("enabled") is True
        client = client_optimizer(self.module, optimizer, ds_configs.offloads(ds_config, "optimizer"))
        try:
            self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=client, config=config)
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise UserError(f"engine.ds_config: DeepSpeed refuses it: {reason}", "correct it or use another") from error
        guard(client, self._grad_norm)
        self._own_norm: torch.Tensor | None = None
        self._loss_scale = LossScale(self.engine.optimizer.loss_scaler) if self.half else None
        self._state = EngineState(self.engine, optimizer.kind)
        self.device, self.dtype = self.engine.device, next(self.module.parameters()).dtype
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_first = self.rank == 0
        self._hosts = Hosts(self.world_size)
        # After DeepSpeed's own: by then it has asked the other ranks for all that a forward pass needs of them.
        self.module.head.register_forward_pre_hook(self._enter_head)

    def step(
        self,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        num_targets: int,
        learning_rate: float,
        flags: Callable[[], Sequence[bool]] = tuple,
    ) -> StepResult:
        """One optimizer step.

        Args:
            batches: this rank's micro-batches, as many as the engine was made for: [b, T] ids and labels; on any
                device, moved to the engine's.
            num_targets: labels that are not ignored, of the whole step over all ranks.
            learning_rate: of this step.
            flags: called when all of the step is queued; its answers are put together over the ranks. As many on
                every rank.

        Raises:
            StepOutOfMemoryError: a forward pass ran out of memory, and nothing has moved.
            LossScaleFloorError: fp16 overflowed with the loss scale at its floor, and nothing has moved.
            RuntimeError: of the allocator, in a backward pass or the optimizer; other ranks may wait for this one.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums = torch.zeros(3, device=self.device)
        floor_error = None if self._loss_scale is None else self._loss_scale.floor_error()
        rows = iter(batches)
        for micro in range(1, self._micro_batches + 1):
            loss_sum, *parts = self._losses(rows)
            # DeepSpeed averages over the ranks; the accumulation is summed, so that every target weighs the same.
            mean_loss = carried_by_gradient(loss_sum, self.world_size / num_targets)
            self.engine.backward(mean_loss, scale_wrt_gas=False)
            sums += torch.stack([part.detach() for part in parts]).float()
            if micro == self._micro_batches:
                self._own_norm = self._total_grad_norm()
                self.is_intact = False
            self.engine.step()
        result = self._result(sums, num_targets, flags())
        self.is_intact = True
        if floor_error is not None and not result.applied:
            raise floor_error
        return result

    def _losses(self, rows: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """Sums over the targets of the next micro-batch, of loss, kd, ce and hidden; on every rank, or on none.

        The peak of memory is in here: the fused loss has its gradients when the forward pass ends. And of the backward
        pass, in which ranks wait for each other, nothing has begun.
        """
        self._is_in_head = False
        if not self._gathers:
            return self._on_all_ranks(lambda: self._forward(*self._inputs(rows)))
        # ZeRO-3 gathers parameters all along the student's forward pass, up to the head.
        inputs = self._on_all_ranks(lambda: self._inputs(rows))
        return self._on_all_ranks(lambda: self._forward(*inputs), lambda: self._is_in_head)

    def _on_all_ranks(self, work: Callable[[], _Found], is_alone: Callable[[], bool] = lambda: True) -> _Found:
        """What `work` gives, once every rank has it.

        Args:
            work: part of a step.
            is_alone: whether, when it has failed, no other rank is waiting for this one.

        Raises:
            StepOutOfMemoryError: a rank ran out of memory.
        """
        fault, found = None, None
        try:
            with consecutive_positions():
                found = work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fault = str(error).splitlines()[0]
        # Not in the handler: what is raised there would hold the allocator's error, and so the tensors of the pass.
        if fault is not None and self.world_size > 1 and not is_alone():
            raise StepOutOfMemoryError(fault, is_shared=False)
        if self._hosts.any(fault is not None):
            raise StepOutOfMemoryError(fault or "on another rank", is_shared=True)
        return cast(_Found, found)

    def _enter_head(self, *_: Any) -> None:
        self._is_in_head = True

    def _forward(self, arguments: tuple[Any, ...], model_inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        sums: tuple[torch.Tensor, ...] = self.engine(*arguments, **model_inputs)
        return sums

    @torch.no_grad()
    def cross_entropy(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of the nats of the targets of [b, T] rows, by the student as it stands; every rank has the same rows.

        Nothing moves by it, and the next step is what it would have been.

        Raises:
            StepOutOfMemoryError: it did not fit.
        """

        def forward() -> torch.Tensor:
            ids = input_ids.to(self.device)
            _, model_inputs = self._documents(ids)
            _, _, ce_sum, _ = self._forward((ids, labels.to(self.device)), model_inputs)
            return ce_sum

        # ZeRO-3 remembers the order in which parameters are asked for, of training and evaluation each.
        self.engine.eval()
        try:
            return self._on_all_ranks(forward, lambda: not self._gathers)
        finally:
            self.engine.train()

    def _documents(self, input_ids: torch.Tensor) -> tuple[Documents | None, dict[str, torch.Tensor]]:
        """Where documents begin in rows, and what the student is told of it; nothing where it may look across them."""
        if self.document_start_id is None:
            return None, {}
        documents = Documents(input_ids, self.document_start_id)
        return documents, documents.model_inputs(self.dtype)

    def _inputs(
        self, rows: Iterator[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
        """Arguments of `DistillationModel.forward` for the next micro-batch."""
        input_ids, labels = (tensor.to(self.device) for tensor in next(rows))
        teacher = self.teacher
        documents, model_inputs = self._documents(input_ids)
        if teacher is None:
            return (input_ids, labels), model_inputs
        hidden, states = teacher.states(input_ids, self._teacher_blocks, documents)
        return (input_ids, labels, hidden, teacher.head_weight, teacher.head_bias, states), model_inputs

    def _grad_norm(self) -> torch.Tensor | float:
        """Norm of the gradients of all ranks, from before the optimizer moves on."""
        if self._own_norm is not None:
            return self._own_norm
        norm: torch.Tensor | float = self.engine.optimizer._global_grad_norm
        return norm

    def _total_grad_norm(self) -> torch.Tensor | None:
        """Norm of the gradients before the step, where no ZeRO stage computes it: then clipping changes them first."""
        if hasattr(self.engine.optimizer, "_global_grad_norm"):
            return None
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _result(self, sums: torch.Tensor, num_targets: int, flags: Sequence[bool]) -> StepResult:
        values = torch.zeros(4 + len(flags), device=self.device)
        values[:3] = sums
        for place, flag in enumerate(flags, 4):
            # A number is an argument of a kernel; a tensor made from it would be a transfer that waits.
            values[place] = float(flag)
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        values[3] = self._grad_norm()
        kd_sum, ce_sum, hidden_sum, grad_norm, *flagged = values.tolist()
        # DeepSpeed counts a step as applied in which `guard` kept its optimizer from moving.
        is_applied = bool(self.engine.was_step_applied()) and math.isfinite(grad_norm)
        return StepResult(
            kd_sum / num_targets,
            ce_sum / num_targets,
            hidden_sum / num_targets,
            grad_norm,
            is_applied,
            is_applied or self.half,
            tuple(number > 0 for number in flagged),
        )

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank calls it, outside of steps."""
        return self._hosts.any(flag)

    def largest(self, number: int) -> int:
        """Largest of the ranks' numbers; every rank calls it, outside of steps."""
        return self._hosts.largest(number)

    def is_same_on_all_ranks(self, number: int) -> bool:
        """Whether all ranks give the same number; every rank calls it, outside of steps."""
        return self._hosts.have_same(number)

    def loss_scaler(self) -> dict[str, Any]:
        """State of the dynamic loss scale; empty where there is none."""
        return {} if self._loss_scale is None else self._loss_scale.state()

    def loss_scale(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale.value

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        """Master weights, both moments and the random state as CPU tensors; every rank calls it.

        Returns:
            ``weights``, ``exp_avg``, ``exp_avg_sq``: fp32 by parameter name; ``rng``: bytes.
        """
        return self._state.gather()

    def restore(self, tensors: dict[str, dict[str, torch.Tensor]], steps: int, loss_scaler: dict[str, Any]) -> None:
        """Put back what `gather` and `loss_scaler` gave; the student and what is trained along have the saved weights.

        Args:
            tensors: as from `gather`.
            steps: optimizer steps taken, for Adam's bias correction.
            loss_scaler: as from `loss_scaler`.
        """
        self._state.restore(tensors, steps)
        if self._loss_scale is not None:
            self._loss_scale.restore(loss_scaler)

    def close(self) -> None:
        """Free the engine and the student, so that others can follow in this process."""
        self.engine.destroy()
        self._hosts.close()
        forget_modules(self.module)
        del self.engine, self._state, self.module
        # What an engine holds refers to itself in circles: without this it would be there when the next one is built.
        gc.collect()
