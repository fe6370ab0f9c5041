"""Selection: exact distances of pairs, and farthest-first picks among a few points, in double precision.

A distance is the same to the last bit in both, so that copies of a point tie whoever finds them. Greedy loops are
eager code: nothing here is differentiated or traced.
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

_ops = torch.ops.counterpoise


def takes(x: Tensor) -> bool:
    """Whether the operators take points (n, d)."""
    return x.dtype == torch.float64 and runs_on(x, "selection_follow")


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


@torch.library.register_fake("counterpoise::selection_distances", lib=LIBRARY)
def _(*_: Tensor) -> None:
    return None
