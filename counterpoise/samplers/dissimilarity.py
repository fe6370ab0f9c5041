"""Dissimilarities formed in tiles and thrown away: what facility location sums over, without an N x N matrix.

Facility location is written for similarities S >= 0. Here stand C = constant - S, since distances are at hand as they
are; ``ceiling`` is the C at which S = 0, None for the largest entry (S = max(D) - D).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

Rows = Tensor | slice


class Dissimilarity(Protocol):
    """What facility location reads."""

    ceiling: float | None
    symmetric: bool
    device: torch.device
    rounding: float

    def __len__(self) -> int: ...

    def raw(self, rows: Rows, columns: Rows) -> Tensor:
        """(rows, columns) float64, which the caller may write over: squares of the costs, 0 up to ``rounding``.

        Where ``rounding`` is below 0, the costs themselves.
        """
        ...


def tile(costs: Dissimilarity, rows: Rows, columns: Rows) -> Tensor:
    """(rows, columns) costs in float64, which the caller may write over."""
    raw = costs.raw(rows, columns)
    return raw if costs.rounding < 0 else torch.threshold_(raw, costs.rounding, 0.0).sqrt_()


class Distance:
    """||x_i - x_j||: what lies below rounding is exactly 0. Keeps a float64 copy of the features, O(N D).

    Features are centred, since products then lose fewer digits, and stand beside 1 and x.x, so that one product
    (-2 x, x.x, 1) (y, 1, y.y)^T is the squared distance.
    """

    ceiling: float | None = None
    symmetric = True

    def __init__(self, features: Tensor) -> None:
        n, d = features.shape
        self.device = features.device
        self.right = torch.ones(n, d + 2, dtype=torch.float64, device=features.device)
        self.right[:, :d] = features
        self.right[:, :d] -= self.right[:, :d].mean(0)
        self.right[:, d + 1] = torch.linalg.vector_norm(self.right[:, :d], dim=1).square_()
        self.rounding = 1e-14 * float(self.right[:, d + 1].max())

    def __len__(self) -> int:
        return len(self.right)

    def raw(self, rows: Rows, columns: Rows) -> Tensor:
        """(rows, columns) squares in float64."""
        right = self.right[rows]
        left = torch.cat([right[:, :-2] * -2, right[:, -1:], right[:, -2:-1]], 1)
        return left @ self.right[columns].T


class Cosine:
    """(1 - cos(x_i, x_j)) / 2, in [0, 1]; a row of zeros has cosine 0 with all."""

    ceiling: float | None = 1.0
    symmetric = True
    rounding = -1.0

    def __init__(self, features: Tensor) -> None:
        self.device = features.device
        self.unit = normalize(features.double(), dim=1)

    def __len__(self) -> int:
        return len(self.unit)

    def raw(self, rows: Rows, columns: Rows) -> Tensor:
        """(rows, columns) float64."""
        return (self.unit[rows] @ self.unit[columns].T).mul_(-0.5).add_(0.5).clamp_(0, 1)


class GradientDistance:
    """||G_i - G_j|| of last-layer gradients G_i = e_i (h_i, 1), whose inner products factor.

    <G_i, G_j> = <e_i, e_j> (1 + <h_i, h_j>), so that the K (D + 1) numbers of a gradient are never formed. Without
    features h, the gradient of the bias alone.
    """

    ceiling: float | None = None
    symmetric = True

    def __init__(self, errors: Tensor, features: Tensor | None = None) -> None:
        self.device = errors.device
        self.errors = errors.double()
        ones = self.errors.new_ones(len(errors), 1)
        self.inputs = ones if features is None else torch.cat([features.double(), ones], 1)
        self.squares = self.errors.square().sum(1) * self.inputs.square().sum(1)
        self.rounding = 1e-14 * float(self.squares.max())

    def __len__(self) -> int:
        return len(self.errors)

    def raw(self, rows: Rows, columns: Rows) -> Tensor:
        """(rows, columns) squares in float64."""
        products = (self.errors[rows] @ self.errors[columns].T).mul_(self.inputs[rows] @ self.inputs[columns].T)
        return products.mul_(-2).add_(self.squares[rows][:, None]).add_(self.squares[columns])


class Dense:
    """-S of a matrix (N, N) that is at hand, entries >= 0; column j says how well j stands for every row."""

    ceiling: float | None = 0.0
    symmetric = False
    rounding = -1.0

    def __init__(self, similarity: Tensor) -> None:
        self.similarity = similarity
        self.device = similarity.device

    def __len__(self) -> int:
        return len(self.similarity)

    def raw(self, rows: Rows, columns: Rows) -> Tensor:
        """(rows, columns) float64."""
        return -self.similarity[rows][:, columns].double()
