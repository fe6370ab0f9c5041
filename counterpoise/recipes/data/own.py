"""A user's own ``Dataset`` objects, as Hydra's ``_target_`` or plain Python makes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import build_splits, data_module
from counterpoise.recipes.data.cuts import validation_split
from counterpoise.recipes.data.long_tail import ClassOrder, LongTail
from counterpoise.recipes.data.splits import AsDict, as_example

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData


def from_datasets(
    *,
    train: Any,
    test: Any,
    val: Any = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    imbalance_factor: float | None = None,
    profile: str = "exponential",
    class_order: ClassOrder = None,
    n_max: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """Map-style data sets that yield (x, y) or dicts with ``input`` and ``target``, and ``group`` where known.

    Args:
        train, test, val: the data sets. Labels come from ``targets`` or ``labels``, or else from one pass over the
            items. Without val it is cut from train.
        num_classes: C; None = number of class_names, or one more than the largest training label.
        class_names: (C,) names; None = ``train.classes`` where it has them, or the numbers.
        val_fraction: in (0, 0.5], read only without val; balanced with at least 10 a class where the classes allow
            it, else stratified, and then ``Splits.notes`` says so.
        imbalance_factor: largest over smallest training class, >= 1; None drops nothing.
        profile, class_order, n_max: see :class:`~counterpoise.recipes.data.LongTailedSubset`.
        seed: draws splits and tail.

    Raises:
        TypeError: a data set without a length, items or inputs of a kind not understood.
        ValueError: labels outside [0, C - 1], a class missing from a split, class_names of another length than
            num_classes.
    """
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    source = _wrapped("train", train)
    splits = build_splits(
        source,
        val=partial(validation_split, fraction=val_fraction) if val is None else _wrapped("val", val),
        test=_wrapped("test", test),
        class_names=_names(train, source, num_classes, class_names),
        tail=LongTail(imbalance_factor, profile, class_order, n_max),
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _wrapped(name: str, dataset: Any) -> AsDict:
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} is empty, expected a data set with examples")
    try:
        wrapped = AsDict(dataset)
        first = int(as_example(dataset[0])["target"])
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error
    if first != int(wrapped.targets[0]):
        raise ValueError(f"{name}[0] has the target {first} but its targets start with {int(wrapped.targets[0])}")
    return wrapped


def _names(dataset: Any, source: AsDict, num_classes: int | None, class_names: Sequence[str] | None) -> list[str]:
    given = class_names if class_names is not None else getattr(dataset, "classes", None)
    if given is None:
        return [str(label) for label in range(num_classes or int(source.targets.max()) + 1)]
    if num_classes is not None and len(given) != num_classes:
        raise ValueError(f"class_names has {len(given)} names, expected num_classes = {num_classes}")
    return [str(name) for name in given]
