"""The data layer: splits, long tails, and what each source refuses."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from counterpoise.recipes.data import (
    AsDict,
    InMemory,
    LongTailed,
    balanced_split,
    cifar10_lt,
    class_order,
    csv_table,
    digits_lt,
    fashion_mnist,
    fashion_mnist_lt,
    from_datasets,
    groups_of,
    image_folder,
    long_tail_counts,
    long_tail_indices,
    targets_of,
    validation_split,
)
from tests.conftest import GOLDEN

CASES = json.loads((GOLDEN / "longtail_counts.json").read_text())["cases"]


def labels(*counts: int) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def points(*counts: int) -> InMemory:
    """Example i of the set has the input [i, i]."""
    targets = labels(*counts)
    return InMemory(torch.arange(len(targets)).float().unsqueeze(1).expand(-1, 2), targets)


# Profiles


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_counts_equal_the_released_code(case: dict[str, Any]) -> None:
    params = case["params"]
    profile = {"exp": "exponential", "step": "step"}[params["imb_type"]]
    n_max = params["dataset_size"] / params["num_classes"]
    counts = long_tail_counts(params["num_classes"], n_max, 1 / params["imb_factor"], profile)
    assert counts == case["expected"]["counts"]


@pytest.mark.parametrize("profile", ["exponential", "step", "pareto"])
def test_a_profile_falls_from_n_max_to_n_max_over_the_factor(profile: str) -> None:
    counts = long_tail_counts(20, 1000, 50, profile)
    assert counts[0] == 1000 and counts[-1] in (19, 20) and counts == sorted(counts, reverse=True)
    assert long_tail_counts(20, 1000, 1, profile) == [1000] * 20
    assert min(long_tail_counts(20, 10, 1000, profile)) == 1


def test_pareto_tends_to_the_exponential_profile() -> None:
    far, near = (long_tail_counts(10, 5000, 100, "pareto", pareto_alpha=alpha) for alpha in (1e7, 1.0))
    exponential = long_tail_counts(10, 5000, 100)
    assert all(abs(a - b) <= 1 for a, b in zip(far, exponential, strict=True))
    assert sum(near) < sum(exponential)


def test_class_order_is_identity_a_seeded_permutation_or_a_list() -> None:
    assert class_order(4, None) == [0, 1, 2, 3]
    assert class_order(10, 3) == class_order(10, 3) != class_order(10, 4)
    assert sorted(class_order(10, 3)) == list(range(10))
    assert class_order(3, [2, 0, 1]) == [2, 0, 1]
    with pytest.raises(ValueError, match=r"class_order is \[0, 0, 1\], expected each of 0 to 2 once"):
        class_order(3, [0, 0, 1])


# Draws and cuts


def test_the_first_class_of_the_order_is_the_head() -> None:
    targets = labels(20, 20, 20)
    chosen = long_tail_indices(targets, [20, 10, 2], [2, 0, 1], seed=0)
    assert targets[chosen].bincount().tolist() == [10, 2, 20]
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_seeds_reproduce_a_tail_and_a_longer_tail_is_a_subset() -> None:
    targets = labels(50, 50, 50)[torch.randperm(150, generator=torch.Generator().manual_seed(1))]
    draw = {seed: long_tail_indices(targets, [50, 20, 5], None, seed).tolist() for seed in (0, 1)}
    assert draw[0] == long_tail_indices(targets, [50, 20, 5], None, 0).tolist() != draw[1]
    assert set(long_tail_indices(targets, [40, 10, 1], None, 0).tolist()) < set(draw[0])


def test_balanced_split_is_balanced_and_disjoint() -> None:
    targets = labels(30, 12, 50)
    held, rest = balanced_split(targets, 10, seed=0)
    assert targets[held].bincount().tolist() == [10, 10, 10]
    assert sorted(held.tolist() + rest.tolist()) == list(range(92))
    with pytest.raises(ValueError, match="class 1 has 12 examples, expected more than 12"):
        balanced_split(targets, 12, seed=0)


def test_validation_is_balanced_where_classes_allow_it_and_stratified_otherwise() -> None:
    large, small = labels(400, 200), labels(400, 15)
    assert large[validation_split(large, 0.1, seed=0)[0]].bincount().tolist() == [20, 20]
    assert small[validation_split(small, 0.1, seed=0)[0]].bincount().tolist() == [40, 2]


# Data sets of dicts


def test_in_memory_keeps_bytes_and_reads_normalised_floats() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    data = InMemory(images, torch.tensor([1, 0]), mean=[0.5, 0.5, 0.0], std=[0.5, 0.5, 1.0])
    assert data.inputs.dtype == torch.uint8
    assert data[1]["input"].dtype == torch.float32
    assert data[1]["input"].amax((1, 2)).tolist() == [1, 1, 1] and data[0]["input"].amin((1, 2)).tolist() == [-1, -1, 0]
    with pytest.raises(ValueError, match=r"targets has shape \(3,\), expected \(2,\)"):
        InMemory(images, torch.zeros(3, dtype=torch.int64))


def test_transform_is_applied_and_said_to_draw() -> None:
    data = InMemory(torch.ones(2, 3), torch.tensor([0, 1]), transform=lambda x: 2 * x)
    assert data[0]["input"].tolist() == [2, 2, 2] and not data.draws_nothing
    assert AsDict(points(2, 2)).draws_nothing and not AsDict(data).draws_nothing


def test_reading_together_equals_reading_alone() -> None:
    data = LongTailed(InMemory(torch.rand(40, 2), labels(20, 20), labels(10, 30)), imbalance_factor=4)
    alone, together = [data[i] for i in (3, 0, 9)], data.__getitems__([3, 0, 9])
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys() == {"input", "target", "index", "group"}
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    batch = default_collate(together)
    assert batch["target"].dtype == batch["index"].dtype == torch.int64 and batch["input"].shape == (3, 2)


def test_index_counts_from_zero_in_the_subset_and_targets_agree() -> None:
    source = points(30, 30, 30)
    data = LongTailed(source, imbalance_factor=6, class_order=[1, 2, 0], seed=3)
    assert data.class_counts == [5, 30, 12]
    for i, row in enumerate(data.indices.tolist()):
        item = data[i]
        assert item["index"] == i and item["input"][0] == row
        assert item["target"] == data.targets[i] == source.targets[row]
    assert data[-1]["index"] == len(data) - 1
    with pytest.raises(IndexError):
        data[len(data)]


def test_n_max_is_the_smallest_class_unless_given() -> None:
    assert LongTailed(points(30, 20, 40), imbalance_factor=1).class_counts == [20, 20, 20]
    assert LongTailed(points(30, 20, 40), imbalance_factor=10, n_max=30).class_counts == [30, 9, 3]


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((9, 9), {"imbalance_factor": 0.5}, "imbalance_factor is 0.5, expected"),
        ((9, 9), {"imbalance_factor": 2, "profile": "exponentiel"}, "did you mean 'exponential'"),
        ((9, 4), {"imbalance_factor": 2, "n_max": 10}, "class 0 has 9 examples, expected the 10 .* lower n_max"),
        ((9,), {"imbalance_factor": 2}, "one class, expected at least 2"),
        ((9, 9, 9, 0, 9), {"imbalance_factor": 2}, "class 3 has no example, expected some of each of 0 to 4"),
    ],
)
def test_long_tailed_refuses(counts: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongTailed(points(*counts), **options)


class Bare:
    """Yields pairs and tells nothing else."""

    def __init__(self, targets: Tensor, read: Callable[[int], Any] = lambda y: (np.zeros(2, np.float32), y)) -> None:
        self.labels_hidden, self.read = targets, read

    def __len__(self) -> int:
        return len(self.labels_hidden)

    def __getitem__(self, index: int) -> Any:
        return self.read(int(self.labels_hidden[index]))


def test_labels_are_found_wherever_they_are() -> None:
    known = points(2, 2)
    assert targets_of(TensorDataset(torch.rand(3, 1), torch.tensor([0, 2, 1]))).tolist() == [0, 2, 1]
    assert targets_of(Subset(known, [3, 0])).tolist() == [1, 0]
    assert targets_of(ConcatDataset([known, Bare(labels(1, 1))])).tolist() == [0, 0, 1, 1, 0, 1]
    known.labels = known.targets  # type: ignore[attr-defined]
    known.target_transform = lambda y: 1 - y  # type: ignore[attr-defined]
    assert targets_of(known).tolist() == [1, 1, 0, 0]
    assert isinstance(AsDict(Bare(labels(1, 1)))[1]["input"], Tensor)


def test_groups_are_found_in_the_items() -> None:
    grouped = Bare(labels(2, 1), lambda y: {"input": torch.zeros(1), "target": y, "group": 1 - y})
    assert groups_of(grouped).tolist() == [1, 1, 0]  # type: ignore[union-attr]
    assert AsDict(grouped, indices=torch.tensor([2]))[0]["group"] == 0
    assert groups_of(Bare(labels(1, 1))) is None


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda y: (torch.zeros(1), y, y), "expected a pair"),
        (lambda y: {"image": 1, "label": y}, r"keys \['image', 'label'\], expected 'input' and 'target'"),
        (lambda y: (Image.new("L", (2, 2)), y), "input of type Image, expected a tensor"),
        (lambda y: (torch.zeros(1), "cat"), "train: targets starts with 'cat', expected integers"),
        (lambda y: (torch.zeros(1), y + 0.5), "dtype torch.float32, expected"),
    ],
)
def test_own_items_that_are_not_understood_are_refused(read: Callable[[int], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        from_datasets(train=Bare(labels(9, 9), read), test=points(2, 2))


# Sources


def test_digits_are_cut_before_the_tail() -> None:
    splits = digits_lt(imbalance_factor=20).splits
    assert splits.val.class_counts == [20] * 10 and splits.test.class_counts == [40] * 10
    assert sorted(splits.class_counts, reverse=True) == long_tail_counts(10, 114, 20)
    assert splits.class_counts == splits.train.class_counts and splits.class_counts[0] != 114
    assert splits.num_classes == 10 and splits.input_shape == (1, 8, 8) and not splits.notes
    rows = [set(part.indices.tolist()) for part in (splits.train, splits.val, splits.test)]  # type: ignore[attr-defined]
    assert sum(map(len, rows)) == len(set.union(*rows))
    images = torch.stack([item["input"] for item in splits.test])
    assert images.min() == 0 and images.max() == 1


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
    assert sorted(splits.class_counts)[::9] == [3, 15] and splits.test.class_counts == [3] * 10
    assert splits.input_shape == (1, 28, 28) and splits.class_names[9] == "Ankle boot"
    assert splits.train[0]["input"].mean() == pytest.approx((1 - 0.2860) / 0.3530)


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
    assert splits.class_counts == long_tail_counts(10, 10, 5) and splits.val.class_counts == [10] * 10
    assert splits.input_shape == (3, 32, 32) and splits.class_names == list("abcdefghij")


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
    assert splits.class_names == ["cat", "dog"] and splits.input_shape == (3, 8, 8)
    assert splits.test.class_counts == [4, 1] and splits.val.class_counts == [2, 1] and splits.class_counts == [14, 3]
    assert splits.train[0]["input"][0].unique().tolist() == [1] and splits.train[0]["input"][2].unique().tolist() == [
        -1
    ]
    assert "Validation holds 1 of class 1 ('dog'), fewer than 10 a class" in splits.notes[0]


def test_image_folder_takes_ready_splits_and_cuts_what_is_missing(tmp_path: Path) -> None:
    write_images(tmp_path / "train", cat=24, dog=30)
    write_images(tmp_path / "test", cat=1, dog=2)
    splits = image_folder(root=str(tmp_path), image_size=8, imbalance_factor=2).splits
    assert splits.test.class_counts == [1, 2] and splits.val.class_counts == [10, 10]
    assert splits.class_counts == [14, 7] and not splits.notes


def test_a_folder_too_large_for_memory_is_decoded_later_to_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_images(tmp_path / "pets", cat=5, dog=5)
    kept = image_folder(root=str(root), image_size=8).splits.train
    monkeypatch.setattr("counterpoise.recipes.data.image_folder.IN_MEMORY_BYTES", 0)
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


def write_table(path: Path, rows: int = 120, **cells: str) -> str:
    """Columns age, height, note, site, species; ``cells`` replaces "<column>" of the row on line 7."""
    header = ["age", "height", "note", "site", "species"]
    lines = [header] + [
        [str(i), str(1e9 + i), "x", "ab"[i % 2], ("setosa", "virginica", "other")[i % 3]] for i in range(rows)
    ]
    lines[6] = [cells.get(name, old) for name, old in zip(header, lines[6], strict=True)]
    path.write_text("\n".join(",".join(line) for line in lines) + "\n", encoding="utf-8-sig")
    return str(path)


def test_csv_standardises_with_training_rows_only(tmp_path: Path) -> None:
    path = write_table(tmp_path / "m.csv")
    splits = csv_table(path=path, label="species", group="site").splits
    assert splits.class_names == ["other", "setosa", "virginica"] and splits.input_shape == (2,)
    assert splits.test.class_counts == [8] * 3 and splits.val.class_counts == [10] * 3
    assert splits.class_counts == [22] * 3 and sum(splits.group_counts or []) == 66
    train = torch.stack([item["input"] for item in splits.train])
    torch.testing.assert_close(train.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(2))
    assert abs(torch.stack([item["input"] for item in splits.test]).mean()) > 1e-4
    assert splits.notes == ["Columns left out because they hold no numbers: note."]
    raw = csv_table(path=path, label="species", features=["age"], standardize=False).splits
    assert raw.input_shape == (1,) and raw.group_counts is None and not raw.notes
    assert torch.stack([item["input"] for item in raw.train]).max() > 50


def test_integer_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("y;x\n" + "".join(f"{y};{i}\n" for i, y in enumerate([10, 9, 2] * 4)))
    splits = csv_table(path=str(tmp_path / "n.csv"), label="y", delimiter=";").splits
    assert splits.class_names == ["2", "9", "10"]


@pytest.mark.parametrize("entry", ["nan", "inf", "abc"])
def test_csv_names_line_and_column_of_what_is_no_number(tmp_path: Path, entry: str) -> None:
    path = write_table(tmp_path / "measurements.csv", age=entry)
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
    path = write_table(tmp_path / "m.csv", **cells)
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


def test_own_datasets_are_wrapped_cut_and_long_tailed() -> None:
    splits = from_datasets(train=Bare(labels(50, 40)), test=points(3, 3), imbalance_factor=3).splits
    assert splits.class_counts == [30, 10] and splits.val.class_counts == [10, 10]
    assert splits.class_names == ["0", "1"] and splits.input_shape == (2,) and splits.group_counts is None
    assert splits.train[4].keys() == {"input", "target", "index"}


def test_groups_are_counted_and_a_missing_one_is_noted() -> None:
    train = InMemory(torch.rand(60, 2), labels(30, 30), labels(59, 1))
    test = InMemory(torch.rand(4, 2), labels(2, 2), torch.zeros(4, dtype=torch.int64))
    splits = from_datasets(train=train, val=train, test=test, class_names=["a", "b"]).splits
    assert splits.group_counts == [59, 1] and splits.class_counts == [30, 30]
    assert splits.notes == ["The test split has no example of group 1."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": points(9, 0, 9)}, "class 1 has no example in train"),
        ({"train": points(9)}, "train has one class, '0', expected at least 2"),
        ({"train": points(9, 9, 9), "num_classes": 2}, r"train holds the label 2, expected labels in \[0, 1\]"),
        ({"test": points(2, 2, 2)}, r"test holds the label 2, expected labels in \[0, 1\]"),
        ({"test": points(2, 0)}, "class 1 has no example in test"),
        ({"val": points(2)}, "class 1 has no example in val"),
        ({"class_names": ["a", "b"], "num_classes": 3}, "class_names has 2 names, expected num_classes = 3"),
        ({"train": points(9, 1)}, "class 1 has 1 example, expected at least 2"),
        ({"train": points()}, "train is empty"),
    ],
)
def test_own_datasets_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_datasets(**{"train": points(9, 9), "test": points(2, 2), **options})


def test_own_targets_that_contradict_the_items_are_refused() -> None:
    train = Bare(labels(9, 9))
    train.targets = 1 - labels(9, 9)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"train\[0\] has the target 0 but its targets start with 1"):
        from_datasets(train=train, test=points(2, 2))
    with pytest.raises(TypeError, match="train: dataset is a generator without a length"):
        from_datasets(train=(x for x in ()), test=points(2, 2))
