"""Rank arithmetic that carries no gradient: world size, rank, sums over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default process group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` over all ranks, detached; ``x`` itself is left alone. Any shape, the same on every rank."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total
