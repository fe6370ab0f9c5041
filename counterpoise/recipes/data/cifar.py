"""Long-tailed CIFAR-10 and CIFAR-100, read through torchvision.

Unlike the released code of most long-tail papers, which selects on the test split, a balanced validation split is cut
from the training part first; a class therefore has ``val_per_class`` images fewer to train on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import build_splits, data_module
from counterpoise.recipes.data.cuts import LEAST_PER_CLASS, balanced_split
from counterpoise.recipes.data.long_tail import ClassOrder, LongTail
from counterpoise.recipes.data.splits import AsDict, InMemory, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training part


def cifar10_lt(
    *,
    root: str = "data",
    download: bool = False,
    imbalance_factor: float | None = 100.0,
    profile: str = "exponential",
    class_order: ClassOrder = None,
    n_max: int | None = None,
    val_per_class: int = 100,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """CIFAR-10, inputs (3, 32, 32) normalised; the official test split, long-tailed training.

    Args:
        root: folder that holds ``cifar-10-batches-py``.
        download: let torchvision fetch missing files into root (about 170 MB).
        imbalance_factor: largest over smallest class, >= 1; None keeps all that the validation cut leaves.
        profile, class_order, n_max: see :class:`~counterpoise.recipes.data.LongTailedSubset`.
        val_per_class: validation images a class, >= 10, cut from the training part before it becomes long-tailed.
        seed: draws splits and tail.

    Raises:
        FileNotFoundError: the files are missing or damaged; the message says how to get them.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    tail = LongTail(imbalance_factor, profile, class_order, n_max)
    splits = _splits("CIFAR10", root, download, tail, val_per_class, seed)
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def cifar100_lt(
    *,
    root: str = "data",
    download: bool = False,
    imbalance_factor: float | None = 100.0,
    profile: str = "exponential",
    class_order: ClassOrder = None,
    n_max: int | None = None,
    val_per_class: int = 10,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """CIFAR-100 with its 100 fine labels; root holds ``cifar-100-python``, all else is as in :func:`cifar10_lt`."""
    tail = LongTail(imbalance_factor, profile, class_order, n_max)
    splits = _splits("CIFAR100", root, download, tail, val_per_class, seed)
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _splits(name: str, root: str, download: bool, tail: LongTail, val_per_class: int, seed: int) -> Splits:
    check_number("val_per_class", val_per_class, LEAST_PER_CLASS)
    train = _read(name, root, download, train=True)
    return build_splits(
        _in_memory(train),
        val=partial(balanced_split, per_class=val_per_class),
        test=AsDict(_in_memory(_read(name, root, download, train=False))),
        class_names=train.classes,
        tail=tail,
        seed=seed,
    )


def _in_memory(part: Any) -> InMemory:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return InMemory(images, part.targets, mean=MEAN, std=STD)


def _read(name: str, root: str, download: bool, train: bool) -> Any:
    from torchvision import datasets

    folder = Path(root).expanduser()
    try:
        return getattr(datasets, name)(str(folder), train=train, download=download)
    except (OSError, RuntimeError) as error:
        base = getattr(datasets, name).base_folder
        why = f" ({error})" if download else ""
        raise FileNotFoundError(
            f"{name} was not found, or is damaged, in {(folder / base).absolute()}{why}. Fetch it with "
            f"data.download=true, or name the folder that holds {base} with data.root=..."
        ) from error
