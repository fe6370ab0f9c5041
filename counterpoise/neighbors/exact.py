r"""Exact nearest neighbours in tiles: memory grows with the tile, never with queries x keys.

Products of matrices propose candidates, a distance through

.. math:: \lVert q - x \rVert^2 = \lVert q \rVert^2 - 2\, q^\top x + \lVert x \rVert^2

which loses digits where neighbours are close: a query that is itself a key is found at 0.001, not at 0, and copies of
one key at different distances. So candidates are evaluated again, pair by pair in float64, and rounded once. A bound on
the rounding of the products tells for which queries a better key may have been missed; these go through all keys again,
in float64. What comes out depends neither on tiles and threads nor on who proposed, and ties go to the smaller id:
scikit-learn and FAISS leave ties to the order of their heaps.

Source: derived; error of a product of d terms: Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from counterpoise._core import at_least_float32, check_choice, check_embeddings, check_number, without_autocast
from counterpoise.kernels import selection

METRICS = ("cosine", "euclidean", "inner_product")
TILE = 1 << 20  # numbers in a tile of products: few enough for a cache
ROWS = 512  # queries in a tile at most
FOLDS = 16  # columns of a tile that are compared before any is looked at
AGAIN = 64  # queries that go through all keys again at once
SPARE = 8  # candidates beyond k

Propose = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def nearest_neighbors(queries: Tensor, keys: Tensor, k: int, *, metric: str = "cosine") -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of ``keys`` to each of ``queries``, exactly.

    Args:
        queries: (Q, d), finite. Float64 is searched in float64, narrower types in float32.
        keys: (N, d) of the same width, finite.
        k: >= 1.
        metric: "cosine" and "inner_product" give similarities, largest first; "euclidean" distances (not squared, as
            FAISS gives them), smallest first.

    Returns:
        Values (Q, k) and indices (Q, k) int64; ties to the smaller index. Beyond N the values are those of a key
        infinitely far away, and the indices -1. Neither carries a gradient.

    Raises:
        ValueError, TypeError: a shape, type, metric or k that does not fit, or numbers that are not finite.
    """
    check_choice("metric", metric, METRICS)
    check_number("k", k, 1)
    check_finite("keys", keys)
    check_finite("queries", queries, width=keys.shape[1])
    known = Keys(prepare(keys, metric), torch.arange(len(keys), device=keys.device), metric)
    costs, ids = search(known, prepare(queries, metric).to(known.vectors), k)
    return as_values(costs, metric), ids


def check_finite(name: str, x: Tensor, width: int | None = None) -> None:
    """Raises unless ``x`` is a floating, finite (N, d) tensor, of one width where that is given."""
    check_embeddings(name, x)
    if width is not None and x.shape[1] != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (N, {width})")
    if not all(bool(part.isfinite().all()) for part in x.split(4096)):
        raise ValueError(f"{name} holds NaN or infinity, expected finite numbers")


@torch.no_grad()
def prepare(x: Tensor, metric: str) -> Tensor:
    """``x`` as the metric compares it: in float32 at least; for the cosine of unit length, or zero where it is zero."""
    x = at_least_float32(x.detach())
    if metric != "cosine":
        return x
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    return x * torch.where(lengths > torch.finfo(x.dtype).tiny, 1 / lengths, 0).to(x)


def as_values(costs: Tensor, metric: str) -> Tensor:
    """Costs, of which less is better, as the metric's own values."""
    return costs if metric == "euclidean" else -costs


@dataclass(frozen=True)
class Keys:
    """Prepared vectors (N, d), in any order, with their ids (N,) and the metric that compares them."""

    vectors: Tensor
    ids: Tensor
    metric: str

    @cached_property
    def squares(self) -> Tensor:
        """(N,) squared lengths in float64."""
        return torch.cat([x.double().square().sum(1) for x in self.vectors.split(4096)])

    @cached_property
    def rounded_squares(self) -> Tensor:
        """(N,) squared lengths in the vectors' dtype."""
        return self.squares.to(self.vectors)

    @cached_property
    def radius(self) -> float:
        """The greatest length."""
        return float(self.squares.max()) ** 0.5

    def products(self, queries: Tensor, columns: slice, out: Tensor | None = None) -> Tensor:
        """(Q, columns) costs by a product of matrices, for a distance its square less the query's, in their dtype."""
        x = self.vectors[columns].to(queries)
        if self.metric != "euclidean":
            return torch.mm(-queries, x.T, out=out)
        squares = self.rounded_squares if out is not None else self.squares
        return torch.addmm(squares[columns].to(queries), queries, x.T, alpha=-2, out=out)

    def evaluate(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Exact costs of pairs, rounded once: ``queries`` (..., d) and the vectors at ``rows`` (...) broadcast."""
        q, x = queries.double(), self.vectors[rows].double()
        if self.metric == "euclidean":
            return x.sub_(q).square_().sum(-1).sqrt_().to(self.vectors.dtype)
        cost = x.mul_(q).sum(-1).neg_()
        if self.metric == "cosine":  # lengths are one but for the rounding
            cost /= (q.square().sum(-1) * self.squares[rows]).sqrt_().clamp_min_(torch.finfo(q.dtype).tiny)
        return cost.to(self.vectors.dtype)

    def error(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """(Q,) float64 bound on the error of :meth:`products` in ``dtype``; infinite where they may overflow."""
        lengths, numbers = queries.double().square().sum(1).sqrt(), torch.finfo(dtype)
        reach = lengths * self.radius if self.metric != "euclidean" else (lengths + self.radius).square()
        return torch.where(reach < numbers.max / 8, (queries.shape[1] + 8) * numbers.eps * reach, torch.inf)

    def threshold(self, queries: Tensor, costs: Tensor) -> Tensor:
        """(Q,) float64: what :meth:`products` gives for keys that round to ``costs`` (Q,), or a little more."""
        slack = 4 * torch.finfo(self.vectors.dtype).eps
        if self.metric == "euclidean":
            return costs.double().square() * (1 + slack) - queries.double().square().sum(1)
        return costs.double() + slack * costs.double().abs()


@torch.no_grad()
def search(keys: Keys, queries: Tensor, k: int, propose: Propose | None = None) -> tuple[Tensor, Tensor]:
    """Costs (Q, k), ascending, and ids (Q, k) of prepared queries; beyond the keys that there are, inf and -1.

    ``propose(queries, count)`` may find candidates in another way than by tiles: costs like :meth:`Keys.products` and
    rows, both (Q, count).
    """
    found, n = min(k, len(keys.vectors)), len(keys.vectors)
    costs = queries.new_full((len(queries), k), torch.inf)
    ids = keys.ids.new_full((len(queries), k), -1)
    if found == 0 or len(queries) == 0:
        return costs, ids
    with without_autocast(queries), full_precision():
        count = min(found + SPARE, n)
        near, rows = (propose or _propose_by_tiles(keys))(queries, count)
        for block in _slices(len(queries), max(1, TILE // (4 * count * queries.shape[1]))):
            costs[block, :found], ids[block, :found] = _settle(keys, queries[block], near[block], rows[block], found)
    return costs, ids


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the full precision of float32, whatever ``torch.set_float32_matmul_precision`` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _settle(keys: Keys, queries: Tensor, near: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of the candidates by exact costs, or of all keys where the candidates may miss one."""
    costs, ids = best(keys.evaluate(queries[:, None], rows), keys.ids[rows], k)
    if rows.shape[1] == len(keys.vectors):
        return costs, ids
    bound = keys.threshold(queries, costs[:, -1]) + keys.error(queries, queries.dtype)
    doubtful = (~(near.amax(1).double() > bound)).nonzero().flatten()
    for part in _slices(len(doubtful), AGAIN):
        some = doubtful[part]
        costs[some], ids[some] = _search_again(keys, queries[some], costs[some, -1], k)
    return costs, ids


def best(costs: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` least of each row, in order; ties by the smaller id."""
    order = ids.argsort(1)
    order = order.gather(1, costs.gather(1, order).argsort(dim=1, stable=True))[:, :k]
    return costs.gather(1, order), ids.gather(1, order)


def _propose_by_tiles(keys: Keys) -> Propose:
    def propose(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        parts = [_propose_for_block(keys, block, count) for block in queries.split(ROWS)]
        return torch.cat([near for near, _ in parts]), torch.cat([rows for _, rows in parts])

    return propose


def _propose_for_block(keys: Keys, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    numbers = TILE if queries.is_cpu else 64 * TILE  # an accelerator wants more work a call
    width = max(count, numbers // len(queries)) // FOLDS * FOLDS + FOLDS
    tile = queries.new_empty(len(queries) * min(width, len(keys.vectors)))

    def costs_of(columns: slice) -> Tensor:
        size = columns.stop - columns.start
        return keys.products(queries, columns, out=tile[: len(queries) * size].view(len(queries), size))

    first, *rest = _slices(len(keys.vectors), width)
    costs = costs_of(first)
    if found := selection.nearest_of(costs, count):
        for columns in rest:
            selection.see_nearest(costs_of(columns), columns.start, *found)
        return found
    best = _BestSoFar(*costs.topk(count, largest=False, sorted=False), count)
    for columns in rest:
        best.see(costs_of(columns), columns.start)
    return best.settled()


class _BestSoFar:
    """The least costs of each row, of tiles seen one after the other.

    A topk takes far longer a number than a comparison does, so few numbers should see one: minima over folds of a tile
    are compared with the row's worst, what is inside better ones is set aside, and a topk comes when much has gathered.
    """

    def __init__(self, near: Tensor, rows: Tensor, count: int) -> None:
        self.near, self.rows, self.count = near, rows, count
        self.worst = near.amax(1, keepdim=True) if near.shape[1] == count else near.new_full((len(near), 1), torch.inf)
        self.aside: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gathered = 0

    def see(self, costs: Tensor, start: int) -> None:
        """Takes in a tile whose first column is ``start``."""
        width = costs.shape[1] // FOLDS
        folded = costs[:, : width * FOLDS].unflatten(1, (FOLDS, width))
        query, column = (~(folded.amin(1) >= self.worst)).nonzero(as_tuple=True)
        inside = folded[query, :, column]
        pair, fold = (~(inside >= self.worst[query])).nonzero(as_tuple=True)
        self._set_aside(query[pair], fold * width + column[pair] + start, inside[pair, fold])
        rest = costs[:, width * FOLDS :]
        query, column = (~(rest >= self.worst)).nonzero(as_tuple=True)
        self._set_aside(query, column + width * FOLDS + start, rest[query, column])
        if self.gathered > 2 * self.near.numel():
            self.settled()

    def _set_aside(self, query: Tensor, row: Tensor, cost: Tensor) -> None:
        self.aside.append((query, row, cost))
        self.gathered += len(query)

    def settled(self) -> tuple[Tensor, Tensor]:
        """Costs and rows (Q, count), unordered, with all that was set aside."""
        if self.gathered == 0:
            return self.near, self.rows
        query, row, cost = (torch.cat(parts) for parts in zip(*self.aside, strict=True))
        query, order = query.sort()
        sizes = query.bincount(minlength=len(self.near))
        turn = torch.arange(len(query), device=query.device) - (sizes.cumsum(0) - sizes)[query]
        shape, kept = (len(self.near), int(sizes.max())), self.near.shape[1]
        near = torch.cat([self.near, self.near.new_full(shape, torch.inf)], 1)
        rows = torch.cat([self.rows, self.rows.new_zeros(shape)], 1)
        near[query, kept + turn], rows[query, kept + turn] = cost[order], row[order]
        self.near, at = near.topk(min(self.count, near.shape[1]), largest=False, sorted=False)
        self.rows = rows.gather(1, at)
        self.worst = self.near.amax(1, keepdim=True)
        self.aside, self.gathered = [], 0
        return self.near, self.rows


def _search_again(keys: Keys, queries: Tensor, limit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every key that float64 cannot tell to be beyond ``limit`` (Q,), an upper bound of the k-th cost."""
    wide = queries.double()
    bound = keys.threshold(queries, limit) + keys.error(queries, torch.float64)
    costs, ids = queries.new_empty(len(queries), 0), keys.ids.new_empty(len(queries), 0)
    for columns in _slices(len(keys.vectors), max(k, TILE // (4 * len(queries)))):
        some = keys.ids[columns]
        order = some.argsort()
        row, column = (keys.products(wide, columns) <= bound[:, None]).nonzero(as_tuple=True)
        tile = queries.new_full((len(queries), len(some)), torch.inf)
        for pairs in _slices(len(row), max(1, TILE // queries.shape[1])):
            exact = keys.evaluate(queries[row[pairs]], column[pairs] + columns.start)
            tile[row[pairs], column[pairs]] = exact
        near, at = _first_of_smallest(tile[:, order], min(k, len(some)))
        costs, ids = best(torch.cat([costs, near], 1), torch.cat([ids, some[order][at]], 1), k)
    return costs, ids


def _first_of_smallest(costs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` least of each row, of ties at the last place those of the lowest columns."""
    last = costs.kthvalue(count, dim=1, keepdim=True).values
    below, ties = costs < last, costs == last
    wanted = count - below.sum(1, keepdim=True)
    at = (below | (ties & (ties.cumsum(1) <= wanted))).nonzero()[:, 1].view(-1, count)
    return costs.gather(1, at), at
