"""Chi-square DRO: against a root found independently and against its dual; edges of the ball; losses of any sign."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import chi_square_dual, chi_square_value, chi_square_weights

RADII = [0.0, 1e-10, 1e-3, 0.1, 0.5, 1.0, 3.0, 100.0]


def draw(seed: int, most: int = 40) -> Tensor:
    """Losses of both signs, some of them tied, of several sizes."""
    g = torch.Generator().manual_seed(seed)
    m = int(torch.randint(2, most, (1,), generator=g))
    losses = torch.randn(m, dtype=torch.float64, generator=g) * 10.0 ** (seed % 5 - 2)
    if seed % 3 == 0:
        losses = losses[torch.randint(m, (m,), generator=g)]
    return losses - (10 if seed % 4 == 0 else 0)


def divergence(p: np.ndarray) -> float:
    return float(np.square(len(p) * p - 1).sum() / (2 * len(p)))


def solved_ball(v: np.ndarray, radius: float) -> np.ndarray:
    """p = relu(v - eta) / sum relu(v - eta), eta the root of D(p) = radius; or uniform on the largest."""
    m, top, spread = len(v), v.max(), v.max() - v.min()
    largest = (v == top) / (v == top).sum()
    if divergence(largest) <= radius or spread == 0:
        return largest
    if radius == 0:
        return np.full(m, 1 / m)

    def p(below: float) -> np.ndarray:  # eta = top - e^below
        raw = np.maximum(v - top + math.exp(below), 0)
        return raw / raw.sum()

    gap = (top - v[v < top]).min()
    low, high = math.log(gap / 2), math.log(spread / math.sqrt(radius) + spread) + 5
    return p(brentq(lambda below: divergence(p(below)) - radius, low, high, xtol=1e-15, rtol=1e-14))


def solved_penalty(v: np.ndarray, penalty: float) -> np.ndarray:
    """p = relu(v - eta) / (lambda m), with eta the root of sum p = 1."""
    m, top = len(v), v.max()

    def p(below: float) -> np.ndarray:
        return np.maximum(v - top + below, 0) / (penalty * m)

    return p(brentq(lambda below: p(below).sum() - 1, 0, top - v.min() + penalty * m, xtol=1e-15, rtol=1e-14))


@pytest.mark.parametrize("radius", RADII)
def test_in_the_ball_it_meets_the_optimality_conditions(radius: float) -> None:
    for seed in range(60):
        losses = draw(seed)
        expected = solved_ball(losses.numpy(), radius)
        p = chi_square_weights(losses, radius)
        assert divergence(p.numpy()) <= radius * (1 + 1e-9) + 1e-15
        assert_close(p, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)
        assert_close(chi_square_value(losses, radius).item(), float(expected @ losses.numpy()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 1.0, 50.0])
def test_with_a_penalty_it_meets_the_optimality_conditions(penalty: float) -> None:
    for seed in range(60):
        losses = draw(seed)
        expected = solved_penalty(losses.numpy(), penalty)
        assert_close(chi_square_weights(losses, math.inf, penalty=penalty), torch.from_numpy(expected))
        value = float(expected @ losses.numpy()) - penalty * divergence(expected)
        assert_close(chi_square_value(losses, math.inf, penalty=penalty).item(), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 1.0])
def test_with_both_it_is_the_penalised_solution_if_that_fits_the_ball_and_the_balls_otherwise(
    radius: float, penalty: float
) -> None:
    for seed in range(60):
        v = draw(seed).numpy()
        expected = solved_penalty(v, penalty)
        if divergence(expected) > radius:
            expected = solved_ball(v, radius)
        p = chi_square_weights(draw(seed), radius, penalty=penalty)
        assert_close(p, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("radius", "penalty"), [(0.1, 0.0), (1.0, 0.0), (0.3, 0.2), (50.0, 0.2), (math.inf, 0.2)])
def test_the_best_dual_is_the_value_and_any_other_is_above_it(radius: float, penalty: float) -> None:
    """Strong duality, which needs no solver: a feasible p and an eta of equal value are both optimal."""
    for seed in range(0, 60, 3):
        losses = draw(seed)

        def dual(eta: float, losses: Tensor = losses) -> float:
            return chi_square_dual(losses, torch.tensor(eta, dtype=torch.float64), radius, penalty=penalty).item()

        spread = losses.max().item() - losses.min().item() + 1
        bounds = (losses.min().item() - 10 * spread, losses.max().item() + spread)
        best = minimize_scalar(dual, bounds=bounds, method="bounded", options={"xatol": 1e-11})
        value = chi_square_value(losses, radius, penalty=penalty).item()
        assert best.fun >= value - 1e-9
        assert_close(best.fun, value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("radius", "penalty"), [(0.3, 0.0), (0.3, 0.2), (0.3, 5.0), (math.inf, 0.4)])
def test_the_gradient_of_the_dual_at_the_best_eta_is_the_weights(radius: float, penalty: float) -> None:
    losses = draw(1).requires_grad_()
    p = chi_square_weights(losses, radius, penalty=penalty)
    inside = p > 0
    slope = (p[inside].max() - p[inside].min()) / (losses[inside].max() - losses[inside].min()).detach()
    eta = (losses.max().detach() - p.max() / slope).requires_grad_()
    chi_square_dual(losses, eta, radius, penalty=penalty).backward()
    assert_close(losses.grad, p)
    assert_close(eta.grad.item(), 0.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("radius", "penalty"), [(0.3, 0.0), (0.3, 0.2), (math.inf, 0.2)])
def test_the_dual_has_finite_gradients_where_every_loss_is_below_eta(radius: float, penalty: float) -> None:
    losses, eta = torch.zeros(3, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    chi_square_dual(losses, eta, radius, penalty=penalty).backward()
    assert losses.grad.tolist() == [0.0, 0.0, 0.0]
    assert eta.grad.item() == 1.0


def test_without_rows_the_dual_is_finite() -> None:
    assert chi_square_dual(torch.zeros(0), torch.tensor(0.5), 1.0).item() == 0.5


def test_a_dual_without_radius_and_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="radius is inf and penalty 0, expected a finite radius or a penalty > 0"):
        chi_square_dual(torch.ones(2), torch.tensor(0.0), math.inf)


def test_radius_zero_is_the_mean_and_no_ball_the_largest() -> None:
    losses = draw(1)
    assert_close(chi_square_value(losses, 0.0), losses.mean())
    assert_close(chi_square_value(losses, math.inf), losses.max())
    assert_close(chi_square_value(losses, 1.0, penalty=math.inf), losses.mean())
    assert_close(chi_square_value(losses, 1.0, penalty=1e-300), chi_square_value(losses, 1.0))


def test_a_small_radius_is_the_mean_plus_a_standard_deviation() -> None:
    """Inside the simplex the value is mean + sqrt(2 rho) * standard deviation, exactly."""
    losses = draw(2)
    expected = losses.mean() + math.sqrt(2e-3) * losses.std(correction=0)
    assert_close(chi_square_value(losses, 1e-3), expected)


def test_larger_balls_and_smaller_penalties_are_more_severe() -> None:
    losses = draw(2)
    of_radius = [chi_square_value(losses, radius).item() for radius in RADII]
    assert of_radius == sorted(of_radius)
    of_penalty = [chi_square_value(losses, 2.0, penalty=penalty).item() for penalty in (10.0, 1.0, 0.1, 0.0)]
    assert of_penalty == sorted(of_penalty)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_the_whole_simplex_fits_once_m_is_at_most_one_plus_two_rho(m: int) -> None:
    losses = torch.arange(m, dtype=torch.float64)
    edge = (m - 1) / 2
    assert chi_square_weights(losses, edge)[-1].item() == pytest.approx(1.0, abs=1e-12)
    assert chi_square_weights(losses, edge * 1.1).tolist() == [0.0] * (m - 1) + [1.0]
    assert chi_square_weights(losses, edge * 0.9)[-1] < 0.99


def test_once_the_largest_losses_fit_they_share_the_weight() -> None:
    losses = torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0, 3.0])
    assert_close(chi_square_weights(losses, 0.6), torch.tensor([0, 1 / 3, 0, 1 / 3, 0, 1 / 3]))


def test_losses_below_zero_are_not_taken_for_equal() -> None:
    losses = torch.tensor([-1.0, -2.0, -0.5, 0.0], dtype=torch.float64)
    assert_close(chi_square_weights(losses, 0.2), chi_square_weights(losses + 100, 0.2))
    assert chi_square_value(losses, 0.2) > losses.mean() + 0.1


def test_losses_that_differ_by_rounding_alone_are_equal() -> None:
    losses = torch.full((5,), 0.7, dtype=torch.float64)
    losses[2] = np.nextafter(0.7, 1)
    assert_close(chi_square_weights(losses, 1.0), torch.full((5,), 0.2, dtype=torch.float64))


def test_nothing_cancels_where_one_outlier_is_far_above_many_close_losses() -> None:
    losses = torch.cat([torch.tensor([1e6]), 1e-6 * draw(5, most=200)]).double()
    p = chi_square_weights(losses, 0.5)
    assert_close(divergence(p.numpy()), min(0.5, (len(losses) - 1) / 2), rtol=1e-9, atol=0)
