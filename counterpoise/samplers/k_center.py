r"""k-center greedy: picks the example farthest from all picked so far, so that none is left far away.

.. math:: m_i = \min_{s \in A} \lVert x_i - x_s \rVert, \qquad A \leftarrow A \cup \{\arg\max_i m_i\}

The largest m_i at the end is the covering radius; it is at most twice the smallest that any set of this size reaches.
Distances are exact differences in float64: the form xx + yy - 2xy loses digits, and does not see duplicates.

It is evaluated lazily. Distances to the picked set only ever fall, so those of the last full pass are upper bounds:
only the examples that led then are followed pick by pick, and all others are brought up to date, by matrix products,
when their best bound reaches the leaders' best. The picks are those of the plain loop. DeepCore keeps a b x N matrix
and returns the picks in order of index; here memory is O(N), and picks come in their order.

Source: Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, 2018, algorithm 1;
lazy evaluation: derived.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_choice, generator_for
from counterpoise.kernels import selection
from counterpoise.samplers.selection import (
    Selection,
    check_budget,
    check_features,
    check_start,
    check_targets,
    select_per_class,
)

TILE = 1 << 19  # numbers in a tile of distances
ROWS = 4096  # of the features in float64 at once


def k_center_greedy(
    features: Tensor,
    budget: int,
    *,
    first: str | int = "random",
    already_selected: Tensor | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
) -> Selection:
    """Farthest-first selection; the rule is at the top of this file.

    Args:
        features: (N, D), finite.
        budget: picks in [1, N], those of ``already_selected`` included.
        first: "random" (by ``seed``), "medoid" (least sum of squared distances, which is nearest to the mean), or an
            index. Not read where ``already_selected`` is given.
        already_selected: (a,) distinct indices to start from; they come first in the result.
        targets: (N,) class indices: select inside each class, with shares of the budget as
            :func:`~counterpoise.samplers.selection.class_budgets` divides it.
        seed: >= 0, of the random first pick.

    Returns:
        A selection whose weights count the examples nearest to each pick (ties to the earlier pick; sum N), whose
        gains are each pick's distance to those before it (inf for what it starts from), and whose value is the
        covering radius. It is shorter than the budget, and a note says so, where every example is covered exactly.
        Ties go to the lowest index.

    Raises:
        ValueError, TypeError: a shape, type or setting that does not fit.
    """
    check_features(features)
    check_budget(budget, len(features))
    if targets is not None:
        check_targets(targets, features)
        if already_selected is not None or isinstance(first, int):
            raise ValueError('targets was given with indices to start from, expected first="random" or "medoid"')

        def inside(members: Tensor, share: int) -> Selection:
            return k_center_greedy(features[members], share, first=first, seed=seed)

        return select_per_class(targets, budget, inside)
    start = _starting_points(features, budget, first, already_selected, seed)
    cover = _Cover(features.detach(), start)
    return cover.extend(budget)


def _starting_points(
    features: Tensor, budget: int, first: str | int, already_selected: Tensor | None, seed: int
) -> list[int]:
    """The indices that the greedy starts from."""
    n = len(features)
    if already_selected is not None:
        return check_start(already_selected, n, budget)
    if isinstance(first, int) and not isinstance(first, bool):
        if not 0 <= first < n:
            raise ValueError(f"first is {first}, expected an index in [0, {n - 1}]")
        return [first]
    check_choice("first", first, ("random", "medoid"))
    if first == "random":
        return [int(torch.randint(n, (), generator=generator_for(seed)))]
    mean = _mean(features)
    distance = torch.cat([(part - mean).square().sum(1) for part in features.split(ROWS)])
    return [_first_of_largest(-distance)]


def _mean(features: Tensor) -> Tensor:
    """(D,) float64 mean, summed in parts so that no float64 copy of all is made."""
    return torch.stack([part.sum(0, dtype=torch.float64) for part in features.split(ROWS)]).sum(0) / len(features)


def _first_of_largest(values: Tensor) -> int:
    """The lowest position of the largest value."""
    return int((values == values.max()).nonzero()[0])


class _Cover:
    """Distances of all examples to the picked set, exact for the leaders and upper bounds for the others."""

    def __init__(self, features: Tensor, start: list[int]) -> None:
        n, device = len(features), features.device
        self.features = features
        self.mean = _mean(features)
        self.squares = torch.cat([(part - self.mean).square().sum(1) for part in features.split(ROWS)])
        self.picks = list(start)
        self.seen = 0  # picks that every example's distance knows of
        self.distance = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
        self.nearest = torch.zeros(n, dtype=torch.int64, device=device)
        self.leaders_wanted = max(256, n // 64)

    def _rows(self, rows: Tensor | slice | list[int]) -> Tensor:
        """Some features in float64, centred so that products lose fewer digits."""
        return self.features[rows].double() - self.mean

    def extend(self, budget: int) -> Selection:
        """Picks until the budget is spent or everything is covered."""
        gains, notes = [torch.inf] * len(self.picks), []
        self._bring_up_to_date()
        while len(self.picks) < budget:
            best = _first_of_largest(self.leader_distance)
            index, gap = int(self.leaders[best]), float(self.leader_distance[best])
            if gap < self.bound or (gap == self.bound and index > self.bound_index):
                self._bring_up_to_date()
                continue
            if gap == 0:
                notes.append(f"every example coincides with one of {len(self.picks)} picks, fewer than {budget}")
                break
            if selection.takes(self.leader_features, "follow"):
                gains += self._follow_on(budget)
                continue
            self.picks.append(index)
            gains.append(gap)
            self._follow(best)
        self._bring_up_to_date(leaders=False)
        device = self.features.device
        return Selection(
            torch.tensor(self.picks, device=device),
            torch.bincount(self.nearest, minlength=len(self.picks)).double(),
            gains=torch.tensor(gains, dtype=torch.float64, device=device),
            assignment=self.nearest,
            value=float(self.distance.max()),
            notes=tuple(notes),
        )

    def _follow_on(self, budget: int) -> list[float]:
        """Picks among the leaders as long as they lead; the distances of the picks."""
        followed = self.leader_features, self.leaders, self.leader_distance, self.bound, self.bound_index
        picks, gaps = selection.follow(*followed, budget - len(self.picks))
        self.picks += picks
        return gaps

    def _follow(self, pick: int) -> None:
        """Shows the leaders one pick of theirs; those that fell below the bound are followed no more."""
        centre = self.leader_features[pick : pick + 1]
        changed, exact, _ = _closer(self.leader_features, self.leader_squares, self.leader_distance, centre)
        self.leader_distance[changed] = exact
        self.leader_distance[pick] = 0
        kept = self.leader_distance >= self.bound
        if len(self.picks) % 16 == 0 and 0 < int(kept.sum()) < len(kept) // 2:
            self._lead(self.leaders[kept], self.leader_distance[kept])

    def _bring_up_to_date(self, leaders: bool = True) -> None:
        """Shows every example the picks that it has not seen, and chooses the leaders anew."""
        new = self.picks[self.seen :]
        centres, rows = self._rows(new), max(1, TILE // max(128, len(new)))
        for begin in range(0, len(self.features) if new else 0, rows):
            tile = slice(begin, begin + rows)
            changed, exact, position = _closer(self._rows(tile), self.squares[tile], self.distance[tile], centres)
            self.distance[tile][changed] = exact
            self.nearest[tile][changed] = position + self.seen
        self.nearest[new] = torch.arange(self.seen, len(self.picks), device=self.nearest.device)
        self.distance[new] = 0
        if leaders:
            if self.seen and len(new) * self.leaders_wanted < len(self.features):  # more leaders cost less than passes
                self.leaders_wanted = min(2 * self.leaders_wanted, min(8192, max(256, len(self.features) // 8)))
            self._choose_leaders()
        self.seen = len(self.picks)

    def _choose_leaders(self) -> None:
        """The examples of largest distance, the lowest indices among ties; ``bound`` is the best of the others."""
        wanted = min(self.leaders_wanted, len(self.distance))
        least = self.distance.topk(wanted).values[-1]
        chosen = self.distance > least
        ties = (self.distance == least).nonzero().flatten()
        chosen[ties[: wanted - int(chosen.sum())]] = True
        others = self.distance.masked_fill(chosen, -1.0)
        self.bound, self.bound_index = float(others.max()), _first_of_largest(others)
        self._lead(chosen.nonzero().flatten(), self.distance[chosen])

    def _lead(self, leaders: Tensor, distance: Tensor) -> None:
        self.leaders, self.leader_distance = leaders, distance
        self.leader_features, self.leader_squares = self._rows(leaders), self.squares[leaders]


def _closer(x: Tensor, squares: Tensor, distance: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows some centre is closer to than ``distance``, its exact distance, and which centre (ties: the first).

    A product finds the centre; only rows that it may bring closer are evaluated by differences.
    """
    others = centres.square().sum(1)
    relative = torch.addmm(others, x, centres.T, alpha=-2)
    rounding = 1e-14 * (squares + others.max())
    least = relative.amin(1)
    changed = (least + squares <= distance.square() + rounding).nonzero().flatten()
    if len(centres) > 1:
        position = (relative <= (least + rounding)[:, None]).to(torch.uint8).argmax(1)[changed]
    else:
        position = torch.zeros_like(changed)
    if selection.takes(x, "distances"):
        exact = selection.distances(x, changed, centres, position)
    else:
        exact = torch.linalg.vector_norm(x[changed] - centres[position], dim=1)
    better = exact < distance[changed]
    return changed[better], exact[better], position[better]
