"""The inner problems of CVaR, chi-square DRO and KL-DRO against a general solver of the primal problem, at 1e-8.

SLSQP knows nothing of sorting, thresholds or duals: it is given objective, constraints and their derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from counterpoise.samplers import (
    chi_square_value,
    chi_square_weights,
    cvar_value,
    cvar_weights,
    kl_ball_value,
    kl_ball_weights,
    tilted_value,
    tilted_weights,
)

Divergence = tuple[Callable[[np.ndarray], float], Callable[[np.ndarray], np.ndarray]]
M = 6
CHI_SQUARE: Divergence = (
    lambda p: float(np.square(M * p - 1).sum() / (2 * M)),
    lambda p: M * p - 1,
)
KL: Divergence = (
    lambda p: float((p * np.log(np.maximum(M * p, 1e-300))).sum()),
    lambda p: np.log(np.maximum(M * p, 1e-300)) + 1,
)
LOSSES = [
    [0.3, -1.2, 2.0, 0.9, -0.4, 1.1],
    [-3.0, -2.0, -2.5, -0.1, -7.0, -1.0],
    [1.0, 1.0, 0.0, 0.5, 1.0, -1.0],  # ties at the top
    [0.0, 0.0, 0.0, 0.0, 0.0, 5.0],
]


def solved(
    v: np.ndarray, divergence: Divergence, radius: float = math.inf, penalty: float = 0.0, cap: float = 1.0
) -> float:
    """max <p, v> - penalty D(p) subject to D(p) <= radius, 0 <= p <= cap and sum p = 1; the best of several starts."""
    value, slope = divergence
    constraints = [{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(M)}]
    if radius < math.inf:
        constraints.append({"type": "ineq", "fun": lambda p: radius - value(p), "jac": lambda p: -slope(p)})
    reached = []
    for sharpness in (0.0, 0.05, 0.5):  # at the uniform start the ball's boundary has no slope to follow
        start = np.exp(sharpness * (v - v.max()))
        p = minimize(
            lambda p: penalty * value(p) - p @ v,
            start / start.sum(),
            jac=lambda p: penalty * slope(p) - v,
            bounds=[(0, cap)] * M,
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        ).x
        if abs(p.sum() - 1) < 1e-10 and value(p) <= radius + 1e-10:
            reached.append(float(p @ v - penalty * value(p)))
    return max(reached)


def agrees(ours: Tensor, weights: Tensor, v: np.ndarray, divergence: Divergence, **problem: float) -> None:
    """The same value to 1e-8, by weights that are themselves feasible."""
    p, scale = weights.numpy(), max(1.0, float(np.abs(v).max()))
    assert abs(ours.item() - solved(v, divergence, **problem)) <= 1e-8 * scale
    assert (p >= 0).all()
    assert (p <= problem.get("cap", 1.0) * (1 + 1e-12)).all()
    assert abs(p.sum() - 1) <= 1e-12
    assert divergence[0](p) <= problem.get("radius", math.inf) * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0, (M - 1) / 2, 10.0, math.inf])
@pytest.mark.parametrize("penalty", [0.0, 0.2, 3.0])
def test_chi_square(losses: list[float], radius: float, penalty: float) -> None:
    v = torch.tensor(losses, dtype=torch.float64)
    value = chi_square_value(v, radius, penalty=penalty)
    weights = chi_square_weights(v, radius, penalty=penalty)
    agrees(value, weights, v.numpy(), CHI_SQUARE, radius=radius, penalty=penalty)


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("alpha", [1e-3, 1 / M, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("penalty", [0.0, 0.2, 3.0])
def test_cvar(losses: list[float], alpha: float, penalty: float) -> None:
    v, cap = torch.tensor(losses, dtype=torch.float64), min(1.0, 1 / (alpha * M))
    value, weights = cvar_value(v, alpha, penalty=penalty), cvar_weights(v, alpha, penalty=penalty)
    agrees(value, weights, v.numpy(), KL, penalty=penalty, cap=cap)


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0, math.log(M / 3), math.log(M), 5.0])
def test_kl_ball(losses: list[float], radius: float) -> None:
    v = torch.tensor(losses, dtype=torch.float64)
    agrees(kl_ball_value(v, radius), kl_ball_weights(v, radius), v.numpy(), KL, radius=radius)


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("penalty", [0.2, 1.0, 10.0])
def test_kl_penalty(losses: list[float], penalty: float) -> None:
    v = torch.tensor(losses, dtype=torch.float64)
    agrees(tilted_value(v, 1 / penalty), tilted_weights(v, 1 / penalty), v.numpy(), KL, penalty=penalty)


@pytest.mark.parametrize("losses", LOSSES)
def test_radius_zero_leaves_the_uniform_weights_alone(losses: list[float]) -> None:
    """The one point of the ball, where a solver that follows derivatives has none to follow."""
    v = torch.tensor(losses, dtype=torch.float64)
    for weights, value in (
        (chi_square_weights(v, 0.0), chi_square_value(v, 0.0)),
        (kl_ball_weights(v, 0.0), kl_ball_value(v, 0.0)),
        (cvar_weights(v, 1.0), cvar_value(v, 1.0)),
    ):
        torch.testing.assert_close(weights, torch.full((M,), 1 / M, dtype=torch.float64), rtol=0, atol=1e-15)
        torch.testing.assert_close(value, v.mean(), rtol=0, atol=1e-15)
