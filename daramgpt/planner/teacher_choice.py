"""What the teacher is held in: memory and compute capability give the candidates, a measurement decides."""

from __future__ import annotations

from daramgpt import hardware
from daramgpt.planner.making import MEMORY_SHARE, TrainingSetup, first_step, in_passes
from daramgpt.planner.memory import needed_memory
from daramgpt.planner.shapes import PRECISION_BYTES
from daramgpt.recipe import Recipe


def choose_teacher_precision(recipe: Recipe, machine: hardware.Machine, setup: TrainingSetup) -> tuple[str, str]:
    """What ``teacher.precision = "auto"`` becomes on `machine`, and why.

    Where torch does not see the GPU, capability alone decides.

    Raises:
        UserError: no candidate works on the device.
    """
    import torch

    from daramgpt.teacher import DTYPES, choice

    assert setup.teacher is not None, "a training without a teacher has no precision to choose"
    if machine.gpus and not torch.cuda.is_available():
        by_capability = hardware.choose(machine)
        reason = by_capability.reasons["teacher_precision"]
        return by_capability.teacher_precision, f"{reason}; by capability alone, as torch sees no GPU to measure on"
    device, context_tokens = torch.device(machine.device), setup.context_tokens
    limit_bytes = MEMORY_SHARE * (machine.gpu_memory_bytes or machine.memory_bytes)
    micro_batch_tokens = max(
        context_tokens, min(recipe.optimizer.batch_tokens // setup.world_size, choice.MOST_TOKENS[device.type])
    )

    def needed_bytes(precision: str, tokens: int) -> int:
        step = first_step(recipe, setup, precision)
        return needed_memory(in_passes(step, tokens // context_tokens, recipe.engine.loss_chunk_tokens)).device_bytes

    if needed_bytes("int8", context_tokens) > limit_bytes:
        needed = needed_bytes("int8", context_tokens) / 1e9
        return "nf4", (
            f"with int8 one row needs {needed:.1f} GB, {MEMORY_SHARE:.0%} of the device's "
            f"{limit_bytes / MEMORY_SHARE / 1e9:.1f} GB may be taken; half as large, at a larger error; not measured"
        )
    candidates, left_out = [], {}
    for precision in hardware.teacher_candidates(machine, setup.dtype):
        needed = needed_bytes(precision, micro_batch_tokens) / 1e9
        # Eight bits are the least there is short of nf4; there the plan takes a smaller micro-batch.
        if PRECISION_BYTES[precision] > 1 and needed * 1e9 > limit_bytes:
            left_out[precision] = f"does not fit with {micro_batch_tokens:,} tokens ({needed:.1f} GB)"
        else:
            candidates.append(precision)
    return choice.choose(
        candidates,
        width=setup.teacher.n_embd,
        num_tokens=micro_batch_tokens,
        compute_dtype=DTYPES[setup.dtype],
        device=device,
        left_out=left_out,
    )
