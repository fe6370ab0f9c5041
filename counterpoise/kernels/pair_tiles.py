"""Tiles of the pairwise family: the operators' schemas, the products of a tile, and what is summed over all tiles.

Which sums these are, and what they are for, stands in ``pairwise.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise._core import without_autocast
from counterpoise.kernels._library import LIBRARY, define
from counterpoise.kernels.pair_rules import NONE, Pairs

TILES = {"cpu": (512, 1024), "cuda": (4096, 4096)}  # rows, columns: on the CPU of a size that the second cache holds

_TILE = (
    "Tensor{alias} products, int row, int column, int positive, int candidate, Tensor? query_ids, Tensor? key_ids, "
    "Tensor? index, Tensor? probability, Tensor? itself, Tensor? log_weight, float sharpness"
)
_READ, _WRITTEN = _TILE.format(alias=""), _TILE.format(alias="(a!)")
define(
    f"pairwise_rows({_WRITTEN}, Tensor(b!) top, Tensor(c!) total, Tensor(d!)? dot, Tensor(e!)? similarity, "
    "Tensor(f!)? mass, Tensor(g!)? mean_key, bool keep) -> ()"
)
define(f"pairwise_both({_READ}, Tensor top, Tensor(b!) total, Tensor(c!) similarity, Tensor(d!)? mass) -> ()")
define(
    f"pairwise_slopes({_WRITTEN}, Tensor log_sum, Tensor slope, Tensor? bend, Tensor? middle, int fixed, "
    "Tensor? pull, bool mirrored, bool bounded) -> ()"
)
define(f"pairwise_sigmoid({_READ}, Tensor bias, Tensor(a!) sums) -> ()")
define(f"pairwise_sigmoid_slopes({_WRITTEN}, Tensor bias, Tensor upstream, Tensor(b!) sums) -> ()")

ops = torch.ops.counterpoise
for _name in ("rows", "both", "slopes", "sigmoid", "sigmoid_slopes"):
    LIBRARY.impl(f"pairwise_{_name}", lambda *_: None, "Meta")


def as_asked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Without gradient where none is recorded: functions cannot see that from within."""
    return tensors if torch.is_grad_enabled() else tuple(x.detach() for x in tensors)


class State(NamedTuple):
    """Sums by row, each (N,): the largest logit, what is added up above it, and what was asked for beside these."""

    top: Tensor
    total: Tensor
    dot: Tensor | None
    similarity: Tensor | None
    mass: Tensor
    mean_key: Tensor | None
    shift: Tensor | None = None
    """() what all logits stay below, where one shift serves all rows"""


def _shape(q: Tensor) -> tuple[int, int]:
    return TILES["cpu" if q.is_cpu else "cuda"]


def tiles(q: Tensor, k: Tensor, *, half: bool = False) -> Iterator[tuple[Tensor, slice, slice]]:
    """Products (rows, columns) of a tile, in a buffer that is reused, and where it lies.

    ``half``: square tiles on the diagonal and those to their right.
    """
    rows, columns = _shape(q)
    rows, columns = min(rows, len(q)), min(columns, len(k))
    buffer = q.new_empty(rows * columns)
    for i in range(0, len(q), rows):
        down = slice(i, min(i + rows, len(q)))
        edges = [*range(down.stop if half else 0, len(k), columns), len(k)]
        spans = [(i, down.stop)] if half else []
        spans += list(itertools.pairwise(edges))
        for left, right in spans:
            if left == right:
                continue
            tile = buffer[: (down.stop - i) * (right - left)].view(down.stop - i, right - left)
            torch.mm(q[down], k[left:right].T, out=tile)
            yield tile, down, slice(left, right)


def forward(
    q: Tensor,
    k: Tensor,
    rules: Pairs,
    *,
    dot: bool = False,
    similarity: bool = False,
    mean_key: bool = False,
    mirrored: bool = False,
) -> State:
    """The sums over all tiles; with ``mirrored`` over half of them, where one shift of all rows serves."""
    shift = _bound(q, rules) if mirrored else None
    state = new_state(q, dot, similarity, mean_key, shift)
    by_rule = state.mass if rules.positive != NONE else None
    sums = state.top, state.total, state.dot, state.similarity, by_rule, state.mean_key
    with without_autocast(q):
        for tile, down, across in tiles(q, k, half=shift is not None):
            place = tile, down.start, across.start, *rules.arguments()
            if shift is not None and across.start != down.start:
                ops.pairwise_both(*place, state.top, state.total, state.similarity, by_rule)
                continue
            ops.pairwise_rows(*place, *sums, mean_key)
            if state.mean_key is not None:
                state.mean_key[down].addmm_(tile, k[across])
    return state


def new_state(q: Tensor, dot: bool, similarity: bool, mean_key: bool, shift: Tensor | None = None) -> State:
    """Sums of no tile yet."""
    n = len(q)
    return State(
        q.new_full((n,), -math.inf) if shift is None else shift.expand(n).contiguous(),
        q.new_zeros(n),
        q.new_zeros(n) if dot else None,
        q.new_zeros(n) if similarity else None,
        q.new_zeros(n),
        torch.zeros_like(q) if mean_key else None,
        shift,
    )


def _bound(q: Tensor, rules: Pairs) -> Tensor | None:
    """() what no logit exceeds; None where one shift of all rows could underflow, or asking would stall a device."""
    if not q.is_cpu:
        return None
    bound = torch.linalg.vector_norm(q, dim=1).max().square() * (1.001 * rules.sharpness)  # products are rounded
    return bound if bound <= (40 if q.dtype == torch.float32 else 300) else None


def log_sum_of(state: State) -> Tensor:
    """(N,) log-sum-exp, -inf without a candidate."""
    return torch.where(state.total == 0, -math.inf, state.top + state.total.log())


def backward(
    q: Tensor,
    k: Tensor,
    rules: Pairs,
    needed: tuple[bool, bool],
    slopes: tuple[Any, ...],
    *,
    mirrored: bool = False,
    constant: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of queries and keys from the tiles' slopes; mirrored, all of it is in the first."""
    of_q = torch.zeros_like(q) if needed[0] or mirrored else None
    of_k = torch.zeros_like(k) if needed[1] and not mirrored else None
    with without_autocast(q):
        for tile, down, across in tiles(q, k, half=mirrored):
            ops.pairwise_slopes(tile, down.start, across.start, *rules.arguments(), *slopes)
            spread(tile, q, k, down, across, of_q, of_q if mirrored else of_k, constant)
    return of_q, of_k


def spread(
    tile: Tensor,
    q: Tensor,
    k: Tensor,
    down: slice,
    across: slice,
    of_q: Tensor | None,
    of_k: Tensor | None,
    constant: int = 0,
) -> None:
    """Adds what a tile of slopes gives to both gradients; a tile on the diagonal of one tensor counts once."""
    if of_q is not None:
        of_q[down].addmm_(tile, k[across])
    if of_k is not None and across.stop > constant and not (of_k is of_q and across.start == down.start):
        of_k[across].addmm_(tile.T, q[down])


def differentiable(
    plain: Callable[..., Any], inputs: tuple[Tensor, ...], needed: tuple[bool, ...], upstream: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients with a graph of their own, through the plain form."""
    with torch.enable_grad():
        found = plain(*inputs)
        leaves = [x for x, wanted in zip(inputs, needed, strict=False) if wanted]
        grads = iter(torch.autograd.grad(found, leaves, upstream, create_graph=True))
    return tuple(next(grads) if wanted else None for wanted in needed)


def finite(log_sum: Tensor) -> Tensor:
    """With 0 for rows without a candidate."""
    return torch.where(log_sum == -math.inf, 0, log_sum)
