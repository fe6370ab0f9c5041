"""Selection of training examples by name: what the coreset recipe and ``counterpoise-select`` have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoise._core import check_choice, check_number, generator_for
from counterpoise.recipes.report_pictures import encoded
from counterpoise.samplers import (
    Selection,
    coverage_centric,
    el2n_scores,
    facility_location,
    grand_scores,
    herding,
    k_center_greedy,
    moderate_coreset,
)
from counterpoise.samplers.selection import class_budgets

SCORES = ("el2n", "grand", "forgetting")  # larger = harder
METHODS = ("random", *SCORES, "coverage", "herding", "k_center", "facility_location", "moderate")
KEEPS = ("hardest", "easiest")


@dataclass(frozen=True)
class Pool:
    """What is known of the N examples that are selected from.

    Args:
        targets: (N,) class indices.
        features: (N, D) embeddings.
        logits: (N, C) of a model trained a little, or None.
        forgetting: (N,) forgetting events, or None.
    """

    targets: Tensor
    features: Tensor
    logits: Tensor | None = None
    forgetting: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Chosen:
    """A selection with the scores it was made by; ``scores`` is (N,), larger = harder, or None."""

    selection: Selection
    scores: Tensor | None


def check_method(method: str, fraction: float, keep: str) -> None:
    """Raises ValueError for settings that :func:`choose` would refuse."""
    check_choice("method", method, METHODS)
    check_choice("keep", keep, KEEPS)
    check_number("fraction", fraction, 0, 1, open_low=True)


def choose(
    pool: Pool, method: str, fraction: float, *, balanced: bool = True, keep: str = "hardest", seed: int = 0
) -> Chosen:
    """A fraction of the pool by any method.

    Args:
        pool: what is known.
        method: one of :data:`METHODS`; "coverage" is stratified by EL2N.
        fraction: in (0, 1] of the examples, rounded; at least one a class where ``balanced``.
        balanced: select inside every class, in proportion to its size.
        keep: by scores, the "hardest" or the "easiest".
        seed: of what is random.

    Raises:
        ValueError: settings out of range, or a score without what it is made of.
    """
    check_method(method, fraction, keep)
    targets = pool.targets.long()
    counts = targets.bincount()
    budget = max(1, round(fraction * len(pool)))
    if balanced or method == "moderate":
        budget = max(budget, int((counts > 0).sum()))
    scores = _scores(pool, "el2n" if method == "coverage" else method)
    within = targets if balanced else None
    features = pool.features
    if method == "random" or method in SCORES:
        rank = torch.rand(len(pool), generator=generator_for(seed), dtype=torch.float64) if scores is None else scores
        return Chosen(_best(rank if keep == "hardest" else -rank, budget, within), scores)
    if scores is not None:  # coverage: what ranks by scores alone is done
        selection = coverage_centric(scores, budget, seed=seed)
    elif method == "herding":
        selection = herding(features, budget, targets=within)
    elif method == "k_center":
        selection = k_center_greedy(features, budget, first="medoid", targets=within, seed=seed)
    elif method == "facility_location":
        selection = facility_location(features, budget, targets=within, seed=seed)
    else:
        selection = moderate_coreset(features, targets, fraction)
    return Chosen(selection, scores)


def _scores(pool: Pool, method: str) -> Tensor | None:
    if method not in SCORES:
        return None
    if method == "forgetting":
        if pool.forgetting is None:
            raise ValueError("method is 'forgetting', which needs the events of a training run: use recipe=coreset")
        never = pool.forgetting.isinf()
        most = pool.forgetting[~never].max() if bool((~never).any()) else pool.forgetting.new_zeros(())
        return torch.where(never, most + 1, pool.forgetting)
    if pool.logits is None:
        raise ValueError(f"method is {method!r}, which needs logits")
    if method == "el2n":
        return el2n_scores(pool.logits, pool.targets).double()
    return grand_scores(pool.logits, pool.targets, pool.features).double()


def _best(rank: Tensor, budget: int, targets: Tensor | None) -> Selection:
    """The largest ranks, ties to the lowest index; weights are class size over share, or N over the budget."""
    order = rank.argsort(descending=True, stable=True)
    if targets is None:
        picked = order[:budget]
        return Selection(picked, torch.full((budget,), len(rank) / budget, dtype=torch.float64), gains=rank[picked])
    counts = targets.bincount()
    shares = class_budgets(counts, budget)
    kept = [order[targets[order] == k][: int(share)] for k, share in enumerate(shares)]
    picked = torch.cat(kept)
    weights = (counts.double() / shares.clamp_min(1))[targets[picked]]
    return Selection(picked, weights, gains=rank[picked])


def coverage_curve(features: Tensor, order: Tensor, points: int = 12) -> tuple[list[int], list[float]]:
    """Mean distance of all examples to the nearest kept one, after the first k of ``order``, for growing k.

    Args:
        features: (N, D); order: (b,) indices, the first kept first; points: how many k, evenly in the logarithm.
    """
    x = features.double()
    sizes = sorted({round(math.exp(t * math.log(len(order)) / max(points - 1, 1))) for t in range(points)})
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64)
    means, done = [], 0
    for size in sizes:
        for part in order[done:size].split(256):
            nearest = torch.minimum(nearest, torch.cdist(x, x[part]).amin(1))
        done = size
        means.append(float(nearest.mean()))
    return sizes, means


def pictures(
    examples: Any, class_names: Sequence[str], kept: Tensor, scores: Tensor | None, most: int = 8
) -> dict[str, list[Any]]:
    """Class name and PNG of the first picks, and of the dropped examples of the lowest score; empty for no images.

    Args:
        examples: data set of ``dict(input, target)``.
        class_names: (C,).
        kept: (b,) indices; scores: (N,), or None.
        most: of each.
    """
    shape = examples[0]["input"].shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        return {}
    dropped = torch.ones(len(examples), dtype=torch.bool)
    dropped[kept] = False
    rest = dropped.nonzero().flatten()
    rest = rest if scores is None else rest[scores[rest].argsort(stable=True)]

    def shown(rows: Tensor) -> list[Any]:
        items = [examples[int(row)] for row in rows[:most]]
        return [[class_names[int(item["target"])], encoded(item["input"])] for item in items]

    return {"kept": shown(kept), "dropped": shown(rest)}


def write_selection(file: Path, arrays: dict[str, Any]) -> None:
    """Writes an ``.npz`` in one step; None is left out."""
    aside = file.with_suffix(".part.npz")
    given: dict[str, Any] = {name: np.asarray(values) for name, values in arrays.items() if values is not None}
    np.savez_compressed(aside, **given)
    os.replace(aside, file)


def read_selection(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a selection.npz."""
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
