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

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from counterpoise._core import without_autocast
from counterpoise.kernels._library import LIBRARY, define, runs_on, transformed
from counterpoise.kernels.pair_rules import NONE, Pairs

TILES = {"cpu": (512, 1024), "cuda": (4096, 4096)}  # rows, columns: on the CPU of a size that the second cache holds
SMALL = 2**17  # pairs whose matrix is as good as a tile
DEARER = 2**5  # times as many where tiles cost a product more than the matrix: 16 MiB of float32
STRIP = (128, 4096)  # rows and columns of tiles that are kept until the sums of their rows are known
WIDEST_STRIP = 2  # tiles
_FEW = 4  # positives a row by index whose keys are read one by one

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

_ops = torch.ops.counterpoise
for _name in ("rows", "both", "slopes", "sigmoid", "sigmoid_slopes"):
    LIBRARY.impl(f"pairwise_{_name}", lambda *_: None, "Meta")

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
    return Sums(*_Masked.apply(*_as_asked(q, k), rules, mirrored, plain))


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
    mean, log_sum = _Mean.apply(*_as_asked(q, k), rules, fixed, constant, even, plain)
    return mean, log_sum


def softmax_sums(q: Tensor, k: Tensor, rules: Pairs, *, mean_key: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean product under the softmax (N,), log-sum-exp (N,) and, if asked, mean key (N, d); without gradient."""
    state = _forward(q.detach().contiguous(), k.detach().contiguous(), rules, dot=True, mean_key=mean_key)
    total = torch.where(state.total == 0, 1, state.total)
    dot = cast(Tensor, state.dot)  # asked for above
    return dot / total, _log_sum(state), None if state.mean_key is None else state.mean_key / total[:, None]


def clamped_sums(q: Tensor, k: Tensor, rules: Pairs, log_sum: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (N, d) summed under min(1, height * share), and the sums of these (N,); without gradient.

    Args:
        log_sum: (N,), of :func:`softmax_sums`; shares are exp(logit - log_sum).
        height: (N,).
    """
    queries, keys = q.detach().contiguous(), k.detach().contiguous()
    safe = _finite(log_sum)
    keys_sum, mass = torch.zeros_like(queries), torch.zeros_like(safe)
    with torch.no_grad(), without_autocast(q):
        for tile, down, across in _tiles(queries, keys):
            place = tile, down.start, across.start, *rules.arguments()
            _ops.pairwise_slopes(*place, safe, height.contiguous(), None, None, 0, None, False, False)
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


def _as_asked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Without gradient where none is recorded: functions cannot see that from within."""
    return tensors if torch.is_grad_enabled() else tuple(x.detach() for x in tensors)


class _State(NamedTuple):
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


def _tiles(q: Tensor, k: Tensor, *, half: bool = False) -> Iterator[tuple[Tensor, slice, slice]]:
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


def _forward(
    q: Tensor,
    k: Tensor,
    rules: Pairs,
    *,
    dot: bool = False,
    similarity: bool = False,
    mean_key: bool = False,
    mirrored: bool = False,
) -> _State:
    shift = _bound(q, rules) if mirrored else None
    state = _new_state(q, dot, similarity, mean_key, shift)
    by_rule = state.mass if rules.positive != NONE else None
    sums = state.top, state.total, state.dot, state.similarity, by_rule, state.mean_key
    with without_autocast(q):
        for tile, down, across in _tiles(q, k, half=shift is not None):
            place = tile, down.start, across.start, *rules.arguments()
            if shift is not None and across.start != down.start:
                _ops.pairwise_both(*place, state.top, state.total, state.similarity, by_rule)
                continue
            _ops.pairwise_rows(*place, *sums, mean_key)
            if state.mean_key is not None:
                state.mean_key[down].addmm_(tile, k[across])
    return state


def _new_state(q: Tensor, dot: bool, similarity: bool, mean_key: bool, shift: Tensor | None = None) -> _State:
    n = len(q)
    return _State(
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


def _log_sum(state: _State) -> Tensor:
    return torch.where(state.total == 0, -math.inf, state.top + state.total.log())


def _backward(
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
        for tile, down, across in _tiles(q, k, half=mirrored):
            _ops.pairwise_slopes(tile, down.start, across.start, *rules.arguments(), *slopes)
            _spread(tile, q, k, down, across, of_q, of_q if mirrored else of_k, constant)
    return of_q, of_k


def _spread(
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


def _differentiable(
    plain: Callable[..., Any], inputs: tuple[Tensor, ...], needed: tuple[bool, ...], upstream: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients with a graph of their own, through the plain form."""
    with torch.enable_grad():
        found = plain(*inputs)
        leaves = [x for x, wanted in zip(inputs, needed, strict=False) if wanted]
        grads = iter(torch.autograd.grad(found, leaves, upstream, create_graph=True))
    return tuple(next(grads) if wanted else None for wanted in needed)


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
        state = _forward(queries, keys, rules, similarity=True, mean_key=ctx.direct, mirrored=ctx.mirrored)
        log_sum = _log_sum(state)
        ctx.rules, ctx.plain, ctx.bounded = rules, plain, state.shift is not None
        ctx.save_for_backward(q, k, log_sum, state.total, state.top if ctx.bounded else None, state.mean_key)
        ctx.mark_non_differentiable(state.mass)
        return log_sum, cast(Tensor, state.similarity), state.mass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, log_sum, total, top, mean_key = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or transformed(*upstream):
            return *_differentiable(ctx.plain, (q, k), needed, upstream[:2]), None, None, None
        of_sum = torch.where(log_sum == -math.inf, 0, upstream[0]) * ctx.rules.sharpness
        pull = upstream[1].contiguous()
        if ctx.direct:
            grad = mean_key * (of_sum / torch.where(total == 0, 1, total))[:, None]
            return _pulled(grad, k, ctx.rules, pull), *[None] * 4
        log_sum = _finite(log_sum)
        if ctx.bounded:
            of_sum, log_sum = of_sum * (top - log_sum).exp(), top
        slopes = log_sum, of_sum.contiguous(), None, None, 0, pull, ctx.mirrored, ctx.bounded
        grads = _backward(q.contiguous(), k.contiguous(), ctx.rules, needed, slopes, mirrored=ctx.mirrored)
        return *grads, None, None, None


def _pulled(grad: Tensor, k: Tensor, rules: Pairs, pull: Tensor) -> Tensor:
    """Adds what the few positives by index give to the queries' gradient."""
    if rules.index is None:
        return grad
    for j in range(rules.index.shape[1]):
        t = pull if rules.probability is None else pull * rules.probability[:, j]
        grad.addcmul_(k[rules.index[:, j]], t[:, None])
    return grad


def _finite(log_sum: Tensor) -> Tensor:
    """With 0 for rows without a candidate."""
    return torch.where(log_sum == -math.inf, 0, log_sum)


def _mean_of(state: _State) -> Tensor:
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
            state, ctx.grads = _forward(queries, keys, rules, dot=True, mean_key=ctx.direct), None
        mean, log_sum = _mean_of(state), _log_sum(state)
        ctx.save_for_backward(q, k, log_sum, mean, state.total, state.mean_key)
        ctx.mark_non_differentiable(log_sum)
        return mean, log_sum

    @staticmethod
    def with_gradient(
        q: Tensor, k: Tensor, rules: Pairs, fixed: int | None, constant: int
    ) -> tuple[_State, tuple[Tensor, Tensor]]:
        """The sums, and the gradients of queries and keys where every row weighs 1."""
        state, of_q, of_k = _new_state(q, True, False, False), torch.zeros_like(q), torch.zeros_like(k)
        sums = state.top, state.total, state.dot, None, None, None, False
        mean, log_sum = q.new_zeros(2, len(q))
        slopes = _mean_slopes(log_sum, torch.ones_like(mean), mean, fixed, rules.sharpness)
        with without_autocast(q):
            for down, tiles in _strips(q, k):
                for tile, across in tiles:
                    _ops.pairwise_rows(tile, down.start, across.start, *rules.arguments(), *sums)
                strip = state._replace(top=state.top[down], total=state.total[down], dot=cast(Tensor, state.dot)[down])
                mean[down], log_sum[down] = _mean_of(strip), _finite(_log_sum(strip))
                for tile, across in tiles:
                    _ops.pairwise_slopes(tile, down.start, across.start, *rules.arguments(), *slopes)
                    _spread(tile, q, k, down, across, of_q, of_k, constant)
        return state, (of_q, of_k)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, log_sum, mean, total, mean_key = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or transformed(*upstream):
            return *_differentiable(ctx.plain, (q, k), needed, upstream[:1]), *[None] * 5
        slope = torch.where(total == 0, 0, upstream[0])
        if ctx.direct:
            return mean_key * (slope / torch.where(total == 0, 1, total))[:, None], *[None] * 6
        of_q = None
        if ctx.grads is not None:
            of_q = ctx.grads[0] * slope[:, None]
            if bool((upstream[0] == upstream[0][0]).all()):
                return of_q, ctx.grads[1] * upstream[0][0], *[None] * 5
            needed = False, True
        slopes = _mean_slopes(_finite(log_sum), slope.contiguous(), mean, ctx.fixed, ctx.rules.sharpness)
        grads = _backward(q.contiguous(), k.contiguous(), ctx.rules, needed, slopes, constant=ctx.constant)
        return grads[0] if of_q is None else of_q, grads[1], *[None] * 5


class _Sigmoid(torch.autograd.Function):
    """:func:`sigmoid_sums`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Tensor, rules: Pairs, plain: Callable[..., Tensor]) -> Tensor:
        ctx.rules, ctx.plain = rules, plain
        ctx.save_for_backward(q, k, bias)
        sums = q.new_zeros(len(q))
        with without_autocast(q):
            for tile, down, across in _tiles(q.contiguous(), k.contiguous()):
                _ops.pairwise_sigmoid(tile, down.start, across.start, *rules.arguments(), bias, sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, bias = ctx.saved_tensors
        (upstream,) = grads
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or transformed(upstream):
            return *_differentiable(ctx.plain, (q, k, bias), needed, (upstream,)), None, None
        of_q, of_k = (torch.zeros_like(x) if wanted else None for x, wanted in zip((q, k), needed, strict=False))
        sums, upstream = q.new_zeros(len(q)), upstream.contiguous()
        queries, keys = q.contiguous(), k.contiguous()
        with without_autocast(q):
            for tile, down, across in _tiles(queries, keys):
                _ops.pairwise_sigmoid_slopes(
                    tile, down.start, across.start, *ctx.rules.arguments(), bias, upstream, sums
                )
                _spread(tile, queries, keys, down, across, of_q, of_k)
        return of_q, of_k, sums.sum() if needed[2] else None, None, None
