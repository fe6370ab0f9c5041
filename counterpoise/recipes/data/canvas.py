"""Items pasted onto canvases: images with several labels each, and with a class for every pixel.

A canvas is a grid of cells, each a little larger than an item; items lie in cells of their own, shifted at random
inside them, so that none overlap and a network has to look everywhere. The seed says which items lie where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.cuts import LEAST_PER_CLASS, balanced_split
from counterpoise.recipes.data.fashion_mnist import CLASS_NAMES, load_fashion_mnist
from counterpoise.recipes.data.long_tail import ClassOrder, class_order
from counterpoise.recipes.data.splits import InMemory, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

Items = tuple[Tensor, Tensor]  # images (M, 1, h, w) uint8 and class indices (M,)

JITTER = 2  # pixels by which a cell is larger than an item
INK = 51  # of 255: an item's pixels of at least this are its own, the others background


def digits_canvas(
    *,
    imbalance_factor: float = 20.0,
    class_order: ClassOrder = 0,
    cells: int = 3,
    max_labels: int = 3,
    n_train: int = 1200,
    n_val: int = 400,
    n_test: int = 1000,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """One to ``max_labels`` different scikit-learn digits on a canvas; inputs (1, 10 cells, 10 cells) in [0, 1].

    Training, validation and test are composed of different digits. In training the labels are long-tailed; in
    validation and test all are equally frequent.

    Args:
        imbalance_factor: >= 1, by which the first class is drawn more often than the last.
        class_order: classes from head to tail: None = as numbered, an int = a seeded random order, or a list.
        cells: a side of the canvas, 2 to 8.
        max_labels: 1 to 10, and at most cells * cells.
        n_train, n_val, n_test: canvases, at least 100.
        seed: draws the canvases.

    Raises:
        ValueError: a setting out of range, or a label without a training canvas.
    """
    splits = label_splits(
        *digit_items(seed),
        class_names=[str(digit) for digit in range(10)],
        imbalance_factor=imbalance_factor,
        order=class_order,
        cells=cells,
        max_labels=max_labels,
        sizes=(n_train, n_val, n_test),
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def fashion_canvas(
    *,
    root: str | None = None,
    download: bool = False,
    imbalance_factor: float = 50.0,
    class_order: ClassOrder = 0,
    cells: int = 2,
    max_labels: int = 3,
    n_train: int = 4000,
    n_val: int = 1000,
    n_test: int = 2000,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """One to ``max_labels`` different Fashion-MNIST items on a canvas, at half their size.

    As :func:`digits_canvas`, with inputs (1, 16 cells, 16 cells) in [0, 1]. Test canvases are composed of test images,
    validation canvases of 100 training images a class that training does not see.

    Args:
        root, download: see :func:`~counterpoise.recipes.data.fashion_mnist_lt`.
        imbalance_factor, class_order, cells, max_labels, n_train, n_val, n_test, seed: see :func:`digits_canvas`.
    """
    splits = label_splits(
        *fashion_items(root, download, seed),
        class_names=list(CLASS_NAMES),
        imbalance_factor=imbalance_factor,
        order=class_order,
        cells=cells,
        max_labels=max_labels,
        sizes=(n_train, n_val, n_test),
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def digit_items(seed: int) -> tuple[Items, Items, Items]:
    """scikit-learn's digits for training, validation (25 a class) and test (50 a class)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    test, rest = balanced_split(labels, 5 * LEAST_PER_CLASS, seed)
    held, left = balanced_split(labels[rest], 25, seed)
    train, val = rest[left], rest[held]
    return (images[train], labels[train]), (images[val], labels[val]), (images[test], labels[test])


def fashion_items(root: str | None, download: bool, seed: int) -> tuple[Items, Items, Items]:
    """Fashion-MNIST at 14 x 14 for training, validation (100 a class of the training part) and test."""
    train, test = load_fashion_mnist(root, download)
    val, rest = balanced_split(train.targets, 100, seed)
    half = avg_pool2d(train.inputs.float(), 2).round().to(torch.uint8)
    small = avg_pool2d(test.inputs.float(), 2).round().to(torch.uint8)
    return (half[rest], train.targets[rest]), (half[val], train.targets[val]), (small, test.targets)


@dataclass(frozen=True)
class Canvases:
    """Images (N, 1, S, S) uint8, label sets (N, C) of 0 and 1, pixel classes (N, S, S): 0 = none, c + 1 = item of c."""

    images: Tensor
    labels: Tensor
    pixels: Tensor


def compose(
    items: Items,
    counts: Tensor,
    probabilities: Tensor,
    cells: int,
    generator: torch.Generator,
    *,
    distinct: bool = True,
) -> Canvases:
    """Draws canvases.

    Args:
        items: what is pasted; every class occurs.
        counts: (N,) items of each canvas, 0 to cells * cells.
        probabilities: (C,) of the classes, > 0; drawn without replacement on one canvas if ``distinct``.
        cells: a side of the grid.
        generator: of all draws.
    """
    images, labels = items
    n, classes, side = len(counts), len(probabilities), images.shape[-1] + JITTER
    most = max(int(counts.max()), 1)
    drawn = probabilities.expand(n, -1).multinomial(most, replacement=not distinct, generator=generator)
    places = torch.rand(n, cells * cells, generator=generator).argsort(1)[:, :most]
    shifts = torch.randint(JITTER + 1, (n, most, 2), generator=generator)
    by_class, of_class = labels.argsort(stable=True), labels.bincount(minlength=classes)
    first = of_class.cumsum(0) - of_class
    draws = torch.rand(n, most, generator=generator, dtype=torch.float64)
    chosen = by_class[first[drawn] + (draws * of_class[drawn]).long()]
    made = Canvases(
        torch.zeros(n, 1, cells * side, cells * side, dtype=torch.uint8),
        torch.zeros(n, classes, dtype=torch.int64),
        torch.zeros(n, cells * side, cells * side, dtype=torch.int64),
    )
    inside = torch.arange(images.shape[-1])
    for j in range(most):
        rows = torch.where(counts > j)[0]
        place, shift, label = places[rows, j], shifts[rows, j], drawn[rows, j]
        down = (place // cells * side + shift[:, 0])[:, None, None] + inside[:, None]
        right = (place % cells * side + shift[:, 1])[:, None, None] + inside
        pasted = images[chosen[rows, j], 0]
        made.images[rows[:, None, None], 0, down, right] = pasted
        made.pixels[rows[:, None, None], down, right] = torch.where(pasted >= INK, label[:, None, None] + 1, 0)
        made.labels[rows, label] = 1
    return made


def label_splits(
    train: Items,
    val: Items,
    test: Items,
    *,
    class_names: list[str],
    imbalance_factor: float,
    order: ClassOrder,
    cells: int,
    max_labels: int,
    sizes: tuple[int, int, int],
    seed: int,
) -> Splits:
    """Canvases with label sets from the items of three splits."""
    classes = len(class_names)
    check_number("imbalance_factor", imbalance_factor, 1)
    check_number("cells", cells, 2, 8)
    check_number("max_labels", max_labels, 1, min(classes, cells * cells))
    for name, size in zip(("n_train", "n_val", "n_test"), sizes, strict=True):
        check_number(name, size, 100)
    tail = torch.empty(classes, dtype=torch.float64)
    tail[class_order(classes, order)] = imbalance_factor ** -torch.linspace(0, 1, classes, dtype=torch.float64)
    parts = []
    for i, (items, size) in enumerate(zip((train, val, test), sizes, strict=True)):
        generator = generator_for(seed, i)
        counts = torch.randint(1, max_labels + 1, (size,), generator=generator)
        made = compose(items, counts, torch.ones_like(tail) if i else tail, cells, generator)
        parts.append(InMemory(made.images, made.labels))
    return splits_of_labels(*parts, class_names=class_names)


def splits_of_labels(train: InMemory, val: InMemory, test: InMemory, *, class_names: list[str]) -> Splits:
    """Splits with label sets (N, C) as targets; ValueError for a label without a positive in training."""
    counts = train.targets.sum(0).tolist()
    absent = [name for name, n in zip(class_names, counts, strict=True) if n == 0]
    if absent:
        raise ValueError(f"label {absent[0]!r} has no positive training example, expected at least one of each label")
    notes = []
    for name, part in (("validation", val), ("test", test)):
        without = [label for label, n in zip(class_names, part.targets.sum(0).tolist(), strict=True) if n == 0]
        if without:
            told = ", ".join(map(repr, without[:5])) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            notes.append(f"The {name} split has no positive of {told}: left out of its mean average precision.")
    return Splits(
        train,
        val,
        test,
        class_names=class_names,
        class_counts=counts,
        input_shape=tuple(train[0]["input"].shape),
        notes=notes,
        kind="labels",
    )
