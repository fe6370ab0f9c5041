"""A user's own images: one folder a class, or train, val and test folders of such folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from counterpoise._core import check_number
from counterpoise._core.checks import did_you_mean
from counterpoise.recipes.data.assemble import Cut, build_splits, data_module
from counterpoise.recipes.data.cuts import stratified_split, validation_split
from counterpoise.recipes.data.long_tail import ClassOrder, LongTail
from counterpoise.recipes.data.splits import AsDict, Examples, InMemory

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

SPLIT_FOLDERS = ("train", "val", "test")
IN_MEMORY_BYTES = 2**28  # a folder that decodes to less is decoded once, at the start


def image_folder(
    *,
    root: str,
    image_size: int = 32,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    imbalance_factor: float | None = None,
    profile: str = "exponential",
    class_order: ClassOrder = None,
    n_max: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
) -> LabelledData:
    """Images as RGB, scaled and cropped to a centred square, inputs (3, image_size, image_size) in [-1, 1].

    Classes are the folder names in alphabetical order; hidden folders are passed over. Up to 256 MiB of decoded pixels
    are kept in memory, larger folders are decoded as they are read.

    Args:
        root: ``root/<class>/*.png``, or ``root/train/<class>/...`` with ``root/val`` and ``root/test`` alike; of the
            two what is missing is cut from train.
        image_size: side in pixels.
        val_fraction: in (0, 0.5]; balanced with at least 10 a class where the classes allow it, else stratified, and
            then ``Splits.notes`` says so.
        test_fraction: in (0, 0.5], of every class.
        imbalance_factor: largest over smallest training class, >= 1; None drops nothing.
        profile, class_order, n_max: see :class:`~counterpoise.recipes.data.LongTailedSubset`.
        seed: draws splits and tail.

    Raises:
        FileNotFoundError: no such folder, or no class folders in it.
        ValueError: one class, an empty class, a class too small to be split, an image that cannot be read.
    """
    check_number("image_size", image_size, 1)
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    base = Path(root).expanduser().absolute()
    folders = _split_folders(base)
    train = _Folder(folders["train"], image_size)

    def part(name: str, cut: Cut) -> Examples | Cut:
        if name not in folders:
            return cut
        return AsDict(_loaded(_Folder(folders[name], image_size, classes=train.classes), image_size))

    splits = build_splits(
        _loaded(train, image_size),
        val=part("val", partial(validation_split, fraction=val_fraction)),
        test=part("test", partial(stratified_split, fraction=test_fraction)),
        class_names=train.classes,
        tail=LongTail(imbalance_factor, profile, class_order, n_max),
        seed=seed,
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def labelled_images(root: str | Path, image_size: int = 32) -> tuple[Examples, list[str], list[str]]:
    """Every image of ``root/<class>/``, or of ``root/train/<class>/``, with the class names and the files in order.

    Raises:
        FileNotFoundError, ValueError: as :func:`image_folder`.
    """
    folder = _Folder(_split_folders(Path(root).expanduser().absolute())["train"], image_size)
    files = [str(Path(file).relative_to(folder.root)) for file, _ in folder.samples]
    return _loaded(folder, image_size), list(folder.classes), files


class _Folder(ImageFolder):
    """torchvision's ImageFolder with our errors; ``classes`` gives a val or test folder the numbering of train."""

    draws_nothing = True

    def __init__(self, root: Path, image_size: int, classes: list[str] | None = None) -> None:
        self.expected = classes
        super().__init__(str(root), partial(_pixels, size=image_size), loader=read_image, allow_empty=True)
        empty = sorted(set(range(len(self.classes))) - set(self.targets))
        if empty:
            folder = root / self.classes[empty[0]]
            raise ValueError(f"class folder {folder} has no image, expected one of {', '.join(IMG_EXTENSIONS)}")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = _subfolders(Path(directory))
        if not names:
            raise FileNotFoundError(f"root {directory} has no class folders, expected one folder of images a class")
        if self.expected is not None and names != self.expected:
            unlike = sorted(set(names) ^ set(self.expected))
            raise ValueError(f"{directory} and its train folder differ in the class {unlike[0]!r}, expected the same")
        if len(names) < 2:
            raise ValueError(f"root {directory} has one class folder, {names[0]!r}, expected at least 2")
        return names, {name: label for label, name in enumerate(names)}


def read_image(path: str) -> Image.Image:
    """The image at ``path`` as RGB; raises ValueError that names the file if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _pixels(image: Image.Image, size: int) -> Tensor:
    return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def _loaded(folder: _Folder, image_size: int) -> Examples:
    if len(folder) * 3 * image_size**2 <= IN_MEMORY_BYTES:
        return InMemory(torch.stack([pixels for pixels, _ in folder]), folder.targets, mean=0.5, std=0.5)
    folder.transform = partial(_read_later, size=image_size)
    return AsDict(folder)


def _read_later(image: Image.Image, size: int) -> Tensor:
    return (_pixels(image, size) / 255 - 0.5) / 0.5


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _split_folders(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} does not exist, expected a folder with one folder of images a class")
    names = _subfolders(root)
    if "train" not in names or not _subfolders(root / "train"):
        return {"train": root}
    unknown = next((name for name in names if name not in SPLIT_FOLDERS), None)
    if unknown is not None:
        hint = did_you_mean(unknown, SPLIT_FOLDERS)
        raise ValueError(f"root {root} has {unknown!r} beside 'train', expected only train, val and test{hint}")
    return {name: root / name for name in names}
