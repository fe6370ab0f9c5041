"""The few collectives that objectives need, with gradients, and exact for uneven ranks.

DDP averages gradients over ranks. Two forms make several ranks equal one process on the whole batch:
keys gathered *with* gradient against local rows (:func:`gather_rows`), and sums reduced with gradient
(:func:`all_reduce_sum`). Both are the identity without a process group, so that a loss is written once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterpoise._core import rank, sum_over_ranks, world_size

__all__ = ["all_reduce_sum", "gather_rows", "rank", "row_offset", "rows_per_rank", "sum_over_ranks", "world_size"]


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; the gradient is summed over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:  # type: ignore[override]
        return _AllReduceSum.apply(grad[0].contiguous())


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks in rank order; each rank's gradient is the sum over ranks of what its rows received."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = _AllReduceSum.apply(grad[0].contiguous())
        return total.split(ctx.sizes)[rank()], None


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, differentiable (twice). Any shape, the same on every rank."""
    return _AllReduceSum.apply(x.contiguous()) if world_size() > 1 else x


def rows_per_rank(x: Tensor) -> list[int]:
    """How many rows each rank holds, in rank order."""
    if world_size() == 1:
        return [len(x)]
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    sizes[rank()] = len(x)
    dist.all_reduce(sizes)
    return [int(size) for size in sizes]


def row_offset(x: Tensor) -> int:
    """Index of this rank's first row among the rows of all ranks."""
    return sum(rows_per_rank(x)[: rank()])


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (sum of N, ...), with gradient; ranks may hold different numbers of rows."""
    if world_size() == 1:
        return x
    if not x.is_floating_point():
        return _GatherRows.apply(x.detach(), rows_per_rank(x))
    return _GatherRows.apply(x, rows_per_rank(x))
