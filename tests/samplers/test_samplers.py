"""Samplers: what they draw, what an epoch and a rank are, and how they go on in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.losses import LogitAdjustedLoss
from counterpoise.samplers import (
    ClassBalancedSampler,
    ClassFrequencySampler,
    DeferredBalancedSampler,
    EpochSampler,
    ProgressivelyBalancedSampler,
    ShuffleSampler,
    SquareRootSampler,
    class_sampling_probabilities,
    epoch_sampler,
    progressive_probabilities,
)

COUNTS = [64, 16, 4, 1]
TARGETS = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))[
    torch.randperm(85, generator=torch.Generator().manual_seed(0))
]
SAMPLERS: dict[str, Callable[[], EpochSampler]] = {
    "shuffle": lambda: ShuffleSampler(TARGETS, seed=3),
    "instance": lambda: ClassFrequencySampler(TARGETS, seed=3),
    "balanced": lambda: ClassBalancedSampler(TARGETS, seed=3),
    "square_root": lambda: SquareRootSampler(TARGETS, seed=3),
    "deferred": lambda: DeferredBalancedSampler(TARGETS, 5, seed=3),
    "progressive": lambda: ProgressivelyBalancedSampler(TARGETS, 5, seed=3),
}


@pytest.fixture(params=list(SAMPLERS))
def make(request: pytest.FixtureRequest) -> Callable[[], EpochSampler]:
    return SAMPLERS[request.param]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes samplers believe that they are rank r of w."""

    def become(rank: int, world_size: int) -> None:
        monkeypatch.setattr(epoch_sampler, "rank", lambda: rank)
        monkeypatch.setattr(epoch_sampler, "world_size", lambda: world_size)

    return become


def some(iterator: Iterator[int], count: int) -> list[int]:
    return [next(iterator) for _ in range(count)]


# Probabilities


def test_exponents_run_from_instance_balanced_to_class_balanced() -> None:
    assert_close(class_sampling_probabilities(COUNTS, 1.0).tolist(), [n / 85 for n in COUNTS])
    assert_close(class_sampling_probabilities(COUNTS, 0.5).tolist(), [8 / 15, 4 / 15, 2 / 15, 1 / 15])
    assert_close(class_sampling_probabilities(COUNTS, 0.0).tolist(), [0.25] * 4)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_class_without_examples_is_never_drawn(exponent: float) -> None:
    p = class_sampling_probabilities([3, 0, 1], exponent)
    assert p[1] == 0
    assert_close(p.sum().item(), 1.0)
    sampler = ClassFrequencySampler(torch.tensor([0, 2, 2]), exponent, num_samples=50)
    assert set(sampler.class_counts.tolist()) == {0, 1, 2}
    assert set(sampler) <= {0, 1, 2}


def test_the_progressive_schedule_reaches_both_ends() -> None:
    instance, balanced = class_sampling_probabilities(COUNTS, 1.0), class_sampling_probabilities(COUNTS, 0.0)
    assert_close(progressive_probabilities(COUNTS, 0, 5), instance)
    assert_close(progressive_probabilities(COUNTS, 1, 5), 0.75 * instance + 0.25 * balanced)
    assert_close(progressive_probabilities(COUNTS, 4, 5), balanced)


def test_the_printed_schedule_stops_short_of_balance() -> None:
    instance, balanced = class_sampling_probabilities(COUNTS, 1.0), class_sampling_probabilities(COUNTS, 0.0)
    last = progressive_probabilities(COUNTS, 4, 5, inclusive=False)
    assert_close(last, 0.2 * instance + 0.8 * balanced)


def test_a_schedule_of_one_epoch_is_balanced() -> None:
    assert_close(progressive_probabilities(COUNTS, 0, 1).tolist(), [0.25] * 4)


def test_beyond_its_end_the_schedule_stays_balanced() -> None:
    assert_close(progressive_probabilities(COUNTS, 9, 5).tolist(), [0.25] * 4)


def test_deferred_balancing_changes_the_rule_at_the_switch() -> None:
    sampler = DeferredBalancedSampler(TARGETS, num_epochs=10, switch_at=0.8)
    instance, balanced = class_sampling_probabilities(COUNTS, 1.0), class_sampling_probabilities(COUNTS, 0.0)
    for epoch in range(10):
        sampler.set_epoch(epoch)
        assert_close(sampler.class_probabilities, balanced if epoch >= 8 else instance)
    every = DeferredBalancedSampler(TARGETS, num_epochs=10, switch_at=0, exponent=0.5)
    assert_close(every.class_probabilities, class_sampling_probabilities(COUNTS, 0.5))


def test_a_progressive_sampler_tells_the_prior_of_its_epoch() -> None:
    sampler = ProgressivelyBalancedSampler(TARGETS, 5)
    sampler.set_epoch(3)
    assert_close(sampler.class_probabilities, progressive_probabilities(COUNTS, 3, 5))


def test_the_probabilities_of_a_sampler_are_the_prior_a_loss_takes() -> None:
    loss = LogitAdjustedLoss(COUNTS)
    loss.statistics.set_prior(ClassBalancedSampler(TARGETS).class_probabilities)
    assert_close(loss.statistics.prior.tolist(), [0.25] * 4)


# Draws


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_classes_come_in_their_probabilities(exponent: float) -> None:
    sampler = ClassFrequencySampler(TARGETS, exponent, num_samples=20_000, seed=1)
    seen = TARGETS[sampler.order()].bincount(minlength=4) / 20_000
    p = class_sampling_probabilities(COUNTS, exponent)
    assert ((seen - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_examples_of_a_class_are_repeated_evenly() -> None:
    sampler = ClassBalancedSampler(TARGETS, num_samples=1000)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        times = sampler.order().bincount(minlength=len(TARGETS))
        for k in range(4):
            of_class = times[k == TARGETS]
            assert of_class.max() - of_class.min() <= 1


def test_which_examples_come_once_more_differs_between_epochs() -> None:
    sampler = ClassBalancedSampler(TARGETS)  # about 21 of the 64 examples of class 0 an epoch
    chosen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        chosen.append({i for i in sampler.order().tolist() if TARGETS[i] == 0})
    assert chosen[0] - chosen[1]
    assert chosen[1] - chosen[0]


def test_shuffling_gives_every_example_once() -> None:
    assert sorted(ShuffleSampler(TARGETS)) == list(range(85))
    assert sorted(ShuffleSampler(7)) == list(range(7))


def test_num_samples_sets_the_length_of_an_epoch() -> None:
    for length in (1, 10, 500):
        sampler = ClassBalancedSampler(TARGETS, num_samples=length)
        assert len(list(sampler)) == len(sampler) == length
    assert len(ClassBalancedSampler(TARGETS)) == len(TARGETS)


# Epochs


def test_the_order_is_a_function_of_seed_and_epoch(make: Callable[[], EpochSampler]) -> None:
    first, second = make(), make()
    list(first)
    for sampler in (first, second):
        sampler.set_epoch(2)
    assert list(first) == list(second)


def test_the_order_does_not_touch_the_global_generator(make: Callable[[], EpochSampler]) -> None:
    before = torch.get_rng_state()
    list(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_differ(make: Callable[[], EpochSampler]) -> None:
    sampler = make()
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 3


def test_seeds_differ() -> None:
    assert len({tuple(ShuffleSampler(TARGETS, seed=seed)) for seed in range(5)}) == 5


def test_an_epoch_iterated_twice_is_the_same(make: Callable[[], EpochSampler]) -> None:
    sampler = make()
    assert list(sampler) == list(sampler)


# Ranks


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_partition_the_order(
    make: Callable[[], EpochSampler], as_rank: Callable[[int, int], None], world_size: int
) -> None:
    order = make().order().tolist()
    shares = []
    for rank in range(world_size):
        as_rank(rank, world_size)
        shares.append(list(make()))
        assert len(shares[-1]) == len(make())
    padded = order + order[: -len(order) % world_size]
    assert [i for step in zip(*shares, strict=True) for i in step] == padded


def test_step_k_of_two_ranks_sees_what_one_process_sees(as_rank: Callable[[int, int], None]) -> None:
    sampler = ClassBalancedSampler(TARGETS, num_samples=84)
    order, shares = sampler.order(), []
    for rank in range(2):
        as_rank(rank, 2)
        shares.append(torch.tensor(list(sampler)))
    for step in range(84 // 12):
        of_ranks = torch.cat([share[6 * step : 6 * step + 6] for share in shares])
        assert torch.equal(of_ranks.sort().values, order[12 * step : 12 * step + 12].sort().values)


def test_more_ranks_than_examples_each_get_one(as_rank: Callable[[int, int], None]) -> None:
    """A rank without an index would leave the others waiting."""
    order, shares = ShuffleSampler(2).order().tolist(), []
    for rank in range(5):
        as_rank(rank, 5)
        shares.append(list(ShuffleSampler(2)))
    assert [share[0] for share in shares] == [order[r % 2] for r in range(5)]
    assert all(len(share) == len(ShuffleSampler(2)) == 1 for share in shares)


# Going on in mid-epoch


@pytest.mark.parametrize("position", [0, 1, 40, 84, 85])
def test_a_restored_sampler_yields_the_rest(make: Callable[[], EpochSampler], position: int) -> None:
    stopped = make()
    stopped.set_epoch(2)
    whole = list(stopped)
    some(iter(stopped), position)
    resumed = make()
    resumed.load_state_dict({"epoch": 2, "position": position})
    resumed.set_epoch(2)  # what a training loop does before it iterates
    assert list(resumed) == whole[position:]


def test_the_state_counts_what_was_handed_out() -> None:
    sampler = ShuffleSampler(TARGETS)
    assert sampler.state_dict() == {"epoch": 0, "position": 0}
    iterator = iter(sampler)
    some(iterator, 7)
    assert sampler.state_dict() == {"epoch": 0, "position": 7}
    some(iterator, 3)
    assert sampler.state_dict() == {"epoch": 0, "position": 10}


def test_a_restored_sampler_goes_on_counting() -> None:
    sampler = ShuffleSampler(TARGETS)
    sampler.load_state_dict({"epoch": 1, "position": 30})
    assert sampler.state_dict() == {"epoch": 1, "position": 30}  # also before the first index
    some(iter(sampler), 5)
    assert sampler.state_dict() == {"epoch": 1, "position": 35}


def test_only_one_iteration_starts_late() -> None:
    sampler = ShuffleSampler(TARGETS)
    sampler.load_state_dict({"epoch": 0, "position": 80})
    assert len(list(sampler)) == 5
    assert len(list(sampler)) == 85


def test_another_epoch_starts_at_its_beginning() -> None:
    sampler, fresh = ShuffleSampler(TARGETS), ShuffleSampler(TARGETS)
    sampler.load_state_dict({"epoch": 0, "position": 30})
    for s in (sampler, fresh):
        s.set_epoch(1)
    assert sampler.state_dict() == {"epoch": 1, "position": 0}
    assert list(sampler) == list(fresh)


def test_a_finished_epoch_is_not_counted_for_the_next() -> None:
    sampler = ShuffleSampler(TARGETS)
    list(sampler)
    sampler.set_epoch(1)
    assert sampler.state_dict() == {"epoch": 1, "position": 0}


def test_a_rank_goes_on_in_its_own_share(as_rank: Callable[[int, int], None]) -> None:
    as_rank(1, 3)
    sampler = ShuffleSampler(TARGETS)
    whole = list(sampler)
    sampler.load_state_dict({"epoch": 0, "position": 20})
    assert list(sampler) == whole[20:]
    assert len(sampler) == 29


def test_the_length_is_that_of_a_whole_epoch_also_when_it_starts_late() -> None:
    sampler = ShuffleSampler(TARGETS)
    sampler.load_state_dict({"epoch": 0, "position": 80})
    assert len(sampler) == 85


# What is refused


@pytest.mark.parametrize(
    "targets",
    [
        torch.zeros(3, 2, dtype=torch.int64),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0, -1]),
    ],
    ids=["matrix", "empty", "floating", "negative"],
)
def test_targets_that_are_no_class_indices_are_refused(targets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"targets has shape .* and dtype .*, expected \(N,\) class indices >= 0"):
        ClassBalancedSampler(targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassFrequencySampler(TARGETS, 1.5), r"exponent is 1.5, expected a number in \[0, 1\]"),
        (lambda: ClassBalancedSampler(TARGETS, num_samples=0), r"num_samples is 0, expected a number in \[1, inf\]"),
        (lambda: ShuffleSampler(0), r"num_samples is 0, expected a number in \[1, inf\]"),
        (lambda: ShuffleSampler(5, seed=-1), r"seed is -1, expected a number in \[0, inf\]"),
        (lambda: ProgressivelyBalancedSampler(TARGETS, 0), r"num_epochs is 0, expected a number in \[1, inf\]"),
    ],
)
def test_settings_out_of_range_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
