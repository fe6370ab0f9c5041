"""Images with masks from a user's folders: what is read, how it is cut, what is refused, and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoise.losses import CrossEntropyLoss
from counterpoise.recipes import SemiSegmentation, SmallUNet, fit
from counterpoise.recipes.data import mask_folder


def scan(i: int, width: int = 24, height: int = 16) -> np.ndarray:
    """Classes of a picture: background, a block of class 1 that moves with i, one pixel row of void below."""
    classes = np.zeros((height, width), dtype=np.uint8)
    classes[4:10, 5 + i % 6 : 12 + i % 6] = 1
    classes[-1] = 255
    return classes


def write(folder: Path, count: int = 10) -> Path:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        classes = scan(i)
        Image.fromarray(np.where(classes == 1, 200, 30).astype(np.uint8)).save(folder / "images" / f"{i:02}.png")
        Image.fromarray(classes).save(folder / "masks" / f"{i:02}.png")
    return folder


def test_image_and_mask_are_cut_alike(tmp_path: Path) -> None:
    splits = mask_folder(root=str(write(tmp_path)), image_size=16).splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [7, 1, 2]
    assert splits.class_names == ["background", "1"]
    assert splits.input_shape == (3, 16, 16)
    assert splits.kind == "pixels"
    for part in (splits.train, splits.val, splits.test):
        for item in part:
            assert item["target"].shape == (16, 16)
            assert torch.equal(item["target"] == 1, item["input"][0] > 0.3)  # bright in the picture, and nothing else
            assert item["target"][-1].tolist() == [-100] * 16
    counted = splits.train.targets[splits.train.targets >= 0]
    assert splits.class_counts == counted.bincount().tolist()


def test_splits_repeat_by_seed_and_do_not_overlap(tmp_path: Path) -> None:
    root = str(write(tmp_path, count=12))
    first, again, other = (mask_folder(root=root, image_size=8, seed=seed).splits for seed in (0, 0, 1))
    assert torch.equal(first.train.targets, again.train.targets)
    assert not torch.equal(first.train.targets, other.train.targets)
    assert sum(len(part) for part in (first.train, first.val, first.test)) == 12


def test_ready_splits_are_taken_and_what_is_missing_is_cut(tmp_path: Path) -> None:
    write(tmp_path / "train", count=8)
    write(tmp_path / "test", count=3)
    splits = mask_folder(root=str(tmp_path), image_size=8, val_fraction=0.25, class_names=["none", "organ"]).splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [6, 2, 3]
    assert splits.class_names == ["none", "organ"]


@pytest.mark.parametrize("mode", ["P", "1"])
def test_palette_and_black_and_white_masks_keep_their_indices(tmp_path: Path, mode: str) -> None:
    for file in sorted((write(tmp_path) / "masks").iterdir()):
        classes = np.where(np.array(Image.open(file)) == 1, 1, 0).astype(np.uint8)
        mask = Image.fromarray(classes)
        if mode == "P":
            mask.putpalette([200, 0, 0, 0, 90, 0])
        else:
            mask = mask.point(lambda value: 255 * value).convert("1", dither=Image.Dither.NONE)
        assert mask.mode == mode
        mask.save(file)
    splits = mask_folder(root=str(tmp_path), image_size=16).splits
    assert splits.train.targets.unique().tolist() == [0, 1]


def test_a_recipe_trains_on_it(tmp_path: Path) -> None:
    data = mask_folder(root=str(write(tmp_path / "scans", count=20)), image_size=16, batch_size=7)
    torch.manual_seed(0)
    recipe = SemiSegmentation(SmallUNet(3, 2, width=4), CrossEntropyLoss(), num_classes=2)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
    result = fit(recipe, data, folder=tmp_path / "run", max_epochs=1, **quiet)
    assert result.metrics["status"] == "completed"
    assert result.metrics["per_class"]["train_pixels"] == data.splits.class_counts


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def refused(name: str, error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            mask_folder(root=str(tmp_path / name), image_size=8, **options)

    refused("nowhere", FileNotFoundError, "nowhere has no folder 'images'")
    write(tmp_path / "few", count=2)
    refused("few", ValueError, "has 2 images, expected enough for three splits")
    (write(tmp_path / "unpaired") / "masks" / "03.png").unlink()
    refused("unpaired", FileNotFoundError, r"03.png has no mask, expected .*masks/03.png")
    (write(tmp_path / "unlike") / "masks" / "03.png").unlink()
    Image.new("L", (5, 5)).save(tmp_path / "unlike" / "masks" / "03.png")
    refused("unlike", ValueError, r"has \(5, 5\) pixels and its image \(24, 16\), expected the same")
    Image.new("RGB", (24, 16)).save(write(tmp_path / "colour") / "masks" / "03.png")
    refused("colour", ValueError, "03.png cannot be read as a mask .*mode is RGB, expected grey or palette")
    write(tmp_path / "good")
    refused("good", ValueError, r"has the class 255, expected \[0, 1\]", void=None, class_names=["none", "organ"])
    refused("good", ValueError, "class 2 has no pixel in training", class_names=["none", "organ", "other"])
    for file in (write(tmp_path / "blank") / "masks").iterdir():
        Image.new("L", (24, 16)).save(file)
    refused("blank", ValueError, r"masks have the classes \['background'\], expected the background and at least one")
    refused("good", ValueError, r"test_fraction is 0, expected a number in \(0, 0.5\]", test_fraction=0)
