r"""Costs between points, given as points: no N x K matrix has to exist.

.. math:: C_{ij} = s\,|x_i - y_j|^2, \qquad C_{ij} = s\,|x_i - y_j|, \qquad
          C_{ij} = s \Big(1 - \frac{x_i \cdot y_j}{|x_i|\,|y_j|}\Big)

The solvers take such an object wherever they take a matrix. They form it once where it has no more than 2^24 entries,
and in tiles of rows, again in every iteration, where it has more. A cost of your own is a :class:`PointCost` with
another ``pairwise``, in differentiable torch operations.

Squared distances come from one matrix product, as |x|^2 + |y|^2 - 2 x.y, about the mean of y: far from the origin the
difference of large squares would lose the digits that matter.

Source: squared distances as above are customary; the scale 1/2 is the one of Feydy et al., Interpolating between
Optimal Transport and MMD using Sinkhorn Divergences, 2019.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise._core import at_least_float32, check_number

TILE = 2**20  # entries of a tile of points on the host: some megabytes, so that all that is done to it is near
WIDE_TILE = 2**22  # of a matrix, and on accelerators: many small tiles keep threads waiting for each other
FORMED = 2**24  # entries up to which the matrix is formed


class PointCost(ABC):
    """A cost between the points ``x`` and ``y``; subclasses say which in ``pairwise``.

    Args:
        x: (..., N, d) floating; the rows.
        y: (..., K, d) of the same leading shape; the columns.
        scale: s > 0, multiplies the cost.

    Raises:
        ValueError, TypeError: shapes or types that do not fit.
    """

    def __init__(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        for name, points in (("x", x), ("y", y)):
            if not isinstance(points, Tensor) or points.ndim < 2 or not points.is_floating_point():
                kind = f"{tuple(points.shape)}, {points.dtype}" if isinstance(points, Tensor) else type(points).__name__
                raise TypeError(f"{name} is {kind}, expected a floating tensor of shape (..., N, d)")
        if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
            raise ValueError(f"y has shape {tuple(y.shape)}, expected (..., K, d) as x of {tuple(x.shape)} has it")
        check_number("scale", scale, 0, open_low=True)
        dtype = torch.promote_types(x.dtype, y.dtype)
        self.x, self.y = at_least_float32(x.to(dtype)), at_least_float32(y.to(dtype))
        self.scale = scale

    @abstractmethod
    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Points (..., n, d) and (..., k, d) to costs (..., n, k), times ``scale``."""

    @property
    def shape(self) -> torch.Size:
        """(..., N, K)."""
        return torch.Size([*self.x.shape[:-1], self.y.shape[-2]])

    @property
    def points(self) -> tuple[Tensor, Tensor]:
        """The points that gradients reach."""
        return self.x, self.y

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the matrix, (..., stop - start, K)."""
        return self.pairwise(self.x[..., start:stop, :], self.y)

    def matrix(self) -> Tensor:
        """All of it, (..., N, K)."""
        return self.pairwise(self.x, self.y)


class SquaredEuclidean(PointCost):
    """s |x - y|^2; see :class:`PointCost`."""

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Points to squared distances, never below 0."""
        products, of_x, of_y = self._products(x, y)
        return products.add_(of_x[..., None]).add_(of_y[..., None, :]).clamp_min(0)

    def products(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """-2 s x.y of rows [start, stop), s |x|^2 and s |y|^2, of which the distances are the sum."""
        return self._products(self.x[..., start:stop, :], self.y)

    def _products(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centre = self.y.detach().mean(-2, keepdim=True)
        x, y = x - centre, y - centre
        of_x, of_y = (self.scale * points.square().sum(-1) for points in (x, y))
        return (-2 * self.scale) * x @ y.mT, of_x, of_y


class Euclidean(PointCost):
    """s |x - y|, with gradient 0 where x = y; see :class:`PointCost`."""

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Points to distances."""
        return self.scale * torch.cdist(x, y)


class Cosine(PointCost):
    """s (1 - cosine); see :class:`PointCost`. The cosine with a point at the origin is 0."""

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Points to one minus their cosines."""
        return self.scale * (1 - normalize(x, dim=-1) @ normalize(y, dim=-1).mT)


def rows_of(cost: Tensor | PointCost, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a cost given as a matrix or as points."""
    return cost[..., start:stop, :] if isinstance(cost, Tensor) else cost.rows(start, stop)


def tiles(cost: Tensor | PointCost) -> Iterator[tuple[int, int]]:
    """(start, stop) of tiles of rows that cover the cost; none where it has no rows."""
    *batch, n, k = cost.shape
    size = TILE if isinstance(cost, PointCost) and cost.points[0].is_cpu else WIDE_TILE
    step = max(1, size // max(1, k * torch.Size(batch).numel()))
    return ((start, min(start + step, n)) for start in range(0, n, step))
