"""One MLP of the student in place of those of several blocks of the teacher.

Their neurons, read from the student's stream, are candidates. The least useful are left out in rounds, and after each
round the weights behind those that stay are fitted anew.

Legend of shapes: N tokens, d width of the student, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from daramgpt.initialisation.least_squares import Fit, Moments, moments
from daramgpt.initialisation.teacher_states import BlockStates, read_by

# Of so many times the student's neurons the best are found by fitting; of more, by their own size alone.
CANDIDATES, SHARE_KEPT = 4, 0.7
OUTPUT_RIDGE = 0.03
# Neurons are compared on every so many'th token: the moments of all candidates cost most.
STRIDE = 4


def fit_mlp(
    states: list[BlockStates],
    normed: torch.Tensor,
    wanted: torch.Tensor,
    sample_weights: torch.Tensor,
    basis: torch.Tensor,
    tick: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Weights of ``mlp`` for a block of the student, with 4 d neurons.

    Args:
        states: of the teacher's blocks that it stands for.
        normed: [N, d], the student's stream behind its second norm, whose own weights are one.
        wanted: [N, d], what is to be added to the stream.
        sample_weights: [N]
        basis: [D, d], the student's channels in the teacher's.
        tick: called now and then.

    Returns:
        By transformers' names: ``c_fc.weight`` [d, 4d], ``c_proj.weight`` [4d, d], and their biases.
    """
    num_neurons = 4 * normed.shape[1]
    weights, biases, sizes = [], [], []
    for one in states:
        tick()
        mlp: Any = one.block.mlp
        into = read_by(one.block.ln_2(one.between), normed, sample_weights)
        neurons = Fit(into.weight @ mlp.c_fc.weight, into.bias @ mlp.c_fc.weight + mlp.c_fc.bias)
        active = _active(normed[::STRIDE], neurons)
        sizes.append(active.std(0) * (mlp.c_proj.weight @ basis).norm(dim=1))
        weights.append(neurons.weight)
        biases.append(neurons.bias)
    weight, bias, size = torch.cat(weights, 1), torch.cat(biases), torch.cat(sizes)
    kept = size.argsort(descending=True)[: CANDIDATES * num_neurons]

    def active_moments(stride: int) -> Moments:
        neurons, given = Fit(weight[:, kept], bias[kept]), normed[::stride]

        def rows(place: slice) -> torch.Tensor:
            tick()
            return _active(given[place], neurons)

        return moments(rows, wanted[::stride], sample_weights[::stride])

    left = active_moments(STRIDE)
    out = left.fit(OUTPUT_RIDGE)
    while len(kept) > num_neurons:
        tick()
        size = out.weight.norm(dim=1) * left.gram.diagonal().sqrt()
        best = size.argsort(descending=True)[: max(num_neurons, int(SHARE_KEPT * len(kept)))]
        kept, left = kept[best], left.of(best)
        out = left.fit(OUTPUT_RIDGE)
    out = active_moments(1).fit(OUTPUT_RIDGE)
    # A teacher with fewer neurons than the student leaves some of the student's without an effect.
    room = num_neurons - len(kept)
    pad = torch.nn.functional.pad
    return {
        "c_fc.weight": pad(weight[:, kept], (0, room)),
        "c_fc.bias": pad(bias[kept], (0, room)),
        "c_proj.weight": pad(out.weight, (0, 0, 0, room)),
        "c_proj.bias": out.bias,
    }


def _active(normed: torch.Tensor, neurons: Fit) -> torch.Tensor:
    return torch.nn.functional.gelu(neurons(normed), approximate="tanh")
