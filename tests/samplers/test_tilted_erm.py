"""Tilted ERM: limits of the tilt, digits near zero, and the nested form over groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import TiltedERM, tilted_value, tilted_weights

LOSSES = torch.tensor([0.3, -1.2, 2.0, 0.9, 2.0, -0.4, 1.1], dtype=torch.float64)
GROUPS = torch.tensor([5, -2, 5, 9, -2, 5, 9])
TILTS = [-math.inf, -300.0, -2.0, -1e-9, 0.0, 1e-9, 0.7, 5.0, 300.0, math.inf]


def by_hand(losses: Tensor, tilt: float) -> Tensor:
    """The formula as it is written, for tilts that it can take."""
    return (tilt * losses).exp().mean().log() / tilt


def risks(tilt: float) -> list[Tensor]:
    return [tilted_value(LOSSES[g == GROUPS], tilt) for g in (-2, 5, 9)]


@pytest.mark.parametrize("tilt", [-5.0, -0.3, 0.3, 1.0, 20.0])
def test_it_is_the_log_mean_exp_and_its_weights_the_softmax(tilt: float) -> None:
    assert_close(tilted_value(LOSSES, tilt), by_hand(LOSSES, tilt))
    assert_close(tilted_weights(LOSSES, tilt), (tilt * LOSSES).softmax(0))


def test_zero_is_the_mean_and_infinity_the_largest_or_the_smallest() -> None:
    assert_close(tilted_value(LOSSES, 0.0), LOSSES.mean())
    assert tilted_value(LOSSES, math.inf).item() == 2.0
    assert tilted_value(LOSSES, -math.inf).item() == -1.2
    assert tilted_weights(LOSSES, math.inf).tolist() == [0, 0, 0.5, 0, 0.5, 0, 0]
    assert tilted_weights(LOSSES, -math.inf).tolist() == [0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("tilt", [1e-3, 1e-6, 1e-9, 1e-15, 1e-200, -1e-6, -1e-12])
def test_small_tilts_keep_their_digits(tilt: float) -> None:
    """Third order: mean + t/2 variance + t^2/6 third central moment."""
    centred = LOSSES - LOSSES.mean()
    expected = LOSSES.mean() + tilt / 2 * centred.square().mean() + tilt**2 / 6 * centred.pow(3).mean()
    assert_close(tilted_value(LOSSES, tilt), expected, rtol=0, atol=1e-15 + abs(tilt) ** 3 * 10)


def test_a_larger_tilt_is_more_severe() -> None:
    values = [tilted_value(LOSSES, tilt).item() for tilt in TILTS]
    assert values == sorted(values)


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e4, 1e150])
def test_extremes_stay_finite(tilt: float, scale: float) -> None:
    for options in ({}, {"group": GROUPS, "group_tilt": 3.0}, {"group": GROUPS, "group_tilt": -math.inf}):
        assert tilted_value(LOSSES * scale, tilt, **options).isfinite()
        weights = tilted_weights(LOSSES * scale, tilt, **options)
        assert weights.isfinite().all()
        assert_close(weights.sum().item(), 1.0)


# Groups


@pytest.mark.parametrize("tilt", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("group_tilt", [-2.0, 0.0, 0.5, 4.0])
def test_the_nested_form_is_the_published_one(tilt: float, group_tilt: float) -> None:
    sizes = torch.tensor([2.0, 3.0, 2.0], dtype=torch.float64)
    inner = torch.stack(risks(tilt))
    mixed = (sizes * (group_tilt * inner).exp()).sum() / 7
    expected = (sizes * inner).sum() / 7 if group_tilt == 0 else mixed.log() / group_tilt
    assert_close(tilted_value(LOSSES, tilt, group=GROUPS, group_tilt=group_tilt), expected)


@pytest.mark.parametrize("tilt", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("group_tilt", [-2.0, 0.0, 0.5, 4.0])
def test_the_nested_weights_are_the_derivative_of_the_value(tilt: float, group_tilt: float) -> None:
    losses = LOSSES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tilted_value(x, tilt, group=GROUPS, group_tilt=group_tilt), (losses,))
    value = tilted_value(losses, tilt, group=GROUPS, group_tilt=group_tilt)
    weights = tilted_weights(losses, tilt, group=GROUPS, group_tilt=group_tilt)
    assert_close(torch.autograd.grad(value, losses)[0], weights)


@pytest.mark.parametrize("tilt", [-1.0, 0.0, 2.0])
def test_equal_tilts_are_a_tilt_over_examples(tilt: float) -> None:
    assert_close(tilted_weights(LOSSES, tilt, group=GROUPS, group_tilt=tilt), tilted_weights(LOSSES, tilt))


def test_infinite_between_groups_is_the_worst_group() -> None:
    assert_close(tilted_value(LOSSES, 0.0, group=GROUPS, group_tilt=math.inf), torch.stack(risks(0.0)).max())
    weights = tilted_weights(LOSSES, 0.0, group=GROUPS, group_tilt=math.inf)
    assert_close(weights, (GROUPS == 9).double() / 2)


def test_names_of_groups_do_not_matter() -> None:
    renamed = torch.tensor([0, 1, 0, 70, 1, 0, 70], dtype=torch.int32)
    options = {"tilt": 1.0, "group_tilt": 3.0}
    assert_close(tilted_weights(LOSSES, group=renamed, **options), tilted_weights(LOSSES, group=GROUPS, **options))


def test_classes_may_be_the_groups() -> None:
    by_class = TiltedERM(0.0, group_tilt=2.0, by="target")
    by_group = TiltedERM(0.0, group_tilt=2.0)
    assert_close(by_class(LOSSES, target=GROUPS), by_group(LOSSES, group=GROUPS))
