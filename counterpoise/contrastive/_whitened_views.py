"""What the whitening objectives share: blocks of the batch, each view whitened by itself, and the distance between."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from counterpoise._core import (
    at_least_float32,
    check_number,
    check_per_row,
    check_within,
    uniform_by_index,
    without_autocast,
    world_size,
)
from counterpoise.distributed import gather_rows


def distance_of_whitened(
    views: Tensor,
    whitened: Callable[[int, Tensor, Tensor | None], Tensor],
    *,
    block_size: int | None,
    iterations: int,
    permutations: Tensor | None,
    normalize: bool,
    scale: float,
    weight: Tensor | None,
    mask: Tensor | None,
    sync: bool,
) -> Tensor:
    """Mean distance of whitened views (V, N, D) over partitions, pairs of views and examples.

    ``whitened`` maps (iteration, blocks (V, N / S, S, D), weights (V, N / S, S) or None) to blocks.
    """
    if len(views) < 2:
        raise ValueError(f"z holds {len(views)} views, expected at least two: z and other, or z of shape (V, N, D)")
    check_per_row("weight", weight, views[0])
    check_per_row("mask", mask, views[0], dtype=torch.bool)
    x, u = _rows_of_all_ranks(at_least_float32(views), weight, mask, sync=sync and world_size() > 1)
    count = x.shape[1]
    if count == 0:
        return x.sum() * 0
    size = count if block_size is None else block_size
    if count % size:
        raise ValueError(f"z holds N = {count} examples, expected a multiple of block_size = {size}")
    orders = _orders(permutations, count, 1 if size == count else iterations, x.device)
    total, pairs = x.new_zeros(()), list(combinations(range(len(x)), 2))
    with without_autocast(x):
        for i, order in enumerate(orders):
            of_blocks, blocks = u, x
            if order is not None:
                of_blocks, blocks = None if u is None else u[order], x[:, order]
            blocks = blocks.unflatten(1, (-1, size))
            if of_blocks is not None:
                of_blocks = of_blocks.unflatten(0, (-1, size)).expand(blocks.shape[:-1])
            z = whitened(i, blocks, of_blocks)
            z = unit(z, dim=-1) if normalize else z
            for v, w in pairs:
                rows = 2 - 2 * (z[v] * z[w]).sum(-1) if normalize else (z[v] - z[w]).square().mean(-1)
                total = total + (rows.mean() if of_blocks is None else (of_blocks[0] * rows).sum())
    if u is not None:
        mass = u.sum()
        total = total / torch.where(mass > 0, mass, 1)
    return scale * total / (len(orders) * len(pairs))


def _rows_of_all_ranks(
    x: Tensor, weight: Tensor | None, mask: Tensor | None, *, sync: bool
) -> tuple[Tensor, Tensor | None]:
    """Views (V, N, D), zero where masked out, and the weights of their examples, gathered with gradient."""
    if mask is not None:
        x = torch.where(mask[None, :, None], x, 0)
    if weight is None and mask is None and not sync:
        return x, None
    u = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)
    u = u if mask is None else torch.where(mask, u, 0)
    if not sync:
        return x, u
    rows = gather_rows(torch.cat([x.movedim(0, 1).flatten(1), u[:, None]], dim=1))
    return rows[:, :-1].unflatten(1, (len(x), -1)).movedim(1, 0), rows[:, -1]


def _orders(permutations: Tensor | None, count: int, iterations: int, device: torch.device) -> list[Tensor | None]:
    """The order of the examples in each iteration; None as they come."""
    if permutations is None:
        rows = torch.arange(count, device=device)
        return [None, *(uniform_by_index(rows, 1, i)[:, 0].argsort() for i in range(1, iterations))]
    if permutations.ndim != 2 or permutations.shape[1] != count or len(permutations) == 0:
        raise ValueError(f"permutations has shape {tuple(permutations.shape)}, expected (iterations, {count})")
    check_within("permutations", permutations, 0, count - 1, what="indices of examples")
    return list(permutations.to(device).long())


def check_blocks(block_size: int | None, iterations: int, scale: float) -> None:
    """Raises unless the settings of the partition are in range."""
    if block_size is not None:
        check_number("block_size", block_size, 2)
    check_number("iterations", iterations, 1)
    check_number("scale", scale, 0, open_low=True)
