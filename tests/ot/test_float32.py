"""Float32 at an epsilon down to a thousandth: no NaN in results or gradients of any solver, zeros and ties included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from counterpoise.ot import OTResult, partial_sinkhorn, sinkhorn, sinkhorn_divergence, unbalanced_sinkhorn
from tests.ot.problems import Transport, transports

INF = math.inf
ENDLESS: dict[str, Any] = {"tolerance": 0, "max_iterations": 60}
SOLVERS: dict[str, Callable[..., OTResult]] = {
    "sinkhorn": sinkhorn,
    "unbalanced": lambda *p, **o: unbalanced_sinkhorn(*p, penalty_a=0.5, penalty_b=1.0, **o),
    "unbalanced, entropy": lambda *p, **o: unbalanced_sinkhorn(*p, penalty_a=0.5, penalty_b=1.0, reference="ones", **o),
    "semi-relaxed": lambda *p, **o: unbalanced_sinkhorn(*p, penalty_a=INF, penalty_b=1.0, **o),
    "partial": lambda *p, **o: partial_sinkhorn(*p, mass=0.7, **o),
}
GRADIENTS = {
    name: ("envelope", "unroll") if name == "partial" else ("envelope", "implicit", "unroll") for name in SOLVERS
}


# Row 1 sends column 4 a mass of 7e-43: what couples the columns is far below rounding.
ALMOST_APART = Transport(
    cost=torch.tensor([[0.0] * 5, [0.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
    a=torch.tensor([0.0, 0.4536, 0.5464], dtype=torch.float64),
    b=torch.tensor([0.5769, 0.0, 0.0, 0.0, 0.4231], dtype=torch.float64),
)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.filterwarnings("ignore:.*did not converge", "ignore:.*implicit")
@example(problem=ALMOST_APART, epsilon=1e-3, scale=1.0)
@given(problem=transports(), epsilon=st.sampled_from([1e-3, 1e-2, 1.0]), scale=st.sampled_from([1.0, 10.0]))
def test_results_and_gradients_are_finite(name: str, problem: Transport, epsilon: float, scale: float) -> None:
    for gradient in GRADIENTS[name]:
        cost, a, b = (x.float().requires_grad_() for x in problem)
        found = SOLVERS[name](scale * cost, a, b, epsilon=epsilon, gradient=gradient, **ENDLESS)
        for part in (found.plan, found.f, found.g, found.value, found.marginal_error):
            assert part.dtype == torch.float32
            assert part.isfinite().all()
        loss = found.value if gradient == "envelope" else found.value + found.plan.square().sum()
        assert all(x.isfinite().all() for x in torch.autograd.grad(loss, (cost, a, b)))


@pytest.mark.parametrize("name", SOLVERS)
@given(problem=transports())
def test_plans_are_those_of_float64(name: str, problem: Transport) -> None:
    options: dict[str, Any] = {"epsilon": 0.1, "max_iterations": 5000}
    precise = SOLVERS[name](*problem, tolerance=1e-10, **options)
    found = SOLVERS[name](*(x.float() for x in problem), tolerance=1e-6, **options)
    assert_close(found.plan.double(), precise.plan, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*did not converge")
@given(seed=st.integers(0, 100), epsilon=st.sampled_from([1e-3, 1e-2, 1.0]), p=st.sampled_from([1, 2]))
def test_the_divergence_and_its_gradients_are_finite(seed: int, epsilon: float, p: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 2, generator=generator) for n in (7, 5))
    y[0] = x[0]
    a = torch.rand(7, generator=generator) ** 8
    a[1] = 0
    leaves = [leaf.requires_grad_() for leaf in (x, y, a / a.sum())]
    value = sinkhorn_divergence(x, y, leaves[2], epsilon=epsilon, p=p, max_iterations=200)
    assert value.isfinite()
    assert all(part.isfinite().all() for part in torch.autograd.grad(value, leaves))
