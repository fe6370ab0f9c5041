"""Small segmentation sets of real items on noise: half of the images nearly empty, the others crowded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.canvas import Items, compose, digit_items, fashion_items
from counterpoise.recipes.data.fashion_mnist import CLASS_NAMES
from counterpoise.recipes.data.splits import InMemory, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData


def digits_scenes(
    *,
    classes: int = 4,
    sparse_fraction: float = 0.5,
    noise: float = 0.2,
    cells: int = 2,
    n_train: int = 400,
    n_val: int = 100,
    n_test: int = 200,
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 0,
) -> LabelledData:
    """scikit-learn's digits pasted onto noise; inputs (1, 10 cells, 10 cells), targets (10 cells, 10 cells).

    Pixel class 0 is the background, c + 1 the ink of digit c. Sparse images hold one digit or none, dense ones fill
    more than half of the cells. Training, validation and test are composed of different digits.

    Args:
        classes: 2 to 10, the first digits.
        sparse_fraction: in [0, 1], of the images of each split.
        noise: standard deviation >= 0 of the background and of the ink, in units of full ink.
        cells: a side of the canvas, even, 2 to 8.
        n_train, n_val, n_test: images, at least 20.
        seed: draws the images.

    Raises:
        ValueError: a setting out of range.
    """
    names, sizes = [str(digit) for digit in range(10)], (n_train, n_val, n_test)
    splits = scene_splits(digit_items(seed), names, classes, sparse_fraction, noise, cells, sizes, seed)
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def fashion_scenes(
    *,
    root: str | None = None,
    download: bool = False,
    classes: int = 6,
    sparse_fraction: float = 0.5,
    noise: float = 0.2,
    cells: int = 2,
    n_train: int = 300,
    n_val: int = 150,
    n_test: int = 400,
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 0,
) -> LabelledData:
    """Fashion-MNIST items at half their size pasted onto noise, as :func:`digits_scenes`.

    Inputs (1, 16 cells, 16 cells), targets (16 cells, 16 cells).

    Args:
        root, download: see :func:`~counterpoise.recipes.data.fashion_mnist_lt`.
        classes, sparse_fraction, noise, cells, n_train, n_val, n_test, seed: see :func:`digits_scenes`.
    """
    items = fashion_items(root, download, seed)
    sizes = (n_train, n_val, n_test)
    splits = scene_splits(items, list(CLASS_NAMES), classes, sparse_fraction, noise, cells, sizes, seed)
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def scene_splits(
    items: tuple[Items, Items, Items],
    names: list[str],
    classes: int,
    sparse_fraction: float,
    noise: float,
    cells: int,
    sizes: tuple[int, int, int],
    seed: int,
) -> Splits:
    """Images with pixel classes from the items of three splits; arguments as :func:`digits_scenes` has them."""
    check_number("classes", classes, 2, len(names))
    check_number("sparse_fraction", sparse_fraction, 0, 1)
    check_number("noise", noise, 0)
    check_number("cells", cells, 2, 8)
    if cells % 2:
        raise ValueError(f"cells is {cells}, expected an even number: encoders halve the image")
    parts = []
    for i, (part, name, size) in enumerate(zip(items, ("n_train", "n_val", "n_test"), sizes, strict=True)):
        check_number(name, size, 20)
        parts.append(_scenes(part, classes, size, sparse_fraction, noise, cells, generator_for(seed, 7, i)))
    train, val, test = parts
    return Splits(
        train,
        val,
        test,
        class_names=["background", *names[:classes]],
        class_counts=train.targets.flatten().bincount(minlength=classes + 1).tolist(),
        input_shape=tuple(train.inputs.shape[1:]),
        kind="pixels",
    )


def _scenes(
    items: Items, classes: int, size: int, sparse_fraction: float, noise: float, cells: int, generator: torch.Generator
) -> InMemory:
    images, labels = items
    known = labels < classes
    sparse = torch.rand(size, generator=generator) < sparse_fraction
    few = torch.randint(2, (size,), generator=generator)
    many = torch.randint(cells * cells // 2 + 1, cells * cells + 1, (size,), generator=generator)
    counts = torch.where(sparse, few, many)
    made = compose((images[known], labels[known]), counts, torch.ones(classes), cells, generator, distinct=False)
    return InMemory(_noisy(made.images, noise, generator), made.pixels)


def _noisy(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Images (N, 1, S, S) uint8 in [0, 1], with noise everywhere."""
    clean = images / 255
    return clean + noise * torch.randn(clean.shape, generator=generator)
