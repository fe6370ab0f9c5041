"""Pairwise family: sums over all pairs of queries and keys, a tile of products at a time and never the whole matrix.

``torch.mm`` makes the products of a tile in a buffer that one call reuses; an operator of ours then turns them into
sums by row, or in place into what the products' gradient is. Nothing of the size of queries times keys is kept: the
backward pass makes the tiles again. Four forms spare products:

- Queries that are the keys: a tile serves both directions, so half of them suffice (on the CPU in the forward pass
  too, where no logit can be so large that one shift for all rows would underflow).
- Keys without gradient: the mean key under the softmax, which is the gradient of a query, is summed on the way.
- Rows that will all weigh the same: while the products of a strip of rows are there, the gradient is made of them.
- Rules of what is positive or a candidate are evaluated from ids inside the tile.

Results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from counterpoise._core import without_autocast
from counterpoise.kernels import pair_tiles
from counterpoise.kernels._library import runs_on, transformed
from counterpoise.kernels.pair_rules import NONE, Pairs

SMALL = 2**17  # pairs whose matrix is as good as a tile
DEARER = 2**5  # times as many where tiles cost a product more than the matrix: 16 MiB of float32
STRIP = (128, 4096)  # rows and columns of tiles that are kept until the sums of their rows are known
WIDEST_STRIP = 2  # tiles
_FEW = 4  # positives a row by index whose keys are read one by one

Plain = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""The same sums from queries and keys as they are written in PyTorch, for second derivatives."""


class Sums(NamedTuple):
    """By row, each (N,)."""

    log_sum_exp: Tensor
    """of the candidates' logits, -inf without any"""
    similarity: Tensor
    """sum of the positives' products"""
    mass: Tensor
    """number of positives by rule; zeros where they are given by index. Without gradient"""


def serves(q: Tensor, *others: Tensor) -> bool:
    """Whether tiles may be taken: eager mode, float32 or float64, compiled kernels, something to multiply."""
    return (
        not torch.compiler.is_compiling()
        and q.dtype in (torch.float32, torch.float64)
        and runs_on(q, "pairwise_rows")
        and not transformed(*others)
        and all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype == q.dtype for x in others)
        and all(x.numel() for x in (q, *others))
    )


def masked_sums(q: Tensor, k: Tensor, rules: Pairs, plain: Plain, *, mirrored: bool = False) -> Sums:
    """Log-sum-exp over the candidates and sum over the positives of ``q @ k.T``, by row.

    Args:
        q: (N, d), the temperature divided out; k: (M, d); float32 or float64.
        rules: from :func:`~counterpoise.kernels.pair_rules.pairs`.
        plain: gives log-sum-exp and similarity.
        mirrored: q is k, and rules are the same in both directions: no log weight, no candidate by POSITIVE_OR_BANK,
            on the CPU ``itself`` None or the rows' own numbers.
    """
    return Sums(*_Masked.apply(*pair_tiles.as_asked(q, k), rules, mirrored, plain))


def softmax_mean(
    q: Tensor,
    k: Tensor,
    rules: Pairs,
    plain: Plain,
    *,
    fixed: int | None = None,
    constant: int = 0,
    even: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean product of a row's candidates under the softmax of their logits, and log-sum-exp, each (N,).

    The log-sum-exp carries no gradient; without a candidate it is -inf and the mean 0.

    Args:
        q: (N, d); k: (M, d); float32 or float64.
        rules: from :func:`~counterpoise.kernels.pair_rules.pairs`.
        plain: gives the mean alone, as a tuple.
        fixed: the weights of so many first keys carry no gradient; None = none of them does.
        constant: so many first keys have no gradient.
        even: all rows are likely to weigh the same. Their gradient then comes with the mean, on the CPU where a strip
            of products fits, and costs no products of its own; weights that do differ make the keys' part anew.
    """
    mean, log_sum = _Mean.apply(*pair_tiles.as_asked(q, k), rules, fixed, constant, even, plain)
    return mean, log_sum


def softmax_sums(q: Tensor, k: Tensor, rules: Pairs, *, mean_key: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean product under the softmax (N,), log-sum-exp (N,) and, if asked, mean key (N, d); without gradient."""
    state = pair_tiles.forward(q.detach().contiguous(), k.detach().contiguous(), rules, dot=True, mean_key=mean_key)
    mean_of_keys = None
    if state.mean_key is not None:
        mean_of_keys = state.mean_key / torch.where(state.total == 0, 1, state.total)[:, None]
    return _mean_of(state), pair_tiles.log_sum_of(state), mean_of_keys


def clamped_sums(q: Tensor, k: Tensor, rules: Pairs, log_sum: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (N, d) summed under min(1, height * share), and the sums of these (N,); without gradient.

    Args:
        log_sum: (N,), of :func:`softmax_sums`; shares are exp(logit - log_sum).
        height: (N,).
    """
    queries, keys = q.detach().contiguous(), k.detach().contiguous()
    safe = pair_tiles.finite(log_sum)
    keys_sum, mass = torch.zeros_like(queries), torch.zeros_like(safe)
    with torch.no_grad(), without_autocast(q):
        for tile, down, across in pair_tiles.tiles(queries, keys):
            place = tile, down.start, across.start, *rules.arguments()
            pair_tiles.ops.pairwise_slopes(*place, safe, height.contiguous(), None, None, 0, None, False, False)
            tile.clamp_max_(1)
            keys_sum[down].addmm_(tile, keys[across])
            mass[down] += tile.sum(1)
    return keys_sum, mass


def sigmoid_sums(q: Tensor, k: Tensor, bias: Tensor, rules: Pairs, plain: Callable[..., Tensor]) -> Tensor:
    """(N,) sums over a row's keys of -log sigmoid of +-(product + bias), + for positives.

    Args:
        q: (N, d); k: (M, d); float32 or float64.
        bias: (), of the same type.
        rules: from :func:`~counterpoise.kernels.pair_rules.pairs`; keys of log weight -inf do not count, other
            weights are not read.
        plain: the same from q, k and bias.
    """
    return _Sigmoid.apply(q, k, bias, rules, plain)


def _strips(q: Tensor, k: Tensor) -> Iterator[tuple[slice, list[tuple[Tensor, slice]]]]:
    """Rows, and all tiles of products in them, side by side in one buffer that is reused."""
    rows, columns = STRIP
    spans = [slice(left, min(left + columns, len(k))) for left in range(0, len(k), columns)]
    buffer = q.new_empty(min(rows, len(q)) * len(k))
    for i in range(0, len(q), rows):
        down = slice(i, min(i + rows, len(q)))
        n = down.stop - i
        tiles = [buffer[n * span.start : n * span.stop].view(n, -1) for span in spans]
        for tile, span in zip(tiles, spans, strict=True):
            torch.mm(q[down], k[span].T, out=tile)
        yield down, list(zip(tiles, spans, strict=True))


class _Masked(torch.autograd.Function):
    """:func:`masked_sums`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, rules: Pairs, mirrored: bool, plain: Plain
    ) -> tuple[Tensor, Tensor, Tensor]:
        few = rules.positive == NONE and (rules.index is None or rules.index.shape[1] <= _FEW)
        ctx.direct = few and ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        queries, keys = q.contiguous(), k.contiguous()
        ctx.mirrored = mirrored and not ctx.direct
        state = pair_tiles.forward(queries, keys, rules, similarity=True, mean_key=ctx.direct, mirrored=ctx.mirrored)
        log_sum = pair_tiles.log_sum_of(state)
        ctx.rules, ctx.plain, ctx.bounded = rules, plain, state.shift is not None
        ctx.save_for_backward(q, k, log_sum, state.total, state.top if ctx.bounded else None, state.mean_key)
        ctx.mark_non_differentiable(state.mass)
        return log_sum, cast(Tensor, state.similarity), state.mass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, log_sum, total, top, mean_key = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or transformed(*upstream):
            return *pair_tiles.differentiable(ctx.plain, (q, k), needed, upstream[:2]), None, None, None
        of_sum = torch.where(log_sum == -math.inf, 0, upstream[0]) * ctx.rules.sharpness
        pull = upstream[1].contiguous()
        if ctx.direct:
            grad = mean_key * (of_sum / torch.where(total == 0, 1, total))[:, None]
            return _pulled(grad, k, ctx.rules, pull), *[None] * 4
        log_sum = pair_tiles.finite(log_sum)
        if ctx.bounded:
            of_sum, log_sum = of_sum * (top - log_sum).exp(), top
        slopes = log_sum, of_sum.contiguous(), None, None, 0, pull, ctx.mirrored, ctx.bounded
        grads = pair_tiles.backward(q.contiguous(), k.contiguous(), ctx.rules, needed, slopes, mirrored=ctx.mirrored)
        return *grads, None, None, None


def _pulled(grad: Tensor, k: Tensor, rules: Pairs, pull: Tensor) -> Tensor:
    """Adds what the few positives by index give to the queries' gradient."""
    if rules.index is None:
        return grad
    for j in range(rules.index.shape[1]):
        t = pull if rules.probability is None else pull * rules.probability[:, j]
        grad.addcmul_(k[rules.index[:, j]], t[:, None])
    return grad


def _mean_of(state: pair_tiles.State) -> Tensor:
    return cast(Tensor, state.dot) / torch.where(state.total == 0, 1, state.total)


def _mean_slopes(log_sum: Tensor, slope: Tensor, mean: Tensor, fixed: int | None, sharpness: float) -> tuple[Any, ...]:
    """What ``pairwise_slopes`` asks for, of rows that weigh ``slope``."""
    bends = (None, None) if fixed is None else (slope * sharpness, mean)
    return log_sum, slope, *bends, fixed or 0, None, False, False


class _Mean(torch.autograd.Function):
    """:func:`softmax_mean`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, rules: Pairs, fixed: int | None, constant: int, even: bool, plain: Plain
    ) -> tuple[Tensor, Tensor]:
        ctx.direct = fixed is None and not ctx.needs_input_grad[1]
        ctx.rules, ctx.fixed, ctx.constant, ctx.plain = rules, fixed, constant, plain
        queries, keys = q.contiguous(), k.contiguous()
        emits = even and q.is_cpu and all(ctx.needs_input_grad[:2]) and len(k) <= WIDEST_STRIP * STRIP[1]
        if emits:
            state, ctx.grads = _Mean.with_gradient(queries, keys, rules, fixed, constant)
        else:
            state, ctx.grads = pair_tiles.forward(queries, keys, rules, dot=True, mean_key=ctx.direct), None
        mean, log_sum = _mean_of(state), pair_tiles.log_sum_of(state)
        ctx.save_for_backward(q, k, log_sum, mean, state.total, state.mean_key)
        ctx.mark_non_differentiable(log_sum)
        return mean, log_sum

    @staticmethod
    def with_gradient(
        q: Tensor, k: Tensor, rules: Pairs, fixed: int | None, constant: int
    ) -> tuple[pair_tiles.State, tuple[Tensor, Tensor]]:
        """The sums, and the gradients of queries and keys where every row weighs 1."""
        state, of_q, of_k = pair_tiles.new_state(q, True, False, False), torch.zeros_like(q), torch.zeros_like(k)
        sums = state.top, state.total, state.dot, None, None, None, False
        mean, log_sum = q.new_zeros(2, len(q))
        slopes = _mean_slopes(log_sum, torch.ones_like(mean), mean, fixed, rules.sharpness)
        with without_autocast(q):
            for down, tiles in _strips(q, k):
                for tile, across in tiles:
                    pair_tiles.ops.pairwise_rows(tile, down.start, across.start, *rules.arguments(), *sums)
                strip = state._replace(top=state.top[down], total=state.total[down], dot=cast(Tensor, state.dot)[down])
                mean[down], log_sum[down] = _mean_of(strip), pair_tiles.finite(pair_tiles.log_sum_of(strip))
                for tile, across in tiles:
                    pair_tiles.ops.pairwise_slopes(tile, down.start, across.start, *rules.arguments(), *slopes)
                    pair_tiles.spread(tile, q, k, down, across, of_q, of_k, constant)
        return state, (of_q, of_k)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, log_sum, mean, total, mean_key = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or transformed(*upstream):
            return *pair_tiles.differentiable(ctx.plain, (q, k), needed, upstream[:1]), *[None] * 5
        slope = torch.where(total == 0, 0, upstream[0])
        if ctx.direct:
            return mean_key * (slope / torch.where(total == 0, 1, total))[:, None], *[None] * 6
        of_q = None
        if ctx.grads is not None:
            of_q = ctx.grads[0] * slope[:, None]
            if bool((upstream[0] == upstream[0][0]).all()):
                return of_q, ctx.grads[1] * upstream[0][0], *[None] * 5
            needed = False, True
        slopes = _mean_slopes(pair_tiles.finite(log_sum), slope.contiguous(), mean, ctx.fixed, ctx.rules.sharpness)
        grads = pair_tiles.backward(q.contiguous(), k.contiguous(), ctx.rules, needed, slopes, constant=ctx.constant)
        return grads[0] if of_q is None else of_q, grads[1], *[None] * 5


class _Sigmoid(torch.autograd.Function):
    """:func:`sigmoid_sums`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Tensor, rules: Pairs, plain: Callable[..., Tensor]) -> Tensor:
        ctx.rules, ctx.plain = rules, plain
        ctx.save_for_backward(q, k, bias)
        sums = q.new_zeros(len(q))
        with without_autocast(q):
            for tile, down, across in pair_tiles.tiles(q.contiguous(), k.contiguous()):
                pair_tiles.ops.pairwise_sigmoid(tile, down.start, across.start, *rules.arguments(), bias, sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, bias = ctx.saved_tensors
        (upstream,) = grads
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or transformed(upstream):
            return *pair_tiles.differentiable(ctx.plain, (q, k, bias), needed, (upstream,)), None, None
        of_q, of_k = (torch.zeros_like(x) if wanted else None for x, wanted in zip((q, k), needed, strict=False))
        sums, upstream = q.new_zeros(len(q)), upstream.contiguous()
        queries, keys = q.contiguous(), k.contiguous()
        with without_autocast(q):
            for tile, down, across in pair_tiles.tiles(queries, keys):
                pair_tiles.ops.pairwise_sigmoid_slopes(
                    tile, down.start, across.start, *ctx.rules.arguments(), bias, upstream, sums
                )
                pair_tiles.spread(tile, queries, keys, down, across, of_q, of_k)
        return of_q, of_k, sums.sum() if needed[2] else None, None, None
