"""The momentum encoder: how it follows, when it stands still, and what it takes along of buffers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.memory import MomentumEncoder, follow, momentum_schedule


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_it_starts_as_a_copy_of_its_own() -> None:
    online = network()
    teacher = MomentumEncoder(online)
    assert same(state(teacher.encoder), state(online))
    with torch.no_grad():
        online[0].weight.zero_()
    assert teacher.encoder[0].weight.abs().sum() > 0


def test_parameters_follow_and_none_wants_a_gradient() -> None:
    start, online = network(0), network(1)
    teacher = MomentumEncoder(start, momentum=0.9)
    teacher.update(online)
    for old, led, now in zip(start.parameters(), online.parameters(), teacher.parameters(), strict=True):
        assert_close(now, 0.9 * old + 0.1 * led)
        assert not now.requires_grad
    assert not teacher(inputs()).requires_grad


def test_it_closes_in_geometrically() -> None:
    start, online = network(0), network(1)
    teacher = MomentumEncoder(start, momentum=0.5)
    for _ in range(10):
        teacher.update(online)
    gap, now = (start[0].weight - online[0].weight), teacher.encoder[0].weight - online[0].weight
    assert_close(now, gap / 2**10, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("momentum", "seed"), [(0.0, 1), (1.0, 0)])
def test_momentum_zero_copies_and_one_stands_still(momentum: float, seed: int) -> None:
    teacher = MomentumEncoder(network(0), momentum=0.5)
    teacher.update(network(1), momentum)
    assert_close(teacher.encoder[0].weight, network(seed)[0].weight)


def test_it_stands_still_in_eval_mode_and_in_a_second_pass() -> None:
    teacher, online = MomentumEncoder(network(0)), network(1)
    before = state(teacher)
    teacher.eval().update(online)
    with second_pass():
        teacher.train().update(online)
    assert same(state(teacher), before)


def test_in_a_second_pass_running_statistics_stand_still_and_the_keys_are_the_same() -> None:
    teacher = MomentumEncoder(network())
    before = state(teacher)
    with second_pass():
        keys = teacher(inputs())
    assert same(state(teacher), before)
    assert torch.equal(teacher(inputs()), keys)
    assert not same(state(teacher), before)


def test_buffers_are_its_own_unless_copied() -> None:
    online = network(1)
    online(inputs())
    own, copied = MomentumEncoder(network(0)), MomentumEncoder(network(0), copy_buffers=True)
    for teacher in (own, copied):
        teacher.update(online)
    assert int(own.encoder[1].num_batches_tracked) == 0
    assert_close(own.encoder[1].running_mean, torch.zeros(4))
    assert int(copied.encoder[1].num_batches_tracked) == 1
    assert torch.equal(copied.encoder[1].running_mean, online[1].running_mean)


def test_it_follows_its_owner_into_train_and_eval_mode() -> None:
    owner = nn.ModuleList([MomentumEncoder(network()), MomentumEncoder(network(), frozen_statistics=True)])
    free, frozen = owner
    assert free.encoder.training
    assert not frozen.encoder.training
    owner.eval()
    assert not free.encoder.training
    owner.train()
    assert free.encoder[1].training
    assert not frozen.encoder[1].training
    before = state(frozen)
    frozen(inputs())
    frozen.update(network(0))
    assert same(state(frozen), before)


def test_a_copy_of_a_model_in_eval_mode_starts_in_eval_mode() -> None:
    assert not MomentumEncoder(network().eval()).training


def test_a_loaded_teacher_goes_on_where_the_saved_one_was() -> None:
    saved, loaded = MomentumEncoder(network(0)), MomentumEncoder(network(2))
    saved.update(network(1))
    saved(inputs())
    loaded.load_state_dict(saved.state_dict())
    for teacher in (saved, loaded, copy.deepcopy(saved)):
        teacher.update(network(3))
    assert same(state(loaded), state(saved))
    assert torch.equal(loaded(inputs()), saved(inputs()))


def test_an_encoder_without_the_head_follows_by_name() -> None:
    online, headless = network(1), copy.deepcopy(network(0))
    headless[2] = nn.Identity()
    follow(headless, online, 0.0)
    assert torch.equal(headless[0].weight, online[0].weight)


def test_names_that_do_not_fit_are_refused() -> None:
    teacher = MomentumEncoder(network())
    with pytest.raises(ValueError, match=r"query has no parameter 2\.weight, expected all of the encoder"):
        teacher.update(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


@pytest.mark.parametrize("start", [0.0, 0.9, 0.99])
def test_the_schedule_rises_from_its_start_to_one(start: float) -> None:
    values = [momentum_schedule(p / 10, start) for p in range(11)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(start)
    assert values[5] == pytest.approx((1 + start) / 2)
    assert values[-1] == 1.0
    assert momentum_schedule(0.25, start) == pytest.approx(1 - (1 - start) * (math.cos(math.pi / 4) + 1) / 2)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"progress is 1\.1, expected a number in \[0, 1\]"):
        momentum_schedule(1.1)
    with pytest.raises(ValueError, match=r"start is -1, expected a number"):
        momentum_schedule(0.5, -1)
    with pytest.raises(ValueError, match=r"momentum is 2, expected a number"):
        MomentumEncoder(network(), momentum=2)
    with pytest.raises(ValueError, match=r"momentum is 2, expected a number"):
        MomentumEncoder(network()).update(network(), 2)
