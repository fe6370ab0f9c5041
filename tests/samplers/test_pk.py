"""PK, score and coreset samplers: what a batch holds, what ranks share, what is drawn how often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from counterpoise.samplers import CoresetSampler, PKSampler, ScoreSampler, epoch_sampler, k_center_greedy, pk

COUNTS = [40, 17, 9, 6, 2, 1]
TARGETS = torch.arange(6).repeat_interleave(torch.tensor(COUNTS))


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes samplers believe that they are rank r of w."""

    def become(rank: int, world_size: int) -> None:
        for module in (epoch_sampler, pk):
            monkeypatch.setattr(module, "rank", lambda: rank)
            monkeypatch.setattr(module, "world_size", lambda: world_size)

    return become


def batches(sampler: PKSampler) -> list[Tensor]:
    return list(torch.tensor(list(sampler)).split(sampler.batch_size))


# PK


@pytest.mark.parametrize(("p", "m"), [(4, 3), (6, 2), (1, 5), (5, 1)])
def test_a_batch_holds_p_classes_with_m_examples_each(p: int, m: int) -> None:
    for batch in batches(PKSampler(TARGETS, p, m, num_batches=12)):
        groups = TARGETS[batch].view(p, m)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0].tolist())) == p


def test_only_a_class_with_fewer_than_m_repeats_in_a_batch() -> None:
    for batch in batches(PKSampler(TARGETS, 6, 4, num_batches=30)):
        for group in batch.view(6, 4):
            k = int(TARGETS[group[0]])
            assert len(set(group.tolist())) == min(4, COUNTS[k])


def test_short_classes_can_be_left_out() -> None:
    sampler = PKSampler(TARGETS, 3, 4, drop_short_classes=True, num_batches=40)
    assert set(TARGETS[torch.tensor(list(sampler))].tolist()) == {0, 1, 2, 3}
    assert sampler.class_probabilities.tolist() == [0.25, 0.25, 0.25, 0.25, 0.0, 0.0]


def test_classes_and_the_examples_of_a_class_come_equally_often() -> None:
    sampler = PKSampler(TARGETS, 3, 2, num_batches=40)
    drawn = torch.tensor(list(sampler))
    assert torch.bincount(TARGETS[drawn]).tolist() == [40] * 6
    times = torch.bincount(drawn, minlength=75)[57:66]  # class 2: 40 draws over 9 examples
    assert int(times.max() - times.min()) <= 2


def test_the_length_is_what_the_data_fill() -> None:
    assert len(PKSampler(TARGETS, 4, 3)) == 75 // 12 * 12
    assert len(PKSampler(TARGETS, 6, 50)) == 300
    assert len(PKSampler(TARGETS, 4, 3, num_batches=2)) == len(list(PKSampler(TARGETS, 4, 3, num_batches=2))) == 24


def test_ranks_take_whole_blocks_of_one_sequence(as_rank: Callable[[int, int], None]) -> None:
    whole = batches(PKSampler(TARGETS, 6, 2, num_batches=5, seed=3))
    parts = []
    for rank in range(2):
        as_rank(rank, 2)
        parts.append(batches(PKSampler(TARGETS, 3, 2, num_batches=5, seed=3)))
    for step in range(5):
        assert torch.cat([part[step] for part in parts]).tolist() == whole[step].tolist()
        assert len(set(TARGETS[whole[step]].tolist())) == 6


def test_with_fewer_classes_than_places_each_rank_s_are_distinct(as_rank: Callable[[int, int], None]) -> None:
    for rank in range(3):
        as_rank(rank, 3)
        for batch in batches(PKSampler(TARGETS, 4, 2, num_batches=6)):
            assert len(set(TARGETS[batch].tolist())) == 4


def test_it_works_as_the_sampler_of_a_loader() -> None:
    sampler = PKSampler(TARGETS, 4, 2, seed=1)
    loader = DataLoader(TensorDataset(TARGETS), batch_size=sampler.batch_size, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert all(len(y.unique()) == 4 for (y,) in loader)


# Scores


def test_examples_are_drawn_in_proportion_to_their_score() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 4.0])
    drawn = torch.tensor(list(ScoreSampler(scores, num_samples=70_000)))
    assert_close(torch.bincount(drawn) / 70_000, scores / 7, rtol=0.05, atol=0)
    squared = ScoreSampler(scores, power=2)
    assert_close(squared.probabilities.tolist(), [0.0, 1 / 21, 4 / 21, 16 / 21])
    assert_close(ScoreSampler(scores, power=0).probabilities.tolist(), [0.0, 1 / 3, 1 / 3, 1 / 3])


def test_without_replacement_every_positive_score_comes_once() -> None:
    sampler = ScoreSampler([0.0, 1.0, 2.0, 4.0], replacement=False)
    assert sorted(sampler) == [1, 2, 3]
    assert len(set(ScoreSampler(torch.rand(50), replacement=False, num_samples=20))) == 20


def test_scores_of_any_scale_do(tmp_path: Path) -> None:
    np.save(tmp_path / "scores.npy", np.array([1e-300, 2e-300, 1e-300]))
    sampler = ScoreSampler(str(tmp_path / "scores.npy"))
    assert_close(sampler.probabilities.tolist(), [0.25, 0.5, 0.25])


# Coresets


def test_an_epoch_is_the_coreset_shuffled(tmp_path: Path) -> None:
    sampler = CoresetSampler([7, 3, 11, 20], seed=2)
    assert sorted(sampler) == [3, 7, 11, 20]
    np.save(tmp_path / "indices.npy", np.array([7, 3, 11, 20]))
    assert list(CoresetSampler(str(tmp_path / "indices.npy"), seed=2)) == list(sampler)


def test_weights_are_found_by_index_and_have_mean_one() -> None:
    found = k_center_greedy(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), 10)
    sampler = CoresetSampler(found.indices, found.weights)
    assert_close(sampler.weight_of(found.indices), (found.weights / 10).float())
    assert_close(sampler.weight_of(torch.tensor(list(sampler))).mean().item(), 1.0)
    assert CoresetSampler([5, 2]).weight_of(torch.tensor([2, 5, 2])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PKSampler(TARGETS, 7), r"classes_per_batch is 7, expected at most 6, the number of classes with 1"),
        (lambda: PKSampler(TARGETS, 5, 3, drop_short_classes=True), r"expected at most 4, .* with 3 or more examples"),
        (lambda: PKSampler(TARGETS, 2, 0), r"samples_per_class is 0, expected a number in \[1, inf\]"),
        (lambda: PKSampler(TARGETS, 2, num_batches=0), r"num_batches is 0"),
        (lambda: PKSampler(TARGETS.double()), r"targets has shape \(75,\) and dtype torch.float64"),
        (lambda: ScoreSampler([1.0, -1.0]), r"scores lie in \[-1.0, 1.0\], expected finite numbers >= 0, some > 0"),
        (lambda: ScoreSampler([1.0, float("inf")]), r"scores lie in \[1.0, inf\]"),
        (lambda: ScoreSampler([0.0, 0.0]), r"expected finite numbers >= 0, some > 0"),
        (
            lambda: ScoreSampler([0.0, 1.0], replacement=False, num_samples=2),
            r"expected at most the 1 positive",
        ),
        (lambda: CoresetSampler([1, 1]), r"expected distinct whole numbers >= 0"),
        (lambda: CoresetSampler([1, 2], [1.0]), r"weights has shape \(1,\), expected \(2,\)"),
        (
            lambda: CoresetSampler([1, 2]).weight_of(torch.tensor([3])),
            r"index holds 3, expected indices",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
