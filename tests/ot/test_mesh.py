"""MESH: a sharper plan with the same columns, and a gradient that passes the change of the cost by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.ot import mesh, sinkhorn
from tests.ot.problems import transport


def problem(seed: int = 0) -> dict[str, Tensor]:
    """Two problems of total mass 3, and their noise."""
    several = [transport(6, 3, seed + i) for i in range(2)]
    cost, a, b = (torch.stack(x) for x in zip(*several, strict=True))
    noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"cost": cost, "a": 3 * a, "b": 3 * b, "noise": noise}


def entropy(plan: Tensor) -> Tensor:
    return torch.special.entr(plan).sum((-2, -1))


def test_columns_are_exact() -> None:
    inputs = problem()
    assert_close(mesh(**inputs).plan.sum(-2), inputs["b"])


def test_plan_and_scalings_belong_together() -> None:
    found = mesh(**problem(), temperature=0.7)
    assert_close(found.plan, (found.u[..., None] + found.v[..., None, :] - found.cost / 0.7).exp())


def test_without_steps_it_is_sinkhorn() -> None:
    inputs = problem()
    found = mesh(**inputs, steps=0, iterations=200, noise_scale=0.0, temperature=0.5)
    expected = sinkhorn(inputs["cost"], inputs["a"], inputs["b"], epsilon=0.5, tolerance=1e-12)
    assert_close(found.plan, expected.plan)


def test_entropy_decreases() -> None:
    for seed in range(5):
        inputs = problem(seed)
        before, after = (entropy(mesh(**inputs, steps=steps).plan) for steps in (0, 4))
        assert (after < before).all()


def test_a_vanishing_step_leaves_sinkhorn_of_the_noisy_cost() -> None:
    inputs = problem()
    assert_close(mesh(**inputs, step_size=0.0).plan, mesh(**inputs, steps=0, iterations=25).plan, atol=1e-6, rtol=1e-5)


def test_a_constant_of_the_cost_changes_nothing() -> None:
    inputs = problem()
    assert_close(mesh(**{**inputs, "cost": inputs["cost"] + 7}).plan, mesh(**inputs).plan)


def test_problems_of_a_batch_are_independent() -> None:
    inputs = problem()
    together = mesh(**inputs).plan
    for i in range(2):
        assert_close(mesh(**{name: x[i] for name, x in inputs.items()}).plan, together[i])


def test_noise_breaks_ties_and_a_generator_repeats_it() -> None:
    tie = torch.zeros(4, 4, dtype=torch.float64)
    uniform = torch.full((4, 4), 1 / 16, dtype=torch.float64)
    assert_close(mesh(tie, noise_scale=0.0).plan, uniform)
    seeds = (0, 0, 1)
    found = [mesh(tie, steps=20, generator=torch.Generator().manual_seed(seed)).plan for seed in seeds]
    assert entropy(found[0]) < entropy(uniform) - 0.5
    assert_close(found[0], found[1], atol=0, rtol=0)
    assert not torch.allclose(found[0], found[2])


# Gradients


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_(name != "noise") for name, x in inputs.items()}


def gradients(output: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(output, [inputs[name] for name in ("cost", "a", "b")]))


def test_the_change_of_the_cost_is_a_constant_of_the_gradient() -> None:
    """Without carried potentials, the gradient is that of Sinkhorn at the changed cost."""
    inputs = leaves(problem())
    probe = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = mesh(**inputs, reuse_potentials=False)
    changed = leaves({**problem(), "cost": found.cost.detach()})
    plain = mesh(**changed, steps=0, noise_scale=0.0)
    assert_close(plain.plan, found.plan)
    assert_close(gradients((found.plan * probe).sum(), inputs), gradients((plain.plan * probe).sum(), changed))


def test_detached_potentials_change_the_gradient_and_not_the_plan() -> None:
    attached, detached = leaves(problem()), leaves(problem())
    plans = mesh(**attached).plan, mesh(**detached, detach_potentials=True).plan
    assert_close(plans[0], plans[1], atol=0, rtol=0)
    found = [gradients(plan.square().sum(), x)[0] for plan, x in zip(plans, (attached, detached), strict=True)]
    assert all(g.isfinite().all() for g in found)
    assert not torch.allclose(found[0], found[1])


def test_the_step_size_can_be_learned() -> None:
    step_size = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inputs = problem()
    (grad,) = torch.autograd.grad(mesh(**inputs, step_size=step_size).cost.square().sum(), step_size)
    ahead, behind = (mesh(**inputs, step_size=2.0 + h).cost.square().sum() for h in (1e-6, -1e-6))
    assert grad.isfinite()
    assert (ahead - behind) * grad != 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_gradients_are_off(mode: Callable[[], Any]) -> None:
    expected = mesh(**problem()).plan
    with mode():
        found = mesh(**problem()).plan
    assert_close(found, expected)
    assert not found.requires_grad


def test_autocast_and_half_precision_are_computed_in_float32() -> None:
    inputs = {name: x.float() for name, x in problem().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(mesh(**inputs).plan, mesh(**inputs).plan)
        assert mesh(**{**inputs, "cost": inputs["cost"].bfloat16()}).plan.dtype == torch.float32


def test_extreme_costs_have_finite_plans_and_gradients() -> None:
    inputs = leaves({**problem(), "cost": 1e4 * problem()["cost"]})
    found = mesh(**inputs)
    assert found.plan.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(found.plan.square().sum(), inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, r"steps is -1, expected a number in \[0, inf\]"),
        ({"iterations": 0}, r"iterations is 0, expected a number in \[1, inf\]"),
        ({"temperature": 0.0}, r"temperature is 0.0"),
        ({"noise": torch.zeros(3)}, r"noise has shape \(3,\), expected \(2, 6, 3\)"),
        ({"cost": torch.zeros(3)}, r"cost is \(3,\), expected a tensor of shape \(..., N, K\)"),
        ({"b": torch.ones(2, 3)}, r"b sums to 3, expected the total of a"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {**problem(), "a": torch.ones(2, 6), **options}
    with pytest.raises(ValueError, match=message):
        mesh(**inputs)
