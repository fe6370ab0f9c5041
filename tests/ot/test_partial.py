"""Partial Sinkhorn: constraints that hold and constraints that bind, limits of mass and epsilon, POT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from counterpoise.ot import emd, partial_sinkhorn, sinkhorn
from tests.ot.problems import TIGHT, Transport, transport, transports

MASSES = (0.05, 0.4, 0.9, 0.999)


@pytest.fixture
def problem() -> Transport:
    cost, a, b = transport()
    return Transport(cost, a, 1.2 * b)


@pytest.mark.parametrize("mass", MASSES)
def test_the_mass_is_exact_and_no_marginal_is_exceeded(problem: Transport, mass: float) -> None:
    result = partial_sinkhorn(*problem, mass=mass, epsilon=0.05, **TIGHT)
    assert result.converged
    assert_close(result.plan.sum().item(), mass)
    assert (result.plan.sum(1) <= problem.a + 1e-12).all()
    assert (result.plan.sum(0) <= problem.b + 1e-12).all()


@pytest.mark.parametrize("mass", MASSES)
def test_potentials_are_at_their_ceiling_unless_the_marginal_binds(problem: Transport, mass: float) -> None:
    """Complementary slackness, with the largest potential of each side as its ceiling."""
    cost, a, b = problem
    result = partial_sinkhorn(cost, a, b, mass=mass, epsilon=0.05, **TIGHT)
    assert_close(result.plan, ((result.f[:, None] + result.g - cost) / 0.05).exp())
    for potential, held, most in ((result.f, result.plan.sum(1), a), (result.g, result.plan.sum(0), b)):
        below = potential < potential.max() - 1e-9
        assert_close(held[below], most[below])


@pytest.mark.parametrize("mass", MASSES)
def test_the_value_is_the_objective(problem: Transport, mass: float) -> None:
    result = partial_sinkhorn(*problem, mass=mass, epsilon=0.05, **TIGHT)
    entropy = (torch.special.xlogy(result.plan, result.plan) - result.plan).sum()
    assert_close(result.value, (result.plan * problem.cost).sum() + 0.05 * entropy)


def test_all_of_equal_masses_is_balanced_transport() -> None:
    cost, a, b = transport()
    partial = partial_sinkhorn(cost, a, b, mass=float(torch.minimum(a.sum(), b.sum())), epsilon=0.1, **TIGHT)
    balanced = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    assert_close(partial.plan, balanced.plan, atol=1e-10, rtol=1e-6)
    assert_close(partial.value, balanced.value_entropy)


def test_nearly_all_of_the_mass_takes_tens_of_iterations() -> None:
    """One constraint at a time, it would take thousands."""
    result = partial_sinkhorn(*transport(200, 150), mass=0.999, epsilon=0.01, tolerance=1e-9)
    assert result.converged
    assert result.iterations <= 150


def test_a_small_mass_goes_to_the_cheapest_pairs_by_softmax(problem: Transport) -> None:
    result = partial_sinkhorn(*problem, mass=1e-6, epsilon=0.5, **TIGHT)
    assert_close(result.plan, 1e-6 * (-problem.cost / 0.5).flatten().softmax(0).reshape(7, 5))


def test_a_small_epsilon_gives_the_exact_cost(problem: Transport) -> None:
    exact = emd(*problem, mass=0.6)
    entropic = partial_sinkhorn(*problem, mass=0.6, epsilon=2e-3, tolerance=1e-9, max_iterations=20_000)
    linear = (entropic.plan * problem.cost).sum()
    assert exact.value - 1e-9 <= linear <= exact.value + 2e-3 * math.log(35)


def test_entries_without_mass_have_a_plan_of_zero() -> None:
    result = partial_sinkhorn(*transport(zeros=True), mass=0.5, epsilon=0.1, **TIGHT)
    assert result.plan[0].eq(0).all()
    assert result.plan[:, -1].eq(0).all()
    assert result.f.isfinite().all()


def test_the_transposed_problem_has_the_transposed_plan(problem: Transport) -> None:
    cost, a, b = problem
    plain, turned = (partial_sinkhorn(*p, mass=0.7, epsilon=0.05, **TIGHT) for p in ((cost, a, b), (cost.T, b, a)))
    assert_close(turned.plan, plain.plan.T)


def test_problems_of_a_batch_are_independent() -> None:
    several = [transport(seed=seed, zeros=seed == 1) for seed in range(3)]
    together = partial_sinkhorn(*(torch.stack(x) for x in zip(*several, strict=True)), mass=0.6, epsilon=0.05, **TIGHT)
    for i, problem in enumerate(several):
        alone = partial_sinkhorn(*problem, mass=0.6, epsilon=0.05, **TIGHT)
        assert_close(together.plan[i], alone.plan)
        assert_close(together.value[i], alone.value)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-1])
def test_float32_has_no_nan(epsilon: float) -> None:
    cost, a, b = (x.float() for x in transport(40, 30, zeros=True))
    result = partial_sinkhorn(100 * cost, a, b, mass=0.5, epsilon=epsilon, tolerance=0, max_iterations=200)
    for part in (result.plan, result.f, result.g, result.value, result.marginal_error):
        assert part.isfinite().all()


@given(problem=transports(), share=st.sampled_from([0.1, 0.5, 0.9]))
def test_it_agrees_with_pot(problem: Transport, share: float) -> None:
    cost, a, b = problem
    rows, columns = a > 0, b > 0
    result = partial_sinkhorn(cost, a, b, mass=share, epsilon=0.3, tolerance=1e-12, max_iterations=20_000)
    theirs = ot.partial.entropic_partial_wasserstein(
        a[rows].numpy(),
        b[columns].numpy(),
        cost[rows][:, columns].numpy(),
        0.3,
        m=share,
        numItermax=30_000,
        stopThr=1e-14,
    )
    assert_close(result.plan[rows][:, columns], torch.from_numpy(theirs), atol=1e-8, rtol=0)
    exact = ot.partial.partial_wasserstein(a.numpy(), b.numpy(), (cost - cost.min()).numpy(), m=share)
    theirs_cost = float((torch.from_numpy(exact) * cost).sum())
    assert_close(emd(cost, a, b, mass=share).value.item(), theirs_cost, atol=1e-8, rtol=0)


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_gradients_are_those_of_finite_differences(gradient: str, mass: float) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((4, 5), (4,), (5,))
    leaves = [torch.rand(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        settings: dict[str, Any] = {"mass": mass, "epsilon": 0.2, "gradient": gradient}
        result = partial_sinkhorn(cost, a.softmax(0), b.softmax(0), **settings, **TIGHT)
        return result.value if gradient == "envelope" else result.plan.square().sum() + result.value

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c, a, b: partial_sinkhorn(c, a, b, mass=0.0, epsilon=0.1),
            r"mass is 0.0, expected a number",
        ),
        (lambda c, a, b: partial_sinkhorn(c, a, b, mass=1.1, epsilon=0.1), r"mass is 1.1, expected at most .*, 1$"),
        (
            lambda c, a, b: partial_sinkhorn(c, a, b, mass=0.5, epsilon=0.1, gradient="implicit"),
            r"gradient is 'implicit', expected one of \['none', 'envelope', 'unroll'\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(problem: Transport, call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*problem)
