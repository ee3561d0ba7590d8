"""Seconds of a training step by component: sums of what was timed here, or arithmetic over a data sheet's rates.

On the machine at hand blocks and loss are timed (`timing`) and counted here. Of a GPU that is not at hand there are
rates alone: what is a product of matrices counts its FLOPs, what is not counts the numbers it goes through. Nothing
overlaps: on a CPU one operation follows the other, on a GPU one kernel does.
"""

from __future__ import annotations

from daramgpt.planner.rates import DISPATCH_SECONDS, Rates
from daramgpt.planner.shapes import QUANTISED, Step
from daramgpt.planner.timing import Timings

# Kernels a block: of the teacher's forward pass, of the student's forward and backward pass.
TEACHER_KERNELS, STUDENT_KERNELS = 25, 90
# Numbers a token and channel of a block that plain passes read and write. Forward: two residual sums of three each.
# Backward: the same, gathering the gradients of queries, keys and values 6, sums for the biases 9, heads put side by
# side 4.
FORWARD_PASSES, BACKWARD_PASSES = 6, 25

# Bytes that the loss of hidden states moves a number of a projected state: twelve passes in fp32, counted.
HIDDEN_STATE_BYTES = 48
# A parameter's gradient, from one pass to the optimizer's own: counted in a profile of DeepSpeed's ZeRO-2.
GRADIENT_PASSES = 5


def step_seconds(step: Step, rates: Rates | Timings) -> dict[str, float]:
    """Of an optimizer step on one rank, by component."""
    parts = _timed(step, rates) if isinstance(rates, Timings) else _by_data_sheet(step, rates)
    parts = {name: value * step.micro_batches for name, value in parts.items()}
    parts["optimizer"] = _optimizer_seconds(step, rates)
    return parts


def tokens_per_second(step: Step, rates: Rates | Timings) -> float:
    """Of all ranks together, as if they never waited for each other."""
    return step.world_size * step.tokens * step.micro_batches / sum(step_seconds(step, rates).values())


def _timed(step: Step, timings: Timings) -> dict[str, float]:
    """Of a forward and backward pass."""
    scale = step.tokens / timings.tokens
    parts = {
        "student blocks": scale * step.student.n_layer * timings.student_block_seconds,
        "student embedding": scale * timings.student_ends_seconds,
        "loss": scale * timings.loss_seconds + timings.loss_backward_seconds,
        "gradients": step.trained_parameters * timings.gradient_seconds,
    }
    if step.teacher is not None:
        parts["teacher blocks"] = scale * step.teacher.n_layer * timings.teacher_block_seconds
        parts["teacher embedding"] = scale * timings.teacher_ends_seconds
    return parts


def _by_data_sheet(step: Step, rates: Rates) -> dict[str, float]:
    """Of a forward and backward pass."""
    student, tokens = step.student, step.tokens
    width, channels = step.width_bytes, tokens * student.n_embd * student.n_layer
    # A mask of documents keeps the kernel from leaving out what a causal one would.
    dense = 2.0 if step.is_by_document else 1.0

    def attention(flops: float) -> float:
        return dense * flops * tokens / rates.attention_flops_per_second

    own_attention = attention(student.attention_flops(step.context_tokens))
    recomputed = 2 if step.recomputes else 1
    parts = {
        "student products": 2 * (2 + recomputed) * tokens * student.block_matrices / rates.product_flops_per_second,
        "head products": 2 * tokens * student.head_parameters / rates.head_flops_per_second
        + 4 * tokens * student.head_parameters / rates.head_backward_flops_per_second,
        "student attention": own_attention * (recomputed + rates.attention_backward),
        "student elementwise": (
            (2 * channels + tokens * student.n_embd) * (recomputed * rates.norm_seconds + rates.norm_backward_seconds)
            + 4 * channels * (recomputed * rates.gelu_seconds + rates.gelu_backward_seconds)
            + channels * (recomputed * FORWARD_PASSES + BACKWARD_PASSES) * width / rates.bytes_per_second
            + student.n_layer * STUDENT_KERNELS * DISPATCH_SECONDS
        ),
        "softmax": tokens
        * student.vocab_size
        * (rates.logit_seconds if step.teacher is not None else rates.logit_alone_seconds),
        "gradients": _gradient_bytes(step) / rates.bytes_per_second,
    }
    if step.teacher is not None:
        teacher = step.teacher
        own = tokens * teacher.n_embd * teacher.n_layer
        stream = 4 if step.teacher_precision in QUANTISED else width
        parts["teacher products"] = 2 * tokens * teacher.block_matrices / rates.teacher_flops_per_second
        parts["teacher head"] = 2 * tokens * teacher.head_parameters / rates.head_flops_per_second
        parts["teacher attention"] = attention(teacher.attention_flops(step.context_tokens))
        parts["teacher elementwise"] = (
            (2 * own + tokens * teacher.n_embd) * rates.norm_seconds
            + 4 * own * rates.gelu_seconds
            + own * FORWARD_PASSES * stream / rates.bytes_per_second
            + teacher.n_layer * TEACHER_KERNELS * DISPATCH_SECONDS
        )
        if step.compared_blocks:
            states = tokens * teacher.n_embd * len(step.compared_blocks)
            parts["hidden-state loss"] = (
                6 * states * student.n_embd / rates.product_flops_per_second
                + states * HIDDEN_STATE_BYTES / rates.bytes_per_second
            )
        if step.teacher_precision in QUANTISED:
            parts["teacher dequantisation"] = teacher.block_matrices * rates.dequantised_seconds
    return parts


def _gradient_bytes(step: Step) -> float:
    """What a forward and backward pass moves for gradients beside making them."""
    # Copied to a bucket, out of it, widened, and added to those of the passes before: five passes in all.
    moved = step.trained_parameters * GRADIENT_PASSES * (step.width_bytes + 4.0)
    if step.width_bytes < 4:
        # Each chunk's product is added to an fp32 sum, which is cast at the end.
        chunks = -(-step.tokens // step.chunk_tokens)
        moved += step.student.head_parameters * (chunks * (8.0 + step.width_bytes) + 4 + step.width_bytes)
    return moved


def _optimizer_seconds(step: Step, rates: Rates | Timings) -> float:
    """AdamW on this rank's share, its norm and clipping 12 bytes, and new weights for the model."""
    shard = step.trained_parameters / (step.world_size if step.zero_stage else 1)
    moved = shard * (12.0 + 4 + 2 * step.width_bytes)
    return shard * rates.optimizer_seconds + moved / rates.bytes_per_second
