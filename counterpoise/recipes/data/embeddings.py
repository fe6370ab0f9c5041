"""A user's own embeddings: vectors in an .npz file, with or without classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.cuts import stratified_split
from counterpoise.recipes.data.splits import InMemory, Splits, as_labels

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

NAMES = {"features": ("features", "embeddings"), "targets": ("targets", "labels")}


def embeddings_npz(
    *,
    path: str,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    standardize: bool = True,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """Vectors of an .npz file, such as the embeddings.npz of the ``self_supervised`` recipe; inputs (d,) float32.

    Args:
        path: the file, with ``features`` (N, d) (or ``embeddings``) and optionally ``targets`` (N,) (or ``labels``),
            integers from 0 on, and ``class_names`` (C,). Where it holds ``val_features`` or ``test_features``, with
            ``val_targets`` and ``test_targets`` if there are targets, these are the splits; else they are cut.
        val_fraction, test_fraction: in (0, 0.5], of every class that has three examples, of all examples without
            targets.
        standardize: centre, and divide by the one standard deviation of all entries, of the training vectors: angles
            and distances of a kind, in units in which noise of views is meant.
        seed: draws the cuts.

    Without targets every example is of the class "unlabelled", and ``Splits.facts`` has ``labelled`` False: clustering
    then reports what needs no classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an array that is missing, of another shape, or not finite.
    """
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    arrays = _read(Path(path).expanduser())
    labelled = _find(arrays, "targets", "") is not None
    names = _class_names(arrays) if labelled else ["unlabelled"]
    parts = {"train": _part(arrays, "", labelled)}
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        given = _find(arrays, "features", f"{split}_")
        if given is not None:
            parts[split] = _part(arrays, f"{split}_", labelled)
        else:
            x, y = parts["train"]
            held, rest = _cut(y, fraction, labelled, seed)
            parts[split], parts["train"] = (x[held], y[held]), (x[rest], y[rest])
    mean, std = _moments(parts["train"][0]) if standardize else (0.0, 1.0)
    sets = {name: InMemory(x, y, mean=mean, std=std) for name, (x, y) in parts.items()}
    counts = {name: part.targets.bincount(minlength=len(names)).tolist() for name, part in sets.items()}
    splits = Splits(
        train=sets["train"],
        val=sets["val"],
        test=sets["test"],
        class_names=names,
        class_counts=counts["train"],
        input_shape=tuple(parts["train"][0].shape[1:]),
        notes=[
            f"The {name} split has no example of class {', '.join(names[c] for c, n in enumerate(found) if not n)}."
            for name, found in counts.items()
            if 0 in found
        ],
        facts={"labelled": labelled},
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _moments(x: Tensor) -> tuple[Tensor, float]:
    """Mean (d,) and the one standard deviation of all entries around it."""
    mean = x.mean(0)
    return mean, float((x - mean).square().mean().sqrt()) or 1.0


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"path {path.absolute()} does not exist, expected an .npz file with features (N, d)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(f"{path.name} cannot be read as .npz of plain arrays ({error})") from error


def _find(arrays: Mapping[str, np.ndarray], kind: str, prefix: str) -> np.ndarray | None:
    return next((arrays[prefix + name] for name in NAMES[kind] if prefix + name in arrays), None)


def _part(arrays: Mapping[str, np.ndarray], prefix: str, labelled: bool) -> tuple[Tensor, Tensor]:
    """Vectors (N, d) and classes (N,) of a split; ValueError for what does not fit."""
    features = _find(arrays, "features", prefix)
    if features is None:
        raise ValueError(f"path holds the arrays {sorted(arrays)}, expected {prefix}features (N, d)")
    first = _find(arrays, "features", "")
    if features.ndim != 2 or not len(features) or first is None or features.shape[1:] != first.shape[1:]:
        raise ValueError(f"{prefix}features has shape {features.shape}, expected (N, d) with N >= 1 and one d")
    if not np.issubdtype(features.dtype, np.number) or not np.isfinite(features).all():
        raise ValueError(f"{prefix}features holds {features.dtype} that is not finite, expected finite numbers")
    x = torch.from_numpy(features.astype(np.float32))
    if not labelled:
        return x, torch.zeros(len(x), dtype=torch.int64)
    targets = _find(arrays, "targets", prefix)
    if targets is None:
        raise ValueError(f"path holds targets and no {prefix}targets, expected those of each split")
    y = as_labels(f"{prefix}targets", targets, len(x))
    if int(y.min()) < 0:
        raise ValueError(f"{prefix}targets holds {int(y.min())}, expected class indices >= 0")
    return x, y


def _class_names(arrays: Mapping[str, np.ndarray]) -> list[str]:
    given = [_find(arrays, "targets", prefix) for prefix in ("", "val_", "test_")]
    largest = max(int(y.max(initial=0)) for y in given if y is not None)
    names = [str(name) for name in arrays.get("class_names", range(largest + 1))]
    if len(names) <= largest:
        raise ValueError(f"class_names has {len(names)} names, and targets holds {largest}: expected a name each")
    return names


def _cut(targets: Tensor, fraction: float, labelled: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Rows held out and the rest, of every class where each can be cut, else of all."""
    present = targets.bincount()
    cut = partial(stratified_split, fraction=fraction, seed=seed)
    if labelled and bool((present[present > 0] >= 3).all()):
        return cut(targets.unique(return_inverse=True)[1])
    if len(targets) < 3:
        raise ValueError(f"features has {len(targets)} rows to train on, expected at least 3 to cut splits from")
    return cut(torch.zeros_like(targets))
