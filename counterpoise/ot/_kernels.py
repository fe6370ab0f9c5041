r"""A transport problem and its kernel, in memory or in tiles.

.. math:: K_{ij} = e^{(f_i + g_j - C_{ij}) / \epsilon}, \qquad R = K V, \qquad S = K^\top U, \qquad
          P = \mathrm{diag}(U)\, K\, \mathrm{diag}(V)

Entries of K below the smallest normal number are 0: what they would add is smaller than rounding, and subnormal numbers
are slow. Entries without mass are left out of K, and of the division by their sums, which are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from counterpoise.ot._sides import Ranks, Side
from counterpoise.ot.costs import PointCost, rows_of, tiles

Shift = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Problem:
    """What is solved.

    Attributes:
        cost: (..., N, K), or points.
        rows, columns: the sides.
        ranks: who shares the rows.
        total: (...) mass that errors are relative to.
        shift: None, or the common shift of the potentials after an iteration: f, g to c (..., 1), for f + c, g - c.
        product: whether the entropy is KL(P | a b^T), the reference of both sides being their mass.
    """

    cost: Tensor | PointCost
    rows: Side
    columns: Side
    ranks: Ranks
    total: Tensor
    shift: Shift | None = None
    product: bool = True

    @property
    def epsilon(self) -> float:
        """Of the entropy."""
        return self.rows.epsilon

    @property
    def matrix(self) -> Tensor:
        """The cost where it is a matrix."""
        if isinstance(self.cost, PointCost):
            raise TypeError("cost is given as points in tiles, expected a matrix")
        return self.cost

    def at(self, epsilon: float) -> Problem:
        """The same problem with another entropy; ceilings are shared."""
        rows, columns = replace(self.rows, epsilon=epsilon), replace(self.columns, epsilon=epsilon)
        return replace(self, rows=rows, columns=columns)

    def kernel(self, f: Tensor, g: Tensor) -> DenseKernel | TiledKernel:
        """The kernel with these potentials absorbed."""
        return DenseKernel(self, f, g) if isinstance(self.cost, Tensor) else TiledKernel(self, g)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(..., N, K) times (..., K)."""
    return torch.mv(matrix, vector) if matrix.ndim == 2 else (matrix @ vector[..., None])[..., 0]


def exp_(exponents: Tensor) -> Tensor:
    """exp in place, with 0 for what is smaller than the smallest normal number."""
    return torch.threshold_(exponents.exp_(), torch.finfo(exponents.dtype).tiny, 0.0)


class DenseKernel:
    """K in memory."""

    def __init__(self, problem: Problem, f: Tensor, g: Tensor) -> None:
        self.f, self.g, self.rows = f, g, problem.rows
        inner = problem.columns.without_void(g)[..., None, :] / problem.epsilon
        outer = problem.rows.without_void(f)[..., None] / problem.epsilon
        self.matrix = torch.empty(problem.cost.shape, dtype=g.dtype, device=g.device)
        for start, stop in tiles(problem.cost):
            part = self.matrix[..., start:stop, :]
            torch.sub(inner, rows_of(problem.cost, start, stop), alpha=1 / problem.epsilon, out=part)
            exp_(part.add_(outer[..., start:stop, :]))

    def row_sums(self, v: Tensor) -> Tensor:
        """R = K V."""
        return times(self.matrix, v)

    def column_sums(self, u: Tensor) -> Tensor:
        """This rank's part of S = K^T U."""
        return times(self.matrix.mT, u)

    def sweep(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V to R, U and this rank's part of S."""
        r = self.row_sums(v)
        u = self.rows.scaled(r, self.f)
        return r, u, self.column_sums(u)

    def plan(self, u: Tensor, v: Tensor) -> Tensor:
        """diag(U) K diag(V), in the memory of K."""
        for start, stop in tiles(self.matrix):
            self.matrix[..., start:stop, :].mul_(u[..., start:stop, None]).mul_(v[..., None, :])
        return self.matrix


class TiledKernel:
    """K formed in tiles whenever it is needed, with f such that the largest entry of every row is one."""

    def __init__(self, problem: Problem, g: Tensor) -> None:
        self.cost, self.g, self.epsilon = problem.cost, g, problem.epsilon
        self.f = torch.zeros_like(problem.rows.mass)
        self.inner = problem.columns.without_void(g)[..., None, :]
        self.parts = [(start, stop, problem.rows.part(start, stop)) for start, stop in tiles(problem.cost)]

    def _tile(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of K, and their f."""
        exponents = (self.inner - rows_of(self.cost, start, stop)).mul_(1 / self.epsilon)
        largest = exponents.amax(-1).clamp_min(torch.finfo(exponents.dtype).min)
        self.f[..., start:stop] = -self.epsilon * largest
        return exp_(exponents.sub_(largest[..., None]))

    def row_sums(self, v: Tensor) -> Tensor:
        """R = K V."""
        r = torch.empty_like(self.f)
        for start, stop, _ in self.parts:
            r[..., start:stop] = times(self._tile(start, stop), v)
        return r

    def column_sums(self, u: Tensor) -> Tensor:
        """This rank's part of S = K^T U."""
        s = torch.zeros_like(self.g)
        for start, stop, _ in self.parts:
            s += times(self._tile(start, stop).mT, u[..., start:stop])
        return s

    def sweep(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V to R, U and this rank's part of S, in one pass over the tiles."""
        r, u, s = torch.empty_like(self.f), torch.empty_like(self.f), torch.zeros_like(self.g)
        for start, stop, rows in self.parts:
            tile = self._tile(start, stop)
            r[..., start:stop] = times(tile, v)
            u[..., start:stop] = rows.scaled(r[..., start:stop], self.f[..., start:stop])
            s += times(tile.mT, u[..., start:stop])
        return r, u, s
