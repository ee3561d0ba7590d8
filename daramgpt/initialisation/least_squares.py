"""Weighted least squares by normal equations, which take memory of the widths alone and not of the samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Fit:
    """inputs · weight + bias.

    Attributes:
        weight: [in, out], fp32.
        bias: [out], fp32.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, in] → [N, out]"""
        return torch.addmm(self.bias, inputs, self.weight)


def fit(inputs: torch.Tensor, targets: torch.Tensor, sample_weights: torch.Tensor, ridge: float) -> Fit:
    """The affine map from inputs to targets with the least weighted squared error.

    Args:
        inputs: [N, in].
        targets: [N, out].
        sample_weights: [N], not negative.
        ridge: share of the inputs' mean square that is added to each of them, against overfitting.
    """
    share = sample_weights / sample_weights.sum()
    input_mean, target_mean = share @ inputs, share @ targets
    centred = inputs - input_mean
    weighted = centred * share[:, None]
    gram = (weighted.T @ centred).double()
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, (weighted.T @ (targets - target_mean)).double()).float()
    return Fit(weight, target_mean - input_mean @ weight)


def square_root(samples: torch.Tensor, share: torch.Tensor | None = None) -> torch.Tensor:
    """Lower triangular L with L · Lᵀ = the second moment of the samples, made regular.

    Args:
        samples: [N, D].
        share: [N] weights that sum to 1; None = all alike.

    Returns:
        [D, D], fp64.
    """
    weighted = samples / len(samples) if share is None else samples * share[:, None]
    moment = (weighted.T @ samples).double()
    moment.diagonal().add_(1e-5 * moment.diagonal().mean() + 1e-12)
    return torch.linalg.cholesky(moment)


def factors(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of this rank for which left · A · Bᵀ · rightᵀ comes closest to left · rightᵀ, in squares.

    `left` and `right` are square roots of what the vectors that get A and B have as second moments, so that the closest
    is meant over those vectors (the data-aware low rank of the product of queries and keys).

    Args:
        left, right: [D, D] as from `square_root`.

    Returns:
        [D, rank] each, fp32.
    """
    u, singular, v = torch.linalg.svd(left.T @ right)
    root = singular[:rank].sqrt()
    a = torch.linalg.solve_triangular(left.T, u[:, :rank] * root, upper=True)
    b = torch.linalg.solve_triangular(right.T, v[:rank].T * root, upper=True)
    return a.float(), b.float()
