"""Seeds derived from several integers, so that a draw is a function of (seed, epoch, index) and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix_seeds(*parts: int) -> int:
    """One seed in [0, 2^32) from several integers, by splitmix64; neighbouring integers give unrelated seeds.

    32 bits, since the CPU generator of torch reads no more of its seed.
    """
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 32


def generator_for(*parts: int) -> torch.Generator:
    """A CPU generator seeded with :func:`mix_seeds`."""
    return torch.Generator().manual_seed(mix_seeds(*parts))


def uniform_by_index(index: Tensor, draws: int, *parts: int) -> Tensor:
    """(N, draws) float64 in [0, 1): row i depends on (parts, index[i]) alone, whatever batch or worker it is in.

    A counter-based generator in int64 arithmetic (which wraps), on the device of ``index`` (N,).
    """
    counter = index.long()[:, None] * draws + torch.arange(draws, device=index.device)
    x = counter + mix_seeds(*parts) * 0x9E3779B9
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shift_right(x, shift)) * factor
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() / 2**53


def normal_by_index(index: Tensor, draws: int, *parts: int) -> Tensor:
    """(N, draws) float64 standard normal, drawn like :func:`uniform_by_index`; by Box and Muller."""
    first, second = uniform_by_index(index, 2 * draws, *parts).chunk(2, dim=1)
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * torch.pi * second)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
