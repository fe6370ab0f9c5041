"""The sources of data: what each gives, and the input it refuses."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoise.recipes.data import (
    cifar10_lt,
    csv_table,
    digits_lt,
    fashion_mnist,
    fashion_mnist_lt,
    image_folder,
    long_tail_counts,
)
from tests.recipes.test_data import labels


def test_digits_are_cut_before_the_tail() -> None:
    splits = digits_lt(imbalance_factor=20).splits
    assert splits.val.class_counts == [20] * 10
    assert splits.test.class_counts == [40] * 10
    assert sorted(splits.class_counts, reverse=True) == long_tail_counts(10, 114, 20)
    assert splits.class_counts == splits.train.class_counts
    assert splits.class_counts[0] != 114
    assert splits.num_classes == 10
    assert splits.input_shape == (1, 8, 8)
    assert not splits.notes
    rows = [set(part.indices.tolist()) for part in (splits.train, splits.val, splits.test)]  # type: ignore[attr-defined]
    assert sum(map(len, rows)) == len(set.union(*rows))
    images = torch.stack([item["input"] for item in splits.test])
    assert images.min() == 0
    assert images.max() == 1


def test_digits_reproduce_by_seed() -> None:
    first, again, other = (digits_lt(seed=seed).splits.train for seed in (0, 0, 1))
    assert torch.equal(first.indices, again.indices)  # type: ignore[attr-defined]
    assert not torch.equal(first.indices, other.indices)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"val_per_class is 5, expected a number in \[10"):
        digits_lt(val_per_class=5)


def write_idx(path: Path, array: np.ndarray) -> None:
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_fashion(folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True)
    for name, each in (("train", 25), ("t10k", 3)):
        targets = labels(*[each] * 10)
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", np.full((len(targets), 28, 28), 255))
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", targets.numpy())


@pytest.mark.parametrize(("folder", "suffix"), [("FashionMNIST/raw", ""), (".", ".gz")])
def test_fashion_mnist_reads_plain_and_gzipped_files(tmp_path: Path, folder: str, suffix: str) -> None:
    write_fashion(tmp_path / "files" / folder, suffix)
    splits = fashion_mnist_lt(root=str(tmp_path / "files"), n_max=None, imbalance_factor=5, val_per_class=10).splits
    assert sorted(splits.class_counts)[::9] == [3, 15]
    assert splits.test.class_counts == [3] * 10
    assert splits.input_shape == (1, 28, 28)
    assert splits.class_names[9] == "Ankle boot"
    assert splits.train[0]["input"].mean() == pytest.approx((1 - 0.2860) / 0.3530)


def test_a_part_of_fashion_mnists_test_split(tmp_path: Path) -> None:
    write_fashion(tmp_path / "raw", ".gz")
    options: dict[str, Any] = {"root": str(tmp_path / "raw"), "imbalance_factor": None, "n_max": None}
    splits = fashion_mnist_lt(**options, val_per_class=10, test_per_class=2).splits
    assert splits.test.class_counts == [2] * 10
    with pytest.raises(ValueError, match="has 3 examples, expected more than 3"):
        fashion_mnist_lt(**options, val_per_class=10, test_per_class=3)


def test_fashion_mnist_says_how_to_get_the_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*download=true.*data\.root="):
        fashion_mnist_lt(root=str(tmp_path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04xxxx", "starts with 504b0304, expected 000008"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "holds 3 values, expected 5"),
        (b"\x00\x00\x08\x03\x00\x00", "fetch it again"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        fashion_mnist.read_idx(tmp_path / "x-ubyte")
    (tmp_path / "x-ubyte.gz").write_bytes(gzip.compress(data * 9)[:-12])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        fashion_mnist.read_idx(tmp_path / "x-ubyte.gz")


def test_cifar_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    with pytest.raises(FileNotFoundError, match=r"CIFAR10 was not found.*data\.download=true.*data\.root="):
        cifar10_lt(root=str(tmp_path))
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    batch = {"data": np.zeros((200, 3072), np.uint8), "labels": [i % 10 for i in range(200)]}
    for name, content in (("a", batch), ("b", batch), ("batches.meta", {"label_names": list("abcdefghij")})):
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "train_list", [["a", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["b", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    splits = cifar10_lt(root=str(tmp_path), imbalance_factor=5, val_per_class=10).splits
    assert splits.class_counts == long_tail_counts(10, 10, 5)
    assert splits.val.class_counts == [10] * 10
    assert splits.input_shape == (3, 32, 32)
    assert splits.class_names == list("abcdefghij")


def write_images(folder: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 9), (255, 10 * i, 0)).save(folder / name / f"{i}.png")
    return folder


def test_image_folder_cuts_its_own_splits_and_notes_small_classes(tmp_path: Path) -> None:
    root = write_images(tmp_path / "pets", cat=20, dog=5)
    (root / ".cache").mkdir()
    splits = image_folder(root=str(root), image_size=8).splits
    assert splits.class_names == ["cat", "dog"]
    assert splits.input_shape == (3, 8, 8)
    assert splits.test.class_counts == [4, 1]
    assert splits.val.class_counts == [2, 1]
    assert splits.class_counts == [14, 3]
    assert splits.train[0]["input"][0].unique().tolist() == [1]
    assert splits.train[0]["input"][2].unique().tolist() == [-1]
    assert "Validation holds 1 of class 1 ('dog'), fewer than 10 a class" in splits.notes[0]


def test_image_folder_takes_ready_splits_and_cuts_what_is_missing(tmp_path: Path) -> None:
    write_images(tmp_path / "train", cat=24, dog=30)
    write_images(tmp_path / "test", cat=1, dog=2)
    splits = image_folder(root=str(tmp_path), image_size=8, imbalance_factor=2).splits
    assert splits.test.class_counts == [1, 2]
    assert splits.val.class_counts == [10, 10]
    assert splits.class_counts == [14, 7]
    assert not splits.notes


def test_a_folder_too_large_for_memory_is_decoded_later_to_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_images(tmp_path / "pets", cat=5, dog=5)
    kept = image_folder(root=str(root), image_size=8).splits.train
    monkeypatch.setattr("counterpoise.recipes.data.image_folders.IN_MEMORY_BYTES", 0)
    later = image_folder(root=str(root), image_size=8).splits.train
    assert all(torch.equal(a["input"], b["input"]) for a, b in zip(kept, later, strict=True))
    assert later.draws_nothing


def test_image_folder_refuses_bad_folders(tmp_path: Path) -> None:
    def refused(name: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            image_folder(root=str(tmp_path / name))

    refused("nowhere", FileNotFoundError, f"root {tmp_path}/nowhere does not exist")
    (tmp_path / "flat").mkdir()
    refused("flat", FileNotFoundError, "has no class folders")
    write_images(tmp_path / "one", cat=3)
    refused("one", ValueError, "has one class folder, 'cat', expected at least 2")
    write_images(tmp_path / "empty", cat=3, dog=0)
    refused("empty", ValueError, "empty/dog has no image, expected one of .jpg")
    write_images(tmp_path / "tiny", cat=9, dog=2)
    refused("tiny", ValueError, r"class 1 \('dog'\) has 2 examples, expected at least 3")
    write_images(tmp_path / "broken", cat=4, dog=4)
    (tmp_path / "broken" / "dog" / "2.png").write_bytes(b"no image")
    refused("broken", ValueError, "dog/2.png cannot be read as an image")
    write_images(tmp_path / "typo" / "train", cat=3, dog=3)
    write_images(tmp_path / "typo" / "tset", cat=3, dog=3)
    refused("typo", ValueError, "'tset' beside 'train', expected only train, val and test, did you mean 'test'")
    write_images(tmp_path / "unlike" / "train", cat=3, dog=3)
    write_images(tmp_path / "unlike" / "test", cat=3, dogs=3)
    refused("unlike", ValueError, "differ in the class 'dog'")


def write_table(path: Path, cells: dict[str, str] | None = None) -> str:
    """Columns age, height, note, site, species; ``cells`` replaces "<column>" of the row on line 7."""
    header = ["age", "height", "note", "site", "species"]
    lines = [header] + [
        [str(i), str(1e9 + i), "x", "ab"[i % 2], ("setosa", "virginica", "other")[i % 3]] for i in range(120)
    ]
    lines[6] = [(cells or {}).get(name, old) for name, old in zip(header, lines[6], strict=True)]
    path.write_text("\n".join(",".join(line) for line in lines) + "\n", encoding="utf-8-sig")
    return str(path)


def test_csv_standardises_with_training_rows_only(tmp_path: Path) -> None:
    path = write_table(tmp_path / "m.csv")
    splits = csv_table(path=path, label="species", group="site").splits
    assert splits.class_names == ["other", "setosa", "virginica"]
    assert splits.input_shape == (2,)
    assert splits.test.class_counts == [8] * 3
    assert splits.val.class_counts == [10] * 3
    assert splits.class_counts == [22] * 3
    assert sum(splits.group_counts or []) == 66
    train = torch.stack([item["input"] for item in splits.train])
    torch.testing.assert_close(train.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(2))
    assert abs(torch.stack([item["input"] for item in splits.test]).mean()) > 1e-4
    assert splits.notes == ["Columns left out because they hold no numbers: note."]
    raw = csv_table(path=path, label="species", features=["age"], standardize=False).splits
    assert raw.input_shape == (1,)
    assert raw.group_counts is None
    assert not raw.notes
    assert torch.stack([item["input"] for item in raw.train]).max() > 50


def test_integer_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("y;x\n" + "".join(f"{y};{i}\n" for i, y in enumerate([10, 9, 2] * 4)))
    splits = csv_table(path=str(tmp_path / "n.csv"), label="y", delimiter=";").splits
    assert splits.class_names == ["2", "9", "10"]


@pytest.mark.parametrize("entry", ["nan", "inf", "abc"])
def test_csv_names_line_and_column_of_what_is_no_number(tmp_path: Path, entry: str) -> None:
    path = write_table(tmp_path / "measurements.csv", {"age": entry})
    with pytest.raises(ValueError, match=f"measurements.csv, line 7, column 'age': '{entry}' is not a finite number"):
        csv_table(path=path, label="species")


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ({"age": ""}, {}, "line 7, column 'age': empty, expected a finite number"),
        ({"species": " "}, {}, "line 7, column 'species': empty, expected a label"),
        ({"age": "1,2"}, {}, "line 7: 6 entries, expected 5"),
        ({}, {"label": "specis"}, "label is 'specis', expected a column of m.csv: .*did you mean 'species'"),
        ({}, {"features": ["aeg"]}, "features is 'aeg', .*did you mean 'age'"),
        ({}, {"features": ["note"]}, "line 2, column 'note': 'x' is not a finite number"),
        ({}, {"features": ["species"]}, "features holds 'species', the label or group column"),
        ({}, {"label": "note"}, "one class, 'x', expected at least 2"),
        ({"species": "rare"}, {}, r"class 1 \('rare'\) has 1 example, expected at least 3"),
        ({}, {"test_fraction": 0.8}, r"test_fraction is 0.8, expected a number in \(0, 0.5\]"),
    ],
)
def test_csv_refuses(tmp_path: Path, cells: dict[str, str], options: dict[str, Any], message: str) -> None:
    path = write_table(tmp_path / "m.csv", cells)
    with pytest.raises(ValueError, match=message):
        csv_table(**{"path": path, "label": "species", **options})


def test_csv_refuses_unusable_files(tmp_path: Path) -> None:
    def refused(content: bytes, message: str) -> None:
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            csv_table(path=str(tmp_path / "t.csv"), label="y")

    refused(b"y,x\n", "t.csv has 1 lines, expected a header and rows")
    refused(b"y,x,x\n1,2,3\n", "column 'x' twice")
    refused("y,x\nä,1\n".encode("latin-1"), "t.csv cannot be read as CSV in UTF-8")
    with pytest.raises(FileNotFoundError, match=f"path {tmp_path}/gone.csv does not exist"):
        csv_table(path=str(tmp_path / "gone.csv"), label="y")
