"""A user's own images with masks: a folder ``images`` and a folder ``masks``, or train, val and test with both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.data.assemble import data_module
from counterpoise.recipes.data.image_folders import read_image
from counterpoise.recipes.data.splits import InMemory, Splits

if TYPE_CHECKING:
    from counterpoise.recipes.data.datamodule import LabelledData

IGNORED = -100  # what losses and metrics leave out


def mask_folder(
    *,
    root: str,
    class_names: Sequence[str] | None = None,
    image_size: int = 64,
    void: int | None = 255,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    batch_size: int = 32,
    num_workers: int = 0,
) -> LabelledData:
    """Images as RGB in [-1, 1], (3, image_size, image_size), and a class for each pixel, (image_size, image_size).

    A mask is a PNG file of the image's name, grey, palette or black and white, whose values are class indices; 0 is the
    background.
    Image and mask are scaled and cropped alike to a centred square, masks without mixing classes; all are decoded once,
    at the start, and kept in memory.

    Args:
        root: ``root/images/*`` with ``root/masks/*.png``, or ``root/train/images`` and ``root/train/masks``, with
            ``root/val`` and ``root/test`` alike; of the two what is missing is cut from train.
        class_names: (C,) names, the background first; None = the numbers up to the largest in training.
        image_size: side in pixels, >= 8; the network may want a multiple of 4.
        void: mask value of pixels that do not count, or None.
        val_fraction, test_fraction: in (0, 0.5], at least one image each.
        seed: draws the splits.

    Raises:
        FileNotFoundError: no such folder, or an image without a mask.
        ValueError: too few images, sides that differ, a mask in colour or with a value of no class, a class that no
            training pixel has.
    """
    check_number("image_size", image_size, 8)
    check_number("val_fraction", val_fraction, 0, 0.5, open_low=True)
    check_number("test_fraction", test_fraction, 0, 0.5, open_low=True)
    base = Path(root).expanduser().absolute()
    apart = (base / "train").is_dir()
    read = {
        name: _read(base / name, image_size, void)
        for name in ("train", "val", "test")
        if apart and (name == "train" or (base / name).is_dir())
    } or {"train": _read(base, image_size, void)}
    images, masks = read["train"]
    rest = torch.randperm(len(images), generator=generator_for(seed))
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        if name not in read:
            size = max(1, round(fraction * len(images)))
            read[name], rest = (images[rest[:size]], masks[rest[:size]]), rest[size:]
    if not len(rest):
        raise ValueError(f"{base} has {len(images)} images, expected enough for three splits")
    rest = rest.sort().values
    read["train"] = images[rest], masks[rest]
    names = _names(class_names, {name: found for name, (_, found) in read.items()})
    train, val, test = (InMemory(*read[name], mean=0.5, std=0.5) for name in ("train", "val", "test"))
    counted = train.targets[train.targets >= 0]
    splits = Splits(
        train,
        val,
        test,
        class_names=names,
        class_counts=counted.bincount(minlength=len(names)).tolist(),
        input_shape=(3, image_size, image_size),
        kind="pixels",
    )
    return data_module(splits, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _names(given: Sequence[str] | None, masks: Mapping[str, Tensor]) -> list[str]:
    """(C,) class names: masks hold no others, and some training pixel has each."""
    counted = masks["train"][masks["train"] >= 0]
    counts = counted.bincount(minlength=0 if given is None else len(given))
    names = ["background", *map(str, range(1, len(counts)))] if given is None else [str(name) for name in given]
    if len(names) < 2:
        raise ValueError(
            f"masks have the classes {names}, expected the background and at least one more; void pixels are of none"
        )
    for name, found in masks.items():
        if int(found.max()) >= len(names):
            raise ValueError(f"a mask of {name} has the class {int(found.max())}, expected [0, {len(names) - 1}]")
    missing = next((k for k, count in enumerate(counts.tolist()) if not count), None)
    if missing is not None:
        raise ValueError(f"class {missing} has no pixel in training, expected at least one of each class")
    return names


def _read(folder: Path, size: int, void: int | None) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) uint8 images and (N, size, size) int64 classes of a folder, in order of their names."""
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {name!r}, expected 'images' and 'masks' in it")
    files = sorted(
        file
        for file in (folder / "images").iterdir()
        if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{folder / 'images'} has no image, expected one of {', '.join(IMG_EXTENSIONS)}")
    pairs = [_pair(file, folder / "masks" / f"{file.stem}.png", size, void) for file in files]
    return torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs])


def _pair(image_file: Path, mask_file: Path, size: int, void: int | None) -> tuple[Tensor, Tensor]:
    if not mask_file.is_file():
        raise FileNotFoundError(f"{image_file} has no mask, expected {mask_file}")
    image, mask = read_image(str(image_file)), read_mask(mask_file)
    if image.size != mask.size:
        raise ValueError(f"{mask_file} has {mask.size} pixels and its image {image.size}, expected the same")
    pixels = pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    values = torch.from_numpy(np.array(ImageOps.fit(mask, (size, size), Image.Resampling.NEAREST))).long()
    return pixels, values if void is None else values.masked_fill(values == void, IGNORED)


def read_mask(file: Path) -> Image.Image:
    """The mask at ``file``, one value a pixel; raises ValueError that names the file if it is none."""
    try:
        with Image.open(file) as mask:
            mask.load()
            if mask.mode not in ("L", "P", "1"):
                raise ValueError(f"its mode is {mask.mode}, expected grey or palette: one class index a pixel")
            return mask.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a mask ({error})") from error
