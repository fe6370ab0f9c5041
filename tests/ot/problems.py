"""Transport problems of the tests, random and hypothesis-made."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

TIGHT: dict[str, Any] = {"tolerance": 1e-13, "max_iterations": 20_000}


class Transport(NamedTuple):
    """Cost (N, K), marginals of total one."""

    cost: Tensor
    a: Tensor
    b: Tensor


def transport(n: int = 7, k: int = 5, seed: int = 0, zeros: bool = False) -> Transport:
    """Uniform costs and masses in float64; with ``zeros`` the first row and the last column have no mass."""
    generator = torch.Generator().manual_seed(seed)
    cost, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((n, k), (n,), (k,)))
    if zeros:
        a[0], b[-1] = 0.0, 0.0
    return Transport(cost, a / a.sum(), b / b.sum())


def marginals(size: int) -> st.SearchStrategy[list[float]]:
    """Masses, zeros included, one of them positive."""
    mass = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
    return st.lists(mass, min_size=size, max_size=size).filter(lambda x: max(x) > 1e-3)


@st.composite
def transports(draw: st.DrawFn) -> Transport:
    """A problem of up to 6 x 6 with costs in [-1, 3]."""
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    entries = draw(st.lists(st.floats(-1, 3), min_size=n * k, max_size=n * k))
    cost = torch.tensor(entries, dtype=torch.float64).reshape(n, k)
    a, b = (torch.tensor(draw(marginals(size)), dtype=torch.float64) for size in (n, k))
    return Transport(cost, a / a.sum(), b / b.sum())


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q) - p + q, with 0 log 0 = 0."""
    ratio = torch.where(q > 0, p / torch.where(q > 0, q, 1), 1)
    return (torch.special.xlogy(p, ratio) - p + q).sum()
