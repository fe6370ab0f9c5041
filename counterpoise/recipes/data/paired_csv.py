"""A user's own pairs: a table in a CSV file, one column of which names an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.csv import Table, read_table
from counterpoise.recipes.data.cuts import stratified_split, validation_split
from counterpoise.recipes.data.image_folders import IN_MEMORY_BYTES, read_image
from counterpoise.recipes.data.paired import splits_of_pairs, standardised
from counterpoise.recipes.data.splits import AsDict, Examples, InMemory

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

NO_CLASS = "all"  # the one class of pairs without labels


def paired_csv(
    *,
    path: str,
    image: str,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    root: str | None = None,
    image_size: int = 32,
    max_categories: int = 50,
    delimiter: str = ",",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """A CSV file with a header, in UTF-8; images as RGB (3, image_size, image_size) in [-1, 1].

    A column of numbers is standardised by the training rows, and an empty entry is their mean. Any other column becomes
    one entry of 0 and 1 for each word that training rows hold; an empty or a new word has none of them.

    Args:
        path: the file.
        image: column of the images' files, below ``root``.
        columns: of the table; None = all others that can be used, and ``Splits.notes`` names those left out.
        label: column of classes, for evaluation only; never among the columns of the table. None = no classes.
        root: folder of the images; None = that of the file.
        image_size: side in pixels; images are scaled and cropped to a centred square.
        max_categories: a column with more different words is left out, >= 2.
        delimiter: one character.
        val_fraction, test_fraction: in (0, 0.5], of every class where there are classes.
        seed: draws the splits.

    Raises:
        FileNotFoundError: no such file, or an image that is not there.
        ValueError: no such column, one that holds nothing to use, fewer than two classes, a class too small to be
            split, an image that cannot be read.
    """
    check_number("image_size", image_size, 1)
    check_number("max_categories", max_categories, 2)
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    file = Path(path).expanduser()
    table = read_table(file, delimiter)
    class_names, targets = [NO_CLASS], torch.zeros(len(table.rows), dtype=torch.int64)
    if label is not None:
        class_names, targets = table.codes("label", label)
        if len(class_names) < 2:
            raise ValueError(f"label {label!r} has the class {class_names[0]!r} alone, expected at least 2 classes")
    folder = file.parent if root is None else Path(root).expanduser()
    pictures = _loaded(_files(table, image, folder), targets, image_size)
    test, rest = stratified_split(targets, test_fraction, seed)
    cut = validation_split if label is not None else stratified_split
    val, train = (rest[part] for part in cut(targets[rest], val_fraction, seed))
    entries = _entries(table, columns, [name for name in (image, label) if name is not None], train, max_categories)
    splits = splits_of_pairs(
        [pictures.subset(rows) for rows in (train, val, test)],
        [entries.values[rows] for rows in (train, val, test)],
        columns=entries.names,
        column_of=entries.column_of,
        class_names=class_names,
        notes=entries.notes,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


class ImageFiles(Examples):
    """Images in files, decoded as they are read.

    Args:
        files: (N,) paths.
        targets: (N,) class indices.
        image_size: side in pixels.
    """

    draws_nothing = True

    def __init__(self, files: Sequence[Path], targets: Tensor, image_size: int) -> None:
        self.files, self.targets, self.image_size = list(files), targets, image_size
        self.groups = None

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        images = [(self.pixels(i) / 255 - 0.5) / 0.5 for i in indices]
        return [{"input": x, **rest} for x, rest in zip(images, self.describe(indices), strict=True)]

    def pixels(self, index: int) -> Tensor:
        """(3, image_size, image_size) uint8."""
        size = (self.image_size, self.image_size)
        return pil_to_tensor(ImageOps.fit(read_image(str(self.files[index])), size, Image.Resampling.BILINEAR))


def _loaded(files: list[Path], targets: Tensor, image_size: int) -> AsDict:
    """In memory where that is small."""
    images = ImageFiles(files, targets, image_size)
    if len(files) * 3 * image_size**2 > IN_MEMORY_BYTES:
        return AsDict(images)
    return AsDict(InMemory(torch.stack([images.pixels(i) for i in range(len(files))]), targets, mean=0.5, std=0.5))


def _files(table: Table, image: str, folder: Path) -> list[Path]:
    files = [folder / entry for entry in table.column("image", image)]
    for file, line in zip(files, table.lines, strict=True):
        if not file.is_file():
            raise FileNotFoundError(f"{table.name}, line {line}: {file} does not exist, expected an image")
    return files


@dataclass(frozen=True)
class _Entries:
    """(N, d) float32 of a table, the names of the entries, the column that each comes from, and what to tell."""

    values: Tensor
    names: list[str]
    column_of: list[int]
    notes: list[str]


def _entries(
    table: Table, columns: Sequence[str] | None, taken: list[str], train: Tensor, max_categories: int
) -> _Entries:
    both = [name for name in columns or () if name in taken]
    if both:
        raise ValueError(f"columns holds {both[0]!r}, the image or label column, expected other columns")
    wanted = [name for name in table.header if name not in taken] if columns is None else list(columns)
    found: list[tuple[str, list[str], Tensor]] = []
    left_out = []
    for name in wanted:
        texts = table.column("columns", name)
        numbers = _numbers(texts, train)
        names, values = _words(name, texts, train, max_categories) if numbers is None else ([name], numbers)
        if names:
            found.append((name, names, values))
        else:
            left_out.append(name)
    if not found or (columns is not None and left_out):
        at_fault = repr(left_out[0]) if left_out else str(wanted)
        raise ValueError(f"columns has {at_fault}, expected numbers, or 2 to {max_categories} words in training rows")
    notes = [f"Columns left out: {', '.join(left_out)}."] if left_out else []
    return _Entries(
        torch.cat([values for _, _, values in found], 1),
        [entry for _, names, _ in found for entry in names],
        [number for number, (_, names, _) in enumerate(found) for _ in names],
        notes,
    )


def _numbers(texts: list[str], train: Tensor) -> Tensor | None:
    """(N, 1) standardised, zero where empty; None for a column that holds something else or no training number."""
    try:
        x = torch.tensor([float(text) if text else math.nan for text in texts], dtype=torch.float64)
    except ValueError:
        return None
    known = x[train][x[train].isfinite()]
    if x.isinf().any() or len(known) == 0 or any(text and math.isnan(v) for text, v in zip(texts, x, strict=True)):
        return None
    return standardised([known[:, None], x[:, None]])[1].nan_to_num(0.0)


def _words(name: str, texts: list[str], train: Tensor, most: int) -> tuple[list[str], Tensor]:
    """Names and (N, words) of 0 and 1; no names where there are fewer than two words, or more than ``most``."""
    words = sorted({texts[i] for i in train.tolist()} - {""})
    if not 2 <= len(words) <= most:
        return [], torch.empty(len(texts), 0)
    values = torch.tensor([[float(text == word) for word in words] for text in texts])
    return [f"{name}={word}" for word in words], values
