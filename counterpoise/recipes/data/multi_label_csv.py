"""A user's own table with several labels an example: columns of 0 and 1, or one column that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.canvas import splits_of_labels
from counterpoise.recipes.data.csv import Table, read_table
from counterpoise.recipes.data.image_folders import read_image
from counterpoise.recipes.data.splits import InMemory

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData


def multi_label_csv(
    *,
    path: str,
    labels: str | Sequence[str],
    separator: str = "|",
    features: Sequence[str] | None = None,
    image: str | None = None,
    image_size: int = 32,
    delimiter: str = ",",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    standardize: bool = True,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """A CSV file with a header, in UTF-8; inputs (d,) float32, or with ``image`` (3, image_size, image_size).

    Validation and test are cut so that each has its share of every label's rows, as far as a row's rarest label tells.

    Args:
        path: the file.
        labels: two or more columns of 0 and 1; or one column that lists the labels of a row, empty for none. Then the
            labels are the distinct entries, sorted.
        separator: between two labels of one column.
        features: columns to use; None = every other column that holds numbers, and ``Splits.notes`` names the columns
            left out. Not read with ``image``.
        image: column of image files, relative to the folder of the CSV file; decoded into memory at the start, read in
            [-1, 1].
        image_size: side in pixels to which images are scaled and cropped.
        delimiter: one character.
        val_fraction, test_fraction: in (0, 0.5].
        standardize: subtract the mean of the training rows' features and divide by their standard deviation.
        seed: draws the splits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such column, an entry that is neither 0 nor 1 or not a finite number (the message has line and
            column), fewer than two labels, a label without a positive in training, an image that cannot be read.
    """
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    check_number("image_size", image_size, 8)
    file = Path(path).expanduser()
    table = read_table(file, delimiter)
    names, sets = _listed(table, labels, separator) if isinstance(labels, str) else _columns(table, labels)
    test, rest = shared_split(sets, torch.arange(len(sets)), test_fraction, seed)
    val, train = shared_split(sets, rest, val_fraction / (1 - test_fraction), seed + 1)
    left_out: list[str] = []
    if image is not None:
        inputs = _images(table, image, file.absolute().parent, image_size)
        parts = [InMemory(inputs[rows], sets[rows], mean=0.5, std=0.5) for rows in (train, val, test)]
    else:
        chosen, left_out = table.choose(features, [labels] if isinstance(labels, str) else list(labels))
        inputs = torch.stack([table.numbers(name) for name in chosen], dim=1)
        parts = [InMemory(inputs[rows], sets[rows]) for rows in (train, val, test)]
        if standardize:
            parts[0].standardize(torch.arange(len(train)))
            for part in parts[1:]:
                part.mean, part.std = parts[0].mean, parts[0].std
    splits = splits_of_labels(*parts, class_names=names)
    if left_out:
        splits.notes.append(f"Columns left out because they hold no numbers: {', '.join(left_out)}.")
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def shared_split(sets: Tensor, rows: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted positions (held out, rest) of ``rows``, every k-th of them in the order of their rarest labels.

    Args:
        sets: (N, C) label sets of 0 and 1; rows: (M,) positions in them, at least 2.
        fraction: of the rows to hold out, at least one.
        seed: orders rows of the same rarest label.
    """
    held_out = max(1, round(fraction * len(rows)))
    if len(rows) <= held_out:
        raise ValueError(f"the table has {len(sets)} rows, expected enough for three splits")
    mixed = rows[torch.randperm(len(rows), generator=generator_for(seed))]
    rarity = torch.where(sets[mixed] == 1, sets.sum(0), len(sets) + 2)
    rarity = torch.cat([rarity, torch.full((len(mixed), 1), len(sets) + 1)], dim=1)  # rows without labels come last
    order = mixed[rarity.min(1).indices.argsort(stable=True)]
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[(torch.arange(held_out, dtype=torch.float64) + 0.5).mul(len(rows) / held_out).long()] = True
    return order[held].sort().values, order[~held].sort().values


def _columns(table: Table, labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """Names and (N, C) sets of columns of 0 and 1."""
    if len(labels) < 2:
        raise ValueError(f"labels is {list(labels)}, expected at least 2 columns, or the name of one that lists labels")
    columns = []
    for name in labels:
        entries = table.column("labels", name)
        wrong = next((i for i, entry in enumerate(entries) if entry not in ("0", "1")), None)
        if wrong is not None:
            line = table.lines[wrong]
            raise ValueError(f"{table.name}, line {line}, column {name!r}: {entries[wrong]!r}, expected 0 or 1")
        columns.append(torch.tensor([int(entry) for entry in entries]))
    return list(labels), torch.stack(columns, dim=1)


def _listed(table: Table, column: str, separator: str) -> tuple[list[str], Tensor]:
    """Names and (N, C) sets of one column that lists the labels of its row."""
    if not separator:
        raise ValueError("separator is empty, expected what stands between two labels")
    listed = [{part.strip() for part in entry.split(separator)} - {""} for entry in table.column("labels", column)]
    names = sorted(set().union(*listed))
    if len(names) < 2:
        raise ValueError(
            f"column {column!r} of {table.name} has the labels {names}, expected at least 2, separated by {separator!r}"
        )
    place = {name: k for k, name in enumerate(names)}
    sets = torch.zeros(len(listed), len(names), dtype=torch.int64)
    for row, found in enumerate(listed):
        sets[row, [place[name] for name in found]] = 1
    return names, sets


def _images(table: Table, column: str, folder: Path, size: int) -> Tensor:
    """(N, 3, size, size) uint8 of the files in a column, scaled and cropped to a centred square."""
    pixels = []
    for entry, line in zip(table.column("image", column), table.lines, strict=True):
        if not entry:
            raise ValueError(f"{table.name}, line {line}, column {column!r}: empty, expected an image file")
        pixels.append(pil_to_tensor(ImageOps.fit(read_image(str(folder / entry)), (size, size))))
    return torch.stack(pixels)
