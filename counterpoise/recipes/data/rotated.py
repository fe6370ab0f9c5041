"""Turned images with three targets: the class, the angle in degrees, and the ink. Their losses differ a thousandfold.

An image is turned by an angle that its seed and index say, uniform in [-largest_angle, largest_angle], once and for
all. Squared errors of the angle are of the order of 1000, those of the ink (mean pixel in [0, 1]) of 0.01.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from counterpoise._core import check_number, mix_seeds, uniform_by_index
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.cuts import LEAST_PER_CLASS, balanced_split
from counterpoise.recipes.data.fashion_mnist import CLASS_NAMES, MEAN, STD, load_fashion_mnist
from counterpoise.recipes.data.splits import InMemory, Splits
from counterpoise.recipes.data.task_splits import splits_of_tasks, without_some

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

Items = tuple[Tensor, Tensor]  # images (N, 1, h, w) uint8 and class indices (N,)
AT_ONCE = 2048  # images turned together


def rotated_digits(
    *,
    largest_angle: float = 60.0,
    scale: float = 1.0,
    missing: float = 0.0,
    val_per_class: int = 20,
    test_per_class: int = 40,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """scikit-learn's digits, turned; inputs (1, 8, 8) in [0, 1], targets "class", "angle" and "ink".

    Args:
        largest_angle: in (0, 180] degrees.
        scale: > 0, multiplies the target "angle": its unit is 1 / scale degrees.
        missing: in [0, 1), fraction of each task's training targets that are missing.
        val_per_class, test_per_class: images of each class, >= 10.
        seed: draws splits, angles and what is missing.
    """
    from sklearn.datasets import load_digits

    check_number("val_per_class", val_per_class, LEAST_PER_CLASS)
    check_number("test_per_class", test_per_class, LEAST_PER_CLASS)
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    test, rest = balanced_split(labels, test_per_class, seed)
    splits = rotated_splits(
        (images[rest], labels[rest]),
        (images[test], labels[test]),
        class_names=[str(digit) for digit in range(10)],
        largest_angle=largest_angle,
        scale=scale,
        missing=missing,
        val_per_class=val_per_class,
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def rotated_fashion_mnist(
    *,
    root: str | None = None,
    download: bool = False,
    largest_angle: float = 60.0,
    scale: float = 1.0,
    missing: float = 0.0,
    n_train: int | None = 10000,
    val_per_class: int = 100,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """Fashion-MNIST, turned; inputs (1, 28, 28) normalised, targets "class", "angle" and "ink".

    Args:
        root, download: see :func:`~counterpoise.recipes.data.fashion_mnist_lt`.
        largest_angle, scale, missing: see :func:`rotated_digits`.
        n_train: training images, a random subset before validation is cut; None = all.
        val_per_class: images of each class, >= 10.
        seed: draws splits, angles and what is missing.
    """
    check_number("val_per_class", val_per_class, LEAST_PER_CLASS)
    train, test = load_fashion_mnist(root, download)
    rows = torch.arange(len(train))
    if n_train is not None:
        check_number("n_train", n_train, 20 * val_per_class)
        rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:n_train].sort().values
    splits = rotated_splits(
        (train.inputs[rows], train.targets[rows]),
        (test.inputs, test.targets),
        class_names=list(CLASS_NAMES),
        largest_angle=largest_angle,
        scale=scale,
        missing=missing,
        val_per_class=val_per_class,
        seed=seed,
        mean=MEAN,
        std=STD,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def rotated_splits(
    train: Items,
    test: Items,
    *,
    class_names: list[str],
    largest_angle: float,
    scale: float,
    missing: float,
    val_per_class: int,
    seed: int,
    mean: float = 0.0,
    std: float = 1.0,
) -> Splits:
    """Turned images of three splits; validation is cut from ``train``, ``missing`` targets are in training only."""
    check_number("largest_angle", largest_angle, 0, 180, open_low=True)
    check_number("scale", scale, 0, open_low=True)
    images, labels = train
    held, rest = balanced_split(labels, val_per_class, seed)
    parts = []
    items = ((images[rest], labels[rest]), (images[held], labels[held]), test)
    for k, (x, labels) in enumerate(items):
        angles = (2 * uniform_by_index(torch.arange(len(x)), 1, seed, k)[:, 0] - 1) * largest_angle
        turned = torch.cat([rotated(a, b) for a, b in zip(x.split(AT_ONCE), angles.split(AT_ONCE), strict=True)])
        ink = turned.float().mean((1, 2, 3)) / 255
        targets = {"class": labels, "angle": (scale * angles).float(), "ink": ink}
        some = without_some(targets, missing if k == 0 else 0, mix_seeds(seed, 1))
        parts.append(InMemory(turned, some, mean=mean, std=std))
    tasks = {
        "class": {"kind": "classification", "size": len(class_names), "class_names": class_names},
        "angle": {"kind": "regression", "size": 1},
        "ink": {"kind": "regression", "size": 1},
    }
    of_train, of_val, of_test = parts
    return splits_of_tasks(of_train, of_val, of_test, tasks)


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (N, 1, h, w) uint8, turned anticlockwise by ``degrees`` (N,), bilinear; what moves in is zero."""
    turn = degrees.double() * math.pi / 180
    zero = torch.zeros_like(turn)
    rows = torch.stack([turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero], 1)
    grid = affine_grid(rows.reshape(-1, 2, 3).float(), list(images.shape), align_corners=False)
    turned = grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False)
    return turned.round().clamp(0, 255).to(torch.uint8)
