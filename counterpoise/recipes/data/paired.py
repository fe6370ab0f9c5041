"""Images with the row of a table each: ``input={"image": .., "table": ..}``, for contrast between the two.

The built-in sets measure their own images (:mod:`~counterpoise.recipes.data.image_attributes`) and add columns of
noise: the class is in neither, and is read for evaluation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.cuts import LEAST_PER_CLASS, balanced_split
from counterpoise.recipes.data.fashion_mnist import CLASS_NAMES, MEAN, STD, load_fashion_mnist
from counterpoise.recipes.data.image_attributes import ATTRIBUTES, image_attributes
from counterpoise.recipes.data.splits import Examples, InMemory, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

Labelled = tuple[Tensor, Tensor]  # images (N, 1, H, W) uint8 and class indices (N,)


class WithTable(Examples):
    """Images with a row of a table each.

    Args:
        images: items whose ``input`` is an image.
        table: (N, d) float32, standardised.
        columns: (d,) names of its entries.

    Raises:
        ValueError: a table of another length than images, or other names than entries.
    """

    def __init__(self, images: Examples, table: Tensor, columns: Sequence[str]) -> None:
        if table.shape != (len(images), len(columns)):
            raise ValueError(f"table has shape {tuple(table.shape)}, expected ({len(images)}, {len(columns)})")
        self.images, self.table, self.columns = images, table, list(columns)
        self.targets, self.groups, self.draws_nothing = images.targets, images.groups, images.draws_nothing

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.table[torch.as_tensor(indices)]
        items = self.images.__getitems__(indices)
        return [
            {**item, "input": {"image": item["input"], "table": row}} for item, row in zip(items, rows, strict=True)
        ]


def digits_attributes(
    *,
    noise_columns: int = 6,
    val_per_class: int = 20,
    test_per_class: int = 40,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """scikit-learn's digits, images (1, 8, 8) in [0, 1], with a table of 18 measures of each and some noise.

    Args:
        noise_columns: columns that say nothing, >= 0.
        val_per_class, test_per_class: images of each class, >= 10.
        seed: draws splits and noise.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    check_number("test_per_class", test_per_class, LEAST_PER_CLASS)
    test, rest = balanced_split(labels, test_per_class, seed)
    splits = attribute_splits(
        (images[rest], labels[rest]),
        (images[test], labels[test]),
        class_names=[str(digit) for digit in range(10)],
        noise_columns=noise_columns,
        val_per_class=val_per_class,
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def fashion_attributes(
    *,
    root: str | None = None,
    download: bool = False,
    noise_columns: int = 6,
    n_train: int | None = 8000,
    val_per_class: int = 50,
    test_per_class: int = 100,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """Fashion-MNIST, images (1, 28, 28) normalised, with a table of 18 measures of each and some noise.

    Args:
        root, download: see :func:`~counterpoise.recipes.data.fashion_mnist_lt`.
        noise_columns: columns that say nothing, >= 0.
        n_train: training images before validation is cut, None = all; >= 20 * val_per_class.
        val_per_class, test_per_class: images of each class, >= 10; the test images are of the official test split.
        seed: draws splits and noise.
    """
    check_number("test_per_class", test_per_class, LEAST_PER_CLASS, 999)
    train, test = load_fashion_mnist(root, download)
    rows = torch.arange(len(train))
    if n_train is not None:
        check_number("n_train", n_train, 20 * val_per_class, len(train) - 10)
        rows = balanced_split(train.targets, n_train // 10, seed)[0]
    held = balanced_split(test.targets, test_per_class, seed)[0]
    splits = attribute_splits(
        (train.inputs[rows], train.targets[rows]),
        (test.inputs[held], test.targets[held]),
        class_names=list(CLASS_NAMES),
        noise_columns=noise_columns,
        val_per_class=val_per_class,
        seed=seed,
        mean=MEAN,
        std=STD,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def attribute_splits(
    train: Labelled,
    test: Labelled,
    *,
    class_names: list[str],
    noise_columns: int,
    val_per_class: int,
    seed: int,
    mean: float = 0.0,
    std: float = 1.0,
) -> Splits:
    """Cuts validation from the training part and measures the images of all three.

    Args:
        train, test: images and labels.
        class_names: (C,).
        noise_columns: >= 0.
        val_per_class: images of each class, >= 10.
        seed: draws the cut and the noise.
        mean, std: of the images.
    """
    check_number("noise_columns", noise_columns, 0)
    check_number("val_per_class", val_per_class, LEAST_PER_CLASS)
    held, rest = balanced_split(train[1], val_per_class, seed)
    parts = [(train[0][rest], train[1][rest]), (train[0][held], train[1][held]), test]
    tables = []
    for number, (images, _) in enumerate(parts):
        noise = torch.randn(len(images), noise_columns, generator=generator_for(seed, number), dtype=torch.float64)
        tables.append(torch.cat([image_attributes(images / 255), noise], 1))
    columns = [*ATTRIBUTES, *(f"noise_{i}" for i in range(noise_columns))]
    return splits_of_pairs(
        [InMemory(*part, mean=mean, std=std) for part in parts],
        standardised(tables),
        columns=columns,
        column_of=list(range(len(columns))),
        class_names=class_names,
    )


def standardised(tables: Sequence[Tensor]) -> list[Tensor]:
    """Float32 tables less the first one's mean, over its standard deviation; a constant column is only centred."""
    spread = tables[0].std(0, correction=0)
    scale = torch.where(spread > 0, spread, 1)
    return [((table - tables[0].mean(0)) / scale).float() for table in tables]


def splits_of_pairs(
    images: Sequence[Examples],
    tables: Sequence[Tensor],
    *,
    columns: Sequence[str],
    column_of: Sequence[int],
    class_names: list[str],
    notes: Sequence[str] = (),
) -> Splits:
    """Training, validation and test pairs.

    Args:
        images: of the three.
        tables: (N, d) of the three.
        columns: (d,) names of the entries.
        column_of: (d,) the column of the original table that each entry comes from: one column of words has several.
        class_names: (C,) names; one name where classes are not known.
        notes: sentences for the report.
    """
    train, val, test = (WithTable(*part, columns) for part in zip(images, tables, strict=True))
    return Splits(
        train,
        val,
        test,
        class_names=class_names,
        class_counts=train.targets.bincount(minlength=len(class_names)).tolist(),
        input_shape=tuple(train[0]["input"]["image"].shape),
        notes=list(notes),
        kind="pairs",
        facts={"train_table": train.table, "column_of": list(column_of)},
    )
