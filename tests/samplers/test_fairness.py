"""BROAD and the ROAD ratio network: mean one within each group, limits in tau, and where the objective is least."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise._core import sum_over_ranks, world_size
from counterpoise.samplers import BROAD, RatioNetwork, group_log_ratios, reweighted_loss, road_ratio_objective
from tests.pool import Pool

GROUP = torch.tensor([0, 1, 1, 0, 2, 1, 0, 2])
SPLITS = {"even": (3, 3, 2), "a rank with one group": (1, 4, 3), "an empty rank": (5, 0, 3)}


def losses_of(seed: int = 0, n: int = 8) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def per_group(x: Tensor, group: Tensor = GROUP) -> list[float]:
    return [x[group == g].mean().item() for g in range(int(group.max()) + 1)]


def broad(losses: Tensor, temperature: float = 0.5, group: Tensor = GROUP, groups: int = 3) -> Tensor:
    return BROAD([1] * groups, temperature=temperature)(losses, group=group)


# BROAD


def test_the_weights_are_a_softmax_of_minus_the_loss_times_the_group_size() -> None:
    losses = losses_of()
    weights = broad(losses, temperature=0.7)
    for g in range(3):
        inside = g == GROUP
        assert_close(weights[inside], (-losses[inside] / 0.7).softmax(0) * inside.sum())


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 1e4])
def test_the_mean_within_each_group_is_one(temperature: float) -> None:
    assert_close(per_group(broad(losses_of(), temperature)), [1.0] * 3)


def test_an_infinite_temperature_is_plain_adversarial_debiasing() -> None:
    losses = losses_of()
    assert torch.equal(broad(losses, math.inf), torch.ones_like(losses))
    assert_close(broad(losses, 1e9), torch.ones_like(losses))
    assert_close(reweighted_loss(losses, BROAD([1] * 3, temperature=math.inf), group=GROUP), losses.mean())


def test_a_small_temperature_puts_a_group_on_its_smallest_loss() -> None:
    losses = losses_of()
    weights = broad(losses, 1e-6)
    for g in range(3):
        inside = g == GROUP
        assert weights[inside].argmax() == losses[inside].argmin()
        assert_close(weights[inside].max(), inside.sum().double())


def test_a_constant_added_to_a_groups_losses_changes_nothing() -> None:
    shift = torch.tensor([5.0, -3.0, 100.0], dtype=torch.float64)[GROUP]
    assert_close(broad(losses_of() + shift), broad(losses_of()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_losses_that_would_underflow_stay_finite(dtype: torch.dtype) -> None:
    weights = broad((1e4 * (1 + losses_of())).to(dtype), temperature=0.01)
    assert weights.isfinite().all()
    assert_close(per_group(weights.double()), [1.0] * 3)


def test_groups_that_are_absent_are_fine() -> None:
    assert_close(broad(losses_of(), groups=9), broad(losses_of()))
    assert broad(torch.zeros(0), group=torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_a_nan_spoils_its_group_and_is_not_repaired() -> None:
    losses = losses_of()
    losses[1] = torch.nan
    weights = broad(losses)
    assert weights[GROUP == 1].isnan().all()
    assert weights[GROUP != 1].isfinite().all()


def test_targets_can_be_the_groups() -> None:
    assert torch.equal(BROAD([1] * 3, by="target")(losses_of(), target=GROUP), BROAD([1] * 3)(losses_of(), group=GROUP))


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(ValueError, match="BROAD got no group"):
        BROAD([1, 1])(losses_of())
    with pytest.raises(ValueError, match="temperature is 0"):
        BROAD([1, 1], temperature=0)
    with pytest.raises(ValueError, match="group holds 2"):
        broad(losses_of(), groups=2)


# The ratio objective


def best_log_ratio(losses: Tensor, temperature: float) -> Tensor:
    return broad(losses, temperature).log()


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_least_value_is_minus_tau_log_mean_exp_in_each_group(temperature: float) -> None:
    losses = losses_of()
    value = road_ratio_objective(best_log_ratio(losses, temperature), losses, temperature=temperature)
    expected = sum(
        -temperature * math.log((-losses[g == GROUP] / temperature).exp().mean().item()) * (g == GROUP).sum().item()
        for g in range(3)
    )
    assert_close(value.item(), expected / len(losses))


def test_no_other_ratio_of_mean_one_is_better() -> None:
    losses, least = losses_of(), road_ratio_objective(best_log_ratio(losses_of(), 0.5), losses_of(), temperature=0.5)
    for seed in range(20):
        scores = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = group_log_ratios(scores, GROUP, 3)
        assert_close(per_group(other.exp()), [1.0] * 3)
        assert road_ratio_objective(other, losses, temperature=0.5) > least


def test_its_gradient_vanishes_at_broads_weights() -> None:
    losses = losses_of()
    scores = (-losses / 0.5).requires_grad_()
    road_ratio_objective(group_log_ratios(scores, GROUP, 3), losses, temperature=0.5).backward()
    assert_close(scores.grad, torch.zeros_like(losses), rtol=0, atol=1e-15)


def test_the_adversary_gets_no_gradient_from_it() -> None:
    losses = losses_of().requires_grad_()
    scores = losses_of(1).requires_grad_()
    road_ratio_objective(group_log_ratios(scores, GROUP, 3), losses, temperature=0.5).backward()
    assert losses.grad is None
    assert scores.grad is not None


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_ratios_that_underflow_have_finite_gradients(scale: float) -> None:
    scores = (scale * losses_of()).requires_grad_()
    loss = road_ratio_objective(group_log_ratios(scores, GROUP, 5), losses_of(), temperature=0.5)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


def test_the_derivatives_agree_with_finite_differences() -> None:
    scores = losses_of(1).requires_grad_()

    def objective(x: Tensor) -> Tensor:
        return road_ratio_objective(group_log_ratios(x, GROUP, 3), losses_of(), temperature=0.5)

    assert torch.autograd.gradcheck(objective, scores)
    assert torch.autograd.gradgradcheck(objective, scores)


def test_settings_out_of_range_are_refused() -> None:
    for temperature in (0, -1, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            road_ratio_objective(losses_of(), losses_of(), temperature=temperature)
    with pytest.raises(ValueError, match="adversary_losses"):
        road_ratio_objective(losses_of(), losses_of(n=7), temperature=1)


# The network


def test_its_ratio_has_mean_one_within_each_group() -> None:
    torch.manual_seed(0)
    ratio = RatioNetwork(4, num_groups=3)(torch.randn(8, 4), GROUP).exp()
    assert ratio.shape == (8,)
    assert_close(per_group(ratio), [1.0] * 3)


def test_it_sees_the_group() -> None:
    torch.manual_seed(0)
    network = RatioNetwork(2, num_groups=2)
    x = torch.randn(1, 2).expand(2, 2)
    same = network.network(torch.cat([x, torch.eye(2)], 1))
    assert same[0] != same[1]


def test_trained_it_finds_the_region_where_the_group_is_guessed_easily() -> None:
    torch.manual_seed(0)
    x, group = torch.rand(256, 1), torch.arange(256) % 2
    easy = x[:, 0] < 0.3
    losses = torch.where(easy, 0.1, 0.7)
    network = RatioNetwork(1, hidden=16)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(300):
        loss = road_ratio_objective(network(x, group), losses, temperature=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    least = road_ratio_objective(BROAD([1, 1], temperature=0.3)(losses, group=group).log(), losses, temperature=0.3)
    assert least <= loss < least + 0.02
    ratio = network(x, group).exp()
    assert_close(ratio[easy].mean() / ratio[~easy].mean(), torch.tensor(math.exp(0.6 / 0.3)), rtol=0.15, atol=0)


def ratio_step(rank: int, split: tuple[int, ...]) -> Any:
    """Mean over ranks of the objective, and of the network's gradients."""
    start = sum(split[:rank])
    rows = slice(start, start + split[rank])
    torch.manual_seed(0)
    network = RatioNetwork(4, hidden=6, num_groups=4).double()
    x = torch.randn(8, 4, dtype=torch.float64)[rows]
    loss = road_ratio_objective(network(x, GROUP[rows]), losses_of()[rows], temperature=0.4, sync=True)
    loss.backward()
    return [sum_over_ranks(t) / world_size() for t in (loss, *(p.grad for p in network.parameters()))]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_ranks_equal_one_process(split: tuple[int, ...], ranks: Pool) -> None:
    expected = ratio_step(0, (8,))
    for got in ranks.run(ratio_step, split):
        assert_close(got, expected, rtol=1e-9, atol=1e-12)
