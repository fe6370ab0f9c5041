"""Sinkhorn: what a plan must be, what changes nothing, the limits of epsilon, and what is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ot
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

from counterpoise.ot import sinkhorn
from tests.ot.problems import TIGHT, Transport, kl, transport, transports


@pytest.fixture
def problem() -> Transport:
    return transport()


# The plan


@pytest.mark.parametrize("zeros", [False, True])
def test_the_plan_has_the_marginals(zeros: bool) -> None:
    cost, a, b = transport(zeros=zeros)
    result = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    assert_close(result.plan.sum(1), a)
    assert_close(result.plan.sum(0), b)
    assert result.converged


def test_the_plan_is_what_the_potentials_say(problem: Transport) -> None:
    cost, a, b = problem
    result = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    assert_close(result.plan, a[:, None] * b * ((result.f[:, None] + result.g - cost) / 0.1).exp())
    assert_close(result.f.mean().item(), 0.0)


def test_the_value_is_the_objective_in_both_conventions(problem: Transport) -> None:
    cost, a, b = problem
    result = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    linear, plan = (result.plan * cost).sum(), result.plan
    assert_close(result.value, linear + 0.1 * kl(plan, a[:, None] * b))
    assert_close(result.value, a @ result.f + b @ result.g)
    assert_close(result.value_entropy, linear + 0.1 * (plan * (plan.log() - 1)).sum())


def test_rows_and_columns_without_mass_have_a_plan_of_zero_and_finite_potentials() -> None:
    cost, a, b = transport(zeros=True)
    result = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    assert result.plan[0].eq(0).all()
    assert result.plan[:, -1].eq(0).all()
    smooth = -0.1 * (b.log() + (result.g - cost) / 0.1).logsumexp(1)
    assert_close(result.f, smooth)  # the next update, of these entries too
    assert result.g.isfinite().all()


def test_forbidden_pairs_get_nothing(problem: Transport) -> None:
    cost = problem.cost.clone()
    cost[0, :3] = math.inf
    result = sinkhorn(cost, problem.a, problem.b, epsilon=0.1, **TIGHT)
    assert result.plan[0, :3].eq(0).all()
    assert_close(result.plan.sum(1), problem.a)
    assert result.value.isfinite()


def test_marginals_are_uniform_by_default(problem: Transport) -> None:
    result = sinkhorn(problem.cost, epsilon=0.1, **TIGHT)
    assert_close(result.plan.sum(1), torch.full((7,), 1 / 7, dtype=torch.float64))
    assert_close(result.plan.sum(0), torch.full((5,), 1 / 5, dtype=torch.float64))


def test_any_total_mass_will_do(problem: Transport) -> None:
    cost, a, b = problem
    one, many = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT), sinkhorn(cost, 1e4 * a, 1e4 * b, epsilon=0.1, **TIGHT)
    assert_close(many.plan, 1e4 * one.plan)
    assert_close(many.marginal_error, one.marginal_error, atol=1e-12, rtol=0)


def test_one_row_takes_all(problem: Transport) -> None:
    result = sinkhorn(problem.cost[:1], torch.ones(1, dtype=torch.float64), problem.b, epsilon=0.1)
    assert_close(result.plan[0], problem.b)
    assert_close(result.value, problem.cost[0] @ problem.b)


# What changes nothing, or only what it should


def test_constants_of_rows_and_columns_move_potentials_only(problem: Transport) -> None:
    cost, a, b = problem
    up, across = torch.arange(7.0, dtype=torch.float64), torch.tensor([3.0, -1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    plain = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    moved = sinkhorn(cost + up[:, None] + across, a, b, epsilon=0.1, **TIGHT)
    assert_close(moved.plan, plain.plan)
    assert_close(moved.value - plain.value, a @ up + b @ across)
    assert_close(moved.f - plain.f, up - up.mean())


def test_permuting_rows_and_columns_permutes_the_plan(problem: Transport) -> None:
    cost, a, b = problem
    rows, columns = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    plain = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    permuted = sinkhorn(cost[rows][:, columns], a[rows], b[columns], epsilon=0.1, **TIGHT)
    assert_close(permuted.plan, plain.plan[rows][:, columns])
    assert_close(permuted.value, plain.value)


def test_the_transposed_problem_has_the_transposed_plan(problem: Transport) -> None:
    cost, a, b = problem
    plain, turned = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT), sinkhorn(cost.T, b, a, epsilon=0.1, **TIGHT)
    assert_close(turned.plan, plain.plan.T)
    assert_close(turned.value, plain.value)


def test_units_of_the_cost_are_those_of_epsilon(problem: Transport) -> None:
    cost, a, b = problem
    assert_close(
        sinkhorn(1e3 * cost, a, b, epsilon=100.0, **TIGHT).plan, sinkhorn(cost, a, b, epsilon=0.1, **TIGHT).plan
    )


def test_problems_of_a_batch_are_independent() -> None:
    several = [transport(seed=seed, zeros=seed == 1) for seed in range(3)]
    together = sinkhorn(
        *(torch.stack(x).reshape(3, 1, *x[0].shape) for x in zip(*several, strict=True)), epsilon=0.1, **TIGHT
    )
    assert together.plan.shape == (3, 1, 7, 5)
    assert together.value.shape == together.marginal_error.shape == (3, 1)
    for i, problem in enumerate(several):
        alone = sinkhorn(*problem, epsilon=0.1, **TIGHT)
        assert_close(together.plan[i, 0], alone.plan, atol=1e-12, rtol=1e-9)
        assert_close(together.f[i, 0], alone.f)
        assert_close(together.value[i, 0], alone.value)


def test_one_marginal_serves_a_batch(problem: Transport) -> None:
    costs = torch.stack([problem.cost, problem.cost.flip(0)])
    result = sinkhorn(costs, problem.a, problem.b, epsilon=0.1, **TIGHT)
    assert_close(result.plan.sum(2), problem.a.expand(2, 7))


# Limits


def test_a_large_epsilon_gives_the_product(problem: Transport) -> None:
    cost, a, b = problem
    assert_close(sinkhorn(cost, a, b, epsilon=1e6, **TIGHT).plan, a[:, None] * b, atol=1e-7, rtol=0)


def test_a_small_epsilon_gives_the_exact_plan(problem: Transport) -> None:
    cost, a, b = problem
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    for epsilon in (1e-1, 1e-2, 3e-3):
        linear = float((sinkhorn(cost, a, b, epsilon=epsilon, tolerance=1e-8, max_iterations=20_000).plan * cost).sum())
        assert exact - 1e-8 <= linear <= exact + epsilon * math.log(35)  # the most that the entropy is worth


def test_a_spread_of_costs_far_above_epsilon_is_come_down_to() -> None:
    """Epsilon a thousandth of the largest cost: by halves, by quarters or all at once, it is one plan."""
    cost, a, b = transport(10, 8, seed=1)
    scalings = ("auto", 0.25, None)
    found = [sinkhorn(cost, a, b, epsilon=1e-3, scaling=s, tolerance=1e-9, max_iterations=50_000) for s in scalings]
    assert all(result.converged for result in found)
    assert_close(found[0].plan, found[2].plan, atol=1e-7, rtol=0)
    assert_close(found[1].plan, found[2].plan, atol=1e-7, rtol=0)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_float32_has_no_nan(epsilon: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 3, generator=generator), 2 * torch.randn(40, 3, generator=generator) + 1
    a, b = torch.rand(60, generator=generator) ** 8, torch.rand(40, generator=generator) ** 8
    a[:3], b[:3] = 0, 0
    result = sinkhorn(
        torch.cdist(x, y) ** 2 + offset, a / a.sum(), b / b.sum(), epsilon=epsilon, tolerance=0, max_iterations=300
    )
    for part in (result.plan, result.f, result.g, result.value, result.marginal_error):
        assert part.isfinite().all()
        assert part.dtype == torch.float32
    assert_close(result.plan.sum(0), b / b.sum(), atol=1e-6, rtol=1e-4)


def test_masses_from_one_to_a_billion_billionth() -> None:
    """The first kernel cannot hold what the scalings become: this goes through the log domain and back."""
    cost = torch.tensor([[0.0, 40.0, 90.0], [30.0, 0.0, 50.0], [60.0, 80.0, 0.0]])
    a, b = torch.tensor([1.0, 1e-18, 1e-9]), torch.tensor([1e-18, 1e-9, 1.0])
    result = sinkhorn(cost, a, b, epsilon=0.05, tolerance=1e-5, max_iterations=20_000)
    assert result.converged
    assert_close(result.plan.sum(0), b, rtol=1e-4, atol=0)
    assert_close(result.plan[0, 2].item(), 1.0, atol=1e-5, rtol=0)


def test_half_precision_is_computed_in_float32(problem: Transport) -> None:
    result = sinkhorn(problem.cost.bfloat16(), epsilon=0.1)
    assert result.plan.dtype == torch.float32
    assert_close(result.plan.sum(0), torch.full((5,), 0.2))


def test_autocast_changes_nothing(problem: Transport) -> None:
    cost = problem.cost.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn(cost, epsilon=0.1)
    assert_close(inside.plan, sinkhorn(cost, epsilon=0.1).plan, atol=0, rtol=0)


# Convergence


def test_the_error_is_that_of_the_rows(problem: Transport) -> None:
    cost, a, b = problem
    result = sinkhorn(cost, a, b, epsilon=0.05, max_iterations=4, tolerance=0)
    assert_close(result.marginal_error, (result.plan.sum(1) - a).abs().sum())
    assert_close(result.plan.sum(0), b)
    assert result.iterations == 4
    assert not result.converged


def test_not_converging_is_warned_of_where_the_solver_was_called(problem: Transport) -> None:
    with pytest.warns(UserWarning, match=r"sinkhorn did not converge in 5 iterations") as caught:
        result = sinkhorn(problem.cost, epsilon=0.01, max_iterations=5, tolerance=1e-12)
    assert not result.converged
    assert caught[0].filename == __file__


def test_a_fixed_number_of_iterations_is_not_warned_of(problem: Transport) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sinkhorn(problem.cost, epsilon=0.01, max_iterations=5, tolerance=0).iterations == 5


def test_convergence_is_looked_at_every_ten_iterations(problem: Transport) -> None:
    result = sinkhorn(problem.cost, epsilon=0.1)
    assert result.iterations % 10 == 0
    assert result.marginal_error <= 1e-6


def test_more_iterations_give_no_larger_error(problem: Transport) -> None:
    errors = [sinkhorn(*problem, epsilon=0.02, max_iterations=m, tolerance=0).marginal_error for m in range(1, 30)]
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(errors))


@given(problem=transports())
def test_it_agrees_with_pot(problem: Transport) -> None:
    cost, a, b = problem
    result = sinkhorn(cost, a, b, epsilon=0.2, tolerance=1e-12, max_iterations=50_000)
    assert result.converged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of log 0
        theirs = ot.bregman.sinkhorn_log(
            a.numpy(), b.numpy(), cost.numpy(), 0.2, stopThr=1e-15, numItermax=50_000, warn=False
        )
    assert_close(result.plan, torch.from_numpy(theirs), atol=1e-8, rtol=0)


# Gradients

LEAVES = ("cost", "a", "b")


def of_logits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of unconstrained leaves: marginals by softmax."""
    return lambda cost, a, b: function(cost, a.softmax(-1), b.softmax(-1))


def leaves(seed: int = 4, *batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*batch, 5, 3), (*batch, 5), (*batch, 3))
    return [torch.rand(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def probed(gradient: str, turned: bool = False, **options: Any) -> Callable[..., Tensor]:
    """A weighted sum of the plan's entries."""
    probe = torch.randn(5, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def function(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if turned:
            return (sinkhorn(cost.mT, b, a, epsilon=0.2, gradient=gradient, **TIGHT, **options).plan * probe.mT).sum()
        return (sinkhorn(cost, a, b, epsilon=0.2, gradient=gradient, **TIGHT, **options).plan * probe).sum()

    return of_logits(function)


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("value", ["value", "value_entropy"])
def test_the_gradient_of_the_value_is_that_of_finite_differences(gradient: str, value: str) -> None:
    def function(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return getattr(sinkhorn(cost, 2 * a, 2 * b, epsilon=0.2, gradient=gradient, **TIGHT), value)

    assert torch.autograd.gradcheck(of_logits(function), leaves())


def test_the_gradients_of_the_value_are_plan_and_potentials(problem: Transport) -> None:
    cost, a, b = (x.clone().requires_grad_() for x in problem)
    result = sinkhorn(cost, a, b, epsilon=0.1, gradient="envelope", **TIGHT)
    of_cost, of_a, of_b = torch.autograd.grad(result.value, (cost, a, b))
    assert_close(of_cost, result.plan)
    assert_close(of_a - of_a.mean(), result.f)
    assert_close(of_b - of_b.mean(), result.g - result.g.mean())
    assert not result.plan.requires_grad


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
def test_the_gradient_of_the_plan_is_that_of_finite_differences(gradient: str, turned: bool) -> None:
    assert torch.autograd.gradcheck(probed(gradient, turned), leaves())


def test_unrolled_and_implicit_agree_at_convergence() -> None:
    inputs = leaves()
    grads = [torch.autograd.grad(probed(gradient)(*inputs), inputs) for gradient in ("implicit", "unroll")]
    assert_close(grads[0], grads[1])


def test_few_unrolled_iterations_are_differentiated_as_they_are() -> None:
    def function(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options: dict[str, Any] = {"max_iterations": 2, "tolerance": 0, "gradient": "unroll"}
        return sinkhorn(cost, a, b, epsilon=0.2, **options).plan.square().sum()

    assert torch.autograd.gradcheck(of_logits(function), leaves())


def test_gradients_of_a_batch_are_those_of_its_problems() -> None:
    inputs = leaves(6, 2)
    for gradient in ("envelope", "implicit"):
        result = sinkhorn(
            inputs[0], inputs[1].softmax(-1), inputs[2].softmax(-1), epsilon=0.2, gradient=gradient, **TIGHT
        )
        output = result.plan.square().sum() if gradient == "implicit" else result.value.square().sum()
        together = torch.autograd.grad(output, inputs)
        for i in range(2):
            alone = [x[i].detach().requires_grad_() for x in inputs]
            one = sinkhorn(
                alone[0], alone[1].softmax(-1), alone[2].softmax(-1), epsilon=0.2, gradient=gradient, **TIGHT
            )
            single = torch.autograd.grad(
                one.plan.square().sum() if gradient == "implicit" else one.value.square(), alone
            )
            assert_close([x[i] for x in together], list(single), atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
def test_gradients_are_finite_beside_masses_of_zero_and_forbidden_pairs(gradient: str) -> None:
    cost, a, b = transport(zeros=True)
    cost[2, 1] = math.inf
    inputs = [x.clone().requires_grad_() for x in (cost, a, b)]
    result = sinkhorn(*inputs, epsilon=0.1, gradient=gradient, **TIGHT)
    output = result.value if gradient == "envelope" else result.plan.square().sum()
    of_cost, of_a, of_b = torch.autograd.grad(output, inputs)
    assert all(x.isfinite().all() for x in (of_cost, of_a, of_b))
    assert of_cost[0].eq(0).all()
    assert of_cost[2, 1] == 0


def test_an_implicit_gradient_of_a_plan_in_blocks_is_finite() -> None:
    """Where epsilon is tiny the plan falls into blocks, and the linear system has a null space for each."""
    cost = (1 - torch.eye(6, dtype=torch.float64)).requires_grad_()
    plan = sinkhorn(cost, epsilon=1e-3, gradient="implicit", **TIGHT).plan
    (grad,) = torch.autograd.grad((plan * torch.randn(6, 6, dtype=torch.float64)).sum(), cost)
    assert_close(grad, torch.zeros_like(grad), atol=1e-9, rtol=0)


def test_an_implicit_gradient_far_from_convergence_is_warned_of(problem: Transport) -> None:
    cost = problem.cost.clone().requires_grad_()
    with pytest.warns(UserWarning, match=r"marginal_error is above 0.001") as caught:
        sinkhorn(cost, epsilon=0.01, gradient="implicit", max_iterations=1, tolerance=0)
    assert caught[0].filename == __file__


def test_without_a_gradient_nothing_is_attached(problem: Transport) -> None:
    result = sinkhorn(problem.cost.clone().requires_grad_(), epsilon=0.1)
    assert not result.plan.requires_grad
    assert not result.value.requires_grad


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon is 0.0, expected a number in \(0, inf\]"),
        ({"max_iterations": 0}, r"max_iterations is 0, expected a number in \[1, inf\]"),
        ({"max_iterations": 2.5}, r"max_iterations is 2.5, expected a whole number"),
        ({"tolerance": -1.0}, r"tolerance is -1.0"),
        ({"gradient": "implict"}, r"gradient is 'implict', .* did you mean 'implicit'"),
        ({"scaling": 1.0}, r"scaling is 1.0, expected a factor below 1"),
        ({"a": torch.ones(3)}, r"a has shape \(3,\), expected \(7,\)"),
        ({"b": torch.ones(5, 1)}, r"b has shape \(5, 1\), expected \(5,\)"),
        ({"a": torch.tensor([1.0, -1, 0, 0, 0, 0, 0])}, r"a holds a negative mass, NaN or inf"),
        ({"b": torch.tensor([math.nan, 0, 0, 0, 1.0])}, r"b holds a negative mass, NaN or inf"),
        ({"a": torch.zeros(7)}, r"a sums to 0, expected a positive total mass"),
        ({"a": torch.ones(7), "b": torch.ones(5)}, r"b sums to 5, expected the total of a, 7: .*unbalanced_sinkhorn"),
        ({"cost": torch.zeros(7)}, r"cost has shape \(7,\), expected \(..., N, K\)"),
        ({"cost": torch.zeros(7, 0)}, r"cost has shape \(7, 0\), expected \(..., N, K\) with K >= 1"),
        ({"cost": torch.zeros(0, 5)}, r"cost has no rows"),
        ({"cost": torch.full((7, 5), math.nan)}, r"cost holds NaN, -inf, or no finite entry"),
        ({"cost": torch.full((7, 5), -math.inf)}, r"cost holds NaN, -inf, or no finite entry"),
        ({"cost": torch.full((7, 5), math.inf)}, r"cost holds NaN, -inf, or no finite entry"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn(**{"cost": torch.zeros(7, 5), "epsilon": 0.1, **options})


def test_a_cost_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cost is a list, expected a tensor \(..., N, K\) or points"):
        sinkhorn([[1.0]], epsilon=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a is a list, expected a tensor of shape \(1,\)"):
        sinkhorn(torch.ones(1, 1), [1.0], epsilon=0.1)  # type: ignore[arg-type]
