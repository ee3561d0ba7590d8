"""What a model makes of text that no model of the run was trained on: bits per byte, and closeness to the teacher.

Bits per byte is the sum of the nats of all predicted tokens over ln 2 times the raw UTF-8 bytes of the text, so that
models with different tokenizers compare. Closeness is KL(teacher ‖ model) at temperature 1 and the share of tokens
where both think the same next token likeliest.

All models go through one batch together: the teacher, by far the dearest, runs once a batch and not once a model.
The logits [N, V] exist only a chunk of tokens at a time, and everything from the head's product on is fp32.

Legend of shapes: B rows, T tokens a row, N target tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F

from daramgpt.attention import Documents
from daramgpt.vector_math import choose_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from daramgpt.shards import Shards

IGNORED = -100
# 16 MB of fp32 logits a chunk and model: the allocator hands larger blocks back, and page faults then cost more than
# the arithmetic; smaller ones read the head's weights too often.
CHUNK_LOGITS = 2**22
# Whoever evaluates imports this first.
choose_kernels()


class Model(Protocol):
    """What is measured: tokens to hidden states, and the head that turns those into logits."""

    @property
    def head_weight(self) -> torch.Tensor: ...

    @property
    def head_bias(self) -> torch.Tensor | None: ...

    def hidden_states(self, input_ids: torch.Tensor, documents: Documents | None = None) -> torch.Tensor: ...


class HeldOutText(Protocol):
    """The part of the shards that is measured on."""

    def heldout(self, stage_name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]: ...


def measured_batches(
    shards: HeldOutText, stage: str, max_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """The batches of a stage that are measured.

    None is begun when `max_tokens` were predicted, and none is cut, so that bytes and tokens stay those of one text.
    """
    num_tokens = 0
    for batch in shards.heldout(stage):
        if num_tokens >= max_tokens:
            return
        yield batch
        num_tokens += int((batch[1] != IGNORED).sum())


def held_out_tokens(shards: Shards, max_tokens: int) -> int:
    """Tokens of all stages that `measured_batches` gives, but for what the last batches have too many."""
    return sum(min(stage.heldout_tokens, max_tokens) for stage in shards.stages)


@dataclass(frozen=True, slots=True)
class CausalModel:
    """A transformers causal language model as a `Model`."""

    model: PreTrainedModel

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]"""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> torch.Tensor | None:
        """[V], or None."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    def hidden_states(self, input_ids: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """[B, T] token ids → [B, T, D] after the last norm; `documents`, where given, are each seen alone."""
        inputs = {} if documents is None else documents.model_inputs(self.head_weight.dtype)
        return self.model.base_model(input_ids, use_cache=False, **inputs).last_hidden_state


@dataclass(frozen=True, slots=True)
class Measured:
    """What one model scored.

    Attributes:
        bits_per_byte: of every stage, None where it has no held-out text, and of all text together under ``all``.
        kl_to_teacher: nats a token at temperature 1; None without a teacher.
        top1_agreement: share of tokens; None without a teacher.
        tokens_per_second: forward pass and head, without the arithmetic of the measurement.
        text: stage → text bytes and tokens that were measured.
    """

    bits_per_byte: dict[str, float | None]
    kl_to_teacher: float | None
    top1_agreement: float | None
    tokens_per_second: float | None
    text: dict[str, dict[str, int]]


@dataclass(slots=True)
class _Sums:
    """Running sums of one model; the tensors stay on the device so that a chunk costs no synchronisation."""

    nats: dict[str, torch.Tensor] = field(default_factory=dict)
    kl: torch.Tensor | float = 0.0
    agreed: torch.Tensor | float = 0.0
    # One (seconds, tokens) a batch.
    times: list[tuple[float, int]] = field(default_factory=list)


def measure(
    model: Model,
    shards: HeldOutText,
    stages: Iterable[str],
    max_tokens: int,
    teacher: Model | None = None,
    document_start_id: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Measured:
    """`compare` for one model."""
    return compare({"model": model}, shards, stages, max_tokens, teacher, document_start_id, advance)["model"]


@torch.inference_mode()
def compare(
    models: Mapping[str, Model],
    shards: HeldOutText,
    stages: Iterable[str],
    max_tokens: int,
    teacher: Model | None = None,
    document_start_id: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Measured]:
    """Measure models side by side on the held-out text of every stage.

    Args:
        models: by name; all share the tokenizer of the shards.
        shards: gives (input_ids [B, T], labels [B, T], text bytes) a batch; label -100 is not predicted.
        stages: names, in the order of the result.
        max_tokens: of a stage, see `measured_batches`.
        teacher: what KL and agreement refer to; it may be one of `models` and is then run once.
        document_start_id: token that begins a document, where no model is to look across documents; None lets them.
        advance: called with the number of tokens of each batch that was measured.
    """
    stages = list(stages)
    runners = dict(models)
    teacher_name = next((name for name, model in models.items() if model is teacher), None)
    if teacher is not None and teacher_name is None:
        teacher_name = "\0teacher"
        runners[teacher_name] = teacher
    if teacher_name is not None:
        # The teacher's distribution must be there before the others are compared with it.
        runners = {teacher_name: runners[teacher_name], **runners}
    heads = {name: _fp32_head(model) for name, model in runners.items()}
    sums = {name: _Sums() for name in runners}
    text: dict[str, dict[str, int]] = {}
    for stage in stages:
        counted = text.setdefault(stage, {"text_bytes": 0, "tokens": 0})
        for input_ids, labels, text_bytes in measured_batches(shards, stage, max_tokens):
            num_tokens = _measure_batch(runners, heads, sums, stage, input_ids, labels, teacher_name, document_start_id)
            counted["tokens"] += num_tokens
            counted["text_bytes"] += int(text_bytes)
            if advance is not None:
                advance(num_tokens)
    return {name: _result(sums[name], text, teacher_name is not None) for name in models}


def _measure_batch(
    runners: dict[str, Model],
    heads: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
    sums: dict[str, _Sums],
    stage: str,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    teacher_name: str | None,
    document_start_id: int | None,
) -> int:
    """Add one batch to the sums; returns its number of target tokens."""
    is_target = (labels != IGNORED).flatten()
    targets_N = labels.flatten()[is_target]
    hidden_ND: dict[str, torch.Tensor] = {}
    documents: dict[torch.device, Documents] = {}
    seconds: dict[str, float] = {}
    for name, model in runners.items():
        device = heads[name][0].device
        if document_start_id is not None and device not in documents:
            documents[device] = Documents(input_ids.to(device), document_start_id)
        began = _now(device)
        hidden = model.hidden_states(input_ids.to(device), documents.get(device)).flatten(0, 1)
        hidden_ND[name] = hidden[is_target.to(device)].float()
        seconds[name] = _now(device) - began
    num_targets = targets_N.numel()
    vocab_size = next(iter(heads.values()))[0].shape[0]
    chunk_tokens = max(1, CHUNK_LOGITS // vocab_size)
    for start in range(0, num_targets, chunk_tokens):
        piece = slice(start, start + chunk_tokens)
        teacher_log_CV: torch.Tensor | None = None
        for name in runners:
            weight_VD, bias_V = heads[name]
            began = _now(weight_VD.device)
            log_CV = F.linear(hidden_ND[name][piece], weight_VD, bias_V)
            seconds[name] += _now(weight_VD.device) - began
            log_CV = F.log_softmax(log_CV, dim=-1)
            target_C1 = targets_N[piece].to(log_CV.device).unsqueeze(1)
            nats = -log_CV.gather(1, target_C1).sum(dtype=torch.float64)
            sums[name].nats[stage] = sums[name].nats.get(stage, 0.0) + nats
            if name == teacher_name:
                teacher_log_CV = log_CV
                sums[name].agreed += float(target_C1.numel())
            elif teacher_log_CV is not None:
                _compare_chunk(sums[name], log_CV, teacher_log_CV.to(log_CV.device))
    for name in runners:
        sums[name].times.append((seconds[name], num_targets))
    return num_targets


def _compare_chunk(sums: _Sums, log_CV: torch.Tensor, teacher_log_CV: torch.Tensor) -> None:
    agreed = log_CV.argmax(-1) == teacher_log_CV.argmax(-1)
    kl_C = F.kl_div(log_CV, teacher_log_CV, reduction="none", log_target=True).sum(-1)
    sums.kl += kl_C.sum(dtype=torch.float64)
    sums.agreed += agreed.sum(dtype=torch.float64)


def _fp32_head(model: Model) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = model.head_bias
    return model.head_weight.detach().float(), None if bias is None else bias.detach().float()


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _result(sums: _Sums, text: dict[str, dict[str, int]], has_teacher: bool) -> Measured:
    num_tokens = sum(stage["tokens"] for stage in text.values())
    bits = {stage: float(nats) / math.log(2) for stage, nats in sums.nats.items()}
    bits_per_byte: dict[str, float | None] = {
        stage: bits[stage] / counted["text_bytes"] if stage in bits and counted["text_bytes"] else None
        for stage, counted in text.items()
    }
    all_bytes = sum(text[stage]["text_bytes"] for stage in bits)
    bits_per_byte["all"] = sum(bits.values()) / all_bytes if all_bytes else None
    # The first batch pays for buffers and, on a GPU, for loading kernels.
    times = sums.times[1:] or sums.times
    seconds = sum(batch_seconds for batch_seconds, _ in times)
    return Measured(
        bits_per_byte=bits_per_byte,
        kl_to_teacher=float(sums.kl) / num_tokens if has_teacher and num_tokens else None,
        top1_agreement=float(sums.agreed) / num_tokens if has_teacher and num_tokens else None,
        tokens_per_second=sum(tokens for _, tokens in times) / seconds if seconds else None,
        text=text,
    )
