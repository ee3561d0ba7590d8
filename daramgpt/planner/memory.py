"""Bytes of a training step by component: the arithmetic that says what fits, before anything is run.

Each component is a sum over tensors that exist; tests compare them with the tensors of a real engine and of a real
backward pass. What lives at the same time is added up: the states, what the forward pass keeps, the loss's buffers and
gradients, and the largest of the passing things (a block's backward pass, the teacher's forward pass).

What is fitted is for a CPU alone: what the libraries themselves take, the holes in glibc's heap, and what bf16 products
copy. On a GPU the figure is what torch allocates; its cache and its context are in what the plan leaves free.
"""

from __future__ import annotations

from dataclasses import dataclass

from daramgpt.planner.shapes import PRECISION_BYTES, QUANTISED, Step

# Resident memory of a process that has imported torch, transformers, DeepSpeed and bitsandbytes and trained a step of
# a tiny model: measured, torch 2.13 for the CPU.
LIBRARY_BYTES = 560_000_000
# Holes in a heap that gives nothing back to the system, and operands that products copy, as a share of what training
# allocates, by the student's dtype. The teacher's weights are not among it: they are loaded once and stay. Fitted on
# six trainings of 0.3 to 2.7 GB (`benchmarks.plan`, calibration), which had 0.09 to 0.22 in fp32 and 0.20 to 0.33 in
# bf16.
HEAP_SHARES = {"fp32": 0.19, "bf16": 0.32, "fp16": 0.32}
# In numbers a token, channel and block: both norms' inputs and outputs 4, queries, keys, values and what attention
# gives 4, input and output of the GELU 8.
BLOCK_ACTIVATIONS = 16
# Of the backward pass through a block's MLP, beyond what was kept: gradients of the GELU's output and input, of the
# MLP's output; the GELU's output is given up meanwhile.
BLOCK_BACKWARD = 5
# Of the teacher's forward pass through an MLP: its input, input and output of the GELU.
TEACHER_BLOCK = 9
# Bytes of an fp32 block of rows that the softmax arithmetic goes through at a time, on two cores and on a GPU.
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 2**20, 2**26


@dataclass(frozen=True)
class Memory:
    """Bytes by component, of the device and, where the optimizer is offloaded from a GPU, of the host."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def needed_memory(step: Step) -> Memory:
    """What a rank holds at the peak of a step."""
    device, host = _states(step)
    activations = step.tokens * _activation_bytes(step)
    hidden_bytes, teacher_bytes = 0.0, 0.0
    if step.teacher is not None:
        device["teacher weights"] = _teacher_weights(step)
        # The last block's states are the hidden states, which the loss has anyway.
        num_states = 1 + sum(number < step.teacher.n_layer for number in step.compared_blocks)
        hidden_bytes = num_states * step.tokens * step.teacher.n_embd * step.width_bytes
        teacher_bytes = _teacher_forward(step) + (num_states - 1) * hidden_bytes / num_states
    device["loss buffers"] = _loss_buffers(step)
    head_gradient = step.student.head_parameters * step.width_bytes
    hidden_gradient = step.tokens * step.student.n_embd * step.width_bytes
    # The head's gradient waits for the embedding's, for both are one parameter.
    of_loss = activations + hidden_bytes + hidden_gradient + head_gradient + _hidden_state_gradients(step)
    of_backward = (
        activations
        + step.tokens * BLOCK_BACKWARD * step.student.n_embd * step.width_bytes
        + step.student.head_parameters * step.width_bytes
        + _hidden_state_gradients(step)
        + _bucket_bytes(step)
    )
    if step.recomputes:
        of_backward += step.tokens * BLOCK_ACTIVATIONS * step.student.n_embd * step.width_bytes
    peak = max(of_loss, of_backward, teacher_bytes)
    device["activations"] = activations
    device["workspace"] = peak - activations - hidden_bytes
    if step.teacher is not None:
        device["teacher activations"] = hidden_bytes
    if step.is_by_document:
        mask = step.micro_batch_rows * step.context_tokens**2
        # The additive mask of the student and, quantised or not, the teacher, made from a boolean one.
        device["document mask"] = mask * (step.width_bytes + 1)
    if step.device == "cpu":
        for name, size in host.items():
            device[name] = device.get(name, 0) + size
        host = {}
        device["heap"] = HEAP_SHARES[step.dtype] * (sum(device.values()) - device.get("teacher weights", 0.0))
        device["libraries"] = LIBRARY_BYTES
    return Memory(*({name: round(size) for name, size in parts.items()} for parts in (device, host)))


def _states(step: Step) -> tuple[dict[str, float], dict[str, float]]:
    """What outlives a step, of the device and of the host, as DeepSpeed 0.19 holds it."""
    parameters, width, stage = step.trained_parameters, step.width_bytes, step.zero_stage
    shard = parameters / step.world_size if stage else parameters
    moments = 2 * (1 + 4 / 256) if step.optimizer_kind == "adamw-8bit" else 8
    device: dict[str, float] = {"student weights": parameters * width, "gradients": 0.0, "optimizer": 0.0}
    host: dict[str, float] = {}
    # ZeRO keeps fp32 weights of its own, for fp32 models too.
    master = 4 if stage or width < 4 else 0
    optimizer = shard * (master + moments)
    if stage == 3:
        device["student weights"] = shard * width
    is_accumulated_in_fp32 = step.ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if step.is_offloaded and stage:
        # The fp32 gradient that the optimizer reads, and 16-bit (or second fp32) weights on their way back.
        host = {"optimizer": optimizer, "gradients": shard * (4 + width)}
        if step.micro_batches > 1 and not is_accumulated_in_fp32:
            host["gradients"] += shard * width
        largest = max(step.student.head_parameters, 4 * step.student.n_embd**2)
        # A buffer of the largest parameter on either side.
        host["gradients"] += largest * width
        device["gradients"] += largest * width
    else:
        device["optimizer"] = optimizer
        device["gradients"] = shard * (4 if is_accumulated_in_fp32 else width)
        if not stage and width < 4:
            device["gradients"] += parameters * width
    return device, host


def _bucket_bytes(step: Step) -> float:
    """Gradients on their way to their owners; pages that no gradient reaches are never touched."""
    if not step.zero_stage:
        return 0.0
    zero = step.ds_config["zero_optimization"]
    numbers = min(float(zero.get("reduce_bucket_size", 5e8)), step.trained_parameters)
    # What is reduced while the next one fills; a rank that is alone has nothing to reduce.
    has_second = zero.get("overlap_comm") and step.device == "cuda" and step.world_size > 1
    return numbers * step.width_bytes * (2 if has_second else 1)


def _activation_bytes(step: Step) -> float:
    """A token's, kept from the forward pass for the backward pass: of all blocks, and of the final norm."""
    numbers = 1 if step.recomputes else BLOCK_ACTIVATIONS
    return (numbers * step.student.n_layer + 2) * step.student.n_embd * step.width_bytes


def _teacher_weights(step: Step) -> float:
    assert step.teacher is not None
    precision, teacher = step.teacher_precision, step.teacher
    width = step.width_bytes if precision in QUANTISED else PRECISION_BYTES[precision]
    blocks = teacher.block_matrices * PRECISION_BYTES[precision]
    vectors = (teacher.block_parameters - teacher.block_matrices) * width
    if precision in QUANTISED:
        # A scale a row of each matrix (9 D rows a block), or a 64th of the weights.
        blocks += teacher.block_matrices / 64 * 4 if precision == "nf4" else 9 * teacher.n_layer * teacher.n_embd * 4
        # The largest matrix of a block, dequantised.
        blocks += 4 * teacher.n_embd**2 * step.width_bytes
    return blocks + vectors + teacher.embedding_parameters * width


def _teacher_forward(step: Step) -> float:
    """At its widest, inside an MLP; the residual stream of a quantised teacher is fp32."""
    assert step.teacher is not None
    width = step.width_bytes
    if step.teacher_precision not in QUANTISED:
        width = int(PRECISION_BYTES[step.teacher_precision])
    return step.tokens * step.teacher.n_embd * (TEACHER_BLOCK * width + 4)


def _hidden_state_gradients(step: Step) -> float:
    """Of the states that are compared and of their projections, which are there when the forward pass ends."""
    states = len(step.compared_blocks) * step.tokens * step.student.n_embd * step.width_bytes
    # Low-precision gradients of weights are summed in fp32.
    return states + step.projection_parameters * (step.width_bytes + (4 if step.width_bytes < 4 else 0))


def _loss_buffers(step: Step) -> float:
    """[chunk, vocabulary] of each model, and what a block of the softmax arithmetic needs in fp32."""
    logits, width = step.chunk_tokens * step.student.vocab_size, step.width_bytes
    if step.device == "cpu":
        student, block = width * logits, min(CPU_BLOCK_BYTES, 4 * logits)
        # Low-precision logits are widened block by block.
        blocks = block * (1 if width == 4 else 3)
    else:
        # Wide logits, and their gradient where it is not in their place.
        student = (4 + (width if width < 4 else 0)) * logits
        # Probabilities of each model.
        blocks = min(GPU_BLOCK_BYTES, 4 * logits) * (1 if step.teacher is None else 2)
    teacher = (width if step.device == "cpu" else 4) * logits if step.teacher is not None else 0
    if width < 4:
        # The teacher's logits give way to a chunk's product for the head's gradient.
        teacher = max(teacher, (width if step.device == "cpu" else 4) * step.student.head_parameters)
        # Those products are summed in fp32.
        blocks += 4 * step.student.head_parameters
    return student + teacher + blocks
