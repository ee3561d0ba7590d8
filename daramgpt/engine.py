"""The student under DeepSpeed: module, optimizer, resolved config, steps, and its state as plain tensors.

The teacher stays outside: the engine casts, moves and shards whatever it wraps. The optimizer is torch's fused AdamW,
given to DeepSpeed as client optimizer, because DeepSpeed's own CPU Adam compiles C++ on first use (about two minutes,
and a compiler) and is no faster. bitsandbytes' AdamW with 8-bit moments runs on a GPU and on a CPU; on a CPU it is
slow (5.3 s against 0.15 s a step for 68 M parameters on two cores). Only this module imports deepspeed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from daramgpt import moments
from daramgpt.attention import Documents
from daramgpt.ds_config import offloads
from daramgpt.errors import UserError
from daramgpt.losses import DistillationHead
from daramgpt.recipe import Loss, Optimizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from daramgpt.teacher import Teacher


class DistillationModel(nn.Module):
    """The student's body and the fused head; parameters keep their Hugging Face names.

    The head weight is a parameter of the head module too (the same one as the embedding): ZeRO-3 gathers a parameter
    for the module whose forward uses it.
    """

    def __init__(self, student: GPT2LMHeadModel, loss: Loss, chunk_tokens: int) -> None:
        super().__init__()
        self.transformer = student.transformer
        self.head = DistillationHead(
            student.lm_head.weight,
            temperature=loss.temperature,
            kd_weight=loss.kd_weight,
            ce_weight=loss.ce_weight,
            chunk_tokens=chunk_tokens,
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_weight: torch.Tensor | None = None,
        teacher_bias: torch.Tensor | None = None,
        **model_inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T] ids and labels → sums over the target tokens, in nats: loss, kd (with T²), ce.

        Args:
            model_inputs: mask and positions, as from `Documents.model_inputs`; none looks across documents.
        """
        hidden_BTD = self.transformer(input_ids, use_cache=False, **model_inputs).last_hidden_state
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.flatten(0, 1)
        return self.head(hidden_BTD.flatten(0, 1), labels.flatten(), teacher_hidden, teacher_weight, teacher_bias)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks.

    Attributes:
        kd, ce: nats a target token; kd includes T².
        grad_norm: before clipping; NaN where DeepSpeed gives none.
        applied: False where fp16 overflowed and the optimizer did not move.
    """

    kd: float
    ce: float
    grad_norm: float
    applied: bool


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

    Raises:
        UserError: DeepSpeed refuses the configuration.
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
    ) -> None:
        deepspeed = join_ranks(log)
        self.teacher, self.document_start_id = teacher, document_start_id
        self.module = DistillationModel(student, loss, chunk_tokens)
        self.clip_norm = optimizer.clip_norm
        self._optimizer_kind = optimizer.kind
        config = {
            **ds_config,
            "train_micro_batch_size_per_gpu": micro_batch_rows,
            "gradient_accumulation_steps": micro_batches,
            # DeepSpeed's default is 1.0, so 0 (off) is written too.
            "gradient_clipping": optimizer.clip_norm,
            "steps_per_print": 2**31,
        }
        if optimizer.kind == "adamw-8bit":
            # DeepSpeed lets only the optimizers of its own list under ZeRO, unless told to.
            config["zero_allow_untested_optimizer"] = True
        self.half = any(config.get(kind, {}).get("enabled") is True for kind in ("fp16",))
        client = _client_optimizer(self.module, optimizer, offloads(ds_config, "optimizer"))
        try:
            self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=client, config=config)
        except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise UserError(f"engine.ds_config: DeepSpeed refuses it: {reason}", "correct it or use another") from error
        self._create_optimizer_state()
        self.device, self.dtype = self.engine.device, next(self.module.parameters()).dtype
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_first = self.rank == 0

    def step(
        self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], num_targets: int, learning_rate: float
    ) -> StepResult:
        """One optimizer step.

        Args:
            batches: this rank's micro-batches: [b, T] ids and labels.
            num_targets: labels that are not ignored, of the whole step over all ranks.
            learning_rate: of this step.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums = torch.zeros(2, device=self.device)
        for input_ids, labels in batches:
            input_ids, labels = input_ids.to(self.device), labels.to(self.device)
            teacher, documents, model_inputs = self.teacher, None, {}
            if self.document_start_id is not None:
                documents = Documents(input_ids, self.document_start_id)
                model_inputs = documents.model_inputs(self.dtype)
            loss_sum, kd_sum, ce_sum = self.engine(
                input_ids,
                labels,
                teacher.hidden_states(input_ids, documents) if teacher else None,
                teacher.head_weight if teacher else None,
                teacher.head_bias if teacher else None,
                **model_inputs,
            )
            # DeepSpeed averages over the ranks; the accumulation is summed, so that every target weighs the same.
            self.engine.backward(loss_sum * (self.world_size / num_targets), scale_wrt_gas=False)
            self.engine.step()
            sums += torch.stack([kd_sum.detach(), ce_sum.detach()]).to(sums.dtype)
        if self.world_size > 1:
            torch.distributed.all_reduce(sums)
        kd, ce = (sums / num_targets).tolist()
        norm = self.engine.get_global_grad_norm()
        return StepResult(kd, ce, math.nan if norm is None else float(norm), bool(self.engine.was_step_applied()))

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank calls it."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        torch.distributed.all_reduce(value)
        return bool(value.item())

    def loss_scaler(self) -> dict[str, Any]:
        """State of the dynamic loss scale; empty where there is none."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if not self.half or scaler is None:
            return {}
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float, bool))}

    def loss_scale(self) -> float:
        return float(getattr(self.engine.optimizer, "cur_scale", 1.0)) if self.half else 1.0

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        """Master weights, both moments and the random state as CPU tensors; every rank calls it.

        Returns:
            ``weights``, ``exp_avg``, ``exp_avg_sq``: fp32 by parameter name; ``rng``: bytes.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        groups: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
        self._for_8_bit_moments(moments.expose)
        for name, parameter in self.module.named_parameters():
            states = self._own_state(parameter)
            if states is None:
                values = [safe_get_full_fp32_param(parameter)]
                values += [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            else:
                values = [parameter.detach(), states["exp_avg"], states["exp_avg_sq"]]
            for group, value in zip(groups.values(), values, strict=True):
                # Without a clone a CPU tensor would change under the writer.
                group[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        self._for_8_bit_moments(moments.hide)
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        return {**groups, "rng": rng}

    def restore(self, tensors: dict[str, dict[str, torch.Tensor]], steps: int, loss_scaler: dict[str, Any]) -> None:
        """Put back what `gather` and `loss_scaler` gave; the student was built with the saved weights.

        Args:
            tensors: as from `gather`.
            steps: optimizer steps taken, for Adam's bias correction.
            loss_scaler: as from `loss_scaler`.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for state in self.engine.basic_optimizer.state.values():
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(steps)
            else:
                state["step"] = steps
        self._for_8_bit_moments(moments.expose)
        for name, parameter in self.module.named_parameters():
            values = [tensors[group][name].to(self.device) for group in ("weights", "exp_avg", "exp_avg_sq")]
            states = self._own_state(parameter)
            if states is None:
                safe_set_full_fp32_param(parameter, values[0])
                safe_set_full_optimizer_state(parameter, values[1], "exp_avg")
                safe_set_full_optimizer_state(parameter, values[2], "exp_avg_sq")
            else:
                states["exp_avg"].copy_(values[1])
                states["exp_avg_sq"].copy_(values[2])
        self._for_8_bit_moments(moments.absorb)
        torch.set_rng_state(tensors["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"])
        if self.half:
            vars(self.engine.optimizer.loss_scaler).update(loss_scaler)

    def _own_state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor] | None:
        """Optimizer state of a parameter that no ZeRO stage has flattened; None where one has."""
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return None
        return self.engine.basic_optimizer.state[parameter]

    def _create_optimizer_state(self) -> None:
        """The state that AdamW makes at its first step, made before it.

        There is then a place to restore into. And ZeRO-1 and 2 look it up once, when the first of the parameter
        groups has been stepped: of the others they would find nothing, then or later.
        """
        wrapper, adam = self.engine.optimizer, self.engine.basic_optimizer
        # ZeRO-3 swaps one flat sub-group after another into the optimizer's groups.
        flats = getattr(wrapper, "fp32_partitioned_groups_flat", None)
        if flats is None:
            flats = [parameter for group in adam.param_groups for parameter in group["params"]]
        for flat in flats:
            adam.state[flat] = self._new_state(flat)
        self._link_state()

    def _new_state(self, flat: nn.Parameter) -> dict[str, Any]:
        adam = self.engine.basic_optimizer
        if self._optimizer_kind == "adamw-8bit":
            # It reads a tensor's settings from its place in the groups, where ZeRO-3 puts it for its own step only.
            groups, adam.param_groups = adam.param_groups, [{**adam.param_groups[0], "params": [flat]}]
            adam.state[flat] = {}
            adam.init_state(adam.param_groups[0], flat, 0, 0)
            adam.param_groups = groups
            return adam.state[flat]
        return {
            # DeepSpeed's own optimizer counts in Python.
            "step": 0 if self._optimizer_kind == "deepspeed-cpu-adam" else torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }

    def _link_state(self) -> None:
        """Have ZeRO-1 and 2 look up the optimizer's state of each parameter."""
        wrapper = self.engine.optimizer
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()

    def _for_8_bit_moments(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the state of every tensor of an optimizer that keeps its moments in 8 bits."""
        if self._optimizer_kind == "adamw-8bit":
            for state in self.engine.basic_optimizer.state.values():
                change(state)
            self._link_state()

    def close(self) -> None:
        """Free the engine, so that another can follow in this process."""
        self.engine.destroy()
        del self.engine


def import_deepspeed(log: Path) -> Any:
    """deepspeed, what it logs sent to `log`, and kept from compiling anything."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = _LogStream(log)
    with contextlib.redirect_stdout(stream):
        import deepspeed
        from deepspeed.utils import logger
    # Where it was imported before, its logger still writes to the console, or to the log of another run.
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(stream)
    # DeepSpeed finds out what it could compile by running the compiler, and compiles its shared-memory communication
    # on a CPU (90 s). None of its extensions is used here, so none is offered.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


def join_ranks(log: Path) -> Any:
    """deepspeed as from `import_deepspeed`, with the ranks of this training connected; alone without a launcher.

    Raises:
        UserError: the other ranks were not reached in time.
    """
    deepspeed = import_deepspeed(log)
    _single_process_environment()
    try:
        deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo", verbose=False)
    except torch.distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks of all nodes did not meet at {address}: {str(error).strip().splitlines()[0]}",
            "start every node's command within half an hour, with a --master-addr and --master-port that all reach",
        ) from error
    return deepspeed


class _LogStream(io.TextIOBase):
    """A text stream that appends to a file by its path, so that it stays usable for as long as a logger keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> int:
        with self.path.open("a", encoding="utf-8") as file:
            return file.write(text)


def _single_process_environment() -> None:
    """What a launcher would set; without it DeepSpeed asks for mpi4py."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")


def _client_optimizer(module: nn.Module, settings: Optimizer, is_offloaded: bool) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    constants: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **constants)
    if settings.kind == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **constants)
    if torch.cuda.is_available() and not is_offloaded:
        raise UserError(
            f"optimizer.kind: {settings.kind} works in the memory of the CPU, and this ds_config keeps the optimizer "
            "on the GPU",
            'use a ds_config with zero_optimization.offload_optimizer, or optimizer.kind="adamw"',
        )
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, **constants)
    except Exception as error:  # of the compiler, of ninja, or of loading what they built
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"optimizer.kind: {settings.kind} could not be built: {reason}",
            'install a C++ compiler and ninja, or use optimizer.kind="adamw"',
        ) from error
