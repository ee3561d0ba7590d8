"""The sides of the loss measurement: one way to the loss and its gradients, in a process of its own.

All sides but those of other objectives compute the same on the same random inputs: T² · KL(teacher ‖ student) at T = 2
and a tenth of the cross-entropy, divided by the tokens, forward and backward. A side first computes a few tokens of a
small vocabulary, so that libraries and their kernels are there before memory is looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import SIDE_ENVIRONMENT, PeakMemory
from daramgpt import hardware
from daramgpt.losses import DistillationHead, HiddenStateLoss, Objective, distillation_loss_reference
from daramgpt.losses.objective import Divergence

OBJECTIVE = Objective()
STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_BLOCKS = 768, 1920, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = "products"
# What a form with whole logits holds of them at its peak, in fp32 numbers a logit; measured 10 to 14.
WHOLE_LOGITS_COPIES = 14
WHOLE_LOGITS_SIDES = ("plain", "trl-gkd")
PEERS = {"trl-gkd": "trl", "liger-jsd": "liger_kernel"}


@dataclass(frozen=True)
class Case:
    """What a side computes.

    Attributes:
        name: key of `BUILDERS`.
        dtype: key of `DTYPES`; of hidden states and weights.
        vocab_size, tokens: of the logits.
        chunk_tokens: of the fused form.
    """

    name: str
    dtype: str
    vocab_size: int
    tokens: int
    chunk_tokens: int


@dataclass(frozen=True)
class Inputs:
    """[N, D] hidden states and [V, D] weights of both models, and [N] labels; the student's take gradients."""

    student_hidden: Tensor
    student_weight: torch.nn.Parameter
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Inputs:
        """Logits of a standard deviation of about 3, as those of a language model have."""
        torch.manual_seed(0)

        def normal(rows: int, width: int, size: float) -> Tensor:
            # In place: what is freed here would hide that much of the loss's memory.
            return torch.randn(rows, width, dtype=DTYPES[case.dtype], device=device).mul_(size)

        return cls(
            normal(case.tokens, STUDENT_WIDTH, 1.0).requires_grad_(),
            torch.nn.Parameter(normal(case.vocab_size, STUDENT_WIDTH, 3 / STUDENT_WIDTH**0.5)),
            normal(case.tokens, TEACHER_WIDTH, 1.0),
            normal(case.vocab_size, TEACHER_WIDTH, 3 / TEACHER_WIDTH**0.5),
            torch.randint(case.vocab_size, (case.tokens,), device=device),
        )

    @property
    def gradient_bytes(self) -> int:
        """Of what every side leaves behind."""
        return self.student_hidden.nbytes + self.student_weight.nbytes

    def forget_gradients(self) -> None:
        """As an optimizer does after its step."""
        self.student_hidden.grad = self.student_weight.grad = None


def _plain(inputs: Inputs, case: Case) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        kd, ce = distillation_loss_reference(
            inputs.student_hidden @ inputs.student_weight.T,
            inputs.teacher_hidden @ inputs.teacher_weight.T,
            inputs.labels,
            OBJECTIVE,
        )
        return (OBJECTIVE.kd_weight * kd + OBJECTIVE.ce_weight * ce) / case.tokens

    return loss


def _fused(
    inputs: Inputs, case: Case, is_compiled: bool = False, divergence: Divergence = OBJECTIVE.divergence
) -> Callable[[], Tensor]:
    objective = replace(OBJECTIVE, divergence=divergence)
    head = DistillationHead(
        inputs.student_weight, objective=objective, chunk_tokens=case.chunk_tokens, is_compiled=is_compiled
    )
    return lambda: (
        head(inputs.student_hidden, inputs.labels, inputs.teacher_hidden, inputs.teacher_weight)[0] / case.tokens
    )


def _fused_and_hidden_states(inputs: Inputs, case: Case) -> Callable[[], Tensor]:
    """The states of all blocks are those of the last one here: their values take no time."""
    head = _fused(inputs, case)
    compared = HiddenStateLoss(STUDENT_WIDTH, TEACHER_WIDTH, STUDENT_BLOCKS, 0, case.chunk_tokens)
    compared.to(inputs.labels.device, DTYPES[case.dtype])

    def loss() -> Tensor:
        compared.zero_grad()
        states = ([side] * STUDENT_BLOCKS for side in (inputs.student_hidden, inputs.teacher_hidden))
        return head() + compared(*states, inputs.labels) / case.tokens

    return loss


def _trl_gkd(inputs: Inputs, case: Case) -> Callable[[], Tensor]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with contextlib.redirect_stdout(None):
        from trl.experimental.gkd import GKDTrainer

    def loss() -> Tensor:
        logits = inputs.student_hidden @ inputs.student_weight.T
        teacher_logits = inputs.teacher_hidden @ inputs.teacher_weight.T
        kd = GKDTrainer.generalized_jsd_loss(
            logits.unsqueeze(0),
            teacher_logits.unsqueeze(0),
            labels=inputs.labels.unsqueeze(0),
            # Its name for the forward KL.
            beta=0.0,
            temperature=OBJECTIVE.temperature,
        )
        ce = torch.nn.functional.cross_entropy(logits, inputs.labels)
        return OBJECTIVE.kd_weight * OBJECTIVE.temperature**2 * kd + OBJECTIVE.ce_weight * ce

    return loss


def _liger_jsd(inputs: Inputs, case: Case) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    peer = LigerFusedLinearJSDLoss(
        weight_hard_loss=OBJECTIVE.ce_weight,
        weight_soft_loss=OBJECTIVE.kd_weight * OBJECTIVE.temperature**2,
        # Its name for the forward KL.
        beta=0.0,
        temperature=OBJECTIVE.temperature,
        # On a CPU the compiler of torch needs one of C++.
        compiled=inputs.labels.device.type == "cuda",
    )
    return lambda: peer(
        inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
    )


def _products(inputs: Inputs, case: Case) -> Callable[[], Tensor]:
    """The floor: what a head cannot do without, each product whole, with the operands as autograd lays them out."""
    hidden, weight = inputs.student_hidden.detach(), inputs.student_weight.detach()
    logits = torch.empty(case.tokens, case.vocab_size, dtype=hidden.dtype, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> Tensor:
        torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)
        return torch.full((), float("nan"))

    return products


BUILDERS: dict[str, Callable[[Inputs, Case], Callable[[], Tensor]]] = {
    PRODUCTS: _products,
    "plain": _plain,
    "fused": _fused,
    "fused-compiled": functools.partial(_fused, is_compiled=True),
    "fused-reverse-kl": functools.partial(_fused, divergence="reverse-kl"),
    "fused-jsd": functools.partial(_fused, divergence="jsd"),
    "fused-skew-kl": functools.partial(_fused, divergence="skew-kl"),
    "fused-hidden": _fused_and_hidden_states,
    "trl-gkd": _trl_gkd,
    "liger-jsd": _liger_jsd,
}


def fault(case: Case, memory_bytes: int) -> str | None:
    """Why this machine cannot compute a case, or None."""
    package = PEERS.get(case.name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if (reason := hardware.dtype_fault(hardware.detect(), case.dtype)) is not None:
        return reason
    needed = 4 * WHOLE_LOGITS_COPIES * case.tokens * case.vocab_size
    if case.name in WHOLE_LOGITS_SIDES and needed > memory_bytes:
        return f"whole logits need about {needed / 1e9:.0f} GB, there are {memory_bytes / 1e9:.0f} GB"
    return None


class RefusedError(Exception):
    """A side that could not be built, with the reason."""


@dataclass(frozen=True)
class Finished:
    """What a side has to say at its end.

    Attributes:
        peak_bytes: most memory above that of the inputs and of the gradients it leaves behind.
        loss: in nats a token; NaN where there is none.
    """

    peak_bytes: int
    loss: float


class Side:
    """A side, started and waiting.

    Raises:
        RefusedError: it cannot be built; the reason is that of its library.
    """

    def __init__(self, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Allocator and OpenMP read their settings when the process starts. As in training, threads that have nothing
        # to do wait in a loop for a moment: only one side computes at a time.
        with _environment(SIDE_ENVIRONMENT, without="OMP_WAIT_POLICY"):
            self._process = context.Process(target=_serve, args=(case, theirs), daemon=True)
            self._process.start()
        theirs.close()
        self._receive()

    def repeat(self) -> float:
        """Seconds of one forward and backward."""
        self._connection.send("repeat")
        return self._receive()

    def finish(self) -> Finished:
        """End the process."""
        self._connection.send("finish")
        finished = self._receive()
        self._process.join()
        return finished

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RefusedError(f"ended with exit code {self._process.exitcode}") from None
        if isinstance(received, RefusedError):
            self._process.join()
            raise received
        return received


@contextlib.contextmanager
def _environment(values: dict[str, str], without: str) -> Any:
    before = dict(os.environ)
    os.environ.update(values)
    os.environ.pop(without, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(case: Case, connection: Connection) -> None:
    torch.set_num_threads(hardware.detect().num_cores)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        small = replace(case, vocab_size=512, tokens=64)
        _step(BUILDERS[case.name](Inputs.random(small, device), small), Inputs.random(small, device))
    except Exception as error:
        connection.send(RefusedError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        return
    inputs = Inputs.random(case, device)
    compute = BUILDERS[case.name](inputs, case)
    memory = PeakMemory(device)
    memory.start()
    memory.restart()
    loss = _step(compute, inputs)
    _give_back_memory(inputs)
    connection.send("ready")
    while connection.recv() == "repeat":
        # Others have computed meanwhile, and the memory has been given back: the first step faults it in.
        _step(compute, inputs)
        _synchronise(device)
        start = time.perf_counter()
        _step(compute, inputs)
        _synchronise(device)
        seconds = time.perf_counter() - start
        _give_back_memory(inputs)
        connection.send(seconds)
    connection.send(Finished(memory.read_bytes() - inputs.gradient_bytes, float(loss)))


def _step(compute: Callable[[], Tensor], inputs: Inputs) -> Tensor:
    inputs.forget_gradients()
    loss = compute()
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back_memory(inputs: Inputs) -> None:
    """To the system, which holds no two sides with whole logits; the peak that was seen stays."""
    inputs.forget_gradients()
    # Other C libraries than glibc have no such call and keep nothing either.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
