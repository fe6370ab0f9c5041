"""The data layer: profiles, draws, data sets of dicts, and how a user's own become splits."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    LongTailedSubset,
    balanced_split,
    class_order,
    from_datasets,
    groups_of,
    long_tail_counts,
    long_tail_indices,
    stratified_split,
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
    assert counts[0] == 1000
    assert counts[-1] in (19, 20)
    assert counts == sorted(counts, reverse=True)
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
    assert small[validation_split(small, 0.1, seed=0)[0]].bincount().tolist() == [40, 1]


def test_three_examples_can_be_cut_twice_at_any_fraction() -> None:
    held, rest = stratified_split(labels(3, 5), 0.5, seed=0)
    assert labels(3, 5)[held].bincount().tolist() == [1, 2]
    assert validation_split(labels(3, 5)[rest], 0.5, seed=0)[1].tolist()


# Data sets of dicts


def test_in_memory_keeps_bytes_and_reads_normalised_floats() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    data = InMemory(images, torch.tensor([1, 0]), mean=[0.5, 0.5, 0.0], std=[0.5, 0.5, 1.0])
    assert data.inputs.dtype == torch.uint8
    assert data[1]["input"].dtype == torch.float32
    assert data[1]["input"].amax((1, 2)).tolist() == [1, 1, 1]
    assert data[0]["input"].amin((1, 2)).tolist() == [-1, -1, 0]
    with pytest.raises(ValueError, match=r"targets has shape \(3,\), expected \(2,\)"):
        InMemory(images, torch.zeros(3, dtype=torch.int64))


def test_transform_is_applied_and_said_to_draw() -> None:
    data = InMemory(torch.ones(2, 3), torch.tensor([0, 1]), transform=lambda x: 2 * x)
    assert data[0]["input"].tolist() == [2, 2, 2]
    assert not data.draws_nothing
    assert AsDict(points(2, 2)).draws_nothing
    assert not AsDict(data).draws_nothing


def test_reading_together_equals_reading_alone() -> None:
    data = LongTailedSubset(InMemory(torch.rand(40, 2), labels(20, 20), labels(10, 30)), imbalance_factor=4)
    alone, together = [data[i] for i in (3, 0, 9)], data.__getitems__([3, 0, 9])
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys() == {"input", "target", "index", "group"}
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    batch = default_collate(together)
    assert batch["target"].dtype == batch["index"].dtype == torch.int64
    assert batch["input"].shape == (3, 2)


def test_index_counts_from_zero_in_the_subset_and_targets_agree() -> None:
    source = points(30, 30, 30)
    data = LongTailedSubset(source, imbalance_factor=6, class_order=[1, 2, 0], seed=3)
    assert data.class_counts == [5, 30, 12]
    for i, row in enumerate(data.indices.tolist()):
        item = data[i]
        assert item["index"] == i
        assert item["input"][0] == row
        assert item["target"] == data.targets[i] == source.targets[row]
    assert data[-1]["index"] == len(data) - 1
    with pytest.raises(IndexError):
        data[len(data)]


def test_n_max_is_the_smallest_class_unless_given() -> None:
    assert LongTailedSubset(points(30, 20, 40), imbalance_factor=1).class_counts == [20, 20, 20]
    assert LongTailedSubset(points(30, 20, 40), imbalance_factor=10, n_max=30).class_counts == [30, 9, 3]


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
        LongTailedSubset(points(*counts), **options)


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
    assert targets_of(ConcatDataset([known, known])).tolist() == [0, 0, 1, 1] * 2
    assert targets_of(Bare(labels(1, 2))).tolist() == [0, 1, 1]
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


# A user's own data sets


def test_own_datasets_are_wrapped_cut_and_long_tailed() -> None:
    splits = from_datasets(train=Bare(labels(50, 40)), test=points(3, 3), imbalance_factor=3).splits
    assert splits.class_counts == [30, 10]
    assert splits.val.class_counts == [10, 10]
    assert splits.class_names == ["0", "1"]
    assert splits.input_shape == (2,)
    assert splits.group_counts is None
    assert splits.train[4].keys() == {"input", "target", "index"}


def test_groups_are_counted_and_a_missing_one_is_noted() -> None:
    train = InMemory(torch.rand(60, 2), labels(30, 30), labels(59, 1))
    test = InMemory(torch.rand(4, 2), labels(2, 2), torch.zeros(4, dtype=torch.int64))
    splits = from_datasets(train=train, val=train, test=test, class_names=["a", "b"]).splits
    assert splits.group_counts == [59, 1]
    assert splits.class_counts == [30, 30]
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
    with pytest.raises(TypeError, match="train: dataset is a list_iterator without a length"):
        from_datasets(train=iter([]), test=points(2, 2))
