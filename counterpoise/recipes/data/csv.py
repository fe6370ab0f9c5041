"""A user's own table: one row an example, numeric columns as features, one column as label."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from counterpoise._core import check_number
from counterpoise._core.checks import did_you_mean
from counterpoise.recipes.data.assemble import build_splits, data_module
from counterpoise.recipes.data.cuts import stratified_split, validation_split
from counterpoise.recipes.data.long_tail import ClassOrder, LongTail
from counterpoise.recipes.data.splits import AsDict, InMemory

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData


def csv_table(
    *,
    path: str,
    label: str,
    features: Sequence[str] | None = None,
    group: str | None = None,
    delimiter: str = ",",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    standardize: bool = True,
    imbalance_factor: float | None = None,
    profile: str = "exponential",
    class_order: ClassOrder = None,
    n_max: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """A CSV file with a header, in UTF-8; inputs (d,) float32, one entry a feature.

    Args:
        path: the file.
        label: column of the labels, words or integers; classes are the distinct values, sorted.
        features: columns to use; None = every other column that holds numbers, and ``Splits.notes`` names the columns
            left out.
        group: column of group names or ids, sorted and numbered likewise; None = no groups.
        delimiter: one character.
        val_fraction: in (0, 0.5]; balanced with at least 10 a class where the classes allow it, else stratified, and
            then ``Splits.notes`` says so.
        test_fraction: in (0, 0.5], of every class.
        standardize: subtract the mean and divide by the standard deviation of the training rows.
        imbalance_factor: largest over smallest training class, >= 1; None drops nothing.
        profile, class_order, n_max: see :class:`~counterpoise.recipes.data.LongTailedSubset`.
        seed: draws splits and tail.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such column, a feature that is not a finite number (the message has line and column), an empty
            label, fewer than two classes, a class with too few rows to be split.
    """
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    table = read_table(Path(path).expanduser(), delimiter)
    class_names, targets = table.codes("label", label)
    groups = None if group is None else table.codes("group", group)[1]
    names, left_out = table.choose(features, [label] if group is None else [label, group])
    rows = InMemory(torch.stack([table.numbers(name) for name in names], dim=1), targets, groups)
    splits = build_splits(
        rows,
        val=partial(validation_split, fraction=val_fraction),
        test=partial(stratified_split, fraction=test_fraction),
        class_names=class_names,
        tail=LongTail(imbalance_factor, profile, class_order, n_max),
        seed=seed,
    )
    if standardize:
        rows.standardize(cast(AsDict, splits.train).indices)
    if left_out:
        splits.notes.append(f"Columns left out because they hold no numbers: {', '.join(left_out)}.")
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


@dataclass(frozen=True)
class Table:
    """A CSV file as text: its header, its rows, and the line of the file that each row ends on."""

    name: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, argument: str, name: str) -> list[str]:
        """The entries of column ``name``, or a ValueError that speaks of ``argument``."""
        if name not in self.header:
            hint = did_you_mean(name, self.header)
            raise ValueError(
                f"{argument} is {name!r}, expected a column of {self.name}: {', '.join(self.header)}{hint}"
            )
        place = self.header.index(name)
        return [row[place].strip() for row in self.rows]

    def codes(self, argument: str, name: str) -> tuple[list[str], Tensor]:
        """The distinct entries of a column, sorted (as numbers if all are integers), and each row's place (N,)."""
        entries = self.column(argument, name)
        if "" in entries:
            line = self.lines[entries.index("")]
            raise ValueError(f"{self.name}, line {line}, column {name!r}: empty, expected a {argument}")
        distinct = sorted(set(entries))
        if all(_is_integer(entry) for entry in distinct):
            distinct.sort(key=int)
        place = {entry: k for k, entry in enumerate(distinct)}
        return distinct, torch.tensor([place[entry] for entry in entries])

    def choose(self, features: Sequence[str] | None, taken: list[str]) -> tuple[list[str], list[str]]:
        """The feature columns, and those left out because no entry is a number."""
        if features is None:
            others = [name for name in self.header if name not in taken]
            chosen = [name for name in others if any(math.isfinite(_number(x)) for x in self.column("features", name))]
        else:
            others = chosen = list(features)
        both = [name for name in chosen if name in taken]
        if both:
            raise ValueError(f"features holds {both[0]!r}, the label or group column, expected other columns")
        if not chosen:
            raise ValueError(f"features is {others}, expected at least one column of {self.name} that holds numbers")
        return chosen, [name for name in others if name not in chosen]

    def numbers(self, name: str) -> Tensor:
        """A column as (N,) float64; every entry must be a finite number."""
        entries = self.column("features", name)
        values = [_number(entry) for entry in entries]
        for line, entry, value in zip(self.lines, entries, values, strict=True):
            if not math.isfinite(value):
                what = f"{entry!r} is not a finite number" if entry else "empty, expected a finite number"
                raise ValueError(f"{self.name}, line {line}, column {name!r}: {what}")
        return torch.tensor(values, dtype=torch.float64)


def read_table(path: Path, delimiter: str = ",") -> Table:
    """Reads a CSV file; raises for a missing file, an unusable header, or a row of another length than the header."""
    if not path.is_file():
        raise FileNotFoundError(f"path {path.absolute()} does not exist, expected a CSV file with a header")
    rows, lines = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            for row in filter(None, reader):
                rows.append(row)
                lines.append(reader.line_num)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path.name} cannot be read as CSV in UTF-8 after line {reader.line_num} ({error})"
            ) from error
    if len(rows) < 2:
        raise ValueError(f"{path.name} has {len(rows)} lines, expected a header and rows")
    header = [name.strip() for name in rows[0]]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path.name} has the column {twice!r} twice, expected distinct names in the header")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise ValueError(f"{path.name}, line {line}: {len(row)} entries, expected {len(header)} as in the header")
    return Table(path.name, header, rows[1:], lines[1:])


def _number(entry: str) -> float:
    try:
        return float(entry)
    except ValueError:
        return math.nan


def _is_integer(entry: str) -> bool:
    return entry.removeprefix("-").isdecimal()
