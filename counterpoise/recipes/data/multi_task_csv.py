"""A user's own table with several targets: columns to classify by, columns of numbers; empty entries are missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.csv import Table, read_table
from counterpoise.recipes.data.splits import InMemory
from counterpoise.recipes.data.task_splits import splits_of_tasks
from counterpoise.recipes.tasks import MISSING

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData


def multi_task_csv(
    *,
    path: str,
    classifications: Sequence[str] = (),
    regressions: Sequence[str] = (),
    features: Sequence[str] | None = None,
    delimiter: str = ",",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    standardize: bool = True,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """A CSV file with a header, in UTF-8; inputs (d,) float32. The splits are drawn at random.

    Args:
        path: the file.
        classifications: columns whose distinct entries, sorted, are the classes of a task; empty = missing.
        regressions: columns of numbers, each a task; empty = missing.
        features: columns to use; None = every other column that holds numbers, and ``Splits.notes`` names the columns
            left out.
        delimiter: one character.
        val_fraction, test_fraction: in (0, 0.5].
        standardize: subtract the mean of the training rows' features and divide by their standard deviation.
        seed: draws the splits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no task, no such column, a column that is two tasks, a target or feature that is not a finite
            number (the message has line and column), fewer than two classes, a split without any target of a task.
    """
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    names = [*classifications, *regressions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        came = "empty" if not names else f"{names}, with {twice!r} twice"
        raise ValueError(f"classifications and regressions are {came}, expected at least one column, each once")
    table = read_table(Path(path).expanduser(), delimiter)
    tasks, targets = {}, {}
    for name in classifications:
        found, targets[name] = _classes(table, name)
        tasks[name] = {"kind": "classification", "size": len(found), "class_names": found}
    for name in regressions:
        targets[name] = _numbers(table, name)
        tasks[name] = {"kind": "regression", "size": 1}
    chosen, left_out = table.choose(features, names)
    inputs = torch.stack([table.numbers(name) for name in chosen], dim=1)
    parts = []
    for rows in _cut(len(inputs), val_fraction, test_fraction, seed):
        parts.append(InMemory(inputs[rows], {name: values[rows] for name, values in targets.items()}))
    if standardize:
        parts[0].standardize(torch.arange(len(parts[0])))
        for part in parts[1:]:
            part.mean, part.std = parts[0].mean, parts[0].std
    notes = [f"Columns left out because they hold no numbers: {', '.join(left_out)}."] if left_out else []
    train, val, test = parts
    splits = splits_of_tasks(train, val, test, tasks=tasks, notes=notes)
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _classes(table: Table, name: str) -> tuple[list[str], Tensor]:
    """The distinct entries of a column, sorted, and (N,) class indices."""
    entries = table.column("classifications", name)
    found = sorted(set(entries) - {""})
    if len(found) < 2:
        raise ValueError(f"column {name!r} of {table.name} has the classes {found}, expected at least 2")
    place = {entry: k for k, entry in enumerate(found)} | {"": MISSING}
    return found, torch.tensor([place[entry] for entry in entries])


def _numbers(table: Table, name: str) -> Tensor:
    """(N,) float32 of a column, NaN where it is empty."""
    values = []
    for entry, line in zip(table.column("regressions", name), table.lines, strict=True):
        try:
            value = float(entry) if entry else math.nan
        except ValueError:
            value = math.inf
        if math.isinf(value) or (entry and math.isnan(value)):
            raise ValueError(f"{table.name}, line {line}, column {name!r}: {entry!r} is not a finite number")
        values.append(value)
    return torch.tensor(values, dtype=torch.float32)


def _cut(n: int, val_fraction: float, test_fraction: float, seed: int) -> list[Tensor]:
    """Sorted rows of training, validation and test; ValueError for a table too small."""
    n_val, n_test = max(1, round(val_fraction * n)), max(1, round(test_fraction * n))
    if n <= n_val + n_test:
        raise ValueError(f"the table has {n} rows, expected more than {n_val + n_test}, which are held out")
    val, test, train = torch.randperm(n, generator=generator_for(seed)).split([n_val, n_test, n - n_val - n_test])
    return [rows.sort().values for rows in (train, val, test)]
