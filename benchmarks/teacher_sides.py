"""The sides of the teacher measurement: a teacher in one precision and compute dtype, in a process of its own.

A side first loads and runs a model of a few kilobytes in its precision, so that libraries, kernels and thread pools
are there before anything is measured. Its memory while it loads the teacher is watched from outside, for a thread
inside would wait with everything else whenever the loader holds the interpreter. It then computes hidden states batch
by batch, whenever it is asked to: the caller asks the sides in turn, so that whatever else the machine does falls on
all of them alike.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.side_process import SideProcess, set_up, synchronise
from daramgpt import teacher
from daramgpt.errors import UserError

# Memory that matters here takes longer than this to fault in.
INTERVAL_SECONDS = 0.002
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Configuration:
    """A row of the result: what its blocks are stored in, and what it computes in.

    Attributes:
        name: unique.
        precision: of `daramgpt.teacher.load`.
        compute_dtype: a key of `daramgpt.teacher.DTYPES`; of activations, embeddings and head.
        half_accumulation: of `daramgpt.teacher.load`.
    """

    name: str
    precision: str
    compute_dtype: str
    half_accumulation: bool = False


REFERENCE = "fp32"
CONFIGURATIONS = (
    Configuration(REFERENCE, "fp32", "fp32"),
    Configuration("bf16", "bf16", "bf16"),
    Configuration("fp16", "fp16", "fp16"),
    Configuration("int8", "int8", "bf16"),
    Configuration("int8-fp16", "int8", "fp16"),
    Configuration("int8-fp16-half", "int8", "fp16", half_accumulation=True),
    Configuration("int8-fp32", "int8", "fp32"),
    Configuration("llm-int8", "llm-int8", "bf16"),
    Configuration("llm-int8-fp16", "llm-int8", "fp16"),
    Configuration("llm-int8-fp32", "llm-int8", "fp32"),
    Configuration("nf4", "nf4", "bf16"),
    Configuration("nf4-fp16", "nf4", "fp16"),
    Configuration("nf4-fp32", "nf4", "fp32"),
)


def configurations(names: Sequence[str] | None) -> list[Configuration]:
    """Those of these names, in the order of `CONFIGURATIONS` and with the reference; all when None.

    Raises:
        UserError: an unknown name.
    """
    known = [configuration.name for configuration in CONFIGURATIONS]
    if unknown := sorted(set(names or ()) - set(known)):
        raise UserError(f"--rows: there is no row {unknown[0]}", f"choose from {', '.join(known)}")
    return [row for row in CONFIGURATIONS if names is None or row.name in (REFERENCE, *names)]


@dataclass(frozen=True)
class Loaded:
    """What a side measured while it loaded.

    Attributes:
        num_parameters: before quantisation.
        weight_bytes: of all parameters as they are held.
        peak_bytes: most anonymous memory of the process while it loaded, above what it held before.
        device_peak_bytes: most that torch allocated on the GPU meanwhile; None without one.
    """

    num_parameters: int
    weight_bytes: int
    peak_bytes: int
    device_peak_bytes: int | None

    @property
    def checkpoint_bytes(self) -> int:
        """Of all parameters in fp32, shared ones once."""
        return 4 * self.num_parameters


@dataclass(frozen=True)
class Output:
    """[B, T, D] hidden states of a batch in fp32, and the seconds their computation took."""

    hidden: NDArray[np.float32]
    seconds: float


@dataclass(frozen=True)
class _Refused:
    """A `UserError` on its way between processes."""

    fault: str
    mend: str


class Side:
    """A side, started.

    Args:
        configuration: of this side.
        teacher_dir: Hugging Face directory.
        tiny_dir: the same of a tiny model (`save_tiny_model`).
        log: takes what libraries print when they are imported.
    """

    def __init__(self, configuration: Configuration, teacher_dir: Path, tiny_dir: Path, log: Path) -> None:
        self.configuration = configuration
        self._process = SideProcess(configuration.name, _serve, configuration, teacher_dir, tiny_dir, log)

    def wait(self) -> None:
        """Until it is warm.

        Raises:
            UserError: this machine or this version has no such precision.
        """
        self._receive()

    def load(self) -> Loaded:
        """Load the teacher once it is warm.

        Raises:
            UserError: as `daramgpt.teacher.load` raised it.
        """
        pid = self._process.pid
        before_bytes = peak_bytes = anonymous_bytes(pid)
        self._process.send("load")
        while not self._process.has_answered(INTERVAL_SECONDS):
            peak_bytes = max(peak_bytes, anonymous_bytes(pid))
        peak_bytes = max(peak_bytes, anonymous_bytes(pid))
        num_parameters, weight_bytes, device_peak_bytes = self._receive()
        return Loaded(num_parameters, weight_bytes, peak_bytes - before_bytes, device_peak_bytes)

    def head(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """[V, D] weight and [V] bias of the head, as the side holds them, widened to fp32."""
        self._process.send("head")
        return self._receive()

    def run(self, input_ids: NDArray[np.int64]) -> Output:
        """Hidden states of a batch [B, T]."""
        self._process.send(input_ids)
        return self._receive()

    def end(self) -> None:
        """End the process."""
        self._process.kill()

    def _receive(self) -> Any:
        received = self._process.receive()
        if isinstance(received, _Refused):
            raise UserError(received.fault, received.mend)
        return received


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process, which pages of mapped files are no part of; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def require_rss_anon() -> None:
    """Refuse a system on which `anonymous_bytes` knows nothing.

    Raises:
        UserError: no ``RssAnon`` in /proc.
    """
    if not anonymous_bytes(os.getpid()):
        raise UserError("this system does not say how much anonymous memory a process holds", "run on Linux")


def save_tiny_model(folder: Path) -> None:
    """A model of a few kilobytes that every precision can load."""
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=WARM_UP_TOKENS, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def _serve(configuration: Configuration, teacher_dir: Path, tiny_dir: Path, log: Path, connection: Connection) -> None:
    device = set_up(log)
    # transformers imports torch's compiler with an architecture, and that of torch 2.7 fails to import under a device.
    importlib.import_module("torch._dynamo")
    # Imports the teacher's architecture, which would count as its memory; `load` says what is wrong with a broken one.
    with contextlib.suppress(ValueError), torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(teacher_dir))
    dtype = teacher.DTYPES[configuration.compute_dtype]
    try:
        half = configuration.half_accumulation
        tiny = teacher.load(tiny_dir, configuration.precision, dtype, device, half_accumulation=half)
        tiny.hidden_states(torch.zeros(1, WARM_UP_TOKENS, dtype=torch.int64, device=device))
        del tiny
        connection.send("warm")
        order = connection.recv()
        assert order == "load"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        loaded = teacher.load(teacher_dir, configuration.precision, dtype, device, half_accumulation=half)
    except UserError as error:
        connection.send(_Refused(error.fault, error.mend))
        return
    device_peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    connection.send((loaded.num_parameters, loaded.weight_bytes, device_peak_bytes))
    # The caller closes its end when it needs no more.
    with contextlib.suppress(EOFError):
        while True:
            asked = connection.recv()
            if isinstance(asked, str):
                assert asked == "head"
                bias = loaded.head_bias
                connection.send((_widened(loaded.head_weight), None if bias is None else _widened(bias)))
            else:
                connection.send(_timed(loaded, torch.from_numpy(asked).to(device)))


def _timed(loaded: teacher.Teacher, input_ids: torch.Tensor) -> Output:
    synchronise(input_ids.device)
    start = time.perf_counter()
    hidden = loaded.hidden_states(input_ids)
    synchronise(input_ids.device)
    return Output(seconds=time.perf_counter() - start, hidden=_widened(hidden))


def _widened(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()
