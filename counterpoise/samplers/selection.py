"""What every coreset method returns, and what they share: checks of features and budgets, division over classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoise._core import check_number, check_per_row


@dataclass(frozen=True)
class Selection:
    """A weighted subset of N examples.

    Args:
        indices: (b,) int64 in the order of the picks.
        weights: (b,) float64, how many examples each pick stands for; each method says what they sum to.
        gains: (b,) float64, what each pick was chosen by; None where a method has no such number.
        assignment: (N,) int64, the position in ``indices`` of the pick that stands for each example, or None.
        value: the objective after the last pick, or None.
        notes: what a reader must know, such as that the selection stopped early.
    """

    indices: Tensor
    weights: Tensor
    gains: Tensor | None = None
    assignment: Tensor | None = None
    value: float | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)


def check_features(features: Tensor, name: str = "features") -> None:
    """Raises unless ``features`` is a floating, finite (N, D) tensor with N, D >= 1."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} is a {type(features).__name__}, expected a tensor of shape (N, D)")
    if features.ndim != 2 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(features.shape)} and dtype {features.dtype}, expected a floating (N, D) tensor"
        )
    if not all(bool(part.isfinite().all()) for part in features.split(4096)):
        raise ValueError(f"{name} holds NaN or infinity, expected finite numbers")


def check_budget(budget: int, num_examples: int, least: int = 1) -> None:
    """Raises unless ``budget`` is a whole number in [least, N]."""
    check_number("budget", budget, least, num_examples)
    if int(budget) != budget:
        raise ValueError(f"budget is {budget}, expected a whole number of examples")


def check_start(already_selected: Tensor | None, num_examples: int, budget: int) -> list[int]:
    """The indices to start from, distinct, in [0, N - 1] and within the budget; empty for None."""
    if already_selected is None:
        return []
    start = torch.as_tensor(already_selected).flatten().tolist()
    if len(set(start)) != len(start) or not start or not all(0 <= i < num_examples for i in start):
        raise ValueError(f"already_selected is {start}, expected distinct indices in [0, {num_examples - 1}]")
    if len(start) > budget:
        raise ValueError(f"budget is {budget}, expected at least the {len(start)} of already_selected")
    return start


def check_targets(targets: Tensor, like: Tensor) -> None:
    """Raises unless ``targets`` is (N,) of an integer type, classes >= 0."""
    check_per_row("targets", targets, like)
    if targets.is_floating_point() or bool((targets < 0).any()):
        raise ValueError(f"targets has dtype {targets.dtype}, expected (N,) class indices >= 0 of an integer type")


def class_budgets(class_counts: Tensor, budget: int) -> Tensor:
    """(C,) int64 shares of a budget: proportional to the counts, at least 1 a class that has examples, sum = budget.

    Whole parts first, then one each to the largest remainders, ties to the lowest class.

    Raises:
        ValueError: a budget below the number of classes with examples, or above the number of examples.
    """
    counts = torch.as_tensor(class_counts).cpu().long()
    total, present = int(counts.sum()), int((counts > 0).sum())
    check_budget(budget, total, present)
    ideal = counts.double() * budget / total
    shares = torch.minimum(ideal.floor().long().clamp_min(1), counts)
    while (left := budget - int(shares.sum())) != 0:
        sign = 1 if left > 0 else -1
        movable = shares < counts if left > 0 else shares > 1
        order = (sign * (ideal - shares)).masked_fill(~movable, -torch.inf).argsort(descending=True, stable=True)
        shares[order[: min(abs(left), int(movable.sum()))]] += sign
    return shares


def select_per_class(
    targets: Tensor, budget: int, select: Callable[[Tensor, int], Selection], *, assigns: bool = True
) -> Selection:
    """Runs ``select(members, share)`` inside every class and joins the results, classes in ascending order.

    ``members`` are the indices of a class; the selection's own indices count within them.
    """
    targets = targets.long()
    shares = class_budgets(torch.bincount(targets), budget).tolist()
    parts: list[Selection] = []
    owners: list[Tensor] = []
    assignment = torch.zeros_like(targets)
    for k, share in enumerate(shares):
        if share == 0:
            continue
        members = (targets == k).nonzero().flatten()
        part = select(members, share)
        if part.assignment is not None:
            assignment[members] = part.assignment + sum(map(len, parts))
        parts.append(part)
        owners.append(members[part.indices])
    gains = [part.gains for part in parts if part.gains is not None]
    return Selection(
        torch.cat(owners),
        torch.cat([part.weights for part in parts]),
        gains=torch.cat(gains) if gains else None,
        assignment=assignment if assigns else None,
        notes=tuple(note for part in parts for note in part.notes),
    )
