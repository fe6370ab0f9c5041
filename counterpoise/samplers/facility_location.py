r"""Facility location: a subset that stands in for all examples, each counted with its most similar pick.

.. math:: F(A) = \sum_i \max_{j \in A} S_{ij}, \qquad
          \text{gain}(j) = \sum_i \max(0,\; S_{ij} - c_i), \quad c_i = \max_{s \in A} S_{is}

F is monotone and submodular, so that the greedy set reaches 1 - 1/e of the best value. S = max(D) - D for Euclidean
distances; weights count the examples that each pick stands for (ties to the first in the order of the picks; sum N).

Nothing N x N is kept: similarities are formed in tiles from the features. Gains only ever fall, so that a stale one is
an upper bound. Beside the heap's rule (evaluate the best bound anew, accept it if it stays the best; here in blocks),
the evaluated leaders follow each pick exactly, at the cost of the rows that the pick captured, about N / t after t
picks; when bounds have gone too stale, all gains are brought up to date over the captured rows alone. All in all that
costs a few passes over N x N, where re-evaluating every gain at every pick costs one each. The picks are those of the
naive greedy.

The released CRAIG code takes example 0 for its empty marker, so that 0 is always its second pick; DeepCore's weights
sum to N + b. Neither is followed.

Source: Mirzasoleiman et al., Coresets for Data-efficient Training of Machine Learning Models, 2020, algorithm 1; lazy
greedy: Minoux, 1978; stochastic greedy: Mirzasoleiman et al., Lazier Than Lazy Greedy, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_number, generator_for
from counterpoise.kernels import selection
from counterpoise.samplers.dissimilarity import Cosine, Dense, Dissimilarity, Distance, Rows, tile
from counterpoise.samplers.selection import (
    Selection,
    check_budget,
    check_features,
    check_start,
    check_targets,
    select_per_class,
)

TILE = 512  # rows and columns of a tile
BLOCK = 128  # candidates evaluated anew at once


def facility_location(
    features: Tensor | None = None,
    budget: int = 1,
    *,
    similarity: Tensor | None = None,
    metric: str = "euclidean",
    already_selected: Tensor | None = None,
    targets: Tensor | None = None,
    method: str = "lazy",
    delta: float = 0.01,
    seed: int = 0,
) -> Selection:
    """Greedy maximisation of the facility-location value; the formula is at the top of this file.

    Args:
        features: (N, D), finite; or None with a ``similarity``.
        budget: picks in [1, N], those of ``already_selected`` included.
        similarity: (N, N) entries >= 0 instead of features; column j says how well j stands for every row.
        metric: "euclidean", S = max(D) - D, or "cosine", S = (1 + cos) / 2.
        already_selected: (a,) distinct indices to start from; they come first in the result.
        targets: (N,) class indices: select inside each class, with shares of the budget as
            :func:`~counterpoise.samplers.selection.class_budgets` divides it.
        method: "lazy", the exact greedy, or "stochastic": each pick is the best of (N / b) log(1 / delta) random
            candidates, which reaches 1 - 1/e - delta in expectation.
        delta: in (0, 1), of the stochastic method.
        seed: >= 0, of the stochastic method.

    Returns:
        A selection whose weights sum to N, whose gains are those of the picks, and whose value is F (None with
        targets). Ties go to the lowest index; gains that differ by rounding alone count as ties.

    Raises:
        ValueError, TypeError: a shape, type or setting that does not fit.
    """
    check_choice("metric", metric, ("euclidean", "cosine"))
    check_choice("method", method, ("lazy", "stochastic"))
    check_number("delta", delta, 0, 1, open_low=True)
    rows = _one_of(features, similarity)
    check_budget(budget, len(rows))
    start = check_start(already_selected, len(rows), budget)
    if targets is not None:
        check_targets(targets, rows)
        if start:
            raise ValueError("targets and already_selected were both given, expected one of them")
        options = {"metric": metric, "method": method, "delta": delta, "seed": seed}

        def inside(members: Tensor, share: int) -> Selection:
            block = None if similarity is None else similarity[members][:, members]
            part = None if features is None else features[members]
            return facility_location(part, share, similarity=block, **options)  # type: ignore[arg-type]

        return select_per_class(targets, budget, inside)
    costs: Dissimilarity
    if similarity is not None:
        costs = Dense(similarity.detach())
    else:
        costs = Cosine(rows.detach()) if metric == "cosine" else Distance(rows.detach())
    return greedy_facility_location(costs, budget, method, delta, seed, start)


def _one_of(features: Tensor | None, similarity: Tensor | None) -> Tensor:
    """The one that is given, checked."""
    if features is not None and similarity is None:
        check_features(features)
        return features
    if similarity is None or features is not None:
        raise ValueError("facility_location takes either features or similarity, expected exactly one of them")
    check_features(similarity, "similarity")
    if similarity.shape[0] != similarity.shape[1] or bool((similarity < 0).any()):
        raise ValueError(f"similarity has shape {tuple(similarity.shape)}, expected (N, N) with entries >= 0")
    return similarity


def greedy_facility_location(
    costs: Dissimilarity, budget: int, method: str, delta: float, seed: int, start: Sequence[int] = ()
) -> Selection:
    """The greedy on any dissimilarity with tiles; arguments as :func:`facility_location` has them."""
    greedy = _Greedy(costs)
    for index in start:
        greedy.pick(index, float(greedy.gains_of(torch.tensor([index], device=costs.device))))
    if method == "stochastic":
        size = min(len(costs), math.ceil(len(costs) / budget * math.log(1 / delta)))
        greedy.select_stochastically(budget, size, generator_for(seed))
    else:
        greedy.select(budget)
    return greedy.selection()


class _Greedy:
    """Least costs so far, upper bounds of all gains, and the leaders, whose gains are current."""

    def __init__(self, costs: Dissimilarity) -> None:
        self.costs = costs
        n, device = len(costs), costs.device
        sums, largest = _column_sums(costs)
        self.ceiling = largest if costs.ceiling is None else costs.ceiling
        self.bounds = n * self.ceiling - sums
        self.slack = 1e-12 * float(self.bounds.max())  # gains closer than this are ties
        self.least = torch.full((n,), self.ceiling, dtype=torch.float64, device=device)
        self.assignment = torch.zeros(n, dtype=torch.int64, device=device)
        self.picks: list[int] = []
        self.gains: list[float] = []
        self.most_leaders = max(4 * BLOCK, n // 16)
        self._start_over()

    def _start_over(self) -> None:
        """All bounds are current: the largest lead, and of those that tie for the best the lowest index."""
        self.least_then = self.least.clone()
        self.evaluated, self.all_current = 0, True
        first = self.bounds.topk(min(self.most_leaders // 2, len(self.bounds))).indices
        lowest = (self.bounds >= self.bounds[first[0]] - self.slack).nonzero()[0]
        first = first if bool((first == lowest).any()) else torch.cat([first, lowest])
        self.leaders, self.leader_gains = first[:0], self.bounds[:0]
        self._lead(first, self.bounds[first])

    def _lead(self, new: Tensor, gains: Tensor) -> None:
        """Takes candidates among the leaders, which are kept in order of index."""
        self.leaders, order = torch.cat([self.leaders, new]).sort()
        self.leader_gains = torch.cat([self.leader_gains, gains])[order]
        self.others = self.bounds.clone()
        self.others[self.leaders] = -torch.inf

    def select(self, budget: int) -> None:
        """The exact greedy, lazily evaluated."""
        while len(self.picks) < budget:
            best = float(self.leader_gains.max())
            rivals = int((self.others >= best - self.slack).sum())
            if rivals and not self.all_current:
                self._evaluate(rivals)
                continue
            leader = int((self.leader_gains >= best - self.slack).nonzero()[0])
            self.pick(int(self.leaders[leader]), float(self.leader_gains[leader]))

    def _evaluate(self, rivals: int) -> None:
        """Current gains for bounds that may win: a block of the best anew, or of all over the captured rows."""
        captured = (self.least < self.least_then).nonzero().flatten()
        block = min(rivals, BLOCK)
        self.evaluated += block
        if self.evaluated <= len(captured) and len(self.leaders) + block <= self.most_leaders:
            best = self.others.topk(block).indices
            self._lead(best, self.gains_of(best))
            return
        for columns in _tiles(len(self.bounds)):
            for rows in captured.split(TILE):
                self.bounds[columns] -= _taken(self.costs, rows, columns, self.least_then[rows], self.least[rows])
        self._start_over()

    def gains_of(self, candidates: Tensor) -> Tensor:
        """Gains formed anew over all rows: the sum of max(0, c_i - C_ij)."""
        gains = torch.zeros(len(candidates), dtype=torch.float64, device=self.least.device)
        for rows in _tiles(len(self.least), TILE * TILE // max(len(candidates), BLOCK)):
            gains += _taken(self.costs, rows, candidates, self.least[rows])
        return gains

    def pick(self, index: int, gain: float) -> None:
        """Adds a pick: the rows that it captures, and what it takes from the leaders' gains."""
        this = torch.tensor([index], device=self.least.device)
        if self.costs.symmetric:
            column = tile(self.costs, this, slice(None))[0]
        else:
            column = tile(self.costs, slice(None), this)[:, 0]
        rows = (column < self.least).nonzero().flatten()
        before, after = self.least[rows], column[rows]
        for part, high, low in zip(rows.split(TILE), before.split(TILE), after.split(TILE), strict=True):
            for some in _tiles(len(self.leaders)):
                self.leader_gains[some] -= _taken(self.costs, part, self.leaders[some], high, low)
        self.least[rows] = after
        self.assignment[rows] = len(self.picks)
        self.all_current = False
        self.leader_gains[self.leaders == index] = self.bounds[index] = self.others[index] = -torch.inf
        self.picks.append(index)
        self.gains.append(max(gain, 0.0))

    def select_stochastically(self, budget: int, size: int, generator: torch.Generator) -> None:
        """Each pick is the best of ``size`` random candidates that are left."""
        self.leaders, self.leader_gains = self.leaders[:0], self.leader_gains[:0]
        left = torch.ones(len(self.least), dtype=torch.bool)
        left[self.picks] = False
        while len(self.picks) < budget:
            there = left.nonzero().flatten()
            drawn = there[torch.randperm(len(there), generator=generator)[:size]].sort().values
            drawn = drawn.to(self.least.device)
            gains = self.gains_of(drawn)
            winner = int((gains >= gains.max() - self.slack).nonzero()[0])
            self.pick(int(drawn[winner]), float(gains[winner]))
            left[self.picks[-1]] = False

    def selection(self) -> Selection:
        """The result."""
        device = self.least.device
        return Selection(
            torch.tensor(self.picks, device=device),
            torch.bincount(self.assignment, minlength=len(self.picks)).double(),
            gains=torch.tensor(self.gains, dtype=torch.float64, device=device),
            assignment=self.assignment,
            value=float((self.ceiling - self.least).sum()),
        )


def _column_sums(costs: Dissimilarity) -> tuple[Tensor, float]:
    """(N,) sums of the columns, and the largest entry; of a symmetric matrix one half is formed."""
    n = len(costs)
    sums = torch.zeros(n, dtype=torch.float64, device=costs.device)
    largest = torch.tensor(-torch.inf, dtype=torch.float64, device=costs.device)
    for rows in _tiles(n):
        for columns in _tiles(n):
            if costs.symmetric and columns.start < rows.start:
                continue
            here = tile(costs, rows, columns)
            sums[columns] += here.sum(0)
            if costs.symmetric and columns.start > rows.start:
                sums[rows] += here.sum(1)
            largest = torch.maximum(largest, here.amax())
    return sums, float(largest)


def _taken(costs: Dissimilarity, rows: Rows, columns: Rows, before: Tensor, after: Tensor | None = None) -> Tensor:
    """What candidates lose when rows' costs fall: the sum of max(0, before - C) - max(0, after - C); None is -inf."""
    if selection.takes(before, "taken"):
        raw = costs.raw(rows, columns)
        taken = before.new_zeros(raw.shape[1])
        selection.add_taken(taken, raw, costs.rounding, before, after)
        return taken
    here = tile(costs, rows, columns)
    here = here if after is None else torch.maximum(here, after[:, None], out=here)
    return before.sum() - torch.minimum(here, before[:, None], out=here).sum(0)


def _tiles(n: int, size: int = TILE) -> list[slice]:
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]
