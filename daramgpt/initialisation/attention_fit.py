"""One attention of the student in place of those of several blocks of the teacher.

Every head of these blocks is a candidate: its queries and keys, expressed in the student's stream, are cut to the
student's head size where they keep most of the attention logits; the student's stream, averaged by these weights, is
what a head of the student can offer, in its principal directions. Heads are taken one by one, each time the one that,
together with those that are there, leaves least of what the stream has yet to become; then the values of all are
fitted together.

Legend of shapes: R rows, T tokens a row, N = R · T, D width of the teacher, d of the student, h of one of its heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from daramgpt.initialisation.least_squares import Fit, factors, fit, square_root
from daramgpt.initialisation.teacher_states import BlockStates, read_by

# So high that attention keeps to the few directions in which it does most. Fitted closely, it does what the MLP behind
# it would do better, wipes out what that one reads, and follows the few documents that it was fitted on: the stream
# behind the block ends further from the teacher's even on these.
OUTPUT_RIDGE = 10.0
# Of what a head averages, so many times its size of principal directions are looked at: all of a wide student's would
# take most of the time.
DIRECTIONS = 4
# Candidates are compared on every so many'th token of a row.
STRIDE = 4


@dataclass(frozen=True, slots=True)
class Head:
    """A candidate.

    Attributes:
        query, key: from the stream [N, d] behind its norm to [N, h].
    """

    query: Fit
    key: Fit

    def mixed(self, normed: torch.Tensor, num_rows: int, stride: int = 1) -> torch.Tensor:
        """The stream, averaged by the attention, at every so many'th token of a row: [N, d] → [R · ⌈T / stride⌉, d]."""
        stream = normed.view(num_rows, 1, -1, normed.shape[1])
        places = torch.arange(stream.shape[2], device=normed.device)
        seen = places[::stride, None] >= places
        keys = self.key(normed).view(num_rows, 1, len(places), -1)
        queries = self.query(_thinned(normed, num_rows, stride)).view(num_rows, 1, len(seen), -1)
        attend = torch.nn.functional.scaled_dot_product_attention
        # A row at a time: no fused kernel has values so much wider than keys, so that a row's weights are all there.
        parts = zip(queries.split(1), keys.split(1), stream.split(1), strict=True)
        return torch.cat([attend(*part, attn_mask=seen) for part in parts]).reshape(-1, normed.shape[1])


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a candidate brings, at some tokens.

    Attributes:
        directions: [d, ≤ 4h], the leading principal ones of the stream that it averages, first the foremost.
        outputs: [n, h], by the first of these, their means taken off.
        ridge: what is added to the second moments of `outputs`, which are diagonal.
    """

    directions: torch.Tensor
    outputs: torch.Tensor
    ridge: torch.Tensor


def fit_attention(
    states: list[BlockStates],
    normed: torch.Tensor,
    wanted: torch.Tensor,
    sample_weights: torch.Tensor,
    num_rows: int,
    num_heads: int,
    tick: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Weights of ``attn`` for a block of the student.

    Args:
        states: of the teacher's blocks that it stands for.
        normed: [N, d], the student's stream behind its first norm, whose own weights are one.
        wanted: [N, d], what is to be added to the stream.
        sample_weights: [N]
        num_rows, num_heads: R, and heads of the student.
        tick: called now and then.

    Returns:
        By transformers' names: ``c_attn.weight`` [d, 3d], ``c_proj.weight`` [d, d], and their biases.
    """
    width = normed.shape[1]
    head_size = width // num_heads
    heads: list[Head] = []
    for one in states:
        tick()
        heads += _candidates(one, normed, sample_weights, head_size)
    thin_weights = _thinned(sample_weights, num_rows, STRIDE)
    offers = []
    for head in heads:
        tick()
        offers.append(_offer(head.mixed(normed, num_rows, STRIDE), thin_weights, head_size))
    numbers = _choose(offers, _thinned(wanted, num_rows, STRIDE), thin_weights, num_heads, tick)
    chosen, outputs, directions = [heads[number] for number in numbers], [], []
    for number, head in zip(numbers, chosen, strict=True):
        tick()
        directions.append(offers[number].directions)
        outputs.append(head.mixed(normed, num_rows) @ directions[-1])
    tick()
    whole = fit(torch.cat(outputs, 1), wanted, sample_weights, OUTPUT_RIDGE)
    share = sample_weights / sample_weights.sum()
    values = []
    for number, (output, weight) in enumerate(zip(outputs, whole.weight.split(outputs[0].shape[1]), strict=True)):
        root = square_root(output - share @ output, share)
        u, singular, _ = torch.linalg.svd(root.T @ weight.double(), full_matrices=False)
        scaled = u[:, :head_size] * singular[:head_size].sqrt()
        value = torch.linalg.solve_triangular(root.T, scaled, upper=True).float()
        values.append(directions[number] @ value)
        outputs[number] = output @ value
    projection = fit(torch.cat(outputs, 1), wanted, sample_weights, OUTPUT_RIDGE)
    queries, keys = [head.query for head in chosen], [head.key for head in chosen]
    return {
        "c_attn.weight": torch.cat([*(one.weight for one in (*queries, *keys)), *values], 1),
        "c_attn.bias": torch.cat([*(one.bias for one in (*queries, *keys)), normed.new_zeros(width)]),
        "c_proj.weight": projection.weight,
        "c_proj.bias": projection.bias,
    }


def _thinned(samples: torch.Tensor, num_rows: int, stride: int) -> torch.Tensor:
    """Every so many'th token of each row: [N, ...] → [R · ⌈T / stride⌉, ...]."""
    return samples.view(num_rows, -1, *samples.shape[1:])[:, ::stride].flatten(0, 1)


def _candidates(states: BlockStates, normed: torch.Tensor, sample_weights: torch.Tensor, head_size: int) -> list[Head]:
    """The heads of one of the teacher's blocks, in the student's stream and head size."""
    attention: Any = states.block.attn
    inputs = states.block.ln_1(states.before)
    into = read_by(inputs, normed, sample_weights)
    width = inputs.shape[1]
    size = width // attention.num_heads
    found = []
    for head in range(attention.num_heads):
        sides = []
        for offset in (0, width):
            place = slice(offset + head * size, offset + (head + 1) * size)
            sides.append((attention.c_attn.weight[:, place], attention.c_attn.bias[place]))
        roots = [square_root(torch.addmm(bias, inputs, weight)) for weight, bias in sides]
        # Logits are divided by the root of the head size, which is another one here.
        scale = min(1.0, head_size / size) ** 0.25
        reduced = factors(roots[0], roots[1], min(head_size, size))
        fits = []
        for (weight, bias), small in zip(sides, reduced, strict=True):
            # A head of the student may be wider than the teacher's: the rest of it is zero.
            room = torch.nn.functional.pad(small * scale, (0, head_size - small.shape[1]))
            fits.append(Fit(into.weight @ weight @ room, (into.bias @ weight + bias) @ room))
        found.append(Head(*fits))
    return found


def _offer(mixed: torch.Tensor, sample_weights: torch.Tensor, head_size: int) -> _Offer:
    share = sample_weights / sample_weights.sum()
    deviations = mixed - share @ mixed
    moment = (deviations * share[:, None]).T @ deviations
    directions = torch.linalg.eigh(moment.double())[1].flip(1)[:, : DIRECTIONS * head_size].float()
    return _Offer(directions, deviations @ directions[:, :head_size], OUTPUT_RIDGE * moment.trace() / len(moment))


def _choose(
    offers: list[_Offer],
    wanted: torch.Tensor,
    sample_weights: torch.Tensor,
    num_heads: int,
    tick: Callable[[], None],
) -> list[int]:
    """Numbers of those that together leave least of what is wanted."""
    share = (sample_weights / sample_weights.sum())[:, None]
    left = wanted
    chosen: list[int] = []
    for _ in range(min(num_heads, len(offers))):
        tick()
        weighted = left * share
        gains = {}
        for number, offer in enumerate(offers):
            if number not in chosen:
                sizes = (offer.outputs.square() * share).sum(0) + offer.ridge
                # By how much a fit lessens the squares of what is left.
                gains[number] = float(((offer.outputs.T @ weighted).square().sum(1) / sizes).sum())
        chosen.append(max(gains, key=lambda number: gains[number]))
        together = torch.cat([offers[number].outputs for number in chosen], 1)
        left = wanted - fit(together, wanted, sample_weights, OUTPUT_RIDGE)(together)
    # A student with more heads than there are candidates has some twice.
    return [chosen[number % len(chosen)] for number in range(num_heads)]
