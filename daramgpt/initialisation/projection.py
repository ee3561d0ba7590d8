"""A student that begins as the nearest thing to its teacher that its shape can be.

The residual stream of the teacher is projected onto its leading principal directions, those of its normed states on
calibration text and of its token embeddings together (in the spirit of SliceGPT, Ashkboos et al., arXiv 2401.15024;
a narrower stream needs no rotation kept between the blocks). Each block of the student stands for several of the
teacher's, one after the other: what it has to add to the stream is known, and its weights are fitted to that by least
squares on the student's own states so far, so that a block also mends what those before it left (`attention_fit`,
`mlp_fit`). The last norm is fitted to the teacher's logits.

Legend of shapes: R rows, T tokens a row, N = R · T, D width of the teacher, d of the student, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from daramgpt.blocks import matching_blocks
from daramgpt.initialisation.attention_fit import fit_attention
from daramgpt.initialisation.mlp_fit import fit_mlp
from daramgpt.initialisation.teacher_states import BlockStates, centred, walk
from daramgpt.text_table import duration

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

# Tokens whose states the principal directions are those of.
BASIS_TOKENS = 4096


@torch.no_grad()
def project(
    teacher: GPT2LMHeadModel,
    student: GPT2LMHeadModel,
    input_ids: torch.Tensor,
    say: Callable[[str], None],
    tick: Callable[[], None],
) -> None:
    """Replace a student's weights by those projected from the teacher.

    Args:
        teacher: fp32, in evaluation mode, as `check` wants it.
        student: fp32, on the same device, with no more positions than the teacher.
        input_ids: [R, T] of calibration text, on that device; T at most the student's positions.
        say: takes a line on each block.
        tick: called now and then, where it may raise.
    """
    frequencies = _frequencies(input_ids, teacher.config.vocab_size)
    few_rows = input_ids[:: max(1, input_ids.numel() // BASIS_TOKENS)]
    basis = _basis(teacher, student.config.n_embd, few_rows, frequencies, tick)
    old, new = teacher.transformer, student.transformer
    new.wte.weight.copy_(centred(old.wte.weight) @ basis)
    new.wpe.weight.copy_((centred(old.wpe.weight) @ basis)[: len(new.wpe.weight)])
    stream = (new.wte(input_ids) + new.wpe.weight[: input_ids.shape[1]]).flatten(0, 1)
    groups, began = _groups(len(old.h), len(new.h)), time.monotonic()
    states: list[BlockStates] = []
    for one in walk(teacher, input_ids, tick):
        states.append(one)
        group = len(new.h) - len(groups)
        if len(states) < groups[0]:
            continue
        groups.pop(0)
        stream, share = _fit_block(new.h[group], states, stream, basis, len(input_ids), tick)
        seconds_left = (time.monotonic() - began) / (group + 1) * len(groups)
        say(
            f"block {group + 1} of {len(new.h)} fitted to {len(states)} of the teacher's, of what they add {share:.0%} "
            f"are lacking; {duration(seconds_left)} left"
        )
        last, states = one.after, []
    assert not groups
    _fit_last_norm(teacher, student, last, stream, frequencies)


def _frequencies(input_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Of the tokens of the vocabulary, [V], smoothed; their sum is 1."""
    counts = torch.bincount(input_ids.flatten(), minlength=vocab_size).float() + 0.5
    return counts / counts.sum()


def _groups(num_old: int, num_new: int) -> list[int]:
    """Blocks of the teacher that each block of the student stands for, as even as they come."""
    ends = [0, *matching_blocks(num_new, num_old)]
    return [end - begin for begin, end in pairwise(ends)]


def _normed(states: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return torch.nn.functional.layer_norm(states, states.shape[-1:], eps=eps)


def _basis(
    teacher: GPT2LMHeadModel,
    width: int,
    input_ids: torch.Tensor,
    frequencies: torch.Tensor,
    tick: Callable[[], None],
) -> torch.Tensor:
    """The student's channels in the teacher's, [D, d].

    The columns span d - 1 directions and sum to zero in every row, so that a projected state has no mean over channels
    that the student's norms would take away.
    """
    embeddings = _normed(teacher.transformer.wte.weight)
    moment = (embeddings * frequencies[:, None]).T @ embeddings
    num_states = len(teacher.transformer.h) + 1
    for number, states in enumerate(walk(teacher, input_ids, tick)):
        for stream in (states.before, states.after) if number == 0 else (states.after,):
            normed = _normed(stream)
            moment += normed.T @ normed / (len(normed) * num_states)
    _, vectors = torch.linalg.eigh(moment.double())
    leading = vectors[:, -(width - 1) :].flip(1).float()
    # An orthonormal basis of what is at right angles to the vector of ones.
    ones = torch.full((width, width), 1 / width, device=leading.device, dtype=torch.float64)
    without_mean = torch.linalg.eigh(torch.eye(width, device=leading.device, dtype=torch.float64) - ones)[1][:, 1:]
    return leading @ without_mean.float().T


def _fit_block(
    block: Any,
    states: list[BlockStates],
    stream: torch.Tensor,
    basis: torch.Tensor,
    num_rows: int,
    tick: Callable[[], None],
) -> tuple[torch.Tensor, float]:
    """Fit a block of the student.

    Returns:
        The stream behind it, [N, d], and which share of the squares of what was wanted it lacks.
    """
    target = states[-1].after @ basis
    # A norm will divide each token by its size.
    sample_weights = 1 / states[-1].after.square().mean(1)
    attention = fit_attention(
        states, _normed(stream), target - stream, sample_weights, num_rows, block.attn.num_heads, tick
    )
    before = sample_weights @ (target - stream).square().sum(1)
    _load(block.attn, attention)
    stream = stream + block.attn(_normed(stream).view(num_rows, -1, stream.shape[1]))[0].flatten(0, 1)
    mlp = fit_mlp(states, _normed(stream), target - stream, sample_weights, basis, tick)
    _load(block.mlp, mlp)
    for norm in (block.ln_1, block.ln_2):
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    stream = stream + block.mlp(_normed(stream))
    left = sample_weights @ (target - stream).square().sum(1)
    return stream, float(left / before)


def _load(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    named = dict(module.named_parameters())
    assert named.keys() == weights.keys()
    for name, value in weights.items():
        named[name].copy_(value)


def _fit_last_norm(
    teacher: GPT2LMHeadModel,
    student: GPT2LMHeadModel,
    last: torch.Tensor,
    stream: torch.Tensor,
    frequencies: torch.Tensor,
) -> None:
    """Scale and shift of the student's last norm that bring its logits closest to the teacher's.

    Closest in squares over tokens of the text and, by their frequency, of the vocabulary; what all logits have in
    common is left out. The logits, N · V, are never there: their second moments are.
    """
    head, new_head = (_without_mean(model.transformer.wte.weight, frequencies) for model in (teacher, student))
    normed = _normed(stream)
    wanted = teacher.transformer.ln_f(last)
    count = len(normed)
    # Of logits by the student's channels, and by the teacher's.
    own = (new_head * frequencies[:, None]).T @ new_head
    cross = (new_head * frequencies[:, None]).T @ head
    targets = wanted @ cross.T
    mean, moment = normed.mean(0), normed.T @ normed / count
    gram = torch.cat(
        [torch.cat([own * moment, own * mean[:, None]], 1), torch.cat([(own * mean[:, None]).T, own], 1)]
    ).double()
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    right = torch.cat([(normed * targets).mean(0), targets.mean(0)]).double()
    scale, shift = torch.linalg.solve(gram, right).float().split(len(mean))
    student.transformer.ln_f.weight.copy_(scale)
    student.transformer.ln_f.bias.copy_(shift)


def _without_mean(embeddings: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    return embeddings - frequencies @ embeddings
