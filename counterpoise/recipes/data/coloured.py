"""Images whose colour gives the class away in training, and not in the test: what group robustness is measured on.

Two classes, two colours, four groups ``2 * class + colour``. In training a class has its own colour with probability
``correlation``; validation and test hold equally many of every group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.cuts import LEAST_PER_CLASS, balanced_split, take_per_class
from counterpoise.recipes.data.fashion_mnist import CLASS_NAMES, load_fashion_mnist
from counterpoise.recipes.data.splits import InMemory, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

COLOURS = ("red", "green")


def coloured_digits(
    *,
    correlation: float = 0.95,
    val_per_group: int = 20,
    test_per_group: int = 100,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """scikit-learn's digits as 0 to 4 against 5 to 9, red or green; inputs (3, 8, 8) in [0, 1].

    Args:
        correlation: in [0.5, 1): share of a class's training images that have its own colour.
        val_per_group, test_per_group: images of each of the four groups, >= 10.
        seed: draws splits and colours.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = (torch.from_numpy(digits.target) >= 5).long()
    check_number("val_per_group", val_per_group, LEAST_PER_CLASS)
    check_number("test_per_group", test_per_group, LEAST_PER_CLASS)
    test, rest = balanced_split(labels, 2 * test_per_group, seed)
    splits = coloured_splits(
        (images[rest], labels[rest]),
        (images[test], labels[test]),
        class_names=["0 to 4", "5 to 9"],
        correlation=correlation,
        val_per_group=val_per_group,
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def coloured_fashion_mnist(
    *,
    root: str | None = None,
    download: bool = False,
    classes: tuple[int, int] = (2, 4),
    correlation: float = 0.98,
    n_train: int | None = 8000,
    val_per_group: int = 100,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """Two classes of Fashion-MNIST that resemble each other, red or green; inputs (3, 28, 28) in [0, 1].

    Args:
        root, download: see :func:`~counterpoise.recipes.data.fashion_mnist_lt`.
        classes: the two of 0 .. 9; pullover against coat is what shape alone tells apart with some effort.
        correlation: in [0.5, 1): share of a class's training images that have its own colour.
        n_train: training images before validation is cut, None = all.
        val_per_group: images of each of the four groups, >= 10.
        seed: draws splits and colours.
    """
    first, second = classes
    if first == second or not {first, second} <= set(range(10)):
        raise ValueError(f"classes is {classes}, expected two different classes of 0 to 9")
    check_number("val_per_group", val_per_group, LEAST_PER_CLASS)
    parts = []
    for part, kept in zip(load_fashion_mnist(root, download), (n_train, None), strict=True):
        rows = torch.where((part.targets == first) | (part.targets == second))[0]
        labels = (part.targets[rows] == second).long()
        if kept is not None:
            check_number("n_train", kept, 8 * val_per_group)
            chosen = take_per_class(labels, torch.tensor([kept // 2, kept // 2]), seed)
            rows, labels = rows[chosen], labels[chosen]
        parts.append((part.inputs[rows], labels))
    splits = coloured_splits(
        *parts,
        class_names=[CLASS_NAMES[first], CLASS_NAMES[second]],
        correlation=correlation,
        val_per_group=val_per_group,
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def coloured_splits(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    class_names: list[str],
    correlation: float,
    val_per_group: int,
    seed: int,
) -> Splits:
    """Colours grey images of two classes and cuts validation from the training part.

    Args:
        train, test: images (N, 1, H, W) uint8 and labels (N,) of 0 and 1.
        class_names: of the two classes.
        correlation: in [0.5, 1).
        val_per_group: images of each group.
        seed: draws colours and the cut.
    """
    check_number("correlation", correlation, 0.5, 1 - 1e-9)
    images, labels = train
    held, rest = balanced_split(labels, 2 * val_per_group, seed)
    generator = torch.Generator().manual_seed(seed)
    of_train = _own_colour(labels[rest], correlation, generator)
    kept = _coloured(images[rest], labels[rest], of_train)
    group_counts = kept.groups.bincount(minlength=4).tolist()  # type: ignore[union-attr]
    empty = [i for i, n in enumerate(group_counts) if n == 0]
    names = [f"{name}, {colour}" for name in class_names for colour in COLOURS]
    return Splits(
        kept,
        _coloured(images[held], labels[held], _half_and_half(labels[held])),
        _coloured(test[0], test[1], _half_and_half(test[1])),
        class_names=class_names,
        class_counts=kept.class_counts,
        input_shape=tuple(kept[0]["input"].shape),
        group_counts=group_counts,
        notes=[f"Training has no example of group {i} ({names[i]})." for i in empty],
        facts={"group_names": names},
    )


def _own_colour(labels: Tensor, correlation: float, generator: torch.Generator) -> Tensor:
    """Colours (N,) that are the label except for an exact share of each class."""
    colours = labels.clone()
    for label in (0, 1):
        rows = torch.where(labels == label)[0]
        other = rows[torch.randperm(len(rows), generator=generator)[: round((1 - correlation) * len(rows))]]
        colours[other] = 1 - label
    return colours


def _half_and_half(labels: Tensor) -> Tensor:
    """Colours (N,), alternating inside each class."""
    place = torch.where(labels == 1, (labels == 1).cumsum(0), (labels == 0).cumsum(0))
    return place % 2


def _coloured(images: Tensor, labels: Tensor, colours: Tensor) -> InMemory:
    """The grey image in the channel of its colour, of red, green and blue."""
    pixels = images.new_zeros(len(images), 3, *images.shape[2:])
    pixels[torch.arange(len(images)), colours] = images[:, 0]
    return InMemory(pixels, labels, 2 * labels + colours)
