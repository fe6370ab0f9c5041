"""Long-tailed digits: 8 x 8 images that scikit-learn brings along, so that nothing is downloaded."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import build_splits, data_module
from counterpoise.recipes.data.cuts import LEAST_PER_CLASS, balanced_split
from counterpoise.recipes.data.long_tail import ClassOrder, LongTail
from counterpoise.recipes.data.splits import InMemory

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData


def digits_lt(
    *,
    imbalance_factor: float | None = 20.0,
    profile: str = "exponential",
    class_order: ClassOrder = 0,
    n_max: int | None = None,
    val_per_class: int = 20,
    test_per_class: int = 40,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """1,797 digits, 10 classes, inputs (1, 8, 8) in [0, 1]; balanced test and validation, long-tailed training.

    Args:
        imbalance_factor: largest over smallest class, >= 1; None keeps all that the cuts leave.
        profile, class_order, n_max: see :class:`~counterpoise.recipes.data.LongTailedSubset`; at most 114 a class.
        val_per_class: validation images a class, >= 10.
        test_per_class: test images a class.
        seed: draws splits and tail.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    check_number("val_per_class", val_per_class, LEAST_PER_CLASS)
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    splits = build_splits(
        InMemory(images, torch.from_numpy(digits.target), bounds=(0, 1)),
        val=partial(balanced_split, per_class=val_per_class),
        test=partial(balanced_split, per_class=test_per_class),
        class_names=[str(digit) for digit in range(10)],
        tail=LongTail(imbalance_factor, profile, class_order, n_max),
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)
