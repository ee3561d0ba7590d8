"""DeepSpeed's part of the configuration: ZeRO, offload, precision, communication, from a JSON file.

DeepSpeed ignores a misspelt top-level key in silence, takes ``"enabled": "auto"`` as off, and would let a file
override the batch that the plan froze. So a file is checked against the keys DeepSpeed knows, and what the recipe or
the plan decides is refused by name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daramgpt.errors import UserError
from daramgpt.run_directory import read_text

DS_CONFIGS_DIR = Path(__file__).parent / "ds_configs"


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a file may set, as DeepSpeed 0.19 reads it; a test compares the lists with the installed DeepSpeed.
TOP_LEVEL_KEYS = _keys(
    """
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    fp16 bf16 data_types
    communication_data_type prescale_gradients gradient_predivide_factor disable_allgather
    comms_logger flops_profiler timers memory_breakdown dump_state disable_python_gc log_level
    """
)
SECTION_KEYS: dict[str, frozenset[str]] = {
    "zero_optimization": _keys(
        """
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size
        stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
        stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save
        stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
        ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment
        zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
        memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings
        enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
        """
    ),
    "zero_optimization.offload_param": _keys("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    "zero_optimization.offload_optimizer": _keys(
        """
        device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
        cpuadam_cores_perc
        """
    ),
    "fp16": _keys(
        """
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """
    ),
    "bf16": _keys(
        """
        enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states
        """
    ),
    "data_types": _keys("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "flops_profiler": _keys("enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"),
    "comms_logger": _keys("enabled prof_all prof_ops verbose debug"),
    "timers": _keys("throughput"),
    "timers.throughput": _keys("enabled synchronized"),
}
# What DeepSpeed reads too, but the recipe or the plan decides, and where.
OURS = {
    "train_batch_size": "set optimizer.batch_tokens in the recipe",
    "train_micro_batch_size_per_gpu": "set engine.micro_batch_rows in the recipe",
    "gradient_accumulation_steps": "the plan computes it from optimizer.batch_tokens",
    "managed_gradient_accumulation": "the plan computes the accumulation",
    "gradient_clipping": "set optimizer.clip_norm in the recipe",
    "gradient_allreduce_op": "the loss is divided by the target tokens of all ranks",
    "optimizer": "set [optimizer] in the recipe",
    "scheduler": "set [schedule] in the recipe",
    "steps_per_print": "the run's own log has every step",
    "wall_clock_breakdown": "the run's own log has the speed of every step",
    "checkpoint": "set [checkpoint] in the recipe",
    "dataloader_drop_last": "rows come from the run's shards",
    "data_efficiency": "set [curriculum] in the recipe",
    "curriculum_learning": "set [curriculum] in the recipe",
    "activation_checkpointing": "the model decides it",
    "amp": "use fp16 or bf16",
    "bfloat16": "write it as bf16",
    "torch_autocast": "use fp16 or bf16",
}
# Its other sections, for features that this trainer has no use for.
NOT_USED = _keys(
    """
    aio autotuning compile compression_training csv_monitor tensorboard wandb comet expert_parallel hybrid_engine
    pipeline quantize_training sparse_gradients tensor_parallel vocabulary_size weight_quantization
    use_data_before_expert_parallelism seq_parallel_communication_data_type sequence_parallel_size
    datastates_ckpt elasticity eigenvalue progressive_layer_drop sparse_attention graph_harvesting nebula
    """
)

_COMPILED = "DeepSpeed compiles its kernels, and nothing is compiled here"
_OWN_OPTIMIZER = "it works only with DeepSpeed's own optimizer, and checkpoints hold fp32 weights and moments"
# What DeepSpeed knows and this trainer cannot run: the values that leave it off, and why. Each was tried.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_optimization.zero_quantized_weights": ((False,), _COMPILED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _COMPILED),
    "zero_optimization.zero_quantized_gradients": ((False,), _COMPILED),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed has dropped it"),
    "zero_optimization.stage3_module_granularity_threshold": ((0,), "DeepSpeed fails on the tied head with it"),
    "zero_optimization.compute_grad_norm": ((True,), "the norm says whether a step's gradient is finite"),
    "zero_optimization.zenflow": ((None,), _OWN_OPTIMIZER),
    "zero_optimization.offload_optimizer.ratio": ((1.0,), _OWN_OPTIMIZER),
    "zero_optimization.offload_optimizer.super_offload": ((False,), _OWN_OPTIMIZER),
    "fp16.fp16_master_weights_and_grads": ((False,), _OWN_OPTIMIZER),
    "bf16.bf16_master_weights_and_grads": ((False,), _OWN_OPTIMIZER),
    "bf16.bf16_optimizer_states": ((False,), _OWN_OPTIMIZER),
}


def names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in DS_CONFIGS_DIR.glob("*.json"))


def load(name_or_path: str) -> dict[str, Any]:
    """Read and check a configuration.

    Args:
        name_or_path: one of `names`, or a path: whatever ends in ``.json`` or holds a slash.

    Raises:
        UserError: no such file, no JSON (names the line), or a key that is unknown, ours, or of a wrong value.
    """
    is_path = name_or_path.endswith(".json") or "/" in name_or_path
    try:
        path = Path(name_or_path).expanduser() if is_path else DS_CONFIGS_DIR / f"{name_or_path}.json"
        text = read_text(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(
            f"ds_config {name_or_path}: {reason}", f"use one of {', '.join(names())}, or the path of a .json file"
        ) from None
    try:
        config = json.loads(text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise UserError(
            f"ds_config {name_or_path}, line {error.lineno}: {error.msg}", "correct the JSON there (it has no comments)"
        ) from None
    except KeyError as error:
        raise UserError(f'ds_config {name_or_path}: "{error.args[0]}" is there twice', "delete one") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"ds_config {name_or_path}: {error}", "correct the JSON there") from None
    check(config, name_or_path)
    return config


def check(config: Any, where: str) -> None:
    """Refuse what DeepSpeed would ignore, misread, or take out of the recipe's hands.

    Raises:
        UserError: names `where` and the first key at fault.
    """
    if not isinstance(config, dict):
        raise UserError(f"ds_config {where}: an object is needed", 'write it as {"zero_optimization": {...}}')
    for key in config:
        if key in OURS:
            raise UserError(f'ds_config {where}: "{key}" is not set here', f"delete it; {OURS[key]}")
        if key in NOT_USED:
            raise UserError(f'ds_config {where}: "{key}" is not used by this trainer', "delete it")
        _check_known(key, TOP_LEVEL_KEYS, where, key, {*OURS, *NOT_USED})
    for section, known in SECTION_KEYS.items():
        holder, _, last = section.rpartition(".")
        around = _at(config, holder) if holder else config
        if not isinstance(around, dict) or last not in around:
            continue
        table = around[last]
        if table is None and last.startswith("offload_"):
            # As DeepSpeed's documentation writes what is off.
            continue
        if not isinstance(table, dict):
            raise UserError(f'ds_config {where}: "{section}" needs an object', f'write it as "{section}": {{...}}')
        for key in table:
            _check_known(key, known, where, f"{section}.{key}", set())
    for key, (harmless, reason) in UNSUPPORTED.items():
        value = _at(config, key)
        if value is not None and value not in harmless:
            raise UserError(f"ds_config {where}: {key} is not supported here: {reason}", "delete it")
    for key, value in _flatten(config):
        if key.endswith("enabled") and not isinstance(value, bool):
            raise UserError(
                f"ds_config {where}: {key} is {json.dumps(value)}, which DeepSpeed does not take as on",
                "write true or false",
            )
    if all(config.get(kind, {}).get("enabled") for kind in ("fp16", "bf16")):
        raise UserError(f"ds_config {where}: fp16 and bf16 are both enabled", "enable one")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"ds_config {where}: zero_optimization.stage is {json.dumps(stage)}", "write 0, 1, 2 or 3")
    if stage == 0 and dtype(config) != "fp32":
        raise UserError(
            f"ds_config {where}: {dtype(config)} without ZeRO: zero_optimization.stage is 0, where DeepSpeed keeps the "
            "fp32 weights out of reach of the checkpoints",
            "write stage 1, which on one GPU is the same arithmetic",
        )
    size = zero.get("reduce_bucket_size", 1)
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 1 <= size < 2**63:
        raise UserError(
            f"ds_config {where}: zero_optimization.reduce_bucket_size is no number of elements", "write it as 50000000"
        )
    for what in ("optimizer", "param"):
        device = (zero.get(f"offload_{what}") or {}).get("device", "none")
        if device not in ("cpu", "none"):
            raise UserError(
                f"ds_config {where}: zero_optimization.offload_{what}.device is {json.dumps(device)}"
                + (f": {_COMPILED}" if device == "nvme" else ""),
                'write "cpu" or "none"',
            )
    if stage != 0 and (config.get("prescale_gradients") or config.get("gradient_predivide_factor", 1.0) != 1.0):
        key = "prescale_gradients" if config.get("prescale_gradients") else "gradient_predivide_factor"
        raise UserError(f'ds_config {where}: "{key}" does not go with ZeRO-{stage}', "delete it")
    if offloads(config, "optimizer") and stage == 0:
        raise UserError(
            f"ds_config {where}: offload_optimizer needs ZeRO, zero_optimization.stage is 0", "write stage 1, 2 or 3"
        )
    if offloads(config, "param") and stage != 3:
        raise UserError(
            f"ds_config {where}: offload_param needs ZeRO-3, zero_optimization.stage is {stage}",
            "write stage 3, or delete it",
        )
    if offloads(config, "optimizer") and config.get("zero_force_ds_cpu_optimizer", True) is not False:
        raise UserError(
            f"ds_config {where}: with the optimizer offloaded DeepSpeed insists on its own, compiled one",
            'add "zero_force_ds_cpu_optimizer": false',
        )


def for_one_rank(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what has a use only between ranks.

    With ``overlap_comm`` ZeRO-1 and 2 wait for the GPU at the end of every backward pass, and hold a second bucket for
    gradients; one rank has no communication that this could hide. ZeRO-3 fetches parameters on a stream of its own with
    it, from the memory of the CPU too.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        return config
    return {**config, "zero_optimization": {**zero, "overlap_comm": False}}


def dtype(config: dict[str, Any]) -> str:
    """The precision a checked configuration trains in: ``"fp16"``, ``"bf16"`` or ``"fp32"``."""
    return next((kind for kind in ("fp16", "bf16") if config.get(kind, {}).get("enabled") is True), "fp32")


def offloads(config: dict[str, Any], what: str) -> bool:
    """Whether "optimizer" or "param" is kept off the device."""
    table = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return table.get("device", "none") != "none"


def _at(config: dict[str, Any], path: str) -> Any:
    """What lies at a dotted path; None where nothing does."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _check_known(key: str, known: frozenset[str], where: str, full_key: str, others: set[str]) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, sorted(known | others), n=1)
    mend = f'did you mean "{near[0]}"?' if near else f"delete it; known here: {', '.join(sorted(known))}"
    if near and near[0] in others:
        mend = "delete it"
        if near[0] in OURS:
            mend = f'delete it; "{near[0]}" is not set here: {OURS[near[0]]}'
    raise UserError(f'ds_config {where}: unknown key "{full_key}"', mend)


def _flatten(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        full_key = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _flatten(value, full_key)
        else:
            yield full_key, value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise KeyError(key)
        table[key] = value
    return table
