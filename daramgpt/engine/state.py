"""What a checkpoint holds of an engine: master weights, both moments and the random state, as plain tensors.

Parameter by parameter and in fp32, so that it is free of ranks, ZeRO stages and the optimizer's kind. DeepSpeed hands
out what a stage has flattened and split; what no stage has touched is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import getclosurevars, isfunction
from typing import Any

import torch
from torch import nn

from daramgpt import moments


class EngineState:
    """Reads and writes the state of a DeepSpeed engine.

    Args:
        engine: that DeepSpeed has initialised.
        optimizer_kind: of the recipe.
    """

    def __init__(self, engine: Any, optimizer_kind: str) -> None:
        self._engine, self._kind = engine, optimizer_kind
        self._create()

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        """As CPU tensors; every rank calls it.

        Returns:
            ``weights``, ``exp_avg``, ``exp_avg_sq``: fp32 by parameter name; ``rng``: bytes.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        groups: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
        self._for_8_bit_moments(moments.expose)
        for name, parameter in self._engine.module.named_parameters():
            states = self._own(parameter)
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
        if self._engine.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        return {**groups, "rng": rng}

    def restore(self, tensors: dict[str, dict[str, torch.Tensor]], steps: int) -> None:
        """Put back what `gather` gave; the engine's module was built with the saved weights.

        What was not there when that was gathered keeps the state of a beginning.

        Args:
            tensors: as from `gather`.
            steps: optimizer steps taken, for Adam's bias correction.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device = self._engine.device
        for state in self._engine.basic_optimizer.state.values():
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(steps)
            else:
                state["step"] = steps
        self._for_8_bit_moments(moments.expose)
        for name, parameter in self._engine.module.named_parameters():
            if name not in tensors["weights"]:
                continue
            values = [tensors[group][name].to(device) for group in ("weights", "exp_avg", "exp_avg_sq")]
            states = self._own(parameter)
            if states is None:
                safe_set_full_fp32_param(parameter, values[0])
                safe_set_full_optimizer_state(parameter, values[1], "exp_avg")
                safe_set_full_optimizer_state(parameter, values[2], "exp_avg_sq")
            else:
                states["exp_avg"].copy_(values[1])
                states["exp_avg_sq"].copy_(values[2])
        self._for_8_bit_moments(moments.absorb)
        torch.set_rng_state(tensors["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"])

    def _own(self, parameter: nn.Parameter) -> dict[str, torch.Tensor] | None:
        """Optimizer state of a parameter that no ZeRO stage has flattened; None where one has."""
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return None
        return self._engine.basic_optimizer.state[parameter]

    def _create(self) -> None:
        """The state that AdamW makes at its first step, made before it.

        There is then a place to restore into. And ZeRO-1 and 2 look it up once, when the first of the parameter
        groups has been stepped: of the others they would find nothing, then or later.
        """
        wrapper, adam = self._engine.optimizer, self._engine.basic_optimizer
        # ZeRO-3 swaps one flat sub-group after another into the optimizer's groups.
        flats = getattr(wrapper, "fp32_partitioned_groups_flat", None)
        if flats is None:
            flats = [parameter for group in adam.param_groups for parameter in group["params"]]
        for flat in flats:
            adam.state[flat] = self._new(flat)
        self._link()

    def _new(self, flat: nn.Parameter) -> dict[str, Any]:
        adam = self._engine.basic_optimizer
        if self._kind == "adamw-8bit":
            # It reads a tensor's settings from its place in the groups, where ZeRO-3 puts it for its own step only.
            groups, adam.param_groups = adam.param_groups, [{**adam.param_groups[0], "params": [flat]}]
            adam.state[flat] = {}
            adam.init_state(adam.param_groups[0], flat, 0, 0)
            adam.param_groups = groups
            return adam.state[flat]
        return {
            # DeepSpeed's own optimizer counts in Python.
            "step": 0 if self._kind == "deepspeed-cpu-adam" else torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }

    def _link(self) -> None:
        """Have ZeRO-1 and 2 look up the optimizer's state of each parameter."""
        wrapper = self._engine.optimizer
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()

    def _for_8_bit_moments(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the state of every tensor of an optimizer that keeps its moments in 8 bits."""
        if self._kind == "adamw-8bit":
            for state in self._engine.basic_optimizer.state.values():
                change(state)
            self._link()


def forget_modules(module: nn.Module) -> None:
    """Take an engine's module, and those inside it, from where DeepSpeed's ZeRO-3 keeps modules for ever.

    By their hooks they hold the whole engine: weights, moments, gradients. One place is a list of the modules at work,
    with the outermost one of every engine, and after a forward pass that has failed more of them. The other is a cache
    of a method, whose keys are modules; it fills anew for an engine that goes on.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    stack, ours = parameter_offload.FWD_MODULE_STACK, set(module.modules())
    stack[:] = [other for other in stack if other not in ours]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    method = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for wrapped in getclosurevars(method).nonlocals.values() if isfunction(method) else ():
        if hasattr(wrapped, "cache_clear"):
            wrapped.cache_clear()
