"""Unbalanced Sinkhorn: what holds at the optimum, its limits, penalties of one entry each, and the common shift."""

from __future__ import annotations

import math
from typing import Any

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from counterpoise.ot import sinkhorn, unbalanced_sinkhorn
from tests.ot.problems import TIGHT, Transport, kl, transport, transports

INF = math.inf
REFERENCES = ("product", "ones")
VECTOR = torch.tensor([0.3, INF, 2.0, 0.7, 1.0], dtype=torch.float64)
PENALTIES = [(1.0, 0.5), (INF, 0.7), (0.4, INF), (50.0, 50.0), (0.01, 3.0), (INF, VECTOR), (0.6, VECTOR)]


@pytest.fixture
def problem() -> Transport:
    """Totals of 1 and 1.3."""
    cost, a, b = transport()
    return Transport(cost, a, 1.3 * b)


def objective(problem: Transport, plan: Tensor, epsilon: float, rho: Any, sigma: Any, reference: str) -> Tensor:
    cost, a, b = problem
    entropy = kl(plan, a[:, None] * b) if reference == "product" else (torch.special.xlogy(plan, plan) - plan).sum()
    value = (plan * cost).sum() + epsilon * entropy
    for mass, wanted, penalty in ((plan.sum(1), a, rho), (plan.sum(0), b, sigma)):
        for p, q, strength in zip(mass, wanted, torch.as_tensor(penalty).expand(mass.shape), strict=True):
            value = value + (strength * kl(p, q) if strength < INF else 0)
    return value


# The optimum


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("penalties", PENALTIES)
def test_marginals_are_what_the_potentials_say(problem: Transport, penalties: Any, reference: str) -> None:
    cost, a, b = problem
    b = b if any(torch.as_tensor(p).isfinite().all() for p in penalties) else b / 1.3
    result = unbalanced_sinkhorn(
        cost, a, b, epsilon=0.1, penalty_a=penalties[0], penalty_b=penalties[1], reference=reference, **TIGHT
    )
    assert result.converged
    assert_close(result.plan.sum(1), a * (-result.f / torch.as_tensor(penalties[0])).exp())
    assert_close(result.plan.sum(0), b * (-result.g / torch.as_tensor(penalties[1])).exp())
    alpha, beta = (a, b) if reference == "product" else (torch.ones_like(a), torch.ones_like(b))
    assert_close(result.plan, alpha[:, None] * beta * ((result.f[:, None] + result.g - cost) / 0.1).exp())


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("penalties", PENALTIES)
def test_the_value_is_the_objective_and_the_least(problem: Transport, penalties: Any, reference: str) -> None:
    options = {"penalty_a": penalties[0], "penalty_b": penalties[1], "reference": reference}
    result = unbalanced_sinkhorn(*problem, epsilon=0.1, **options, **TIGHT)
    assert_close(result.value, objective(problem, result.plan, 0.1, *penalties, reference))
    if all(torch.as_tensor(p).isfinite().all() for p in penalties):
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            near = result.plan * (1 + 0.1 * torch.randn(7, 5, generator=generator, dtype=torch.float64))
            assert objective(problem, near, 0.1, *penalties, reference) > result.value


def test_entries_without_mass_have_a_plan_of_zero() -> None:
    cost, a, b = transport(zeros=True)
    for reference in REFERENCES:
        result = unbalanced_sinkhorn(cost, a, b, epsilon=0.1, penalty_a=1.0, penalty_b=0.3, reference=reference)
        assert result.plan[0].eq(0).all()
        assert result.plan[:, -1].eq(0).all()
        assert result.f.isfinite().all()
        assert result.g.isfinite().all()


# Limits


@pytest.mark.parametrize("reference", REFERENCES)
def test_infinite_penalties_are_balanced_transport(reference: str) -> None:
    cost, a, b = transport()
    options = {"penalty_a": INF, "penalty_b": INF, "reference": reference}
    assert_close(
        unbalanced_sinkhorn(cost, a, b, epsilon=0.1, **options, **TIGHT).plan,
        sinkhorn(cost, a, b, epsilon=0.1, **TIGHT).plan,
    )


def test_growing_penalties_come_to_balanced_transport() -> None:
    cost, a, b = transport()
    balanced = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    distances = []
    for penalty in (1.0, 1e2, 1e4, 1e6):
        found = unbalanced_sinkhorn(cost, a, b, epsilon=0.1, penalty_a=penalty, penalty_b=penalty, **TIGHT)
        assert found.converged
        distances.append(float((found.plan - balanced.plan).abs().sum()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-5
    assert_close(found.value, balanced.value, atol=1e-5, rtol=0)


def test_vanishing_penalties_leave_every_pair_to_itself(problem: Transport) -> None:
    cost, a, b = problem
    result = unbalanced_sinkhorn(cost, a, b, epsilon=0.1, penalty_a=1e-7, penalty_b=1e-7, **TIGHT)
    assert_close(result.plan, a[:, None] * b * (-cost / 0.1).exp(), rtol=1e-4, atol=1e-9)


def test_mass_beyond_what_transport_is_worth_is_not_moved() -> None:
    """A column at a cost far above the penalties gets nothing, and no row pays for it."""
    cost = torch.tensor([[0.0, 1e3], [0.0, 1e3]], dtype=torch.float64)
    result = unbalanced_sinkhorn(cost, epsilon=0.05, penalty_a=1.0, penalty_b=1.0)
    assert result.plan[:, 1].max() < 1e-200
    assert result.plan[:, 0].min() > 0.1


def test_penalties_of_one_number_each_are_one_vector(problem: Transport) -> None:
    one = unbalanced_sinkhorn(*problem, epsilon=0.1, penalty_a=0.5, penalty_b=2.0, **TIGHT)
    each = unbalanced_sinkhorn(*problem, epsilon=0.1, penalty_a=[0.5] * 7, penalty_b=torch.full((5,), 2.0), **TIGHT)
    assert_close(each.plan, one.plan)


def test_p2ot_is_an_instance() -> None:
    """Rows exact, a virtual column of cost 0 exact, the others relaxed: their common mass is exact too."""
    cost, a, b = transport()
    mass = 0.3
    penalty = torch.tensor([1.0] * 5 + [INF], dtype=torch.float64)
    extended = torch.cat([cost, torch.zeros(7, 1, dtype=torch.float64)], 1)
    target = torch.cat([mass * b, torch.tensor([1 - mass], dtype=torch.float64)])
    options = {"penalty_a": INF, "penalty_b": penalty, "reference": "ones"}
    result = unbalanced_sinkhorn(extended, a, target, epsilon=0.1, **options, **TIGHT)
    assert_close(result.plan[:, :5].sum().item(), mass)
    assert (result.plan[:, :5].sum(1) < a).all()
    stationary = result.g[:5] + 1.0 * (result.plan[:, :5].sum(0) / target[:5]).log()
    assert_close(stationary, torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)
    assert result.iterations <= 200


@given(
    problem=transports(),
    total=st.floats(0.3, 3.0),
    penalties=st.tuples(*[st.sampled_from([0.05, 0.3, 1.0, INF])] * 2).filter(lambda p: p != (INF, INF)),
    reference=st.sampled_from(REFERENCES),
)
def test_it_agrees_with_pot(problem: Transport, total: float, penalties: tuple[float, float], reference: str) -> None:
    cost, a, b = problem
    options = {"penalty_a": penalties[0], "penalty_b": penalties[1], "reference": reference}
    result = unbalanced_sinkhorn(cost, a, total * b, epsilon=0.2, tolerance=1e-13, max_iterations=50_000, **options)
    rows, columns = a > 0, b > 0  # POT divides 0 by 0 elsewhere
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        a[rows].numpy(),
        (total * b[columns]).numpy(),
        cost[rows][:, columns].numpy(),
        0.2,
        penalties,
        reg_type={"product": "kl", "ones": "entropy"}[reference],
        stopThr=1e-15,
        numItermax=20_000,
    )
    assert result.converged
    assert_close(result.plan[rows][:, columns], torch.from_numpy(theirs), atol=1e-8, rtol=0)
    assert result.plan[~rows].eq(0).all()


# The common shift


@pytest.mark.parametrize("penalties", [(1e3, 1e3), (INF, 1e3), (1e4, INF)])
def test_large_penalties_take_no_more_iterations(problem: Transport, penalties: tuple[float, float]) -> None:
    """Without the shift the slowest mode would lose a ten-thousandth of itself an iteration."""
    options = {"penalty_a": penalties[0], "penalty_b": penalties[1]}
    result = unbalanced_sinkhorn(*problem, epsilon=0.1, tolerance=1e-10, max_iterations=200, **options)
    assert result.converged
    rho, sigma = penalties
    best = result.f / rho if rho < INF else result.g / sigma
    mass = result.plan.sum(1) if rho < INF else result.plan.sum(0)
    wanted = problem.a if rho < INF else problem.b
    assert_close(mass, wanted * (-best).exp(), rtol=1e-7, atol=0)


def test_a_cost_raised_by_a_constant_takes_no_more_iterations() -> None:
    cost, a, b = transport()
    options: dict[str, Any] = {"epsilon": 0.1, "penalty_a": 1.0, "penalty_b": 1.0, "tolerance": 1e-10}
    plain, raised = (unbalanced_sinkhorn(c, a, b, **options) for c in (cost, cost + 30))
    assert raised.iterations <= plain.iterations
    assert_close((raised.plan.sum() / plain.plan.sum()).log().item(), -30 / 2.1, rtol=1e-6, atol=0)


# Other properties


def test_permuting_rows_permutes_the_plan(problem: Transport) -> None:
    cost, a, b = problem
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    penalty = torch.linspace(0.1, 2, 7, dtype=torch.float64)
    plain = unbalanced_sinkhorn(cost, a, b, epsilon=0.1, penalty_a=penalty, penalty_b=1.0, **TIGHT)
    permuted = unbalanced_sinkhorn(
        cost[order], a[order], b, epsilon=0.1, penalty_a=penalty[order], penalty_b=1.0, **TIGHT
    )
    assert_close(permuted.plan, plain.plan[order])


def test_the_transposed_problem_has_the_transposed_plan(problem: Transport) -> None:
    cost, a, b = problem
    plain = unbalanced_sinkhorn(cost, a, b, epsilon=0.1, penalty_a=0.3, penalty_b=VECTOR, **TIGHT)
    turned = unbalanced_sinkhorn(cost.T, b, a, epsilon=0.1, penalty_a=VECTOR, penalty_b=0.3, **TIGHT)
    assert_close(turned.plan, plain.plan.T)
    assert_close(turned.value, plain.value)


def test_problems_of_a_batch_are_independent() -> None:
    several = [transport(seed=seed, zeros=seed == 1) for seed in range(3)]
    stacked = [torch.stack(x) for x in zip(*several, strict=True)]
    together = unbalanced_sinkhorn(*stacked, epsilon=0.1, penalty_a=0.5, penalty_b=VECTOR, **TIGHT)
    for i, problem in enumerate(several):
        alone = unbalanced_sinkhorn(*problem, epsilon=0.1, penalty_a=0.5, penalty_b=VECTOR, **TIGHT)
        assert_close(together.plan[i], alone.plan)
        assert_close(together.value[i], alone.value)


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("penalties", [(1.0, 0.5), (INF, 0.7), (0.6, VECTOR), (INF, VECTOR)])
def test_gradients_are_those_of_finite_differences(gradient: str, reference: str, penalties: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((4, 5), (4,), (5,))
    leaves = [torch.rand(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    probe = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    options = {"penalty_a": penalties[0], "penalty_b": penalties[1], "reference": reference}

    def function(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b = 0.2 + 0.2 * a, 0.1 + 0.1 * b
        result = unbalanced_sinkhorn(cost, a, b, epsilon=0.2, gradient=gradient, **options, **TIGHT)
        return result.value if gradient == "envelope" else (result.plan * probe).sum() + result.value

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_a": 0.0}, r"penalty_a holds a number that is not above 0"),
        ({"penalty_b": [1.0, math.nan, 1, 1, 1]}, r"penalty_b holds a number that is not above 0"),
        ({"penalty_a": [1.0]}, r"penalty_a has shape \(1,\), expected a number or \(7,\)"),
        ({"reference": "kl"}, r"reference is 'kl', expected one of"),
        ({"penalty_a": INF, "penalty_b": INF}, r"b sums to 1.3, expected the total of a, 1"),
        ({"b": torch.ones(5), "penalty_a": INF, "penalty_b": VECTOR + INF}, r"b sums to 5, expected the total of a, 1"),
        (
            {"b": torch.ones(5), "penalty_a": INF, "penalty_b": [1, INF, INF, 1, 1]},
            r"exact columns hold more mass",
        ),
        ({"a": torch.ones(7), "penalty_a": [INF] * 6 + [1.0], "penalty_b": INF}, r"exact rows hold more mass than the"),
    ],
)
def test_what_does_not_fit_is_refused(problem: Transport, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unbalanced_sinkhorn(**{**problem._asdict(), "epsilon": 0.1, "penalty_a": 1.0, "penalty_b": 1.0, **options})
