"""From a labelled set to a data module, the same way for every source.

The protocol: the test split is cut first, the validation split next, and only what is left becomes long-tailed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from counterpoise.recipes.data.cuts import LEAST_PER_CLASS
from counterpoise.recipes.data.long_tail import LongTail
from counterpoise.recipes.data.splits import AsDict, Examples, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

Cut = Callable[..., tuple[Tensor, Tensor]]


def build_splits(
    source: Examples,
    *,
    val: Examples | Cut,
    test: Examples | Cut,
    class_names: Sequence[str],
    tail: LongTail,
    seed: int,
) -> Splits:
    """Splits a labelled set.

    Args:
        source: what is trained on, and what is cut from.
        val, test: a set of their own, or how to cut them: ``(targets, seed=...) -> (held out, rest)``.
        class_names: (C,) names, C >= 2; every split must have each class.
        tail: what to keep of the training part.
        seed: draws the cuts and the tail.

    Raises:
        ValueError: labels outside [0, C - 1], a class missing from a split, a class too small to be split.
    """
    names = [str(name) for name in class_names]
    check_classes("train", source, names)
    _check_divisible(source, names, cuts=sum(not isinstance(part, Examples) for part in (val, test)))
    pool = source if isinstance(source, AsDict) else AsDict(source)
    rest = torch.arange(len(pool))
    if not isinstance(test, Examples):
        test, rest = _cut(pool, rest, test, seed)
    if not isinstance(val, Examples):
        val, rest = _cut(pool, rest, val, seed)
    check_classes("test", test, names)
    check_classes("val", val, names)
    train = pool.subset(rest[tail.choose(pool.targets[rest], seed)])
    return Splits(
        train=train,
        val=val,
        test=test,
        class_names=names,
        class_counts=train.class_counts,
        input_shape=_shape(train[0]["input"]),
        group_counts=_group_counts(train, val, test),
        notes=_notes(train, val, test, names),
    )


def data_module(splits: Splits, *, batch_size: int, num_workers: int, seed: int) -> LabelledData:
    """The Lightning data module of ``splits``."""
    from counterpoise.recipes.data.datamodule import LabelledData

    return LabelledData(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def check_classes(name: str, part: Examples, class_names: list[str]) -> None:
    """Raises ValueError unless the labels of ``part`` lie in [0, C - 1] and each class occurs."""
    if len(class_names) < 2:
        raise ValueError(f"{name} has one class, {class_names[0]!r}, expected at least 2")
    outside = part.targets[(part.targets < 0) | (part.targets >= len(class_names))]
    if len(outside):
        raise ValueError(f"{name} holds the label {int(outside[0])}, expected labels in [0, {len(class_names) - 1}]")
    counts = part.targets.bincount(minlength=len(class_names))
    if int(counts.min()) == 0:
        raise ValueError(f"class {_named(int(counts.argmin()), class_names)} has no example in {name}")


def _check_divisible(source: Examples, names: list[str], cuts: int) -> None:
    smallest = int(source.targets.bincount().argmin())
    count = source.class_counts[smallest]
    if count < cuts + 1:
        raise ValueError(
            f"class {_named(smallest, names)} has {count} example{'s' if count > 1 else ''}, expected at least "
            f"{cuts + 1}: one for training and one for each split cut from it"
        )


def _cut(pool: AsDict, rest: Tensor, cut: Cut, seed: int) -> tuple[AsDict, Tensor]:
    held, left = cut(pool.targets[rest], seed=seed)
    return pool.subset(rest[held]), rest[left]


def _named(label: int, names: list[str]) -> str:
    return str(label) if names[label] == str(label) else f"{label} ({names[label]!r})"


def _shape(inputs: Any) -> tuple[int, ...]:
    first = inputs[0] if isinstance(inputs, (list, tuple)) else inputs  # several views have one shape
    return tuple(first.shape) if isinstance(first, Tensor) else ()


def _group_counts(*parts: Examples) -> list[int] | None:
    train = parts[0].groups
    if train is None:
        return None
    num_groups = 1 + max(int(part.groups.max()) for part in parts if part.groups is not None)
    return train.bincount(minlength=num_groups).tolist()


def _notes(train: Examples, val: Examples, test: Examples, names: list[str]) -> list[str]:
    notes = []
    fewest = int(val.targets.bincount().argmin())
    if val.class_counts[fewest] < LEAST_PER_CLASS:
        notes.append(
            f"Validation holds {val.class_counts[fewest]} of class {_named(fewest, names)}, fewer than "
            f"{LEAST_PER_CLASS} a class: its per-class figures are coarse."
        )
    num_groups = len(_group_counts(train, val, test) or [])
    for name, part in (("training", train), ("validation", val), ("test", test)):
        seen = set() if part.groups is None else set(part.groups.tolist())
        absent = sorted(set(range(num_groups)) - seen)
        if absent:
            notes.append(f"The {name} split has no example of group {', '.join(map(str, absent))}.")
    return notes
