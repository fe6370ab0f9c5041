r"""Long-tailed subsets of a labelled set: a profile of class sizes, the order of the classes along it, the draw.

Source: exponential and step profiles as in Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware
Margin Loss, 2019, and its released code, integer truncation included. There ``imb_factor`` is min / max; here
``imbalance_factor`` is max / min.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_number
from counterpoise.recipes.data.cuts import take_per_class
from counterpoise.recipes.data.splits import AsDict

PROFILES = ("exponential", "step", "pareto")

ClassOrder = int | Sequence[int] | None


def long_tail_counts(
    num_classes: int,
    n_max: float,
    imbalance_factor: float,
    profile: str = "exponential",
    *,
    pareto_alpha: float = 6.0,
) -> list[int]:
    r"""Class sizes along the tail, largest first; each is truncated to an integer and at least 1.

    With :math:`q_k = k / (C - 1)` and :math:`\rho` = imbalance_factor:

    - exponential: :math:`n_{max}\,\rho^{-q_k}`;
    - step: :math:`n_{max}` for the first C // 2 classes, :math:`n_{max} / \rho` for the others;
    - pareto: :math:`n_{max}\,x_k^{-(\alpha + 1)}`, the Pareto density at evenly spaced points
      :math:`x_k = 1 + (\rho^{1 / (\alpha + 1)} - 1)\,q_k`, so that it too runs from :math:`n_{max}` to
      :math:`n_{max} / \rho`. A smaller alpha has a thinner head; alpha to infinity is the exponential profile. The
      default is the power that ImageNet-LT names (Liu et al., Large-Scale Long-Tailed Recognition in an Open World,
      2019); that grid is this library's own.

    Args:
        num_classes: C >= 2.
        n_max: size of the largest class, >= 1.
        imbalance_factor: largest over smallest class, >= 1.
        profile: "exponential", "step" or "pareto".
        pareto_alpha: power > 0, read by the pareto profile only.

    Raises:
        ValueError: an argument out of its range.
    """
    check_number("num_classes", num_classes, 2)
    check_number("n_max", n_max, 1)
    check_number("imbalance_factor", imbalance_factor, 1)
    check_choice("profile", profile, PROFILES)
    check_number("pareto_alpha", pareto_alpha, 0, open_low=True)
    smallest = 1 / imbalance_factor  # powers of this, not of imbalance_factor: the rounding decides what is truncated
    places = [k / (num_classes - 1) for k in range(num_classes)]
    if profile == "exponential":
        shares = [smallest**q for q in places]
    elif profile == "step":
        shares = [1.0 if k < num_classes // 2 else smallest for k in range(num_classes)]
    else:
        end = imbalance_factor ** (1 / (pareto_alpha + 1))
        shares = [(1 + (end - 1) * q) ** -(pareto_alpha + 1) for q in places]
    return [max(1, int(n_max * share)) for share in shares]


def class_order(num_classes: int, order: ClassOrder) -> list[int]:
    """The classes from head to tail: None = 0, 1, 2, ...; an int seeds a random order; a list is taken as it is.

    Raises:
        ValueError: a list that is not a permutation of 0 .. num_classes - 1.
    """
    if order is None:
        return list(range(num_classes))
    if isinstance(order, int):
        return torch.randperm(num_classes, generator=torch.Generator().manual_seed(order)).tolist()
    if sorted(order) != list(range(num_classes)):
        raise ValueError(f"class_order is {list(order)}, expected each of 0 to {num_classes - 1} once")
    return list(order)


def long_tail_indices(targets: Tensor, counts_per_rank: Sequence[int], order: ClassOrder, seed: int) -> Tensor:
    """Sorted positions of a long-tailed subset.

    Args:
        targets: (N,) class indices in [0, C - 1].
        counts_per_rank: (C,) examples to keep of the first, second, ... class of the order.
        order: see :func:`class_order`.
        seed: draws the examples; with the same seed a longer tail is a subset of a shorter one.

    Raises:
        ValueError: a class with fewer examples than asked for; the message has the numbers.
    """
    num_classes = len(counts_per_rank)
    counts = torch.zeros(num_classes, dtype=torch.int64)
    counts[class_order(num_classes, order)] = torch.as_tensor(counts_per_rank)
    available = class_sizes(targets, num_classes)
    short = (available < counts).nonzero().flatten().tolist()
    if short:
        raise ValueError(
            f"class {short[0]} has {int(available[short[0]])} examples, expected the {int(counts[short[0]])} that "
            f"the profile asks for: lower n_max (with {int(available.min())}, the smallest class, it always fits)"
        )
    return take_per_class(targets, counts, seed)


def class_sizes(targets: Tensor, num_classes: int | None = None) -> Tensor:
    """(C,) examples of each class; raises ValueError for a negative label, one class only, or an empty class."""
    if bool((targets < 0).any()):
        raise ValueError(f"targets holds {int(targets.min())}, expected class indices >= 0")
    sizes = targets.bincount(minlength=num_classes or 0)
    if len(sizes) < 2:
        raise ValueError("the data set has one class, expected at least 2")
    if int(sizes.min()) == 0:
        raise ValueError(f"class {int(sizes.argmin())} has no example, expected some of each of 0 to {len(sizes) - 1}")
    return sizes


@dataclass(frozen=True)
class LongTail:
    """The long-tail options of a data set. imbalance_factor None keeps every example; n_max None = smallest class."""

    imbalance_factor: float | None
    profile: str = "exponential"
    class_order: ClassOrder = None
    n_max: int | None = None

    def choose(self, targets: Tensor, seed: int) -> Tensor:
        """Sorted positions in ``targets`` (N,) to keep."""
        sizes = class_sizes(targets)
        if self.imbalance_factor is None:
            return torch.arange(len(targets))
        n_max = int(sizes.min()) if self.n_max is None else self.n_max
        counts = long_tail_counts(len(sizes), n_max, self.imbalance_factor, self.profile)
        return long_tail_indices(targets, counts, self.class_order, seed)


class LongTailedSubset(AsDict):
    """A long-tailed subset of any labelled data set, as dicts.

    Args:
        dataset: map-style; its labels are found by :func:`~counterpoise.recipes.data.targets_of`.
        imbalance_factor: largest over smallest class, >= 1.
        profile: "exponential", "step" or "pareto", see :func:`long_tail_counts`.
        class_order: classes from head to tail: None = as numbered, an int = a seeded random order, or a list.
        n_max: size of the largest class; None = the size of the smallest class in ``dataset``, which always fits.
        seed: draws the examples.

    Attributes:
        targets: (n,) int64; class_counts: (C,); indices: (n,) positions in ``dataset``; groups: (n,) or None.

    Raises:
        ValueError: fewer than two classes, a class without examples, a class with fewer than the profile asks for.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        imbalance_factor: float,
        profile: str = "exponential",
        class_order: ClassOrder = None,
        n_max: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset)
        self._keep(LongTail(imbalance_factor, profile, class_order, n_max).choose(self.targets, seed))
