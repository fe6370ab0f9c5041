"""Cuts of a labelled set into a held-out part and the rest. Each returns sorted positions: (held out, rest)."""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_number

LEAST_PER_CLASS = 10  # the protocol's smallest validation split, a class


def take_per_class(targets: Tensor, counts: Tensor, seed: int) -> Tensor:
    """Sorted positions of ``counts[c]`` examples of each class c, drawn without replacement.

    With the same targets and seed a larger count keeps all that a smaller one took.
    """
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[targets[shuffled].argsort(stable=True)]
    classes = targets[by_class]
    available = classes.bincount(minlength=len(counts))
    place = torch.arange(len(classes)) - (available.cumsum(0) - available)[classes]
    return by_class[place < counts[classes]].sort().values


def balanced_split(targets: Tensor, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Holds out ``per_class`` examples of every class.

    Args:
        targets: (N,) class indices; each of 0 .. max must occur.
        per_class: at least 1; every class must have more, so that something is left to train on.
        seed: draws the examples.

    Raises:
        ValueError: a class with too few examples; the message has the numbers.
    """
    check_number("per_class", per_class, 1)
    available = targets.bincount()
    smallest = int(available.argmin())
    if int(available[smallest]) <= per_class:
        raise ValueError(
            f"class {smallest} has {int(available[smallest])} examples, expected more than {per_class}: "
            f"{per_class} a class are held out, and one at least must be left"
        )
    return _without(targets, take_per_class(targets, torch.full_like(available, per_class), seed))


def stratified_split(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Holds out ``fraction`` of every class: at least one example, and at least one is left.

    Args:
        targets: (N,) class indices; each of 0 .. max must occur twice.
        fraction: in (0, 0.5].
        seed: draws the examples.

    Raises:
        ValueError: fraction out of range, or a class with fewer than two examples.
    """
    check_number("fraction", fraction, 0, 0.5, open_low=True)
    available = targets.bincount()
    if int(available.min()) < 2:
        smallest = int(available.argmin())
        raise ValueError(f"class {smallest} has {int(available[smallest])} examples, expected at least 2 to split")
    counts = (available.double() * fraction - 0.5).ceil().long().clamp(min=1)  # halves go down: 3 can be cut twice
    return _without(targets, take_per_class(targets, counts, seed))


def validation_split(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rule for a user's own data: balanced where the classes allow it, otherwise stratified.

    Balanced means ``max(10, fraction of the smallest class)`` a class, and a class allows it if at least half of it is
    left to train on.
    """
    check_number("fraction", fraction, 0, 0.5, open_low=True)
    smallest = int(targets.bincount().min())
    per_class = max(LEAST_PER_CLASS, round(fraction * smallest))
    if smallest >= 2 * per_class:
        return balanced_split(targets, per_class, seed)
    return stratified_split(targets, fraction, seed)


def _without(targets: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    left = torch.ones(len(targets), dtype=torch.bool)
    left[held] = False
    return held, left.nonzero().flatten()
