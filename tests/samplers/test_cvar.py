"""CVaR: against a linear program and a root found independently, its dual, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog, minimize_scalar
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import cvar_dual, cvar_value, cvar_weights

ALPHAS = [1e-6, 0.05, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.77, 0.999, 1.0]


def draw(seed: int) -> Tensor:
    """Losses of both signs, some of them tied, of several sizes."""
    g = torch.Generator().manual_seed(seed)
    m = int(torch.randint(1, 30, (1,), generator=g))
    losses = torch.randn(m, dtype=torch.float64, generator=g) * 10.0 ** (seed % 5 - 2)
    if seed % 3 == 0:
        losses = losses[torch.randint(m, (m,), generator=g)]
    return losses - (10 if seed % 4 == 0 else 0)


def solved(losses: Tensor, alpha: float) -> float:
    """The linear program: max <p, v> with 0 <= p <= 1/(alpha m), sum p = 1."""
    v, m = losses.numpy(), len(losses)
    found = linprog(-v, A_eq=np.ones((1, m)), b_eq=[1.0], bounds=[(0, 1 / (alpha * m))] * m, method="highs")
    assert found.status == 0
    return -found.fun


def solved_with_penalty(losses: Tensor, alpha: float, penalty: float) -> tuple[float, np.ndarray]:
    """Optimality conditions: p = min(e^((v - eta)/lambda), 1/alpha)/m with eta the root of sum p = 1."""
    v, m = losses.numpy(), len(losses)

    def p(eta: float) -> np.ndarray:
        return np.exp(np.minimum((v - eta) / penalty, -math.log(alpha))) / m

    low, high = v.min() - penalty, v.max() + penalty
    best = p(brentq(lambda eta: p(eta).sum() - 1, low, high, xtol=1e-15, rtol=1e-15))
    return float(best @ v - penalty * (best * np.log(m * best + 1e-300)).sum()), best


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_value_is_that_of_the_linear_program(alpha: float) -> None:
    for seed in range(30):
        losses = draw(seed)
        assert_close(cvar_value(losses, alpha).item(), solved(losses, alpha), rtol=1e-8, atol=1e-8)
        p = cvar_weights(losses, alpha)
        assert (p <= 1 / (alpha * len(losses)) * (1 + 1e-12)).all()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 1.0, 30.0])
def test_with_a_penalty_it_meets_the_optimality_conditions(alpha: float, penalty: float) -> None:
    for seed in range(30):
        losses = draw(seed)
        if float(losses.max() - losses.min()) / penalty > 500:
            continue  # the reference underflows
        value, p = solved_with_penalty(losses, alpha, penalty)
        assert_close(cvar_value(losses, alpha, penalty=penalty).item(), value, rtol=1e-9, atol=1e-9)
        assert_close(cvar_weights(losses, alpha, penalty=penalty), torch.from_numpy(p), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0])
def test_the_best_dual_is_the_value_and_any_other_is_above_it(alpha: float, penalty: float) -> None:
    for seed in range(0, 30, 3):
        losses = draw(seed)

        def dual(eta: float, losses: Tensor = losses) -> float:
            return cvar_dual(losses, torch.tensor(eta, dtype=torch.float64), alpha, penalty=penalty).item()

        low, high = losses.min().item() - 10, losses.max().item() + 10
        best = minimize_scalar(dual, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
        value = cvar_value(losses, alpha, penalty=penalty).item()
        assert best.fun >= value - 1e-9
        assert_close(best.fun, value, rtol=1e-7, atol=1e-7)


def test_the_gradient_of_the_dual_at_the_quantile_is_the_weights() -> None:
    losses = torch.tensor([3.0, -1.0, 2.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    eta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)  # between the second and the third largest
    cvar_dual(losses, eta, 0.4).backward()
    assert_close(losses.grad, cvar_weights(losses, 0.4))
    assert_close(eta.grad.item(), 0.0)


def test_the_whole_batch_is_the_mean_and_a_vanishing_fraction_the_largest() -> None:
    losses = draw(1)
    assert_close(cvar_value(losses, 1.0), losses.mean())
    assert_close(cvar_value(losses, 1.0, penalty=0.1), losses.mean())
    assert_close(cvar_value(losses, 1 / len(losses)), losses.max())
    assert_close(cvar_value(losses, 1e-9), losses.max())
    assert_close(cvar_value(losses, 0.2, penalty=math.inf), losses.mean())
    assert_close(cvar_value(losses, 0.2, penalty=1e-12), cvar_value(losses, 0.2))
    assert_close(cvar_weights(losses, 0.2, penalty=1e-300), cvar_weights(losses, 0.2))


def test_smaller_fractions_and_smaller_penalties_are_more_severe() -> None:
    losses = draw(2)
    of_alpha = [cvar_value(losses, alpha).item() for alpha in ALPHAS]
    assert of_alpha == sorted(of_alpha, reverse=True)
    of_penalty = [cvar_value(losses, 0.2, penalty=penalty).item() for penalty in (0.0, 0.1, 1.0, 10.0, math.inf)]
    assert of_penalty == sorted(of_penalty, reverse=True)


def test_without_a_cap_the_penalised_weights_are_a_softmax() -> None:
    losses = draw(2)
    assert_close(cvar_weights(losses, 1e-9, penalty=0.7), (losses / 0.7).softmax(0))


@pytest.mark.parametrize("alpha", [k / 100 for k in range(1, 101)])
def test_a_fraction_that_is_a_whole_number_of_rows_gives_them_equal_weight(alpha: float) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    k = round(100 * alpha)
    p = cvar_weights(torch.arange(100, dtype=torch.float64), alpha)
    expected = torch.cat([torch.zeros(100 - k), torch.full((k,), 1 / k)]).double()
    assert_close(p, expected, rtol=1e-6, atol=1e-12)


def test_of_tied_losses_the_first_gets_weight_first() -> None:
    losses = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0, 2.0])
    assert cvar_weights(losses, 1 / 3).tolist() == [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert_close(cvar_weights(losses, 0.25), torch.tensor([0.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0]))
