r"""A transport problem and its kernel, in memory or in tiles.

.. math:: K_{ij} = e^{(f_i + g_j - C_{ij}) / \epsilon}, \qquad R = K V, \qquad S = K^\top U, \qquad
          P = \mathrm{diag}(U)\, K\, \mathrm{diag}(V)

Entries of K below the smallest normal number are 0: what they would add is smaller than rounding, and subnormal numbers
are slow. Entries without mass are left out of K, and of the division by their sums, which are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from counterpoise.kernels import transport as fused
from counterpoise.ot._sides import Ranks, Side
from counterpoise.ot.costs import PointCost, SquaredEuclidean, rows_of, tiles


class Shift(Protocol):
    """The common shift c (..., 1) of the potentials after an iteration, for f + c, g - c."""

    @property
    def numbers(self) -> fused.Shift:
        """What the fused iteration needs of it."""
        ...

    def __call__(self, f: Tensor, g: Tensor) -> Tensor: ...


@dataclass
class Problem:
    """What is solved.

    Attributes:
        cost: (..., N, K), or points.
        rows, columns: the sides.
        ranks: who shares the rows.
        total: (...) mass that errors are relative to.
        shift: None, or the common shift of the potentials after an iteration.
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
        if fused.takes(problem.matrix, "transport_kernel"):
            offsets = problem.rows.without_void(f), problem.columns.without_void(g)
            self.matrix = fused.kernel(problem.matrix, *offsets, problem.epsilon)
            return
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
        if fused.takes(self.matrix, "transport_plan_"):
            return fused.plan_(self.matrix, u, v)
        for start, stop in tiles(self.matrix):
            self.matrix[..., start:stop, :].mul_(u[..., start:stop, None]).mul_(v[..., None, :])
        return self.matrix


class TiledKernel:
    """K formed in tiles whenever it is needed, with f such that the largest entry of every row is one.

    Fused, a tile is of the cost alone: rows of K exist while they are summed. A cost that is a matrix is one tile then.
    """

    def __init__(self, problem: Problem, g: Tensor) -> None:
        self.cost, self.g, self.epsilon = problem.cost, g, problem.epsilon
        self.f = torch.zeros_like(problem.rows.mass)
        self.inner = problem.columns.without_void(g)
        whole = isinstance(self.cost, Tensor) and fused.takes(self.cost)
        spans = [(0, self.cost.shape[-2])] if whole else tiles(problem.cost)
        self.parts = [(start, stop, problem.rows.part(start, stop)) for start, stop in spans]

    def _fused(self, start: int, stop: int) -> fused.Tile | None:
        """Rows [start, stop) of the cost, for the fused sums where they can be taken."""
        if not fused.runs_on(self.g, "transport_rows"):
            return None
        if type(self.cost) is SquaredEuclidean:  # a subclass may have other distances
            products, *squares = self.cost.products(start, stop)
            return fused.Tile(products, self.inner, self.epsilon, (squares[0], squares[1]))
        cost = rows_of(self.cost, start, stop)
        return fused.Tile(cost, self.inner, self.epsilon) if fused.takes(cost) else None

    def _tile(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of K, and their f."""
        exponents = (self.inner[..., None, :] - rows_of(self.cost, start, stop)).mul_(1 / self.epsilon)
        largest = exponents.amax(-1).clamp_min(torch.finfo(exponents.dtype).min)
        self.f[..., start:stop] = -self.epsilon * largest
        return exp_(exponents.sub_(largest[..., None]))

    def row_sums(self, v: Tensor) -> Tensor:
        """R = K V."""
        r = torch.empty_like(self.f)
        for start, stop, _ in self.parts:
            tile, span = self._fused(start, stop), slice(start, stop)
            if tile is None:
                r[..., span] = times(self._tile(start, stop), v)
            else:
                self.f[..., span], r[..., span] = tile.row_sums(v)
        return r

    def column_sums(self, u: Tensor) -> Tensor:
        """This rank's part of S = K^T U, behind :meth:`row_sums`."""
        s = torch.zeros_like(self.g)
        for start, stop, _ in self.parts:
            tile, some = self._fused(start, stop), u[..., start:stop]
            if tile is None:
                s += times(self._tile(start, stop).mT, some)
            else:
                s += tile.column_sums(self.f[..., start:stop], some)
        return s

    def sweep(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V to R, U and this rank's part of S, in one pass over the tiles."""
        r, u, s = torch.empty_like(self.f), torch.empty_like(self.f), torch.zeros_like(self.g)
        for start, stop, rows in self.parts:
            fused_tile, span = self._fused(start, stop), slice(start, stop)
            if fused_tile is not None and fused.runs_on(v, "transport_sweep"):
                self.f[..., span], r[..., span], u[..., span], more = fused_tile.sweep(v, rows)
                s += more
                continue
            r[..., span], columns = self._halves(start, stop, fused_tile, v)
            u[..., span] = some = rows.scaled(r[..., span], self.f[..., span])
            s += columns(some)
        return r, u, s

    def _halves(
        self, start: int, stop: int, tile: fused.Tile | None, v: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """R of rows [start, stop), and what makes their part of S of U."""
        if tile is None:
            k = self._tile(start, stop)
            return times(k, v), lambda u: times(k.mT, u)
        f, r = tile.row_sums(v)
        self.f[..., start:stop] = f
        return r, lambda u: tile.column_sums(f, u)

    def log_sweep(self, one: Tensor) -> tuple[Tensor, Tensor] | None:
        """(U / alpha) and S of ``one`` in logarithms, from one call; None where that is not to be had."""
        if len(self.parts) != 1 or not fused.runs_on(self.f, "transport_sweep"):
            return None
        start, stop, rows = self.parts[0]
        tile = self._fused(start, stop)
        if tile is None or rows.ceiling is not None:
            return None
        self.f, r, _, log_s = tile.sweep(one, rows, logs=True)
        return rows.log_scaling(rows.divisor(r).log(), self.f), log_s
