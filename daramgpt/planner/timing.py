"""How fast this machine takes a step of the models that are planned: their own modules, timed one block at a time.

The rate of a matrix product depends on its shape, its layout and on what surrounds it: on a CPU with AMX products of
one model reach half the rate of another's. So nothing is inferred from products of other sizes. What is timed is a
block of the teacher as `daramgpt.teacher` loads it, a block of the student forward and backward, and the fused loss on
the run's vocabulary, each at the tokens of the run's own micro-batch; blocks of a model are alike, so one stands for
all. What both share with every run is timed for itself: the optimizer, the way of the gradients to it, and passes over
memory.

It takes some seconds, of which the imports are two. Weights and tokens are random: the time does not depend on them.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import malloc
from daramgpt.planner.shapes import ModelShape, Step
from daramgpt.recipe import Loss, Recipe, Shape

if TYPE_CHECKING:
    import torch

# A measurement ends when it has so many repetitions and seconds, at the latest after these seconds.
FEWEST_REPETITIONS, MOST_REPETITIONS = 3, 10
FEWEST_SECONDS, MOST_SECONDS = 0.3, 1.0
# Before it: the first passes of a process take up to twice as long, in which its heap comes to rest.
WARM_UP_PASSES, WARM_UP_SECONDS = 4, 1.0
# More rows take as many times longer.
MOST_TOKENS = {"cpu": 4096, "cuda": 16384}
# Chunks of the loss, where a forward pass has more: the first begins sums, all that follow are alike.
CHUNKS = 3
# Of the teacher's embedding, from which a row is read for a token: its size does not matter.
FEW_WORDS = 64
# Of random numbers.
RANDOM_ROWS = 1024
# Parameters of the optimizer and numbers of a pass over memory: beyond a usual last-level cache.
MOST_PARAMETERS, MOST_NUMBERS = 8_000_000, 32_000_000


@dataclass(frozen=True)
class Timings:
    """Seconds of the parts of a step, as measured; see `daramgpt.planner.speed` for how they are used.

    Attributes:
        tokens: of the forward pass that was timed; seconds of models and of the loss are of so many.
        student_block_seconds, student_ends_seconds: forward and backward, of a block and of embedding and final norm.
        teacher_block_seconds, teacher_ends_seconds: forward; 0 without a teacher.
        loss_seconds: of the fused loss, both heads and gradients included, and of that of hidden states.
        loss_backward_seconds: of a forward pass, whatever its tokens: its gradients scaled and cast.
        gradient_seconds: a parameter's gradient taken over by the engine, after each backward pass.
        optimizer_seconds: a parameter of AdamW in fp32.
        bytes_per_second: of passes over large tensors.
        source: of the figures.
    """

    tokens: int
    student_block_seconds: float
    student_ends_seconds: float
    teacher_block_seconds: float
    teacher_ends_seconds: float
    loss_seconds: float
    loss_backward_seconds: float
    gradient_seconds: float
    optimizer_seconds: float
    bytes_per_second: float
    source: str


@dataclass(frozen=True)
class _Pass:
    """A forward pass that is timed.

    Attributes:
        rows, context_tokens: of its tokens.
        dtype: of the student's arithmetic.
        is_by_document: with a mask of documents.
        device, num_threads: that compute.
    """

    rows: int
    context_tokens: int
    dtype: str
    is_by_document: bool
    device: torch.device
    num_threads: int

    @property
    def tokens(self) -> int:
        return self.rows * self.context_tokens


def measure(step: Step, recipe: Recipe, device: torch.device) -> Timings:
    """Time the parts of a step on this machine, with the threads that torch is set to.

    Args:
        step: whose shapes say how many heads of attention they have.
        recipe: whose loss is computed.
        device: that trains.
    """
    import torch

    rows = min(step.micro_batch_rows, max(1, MOST_TOKENS[device.type] // step.context_tokens))
    timed = _Pass(rows, step.context_tokens, step.dtype, step.is_by_document, device, torch.get_num_threads())
    student_block, student_ends = _student_seconds(
        timed, _one_block(step.student), step.student.vocab_size, step.recomputes
    )
    teacher_block, teacher_ends = 0.0, 0.0
    if step.teacher is not None:
        half_accumulation = recipe.teacher is not None and recipe.teacher.half_accumulation
        teacher_block, teacher_ends = _teacher_seconds(
            timed, _one_block(step.teacher), step.teacher_precision, half_accumulation
        )
    # Compiled blocks are timed as they are without a compiler: they gain little, and compiling them takes long.
    loss, loss_backward = _loss_seconds(timed, step, recipe.loss, recipe.engine.compile != "none")
    gradient, optimizer, bandwidth = _parameter_seconds(timed, step.student.parameters)
    # Trials of micro-batches may follow, in processes of their own, while this one waits.
    malloc.return_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Timings(
        tokens=timed.tokens,
        student_block_seconds=student_block,
        student_ends_seconds=student_ends,
        teacher_block_seconds=teacher_block,
        teacher_ends_seconds=teacher_ends,
        loss_seconds=loss,
        loss_backward_seconds=loss_backward,
        gradient_seconds=gradient,
        optimizer_seconds=optimizer,
        bytes_per_second=bandwidth,
        source="measured here",
    )


def warm_up(run: Callable[[], Any]) -> None:
    """A few passes that are not timed; one at the least."""
    start = time.perf_counter()
    for _ in range(WARM_UP_PASSES):
        run()
        if time.perf_counter() - start > WARM_UP_SECONDS:
            return


def typical_seconds(
    device: torch.device, run: Callable[[], Any], then: Callable[[Any], object] | None = None
) -> tuple[float, float]:
    """Medians over repetitions, of `run` and of what comes `then` with its result; neither is warmed up.

    Not the fastest: a step is long enough for whatever slows a machine down now and then.
    """
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    took: list[tuple[float, float]] = []
    spent = 0.0
    while not took or (
        spent < MOST_SECONDS
        and len(took) < MOST_REPETITIONS
        and (len(took) < FEWEST_REPETITIONS or spent < FEWEST_SECONDS)
    ):
        start = now()
        result = run()
        middle = now()
        if then is not None:
            then(result)
        took.append((middle - start, now() - middle))
        spent += sum(took[-1])
    return statistics.median(first for first, _ in took), statistics.median(second for _, second in took)


def _one_block(shape: ModelShape) -> Shape:
    assert shape.n_head is not None, "a model is timed with its heads"
    return Shape(n_embd=shape.n_embd, n_head=shape.n_head, n_layer=1)


def _ids(timed: _Pass, num_words: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[B, T] random tokens, and what the models are given beside them in `dtype`."""
    import torch

    from daramgpt.attention import Documents
    from daramgpt.teacher import DTYPES

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(num_words, (timed.rows, timed.context_tokens), generator=generator).to(timed.device)
    return ids, Documents(ids, 0).model_inputs(DTYPES[timed.dtype]) if timed.is_by_document else {}


@functools.cache
def _student_seconds(timed: _Pass, shape: Shape, vocab_size: int, recomputes: bool) -> tuple[float, float]:
    """Forward and backward, of a block and of what stands before and behind them all."""
    import torch
    from torch import nn

    from daramgpt import student
    from daramgpt.teacher import DTYPES

    model = student.build(shape, vocab_size, timed.context_tokens, 0, 0)
    model.to(timed.device, DTYPES[timed.dtype])  # type: ignore[arg-type]
    if recomputes:
        student.checkpoint_activations(model)
    body, (ids, inputs) = model.transformer, _ids(timed, vocab_size)
    gradient = torch.ones(*ids.shape, shape.n_embd, dtype=DTYPES[timed.dtype], device=timed.device)

    def run() -> None:
        body(ids, use_cache=False, **inputs).last_hidden_state.backward(gradient)
        # As an engine does that has taken them.
        model.zero_grad(set_to_none=True)

    warm_up(run)
    whole, _ = typical_seconds(timed.device, run)
    body.h = nn.ModuleList()
    ends, _ = typical_seconds(timed.device, run)
    return max(whole - ends, 0.0), ends


@functools.cache
def _teacher_seconds(timed: _Pass, shape: Shape, precision: str, half_accumulation: bool) -> tuple[float, float]:
    """Forward, of a block and of what stands before and behind them all."""
    from torch import nn

    from daramgpt import student, teacher
    from daramgpt.attention import Documents

    with tempfile.TemporaryDirectory(prefix="daramgpt-timing-") as folder:
        # Through a file, because precisions are made as a checkpoint is read.
        student.save(student.build(shape, FEW_WORDS, timed.context_tokens, 0, 0), Path(folder))
        loaded = teacher.load(
            Path(folder),
            precision,
            teacher.DTYPES[timed.dtype],
            timed.device,
            half_accumulation=half_accumulation,
        )
    ids, _ = _ids(timed, FEW_WORDS)
    documents = Documents(ids, 0) if timed.is_by_document else None

    def run() -> None:
        loaded.hidden_states(ids, documents)

    warm_up(run)
    whole, _ = typical_seconds(timed.device, run)
    loaded.model.base_model.h = nn.ModuleList()
    ends, _ = typical_seconds(timed.device, run)
    return max(whole - ends, 0.0), ends


def _loss_seconds(timed: _Pass, step: Step, loss: Loss, is_compiled: bool) -> tuple[float, float]:
    """Of the tokens of a forward pass, and of the backward pass behind it."""
    import torch
    from torch import nn

    from daramgpt.engine import objective_of
    from daramgpt.losses import DistillationHead, HiddenStateLoss
    from daramgpt.teacher import DTYPES

    kind, vocab_size = DTYPES[timed.dtype], step.student.vocab_size
    num_tokens = min(CHUNKS * step.chunk_tokens, timed.tokens)

    generator = torch.Generator().manual_seed(0)

    def random(num_rows: int, width: int, dtype: torch.dtype = kind) -> torch.Tensor:
        # The same rows over and over: so many random numbers would take longer than the loss.
        few = torch.randn(min(num_rows, RANDOM_ROWS), width, generator=generator).mul_(0.02).to(timed.device, dtype)
        return few.repeat(-(-num_rows // len(few)), 1)[:num_rows]

    head = DistillationHead(
        nn.Parameter(random(vocab_size, step.student.n_embd)),
        objective=objective_of(loss),
        chunk_tokens=step.chunk_tokens,
        is_compiled=is_compiled,
    )
    hidden = random(num_tokens, step.student.n_embd).requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator).to(timed.device)
    teacher_hidden, teacher_head = None, None
    if step.teacher is not None:
        wide = DTYPES.get(step.teacher_precision, kind)
        teacher_hidden, teacher_head = (random(rows, step.teacher.n_embd, wide) for rows in (num_tokens, vocab_size))

    compared = None
    if step.teacher is not None and step.compared_blocks:
        compared = HiddenStateLoss(
            step.student.n_embd, step.teacher.n_embd, len(step.compared_blocks), 0, step.chunk_tokens
        ).to(timed.device, kind)

    def forward(most_tokens: int = num_tokens) -> torch.Tensor:
        shown = teacher_hidden if teacher_hidden is None else teacher_hidden[:most_tokens]
        loss_sum = head(hidden[:most_tokens], labels[:most_tokens], shown, teacher_head)[0]
        if compared is None or shown is None:
            return loss_sum
        states = ([side[:most_tokens]] * len(step.compared_blocks) for side in (hidden, shown))
        return loss_sum + compared(*states, labels[:most_tokens])

    def backward(result: torch.Tensor) -> None:
        result.backward()
        head.weight.grad = hidden.grad = None
        if compared is not None:
            compared.zero_grad()

    backward(forward(num_tokens if is_compiled else step.chunk_tokens))
    seconds, backward_seconds = typical_seconds(timed.device, forward, backward)
    return seconds * timed.tokens / num_tokens, backward_seconds


@functools.cache
def _parameter_seconds(timed: _Pass, num_parameters: int) -> tuple[float, float, float]:
    """Of a gradient, and of AdamW, a parameter; and bytes a second of passes over memory."""
    import torch

    from daramgpt.teacher import DTYPES

    device, num_gradients = timed.device, min(num_parameters, MOST_NUMBERS)
    gradient = torch.zeros(num_gradients, device=device, dtype=DTYPES[timed.dtype])
    bucket, wide = torch.empty_like(gradient), torch.empty_like(gradient, dtype=torch.float32)

    def take_over() -> None:
        # As DeepSpeed's ZeRO-2 does: to the bucket, its norm in fp64, a look for overflow, and to the optimizer's own.
        bucket.copy_(gradient)
        bucket.to(torch.float64).norm(2)
        bucket.amax()
        bucket.amin()
        wide.copy_(bucket)

    take_over()
    gradient_seconds, _ = typical_seconds(device, take_over)
    parameter = torch.nn.Parameter(torch.zeros(min(num_parameters, MOST_PARAMETERS), device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    optimizer_seconds, _ = typical_seconds(device, optimizer.step)
    source, target = torch.zeros(2, num_gradients, device=device).unbind()
    copy_seconds, _ = typical_seconds(device, lambda: target.copy_(source))
    return (
        gradient_seconds / num_gradients,
        optimizer_seconds / parameter.numel(),
        2 * source.nbytes / copy_seconds,
    )
