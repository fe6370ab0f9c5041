"""Long-tailed Fashion-MNIST, read from the files that Debian packages or torchvision downloads."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from counterpoise._core import check_number
from counterpoise.recipes.data.assemble import build_splits, data_module
from counterpoise.recipes.data.cuts import LEAST_PER_CLASS, balanced_split
from counterpoise.recipes.data.long_tail import ClassOrder, LongTail
from counterpoise.recipes.data.splits import AsDict, InMemory

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

CLASS_NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images


def fashion_mnist_lt(
    *,
    root: str | None = None,
    download: bool = False,
    imbalance_factor: float | None = 100.0,
    profile: str = "exponential",
    class_order: ClassOrder = 0,
    n_max: int | None = 4000,
    val_per_class: int = 100,
    test_per_class: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """Fashion-MNIST, 10 classes, inputs (1, 28, 28) normalised; the official test split, long-tailed training.

    Args:
        root: folder that holds ``FashionMNIST/raw``, or the four idx files themselves, plain or gzipped; None looks
            where Debian's package installs them, then under ``data``.
        download: let torchvision fetch missing files into root (or ``data``).
        imbalance_factor: largest over smallest class, >= 1; None keeps all that the validation cut leaves.
        profile, class_order, n_max: see :class:`~counterpoise.recipes.data.LongTailedSubset`. 4000 gives about 10,000
            images at factor 100; None takes the whole class.
        val_per_class: validation images a class, >= 10, cut from the training part before it becomes long-tailed.
        test_per_class: test images a class, >= 1, where testing is slow; None = the whole test split.
        seed: draws splits and tail.

    Raises:
        FileNotFoundError: the files are nowhere; the message says how to get them.

    Source: Xiao et al., Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017.
    """
    check_number("val_per_class", val_per_class, LEAST_PER_CLASS)
    train, test = load_fashion_mnist(root, download)
    tested = AsDict(test)
    if test_per_class is not None:
        tested = tested.subset(balanced_split(test.targets, test_per_class, seed)[0])
    splits = build_splits(
        train,
        val=partial(balanced_split, per_class=val_per_class),
        test=tested,
        class_names=CLASS_NAMES,
        tail=LongTail(imbalance_factor, profile, class_order, n_max),
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def load_fashion_mnist(root: str | None = None, download: bool = False) -> tuple[InMemory, InMemory]:
    """The 60,000 training and the 10,000 test images, uint8 (N, 1, 28, 28) in memory, see :func:`fashion_mnist_lt`."""
    folder = _folder(root, download)
    return _part(folder, "train"), _part(folder, "t10k")


def read_idx(path: Path) -> Tensor:
    """The uint8 array of an idx file, plain or gzipped.

    Raises:
        ValueError: another magic number than that of unsigned bytes, or more or fewer bytes than the header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}): fetch it again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} starts with {data[:4].hex()}, expected 000008 and the number of dimensions")
    ndim = data[3]
    shape = np.frombuffer(data, dtype=">u4", count=min(ndim, (len(data) - 4) // 4), offset=4).tolist()
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * len(shape))
    if len(shape) < ndim or len(values) != np.prod(shape):
        raise ValueError(f"{path} holds {len(values)} values, expected {' x '.join(map(str, shape))}: fetch it again")
    return torch.from_numpy(values.reshape(shape).copy())


def _part(folder: Path, name: str) -> InMemory:
    images, labels = (read_idx(_file(folder, name, kind)) for kind in ("images-idx3", "labels-idx1"))
    return InMemory(images.unsqueeze(1), labels, mean=MEAN, std=STD)


def _file(folder: Path, name: str, kind: str) -> Path:
    plain = folder / f"{name}-{kind}-ubyte"
    return plain if plain.is_file() else plain.with_name(plain.name + ".gz")


def _complete(folder: Path) -> bool:
    names = [(name, kind) for name in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return all(_file(folder, name, kind).is_file() for name, kind in names)


def _folder(root: str | None, download: bool) -> Path:
    base = Path("data" if root is None else root).expanduser()
    raw = base / "FashionMNIST" / "raw"
    candidates = [DEBIAN_FOLDER, raw] if root is None else [raw, base]
    found = next((folder for folder in candidates if _complete(folder)), None)
    if found is not None:
        return found
    if download:
        return _download(base, raw)
    raise FileNotFoundError(
        f"Fashion-MNIST was not found in {' or '.join(str(folder.absolute()) for folder in candidates)}. Get it with "
        "`apt-get install dataset-fashion-mnist`, with data.download=true, or name the folder that has it with "
        "data.root=..."
    )


def _download(base: Path, raw: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(base), download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"Fashion-MNIST could not be downloaded into {raw.absolute()} ({error})") from error
    return raw
