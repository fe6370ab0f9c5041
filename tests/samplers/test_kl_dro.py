"""KL-DRO: the ball against a root found independently, its dual, and the moving average."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import (
    KLDRO,
    kl_ball_temperature,
    kl_ball_value,
    kl_ball_weights,
    kl_dual,
    second_pass,
    tilted_value,
)

RADII = [1e-3, 0.05, 0.3, 0.5]


def draw(seed: int) -> Tensor:
    """Losses of both signs and several sizes."""
    g = torch.Generator().manual_seed(seed)
    m = int(torch.randint(2, 30, (1,), generator=g))
    return torch.randn(m, dtype=torch.float64, generator=g) * 10.0 ** (seed % 5 - 2) - (10 if seed % 4 == 0 else 0)


def kl(p: Tensor) -> float:
    return torch.xlogy(p, len(p) * p).sum().item()


def solved(losses: Tensor, radius: float) -> tuple[np.ndarray, float]:
    """softmax(v / lambda) with log lambda the root of KL = radius."""
    v = losses.numpy() - losses.max().item()

    def p(log_temperature: float) -> np.ndarray:
        raw = np.exp(v / math.exp(log_temperature))
        return raw / raw.sum()

    def above(log_temperature: float) -> float:
        q = p(log_temperature)
        return float((q * np.log(len(q) * q + 1e-300)).sum()) - radius

    middle = math.log(-v.min())
    root = brentq(above, middle - 12, middle + 12, xtol=1e-15, rtol=1e-14)
    return p(root), math.exp(root)


# The ball


@pytest.mark.parametrize("radius", RADII)
def test_the_ball_agrees_with_a_root_found_independently(radius: float) -> None:
    for seed in range(60):
        losses = draw(seed)
        if radius >= 0.95 * math.log(len(losses)):
            continue
        p, temperature = solved(losses, radius)
        assert_close(kl_ball_weights(losses, radius), torch.from_numpy(p), rtol=1e-8, atol=1e-10)
        assert_close(kl_ball_temperature(losses, radius).item(), temperature, rtol=1e-8, atol=0)
        assert_close(kl_ball_value(losses, radius).item(), float(p @ losses.numpy()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("radius", [1e-25, 1e-12, 1e-6, *RADII])
def test_the_divergence_is_the_radius(radius: float) -> None:
    """Where it is small, q log q cancels; its second-order form is what can be checked."""
    losses = draw(2)
    p = kl_ball_weights(losses, radius)
    assert_close(kl(p), radius, rtol=1e-9, atol=1e-15)
    if radius < 1e-10:
        expected = losses.std(correction=0).item() / math.sqrt(2 * radius)
        assert_close(kl_ball_temperature(losses, radius).item(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("radius", RADII)
def test_the_best_dual_is_the_value_and_any_other_is_above_it(radius: float) -> None:
    for seed in range(0, 60, 3):
        losses = draw(seed)
        value = kl_ball_value(losses, radius).item()

        def dual(log_temperature: float, losses: Tensor = losses) -> float:
            return kl_dual(losses, math.exp(log_temperature), radius).item()

        middle = math.log(losses.max().item() - losses.min().item())
        best = minimize_scalar(dual, bounds=(middle - 9, middle + 6), method="bounded", options={"xatol": 1e-9})
        assert best.fun >= value - 1e-9
        if radius < 0.95 * math.log(len(losses)):
            assert_close(best.fun, value, rtol=1e-8, atol=1e-8)


def test_the_gradient_of_the_dual_at_the_best_temperature_is_the_weights() -> None:
    losses = draw(3).requires_grad_()
    temperature = kl_ball_temperature(losses, 0.4).requires_grad_()
    kl_dual(losses, temperature, 0.4).backward()
    assert_close(losses.grad, kl_ball_weights(losses, 0.4))
    assert_close(temperature.grad.item(), 0.0, rtol=0, atol=1e-10)


def test_radius_zero_is_the_mean_at_an_infinite_temperature() -> None:
    losses = draw(2)
    assert_close(kl_ball_value(losses, 0.0), losses.mean())
    assert kl_ball_temperature(losses, 0.0).item() == math.inf


@pytest.mark.parametrize("ties", [1, 2, 3])
def test_from_the_log_of_m_over_the_number_of_largest_losses_on_they_share_the_weight(ties: int) -> None:
    losses = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, 2.0, 2.0], dtype=torch.float64)[: 4 + ties]
    edge = math.log((4 + ties) / ties)
    expected = (losses == 2).double() / ties
    for radius in (edge + 1e-12, 2 * edge, math.inf):
        assert_close(kl_ball_weights(losses, radius), expected, rtol=0, atol=0)
        assert kl_ball_temperature(losses, radius).item() == 0
    near = kl_ball_weights(losses, edge * 0.999)
    assert 0 < 1 - (near * expected * ties).sum().item() < 1e-2


def test_losses_that_are_nearly_tied_are_told_apart() -> None:
    losses = torch.tensor([1.0, 1.0 - 1e-13, 0.0, -1.0], dtype=torch.float64)
    p = kl_ball_weights(losses, 1.0)
    assert_close(kl(p), 1.0, rtol=1e-9, atol=0)
    assert p[0] > 2 * p[1] > 0


def test_larger_balls_are_more_severe() -> None:
    losses = draw(2)
    values = [kl_ball_value(losses, radius).item() for radius in (0.0, 1e-9, *RADII, 2.0, 100.0)]
    assert values == sorted(values)


def test_the_penalty_is_a_tilted_risk() -> None:
    assert_close(kl_dual(draw(2), 0.4), tilted_value(draw(2), 1 / 0.4))


# The reweighter


def test_momentum_one_is_the_softmax_of_the_batch() -> None:
    dro = KLDRO(temperature=0.4)
    for seed in range(3):
        assert_close(dro(draw(seed)), (draw(seed) / 0.4).softmax(0))


def test_the_average_is_the_published_one() -> None:
    dro, u = KLDRO(temperature=2.0, momentum=0.3), None
    for seed in (1, 2, 3, 5):
        losses = draw(seed)
        raised = (losses / 2).exp()
        u = raised.mean() if u is None else 0.7 * u + 0.3 * raised.mean()
        assert_close(dro(losses), raised / u / len(losses))
        assert_close(dro.log_u.exp(), u)


def test_a_harder_batch_than_usual_counts_more() -> None:
    dro = KLDRO(momentum=0.1)
    dro(torch.zeros(4))
    assert dro(torch.ones(4)).sum() > 1.5
    assert dro(-torch.ones(4)).sum() < 0.5


def test_weights_sum_to_one_over_the_momentum_at_most() -> None:
    dro = KLDRO(momentum=0.1)
    dro(torch.zeros(4))
    assert_close(dro(torch.full((4,), 1e5)).sum().item(), 10.0)
    dro.eval()
    assert_close(dro(torch.full((4,), 1e6)).sum().item(), 10.0)


@pytest.mark.parametrize("value", [1e5, -1e5])
def test_losses_that_would_overflow_leave_the_average_usable(value: float) -> None:
    dro = KLDRO(temperature=0.1, momentum=0.5)
    for _ in range(3):
        weights = dro(torch.tensor([value, value - 0.1, 0.0]))
        assert weights.isfinite().all()
        assert dro.log_u.isfinite()


def test_an_infinite_temperature_is_the_mean() -> None:
    assert_close(KLDRO(math.inf)(torch.tensor([1.0, 5.0])), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_move_nothing(value: float) -> None:
    dro = KLDRO(momentum=0.3)
    dro(draw(1))
    before = {name: x.clone() for name, x in dro.state_dict().items()}
    dro(torch.tensor([1.0, value]))
    assert all(torch.equal(x, before[name]) for name, x in dro.state_dict().items())


def test_the_second_pass_uses_the_average_of_the_first() -> None:
    dro = KLDRO(momentum=0.3)
    dro(draw(1))
    dro(draw(2))
    log_u = dro.log_u.clone()
    with second_pass():
        assert_close(dro(draw(3)), (draw(3) - log_u).exp() / len(draw(3)))
    assert torch.equal(dro.log_u, log_u)


def test_evaluation_blends_but_stores_nothing() -> None:
    trained, evaluated = KLDRO(momentum=0.3), KLDRO(momentum=0.3)
    trained(draw(1))
    evaluated.load_state_dict(trained.state_dict())
    evaluated.eval()
    assert_close(evaluated(draw(2)), trained(draw(2)))
    assert evaluated.steps.item() == 1


def test_a_batch_without_rows_is_no_step() -> None:
    dro = KLDRO(momentum=0.3)
    dro(torch.zeros(0))
    assert dro.steps.item() == 0
