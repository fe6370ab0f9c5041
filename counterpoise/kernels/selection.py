"""Selection: exact distances of pairs, farthest-first picks among a few points, gains over tiles of costs, least costs.

All but the last in double precision. A distance is the same to the last bit in the first two, so that copies of a point
tie whoever finds them; gains are summed in blocks of rows, in order: the same for every number of threads, and on a GPU
too. There only :func:`follow` waits for the device. Greedy loops are eager code: nothing here is differentiated or
traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise.kernels._library import LIBRARY, define, runs_on

define("selection_distances(Tensor x, Tensor rows, Tensor centres, Tensor which, Tensor(a!) out) -> ()")
define(
    "selection_follow(Tensor points, Tensor index, Tensor(a!) distance, float bound, int bound_index, "
    "Tensor(b!) picks, Tensor(c!) gaps) -> int"
)
define("selection_taken(Tensor tile, float rounding, Tensor before, Tensor? after, Tensor(a!) out) -> ()")
define("selection_nearest(Tensor costs, int start, bool first, Tensor(a!) near, Tensor(b!) keys) -> ()")

_ops = torch.ops.counterpoise

FOLLOWED = 1 << 21  # coordinates of the leaders that one block of a GPU follows; of more, a kernel a step is faster
NEAREST = 2048  # costs of a query that the shared memory of a GPU keeps: nearest_most of selection_nearest.cuh


def takes(x: Tensor, operator: str) -> bool:
    """Whether selection_<operator> takes points (n, d), or a tile. On a GPU few points are followed, by one block."""
    if operator == "follow" and not x.is_cpu and x.numel() > FOLLOWED:
        return False
    return x.dtype == torch.float64 and runs_on(x, f"selection_{operator}")


def distances(x: Tensor, rows: Tensor, centres: Tensor, which: Tensor) -> Tensor:
    """(n,) Euclidean distances of the points ``x[rows]`` to ``centres[which]``, float64."""
    found = x.new_empty(rows.shape)
    arguments = x.contiguous(), rows.contiguous(), centres.contiguous(), which.contiguous()
    _ops.selection_distances(*arguments, found)
    return found


def follow(
    points: Tensor, index: Tensor, distance: Tensor, bound: float, bound_index: int, most: int
) -> tuple[list[int], list[float]]:
    """Farthest-first picks among ``points``, as long as no other point can be farther.

    Args:
        points: (m, d) float64.
        index: (m,) their indices among all points, ascending.
        distance: (m,) to the nearest pick; brought up to date in place where it is at least ``bound``.
        bound: the largest distance of any other point; ``bound_index`` is the lowest index that has it.
        most: picks at most.

    Returns:
        The picks' indices, and the distance of each to those before it. No pick is at distance 0.
    """
    picks, gaps = index.new_empty(most), distance.new_empty(most)
    arguments = points.contiguous(), index.contiguous(), distance, bound, bound_index
    count = _ops.selection_follow(*arguments, picks, gaps)
    return picks[:count].tolist(), gaps[:count].tolist()


def add_taken(out: Tensor, tile: Tensor, rounding: float, before: Tensor, after: Tensor | None = None) -> None:
    """Adds to ``out`` (columns,) what falling costs take from the columns of a tile.

    Args:
        tile: (rows, columns) squares, of which a cost C is the root where they exceed ``rounding``, else 0; with
            ``rounding`` below 0 the costs themselves.
        before, after: (rows,), after <= before; None is -inf. What is added is the sum over rows of
            max(0, before - C) - max(0, after - C).
    """
    rest = None if after is None else after.contiguous()
    _ops.selection_taken(tile.contiguous(), rounding, before.contiguous(), rest, out)


def nearest_of(costs: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The ``count`` least of each row of a first tile (Q, >= count) of costs; None where there is no operator for it.

    On a GPU that is where ``count`` is above 2048, which shared memory has no room for.

    Returns:
        Costs and columns (Q, count), a heap in each row, on a GPU in order; ties to the lower column, NaN as infinity.
    """
    if costs.dtype not in (torch.float32, torch.float64) or not runs_on(costs, "selection_nearest"):
        return None
    if not costs.is_cpu and count > NEAREST:
        return None
    near, keys = costs.new_empty(len(costs), count), costs.new_empty(len(costs), count, dtype=torch.int64)
    _ops.selection_nearest(costs.contiguous(), 0, True, near, keys)
    return near, keys


def see_nearest(costs: Tensor, start: int, near: Tensor, keys: Tensor) -> None:
    """Takes a tile whose first column is ``start`` into what :func:`nearest_of` gave; tiles come in order."""
    _ops.selection_nearest(costs.contiguous(), start, False, near, keys)


for _name in ("selection_distances", "selection_taken", "selection_nearest"):
    LIBRARY.impl(_name, lambda *_: None, "Meta")
