"""Exact transport: optimality by its duals, partial masses, gradients, and the extra that it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from counterpoise.ot import SquaredEuclidean, emd
from tests.ot.problems import Transport, transport


@pytest.fixture
def problem() -> Transport:
    return transport()


@pytest.mark.parametrize("zeros", [False, True])
def test_plan_and_duals_are_feasible_and_of_one_value(zeros: bool) -> None:
    cost, a, b = transport(zeros=zeros)
    result = emd(cost, a, b)
    assert_close(result.plan.sum(1), a)
    assert_close(result.plan.sum(0), b)
    assert (result.f[:, None] + result.g <= cost + 1e-12).all()
    assert_close(result.value, a @ result.f + b @ result.g)
    assert_close(result.value, (result.plan * cost).sum())
    assert (result.plan > 0).sum() <= 7 + 5 - 1
    assert result.converged


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_part_of_the_mass_goes_where_it_is_cheapest(mass: float, zeros: bool) -> None:
    """The value is attained by no other multiplier of the mass: weak duality with f, g <= 0 up to a constant."""
    cost, a, b = transport(zeros=zeros)
    result = emd(cost, a, b, mass=mass)
    assert_close(result.plan.sum().item(), mass)
    assert (result.plan.sum(1) <= a + 1e-12).all()
    assert (result.plan.sum(0) <= b + 1e-12).all()
    multiplier = (cost - result.f[:, None] - result.g).min()
    assert result.f.max() <= 1e-12
    assert result.g.max() <= 1e-12
    assert_close(result.value, a @ result.f + b @ result.g + multiplier * mass)


def test_all_of_the_mass_is_the_whole_problem(problem: Transport) -> None:
    assert_close(emd(*problem, mass=1.0).value, emd(*problem).value)


def test_problems_of_a_batch_and_points_are_taken() -> None:
    several = [transport(seed=seed) for seed in range(3)]
    together = emd(*(torch.stack(x) for x in zip(*several, strict=True)))
    for i, problem in enumerate(several):
        assert_close(together.plan[i], emd(*problem).plan)
    x = torch.randn(6, 2)
    of_points = emd(SquaredEuclidean(x, x.flip(0)))
    assert_close(of_points.value.item(), 0.0, atol=1e-5, rtol=0)
    assert of_points.plan.dtype == torch.float32


def test_the_gradients_of_the_value_are_plan_and_duals(problem: Transport) -> None:
    cost, a, b = (x.clone().requires_grad_() for x in problem)
    result = emd(cost, a, b, gradient="envelope")
    of_cost, of_a, of_b = torch.autograd.grad(result.value, (cost, a, b))
    assert_close((of_cost, of_a, of_b), (result.plan, result.f, result.g))
    step = 1e-4 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(emd(cost + step, a, b).value - result.value, (of_cost * step).sum(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, a, b: emd(c, a, 2 * b), r"b sums to 2, expected the total of a, 1"),
        (lambda c, a, b: emd(c, a, b, mass=1.5), r"mass is 1.5, expected at most the total of a and of b, 1"),
        (lambda c, a, b: emd(c / 0, a, b), r"cost holds NaN or inf, expected finite numbers"),
        (lambda c, a, b: emd(c, a, b, gradient="implicit"), r"gradient is 'implicit', expected one of"),
        (
            lambda c, a, b: emd(SquaredEuclidean(torch.zeros(5000, 1), torch.zeros(4000, 1))),
            r"cost has 20000000 entries, expected at most 2\^24",
        ),
    ],
)
def test_what_does_not_fit_is_refused(problem: Transport, call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*problem)


def test_the_missing_extra_is_named(problem: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"counterpoise.ot.emd needs ot: pip install 'counterpoise\[recipes\]'"):
        emd(*problem)
