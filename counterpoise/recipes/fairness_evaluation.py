r"""How alike a binary classifier treats groups, as a whole and inside subgroups: from counts alone.

.. math:: p\text{-rule} = \frac{\min_s P(\hat y = 1 \mid s)}{\max_s P(\hat y = 1 \mid s)}, \qquad
          \text{gap} = \max_s P(\hat y = 1 \mid s) - \min_s P(\hat y = 1 \mid s)

The p-rule is disparate impact as a ratio in [0, 1]; one is equal treatment. The equalised-odds gap is
0.5 (gap of the false-positive rate + gap of the true-positive rate): absolute gaps, where a sum of signed ones, as some
code has it, lets two unequal rates cancel. The *local* figures are those of the subgroup that has the worst.

Source: Grari et al., On the Fairness ROAD: Robust Optimization for Adversarial Debiasing, 2024; equalised odds: Hardt
et al., Equality of Opportunity in Supervised Learning, 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

CRITERIA = ("demographic_parity", "equalized_odds")
FEW = 30  # a rate of so many examples is known to about a tenth
SCALARS = (
    *("p_rule", "positive_rate_gap", "equalized_odds_gap"),
    *("worst_local_p_rule", "worst_local_positive_rate_gap", "fair_score"),
)


class FairnessCounts(Metric):
    """Examples by subgroup, group, true and predicted class, summed over batches and ranks.

    Args:
        num_subgroups: K; num_groups: G. ``compute()`` gives (K, G, 2, 2).
    """

    counts: Tensor

    def __init__(self, num_subgroups: int, num_groups: int) -> None:
        super().__init__()
        shape = (num_subgroups, num_groups, 2, 2)
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor, group: Tensor, subgroup: Tensor) -> None:
        """All (N,): predicted and true class in {0, 1}, 1 the favourable one, group and subgroup."""
        cell = ((subgroup * self.counts.shape[1] + group) * 2 + target) * 2 + predicted
        self.counts += torch.bincount(cell, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> Tensor:
        """(K, G, 2, 2) counts."""
        return self.counts


@dataclass(frozen=True)
class Fairness:
    """What :func:`fairness_metrics` returns; plain JSON types, None where undefined.

    Attributes:
        scalars: ``SCALARS`` by name.
        details: "groups" and "subgroups": rates and counts of each cell.
        notes: what is undefined, and why; and whether cells are small.
    """

    scalars: dict[str, float | None]
    details: dict[str, Any]
    notes: list[str]


def p_rule(positive: Tensor, total: Tensor) -> float | None:
    """Smallest over largest rate ``positive / total`` (G,); None with fewer than two groups, or all rates zero."""
    rate = _rates(positive, total)
    return None if len(rate) < 2 or float(rate.max()) == 0 else float(rate.min() / rate.max())


def rate_gap(positive: Tensor, total: Tensor) -> float | None:
    """Largest less smallest rate ``positive / total`` (G,); groups without examples are left out."""
    rate = _rates(positive, total)
    return None if len(rate) < 2 else float(rate.max() - rate.min())


def equalized_odds_gap(counts: Tensor) -> float | None:
    """Half the gap of the false-positive plus half that of the true-positive rate, from counts (G, 2, 2)."""
    gaps = [rate_gap(counts[:, true, 1], counts[:, true].sum(1)) for true in (0, 1)]
    return None if gaps[0] is None or gaps[1] is None else 0.5 * (gaps[0] + gaps[1])


def fair_score(counts: Tensor, criterion: str) -> float:
    """What the best epoch is chosen by: max(0, 2 a - 1) f in [0, 1].

    a is the balanced accuracy; f the p-rule, or one less the equalised-odds gap. A guess, or one answer for everybody,
    is perfectly fair and scores zero, which the plain product of accuracy and fairness would not say. Where f is
    undefined, since only one group is there, it is left out.

    Args:
        counts: (G, 2, 2) by group, true and predicted class; criterion: of ``CRITERIA``.
    """
    total = counts.sum(0)
    recall = _rates(total.diagonal(), total.sum(1))
    informed = max(0.0, 2 * float(recall.mean()) - 1) if len(recall) == 2 else 0.0
    if criterion == "demographic_parity":
        fair = p_rule(counts[:, :, 1].sum(1), counts.sum((1, 2)))
    else:
        gap = equalized_odds_gap(counts)
        fair = None if gap is None else 1 - gap
    return informed * (1.0 if fair is None else fair)


def fairness_metrics(
    counts: Tensor,
    *,
    criterion: str = "demographic_parity",
    group_names: Sequence[str],
    subgroup_names: Sequence[str],
) -> Fairness:
    """Fairness of the groups as a whole, and in the worst subgroup.

    Args:
        counts: (K, G, 2, 2) by subgroup, group, true and predicted class; with K = 1 nothing is local.
        criterion: what the score is of, one of ``CRITERIA``.
        group_names: (G,); subgroup_names: (K,).
    """
    counts = counts.cpu()
    whole = counts.sum(0)
    positive, total = counts[..., 1].sum(2), counts.sum((2, 3))  # (K, G)
    local = [p_rule(p, n) for p, n in zip(positive, total, strict=True)] if len(counts) > 1 else []
    gaps = [rate_gap(p, n) for p, n in zip(positive, total, strict=True)] if len(counts) > 1 else []
    scalars = {
        "p_rule": p_rule(positive.sum(0), total.sum(0)),
        "positive_rate_gap": rate_gap(positive.sum(0), total.sum(0)),
        "equalized_odds_gap": equalized_odds_gap(whole),
        "worst_local_p_rule": min((x for x in local if x is not None), default=None),
        "worst_local_positive_rate_gap": max((x for x in gaps if x is not None), default=None),
        "fair_score": fair_score(whole, criterion),
    }
    subgroups = {"name": list(subgroup_names), **_cells(counts), "p_rule": local} if len(counts) > 1 else None
    details = {"groups": {"name": list(group_names), **_cells(whole)}, "subgroups": subgroups}
    return Fairness(scalars, details, _notes(scalars, whole, total, local, group_names, subgroup_names))


def _rates(positive: Tensor, total: Tensor) -> Tensor:
    """(<= G,) float64 rates where there are examples."""
    known = total > 0
    return positive[known].double() / total[known]


def _cells(counts: Tensor) -> dict[str, Any]:
    """Nested lists of counts (..., 2, 2): examples, and rates that are None in an empty cell."""
    total = counts.sum((-2, -1))
    rates = {
        "positive_rate": counts[..., 1].sum(-1) / total.double(),
        "accuracy": counts.diagonal(dim1=-2, dim2=-1).sum(-1) / total.double(),
        "true_positive_rate": counts[..., 1, 1] / counts[..., 1, :].sum(-1).double(),
        "false_positive_rate": counts[..., 0, 1] / counts[..., 0, :].sum(-1).double(),
    }
    return {"count": total.tolist(), **{name: _without_nan(values.tolist()) for name, values in rates.items()}}


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if values != values else values


def _notes(
    scalars: dict[str, float | None],
    whole: Tensor,
    total: Tensor,
    local: list[float | None],
    group_names: Sequence[str],
    subgroup_names: Sequence[str],
) -> list[str]:
    notes = []
    absent = [name for name, n in zip(group_names, total.sum(0).tolist(), strict=True) if not n]
    if absent:
        notes.append(f"no evaluated example of group {', '.join(absent)}: left out of every comparison of groups")
    if not int(whole[..., 1].sum()):
        notes.append("nobody is predicted positive: the p-rule is undefined")
    for true, name in ((0, "negative"), (1, "positive")):
        groups = [n for n, k in zip(group_names, whole[:, true].sum(1).tolist(), strict=True) if not k]
        if groups and len(groups) > len(absent):
            notes.append(f"no {name} example of group {', '.join(groups)}: left out of the equalised-odds gap")
    if len(total) == 1:
        notes.append("there are no subgroups, so no local figures: see subgroup_feature")
        return notes
    undefined = [name for name, value in zip(subgroup_names, local, strict=True) if value is None]
    if undefined:
        notes.append(
            f"p-rule undefined in subgroup {', '.join(undefined)}, where a group is absent or nobody is predicted "
            "positive: left out of the worst local p-rule"
        )
    if int(total.min()) < FEW:
        notes.append(f"a group has fewer than {FEW} evaluated examples in some subgroup: local figures are coarse")
    return notes


__all__ = [
    "CRITERIA",
    "SCALARS",
    "Fairness",
    "FairnessCounts",
    "equalized_odds_gap",
    "fair_score",
    "fairness_metrics",
    "p_rule",
    "rate_gap",
]
