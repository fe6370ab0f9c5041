"""What a recipe trains on: three map-style data sets whose items are dicts, and what is known about their classes.

An item is ``dict(input, target, index)``, with ``group`` where groups are known. ``index`` is the position in the
item's own split, 0 .. len - 1: what samplers draw and what state kept per example is keyed by.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset


class Examples(Dataset[dict[str, Any]], ABC):
    """Map-style data set of dicts that knows its labels without reading an input.

    Attributes:
        targets: (N,) int64 class indices; (N, ...) of another kind, or a dict of such, where a recipe trains on that.
        groups: (N,) int64 group ids, or None.
        draws_nothing: True if an item is the same whenever it is read: nothing in it is random.
        input_range: (smallest, largest) that an input can hold, each a list with one number a channel, or one for all;
            None where that is not known.
    """

    targets: Any
    groups: Tensor | None
    draws_nothing: bool
    input_range: tuple[list[float], list[float]] | None = None

    @property
    def class_counts(self) -> list[int]:
        """Examples of each class, from class 0 to the largest label."""
        return self.targets.bincount().tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items at ``indices``, read together (a DataLoader prefers this form)."""

    def describe(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """``dict(target, index[, group])`` of each of ``indices`` without reading an input; classes as integers."""
        rows = torch.as_tensor(indices)
        columns = {"target": rows_of(self.targets, rows), "index": rows.tolist()}
        if self.groups is not None:
            columns["group"] = self.groups[rows].tolist()
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def rows_of(targets: Any, rows: Tensor) -> list[Any]:
    """The targets at ``rows``, one a row: integers of class indices, tensors, or dicts of tensors."""
    if isinstance(targets, Mapping):
        columns = {name: rows_of(values, rows) for name, values in targets.items()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    chosen = targets[rows]
    return chosen.tolist() if chosen.ndim == 1 and chosen.dtype == torch.int64 else list(chosen)


class InMemory(Examples):
    """Tensors as a data set.

    Args:
        inputs: (N, ...). uint8 images stay uint8 in memory and are read as float32 in [0, 1].
        targets: (N,) class indices; (N, ...) label sets or pixel classes; or a dict of targets by task.
        groups: (N,) group ids, or None.
        mean, std: a number, or one a channel (dimension 1 of ``inputs``), subtracted and divided by when an item is
            read; in [0, 1] units for uint8 images. None = left alone.
        transform: called with each converted input, or None.
        bounds: smallest and largest entry that inputs may have, before mean and std; None = 0 and 1 for uint8 images,
            and not known for others.

    Raises:
        ValueError: targets or groups of another length than inputs.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor | Mapping[str, Tensor],
        groups: Tensor | None = None,
        *,
        mean: float | Sequence[float] | Tensor = 0.0,
        std: float | Sequence[float] | Tensor = 1.0,
        transform: Callable[[Tensor], Tensor] | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.inputs = inputs
        self.targets = self._checked(targets)
        self.groups = None if groups is None else as_labels("groups", groups, len(inputs))
        self.mean, self.std = self._per_channel(mean), self._per_channel(std)
        self.transform = transform
        self.draws_nothing = transform is None
        self.bounds = (0.0, 1.0) if bounds is None and inputs.dtype == torch.uint8 else bounds

    @property
    def input_range(self) -> tuple[list[float], list[float]] | None:  # type: ignore[override]
        """That of the bounds, behind mean and std; None behind a transform."""
        if self.bounds is None or self.transform is not None:
            return None
        low, high = (((x - self.mean) / self.std).flatten().tolist() for x in self.bounds)
        return low, high

    def __len__(self) -> int:
        return len(self.inputs)

    def _checked(self, targets: Tensor | Mapping[str, Tensor]) -> Any:
        if not isinstance(targets, Mapping) and not (isinstance(targets, Tensor) and targets.ndim > 1):
            return as_labels("targets", targets, len(self.inputs))
        named = targets if isinstance(targets, Mapping) else {"targets": targets}
        for name, values in named.items():
            if len(values) != len(self.inputs):
                raise ValueError(f"{name} has {len(values)} rows, expected {len(self.inputs)}, one for each input")
        return targets

    def standardize(self, rows: Tensor) -> None:
        """Sets ``mean`` and ``std`` to those of ``rows`` (M,), a column; a constant column is only centred."""
        chosen = self.inputs[rows]
        spread = chosen.std(0, correction=0)
        self.mean, self.std = chosen.mean(0), torch.where(spread > 0, spread, 1)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        inputs: Iterable[Tensor] = self._convert(self.inputs[torch.as_tensor(indices)])
        if self.transform is not None:
            inputs = map(self.transform, inputs)
        return [{"input": x, **rest} for x, rest in zip(inputs, self.describe(indices), strict=True)]

    def _convert(self, inputs: Tensor) -> Tensor:
        scaled = inputs / 255 if inputs.dtype == torch.uint8 else inputs
        return ((scaled - self.mean) / self.std).float()

    def _per_channel(self, value: float | Sequence[float] | Tensor) -> Tensor:
        return torch.as_tensor(value).reshape(-1, *(1,) * (self.inputs.ndim - 2))


class AsDict(Examples):
    """Any map-style data set that yields (x, y) or dicts with ``input`` and ``target``, as dicts with ``index``.

    Args:
        dataset: the data set wrapped.
        targets: (len(dataset),) class indices that replace its own; None = :func:`targets_of`.
        indices: the positions of ``dataset`` to keep, in their order; None = all. ``index`` counts those kept.

    Raises:
        TypeError: a data set without a length, an item that is neither a pair nor a dict, an input that is no tensor.
        ValueError: labels that are not one integer an example.
    """

    def __init__(self, dataset: Any, targets: Tensor | None = None, *, indices: Tensor | None = None) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset is a {type(dataset).__name__} without a length, expected a map-style data set")
        self.dataset = dataset
        self.targets = as_labels("targets", targets_of(dataset) if targets is None else targets, len(dataset))
        self.groups = groups_of(dataset)
        self.draws_nothing = getattr(dataset, "draws_nothing", False)
        self.input_range = getattr(dataset, "input_range", None)
        self.indices = torch.arange(len(dataset))
        if indices is not None:
            self._keep(indices)

    def subset(self, rows: Tensor) -> AsDict:
        """The examples at ``rows`` (M,), numbered anew from 0."""
        part = copy.copy(self)
        part._keep(rows)
        return part

    def _keep(self, rows: Tensor) -> None:
        self.indices, self.targets = self.indices[rows], self.targets[rows]
        self.groups = None if self.groups is None else self.groups[rows]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.indices[torch.as_tensor(indices)].tolist()
        together = getattr(self.dataset, "__getitems__", None)
        items = together(rows) if together else [self.dataset[row] for row in rows]
        return [as_example(item) | rest for item, rest in zip(items, self.describe(indices), strict=True)]


def as_example(item: Any) -> dict[str, Any]:
    """An (x, y) pair or a dict with ``input`` and ``target`` as a dict; NumPy inputs become tensors."""
    if isinstance(item, Mapping):
        if not {"input", "target"} <= item.keys():
            raise ValueError(f"the data set yields dicts with the keys {list(item)}, expected 'input' and 'target'")
        example = dict(item)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        example = {"input": item[0], "target": item[1]}
    else:
        raise TypeError(f"the data set yields a {type(item).__name__}, expected a pair (input, target) or a dict")
    if isinstance(example["input"], np.ndarray):
        example["input"] = torch.from_numpy(example["input"])
    if not isinstance(example["input"], (Tensor, list, tuple, Mapping)):
        kind = type(example["input"]).__name__
        raise TypeError(f"the data set yields an input of type {kind}, expected a tensor: end its transform in one")
    return example


def as_labels(name: str, values: Any, length: int | None = None) -> Tensor:
    """``values`` as (N,) int64; raises ValueError if they are not integers, or not ``length`` of them."""
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} starts with {values[0]!r}, expected integers") from error
    if labels.ndim != 1 or (labels.is_floating_point() and labels.numel()):
        raise ValueError(f"{name} has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected (N,) integers")
    if length is not None and len(labels) != length:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected ({length},)")
    return labels.to(torch.int64)


def targets_of(dataset: Any) -> Tensor:
    """(N,) int64 labels of a map-style data set: its ``targets`` or ``labels``, or else by one pass over the items.

    A ``target_transform`` is applied; ``Subset`` and ``ConcatDataset`` are looked through.

    Raises:
        ValueError: labels that are not one integer an example.
    """
    known = _attribute(dataset, ("targets", "labels"))
    if known is not None:
        return known
    return as_labels("targets", [as_example(dataset[i])["target"] for i in range(len(dataset))])


def groups_of(dataset: Any) -> Tensor | None:
    """(N,) int64 groups of a map-style data set: its ``groups``, or else the items' ``group``; None without either."""
    known = _attribute(dataset, ("groups",))
    if known is not None or len(dataset) == 0:
        return known
    first = dataset[0]
    if not (isinstance(first, Mapping) and "group" in first):
        return None
    return as_labels("groups", [int(dataset[i]["group"]) for i in range(len(dataset))])


def _attribute(dataset: Any, names: tuple[str, ...]) -> Tensor | None:
    if isinstance(dataset, Subset):
        inner = _attribute(dataset.dataset, names)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_attribute(part, names) for part in dataset.datasets]
        return torch.cat([p for p in parts if p is not None]) if all(p is not None for p in parts) else None
    found = next((n for n in names if getattr(dataset, n, None) is not None), None)
    if found is None:
        return None
    values, transform = getattr(dataset, found), getattr(dataset, "target_transform", None)
    if transform is not None and "targets" in names:
        values = [int(transform(value)) for value in values]
    return as_labels(found, values)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test set of one task.

    Args:
        train, val, test: items are ``dict(input, target, index[, group])``.
        class_names: (C,) names; class c is ``class_names[c]``.
        class_counts: (C,) training examples of each class.
        input_shape: shape of one input (of one view, where there are several).
        group_counts: training examples of each group, or None.
        notes: sentences a report should show, for instance that validation holds few examples of a class.
        kind: what a target is: "classes" (an index), "labels" ((C,) of 0 and 1), "tasks" (a dict of them) or "pixels";
            or "pairs": the input is an image and a row of a table.
        facts: further run-time facts by the names that parts use.
    """

    train: Examples
    val: Examples
    test: Examples
    class_names: list[str]
    class_counts: list[int]
    input_shape: tuple[int, ...]
    group_counts: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    kind: str = "classes"
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)
