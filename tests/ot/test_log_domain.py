"""The log domain that kernels fall back to: the same solutions, and taken where a kernel overflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import counterpoise.ot._iterations as iterations
from counterpoise.ot import OTResult, partial_sinkhorn, sinkhorn, unbalanced_sinkhorn
from tests.ot.problems import Transport, transport

SOLVERS: dict[str, Callable[..., OTResult]] = {
    "sinkhorn": sinkhorn,
    "unbalanced": lambda *p, **o: unbalanced_sinkhorn(*p, penalty_a=float("inf"), penalty_b=0.4, **o),
    "partial": lambda *p, **o: partial_sinkhorn(*p, mass=0.8, **o),
}


@pytest.fixture
def falls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many iterations each fall took, as they happen."""
    taken: list[int] = []
    plain = iterations.in_logarithms

    def counted(problem: Any, g: torch.Tensor, count: int) -> Any:
        taken.append(count)
        return plain(problem, g, count)

    monkeypatch.setattr(iterations, "in_logarithms", counted)
    return taken


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel overflows."""
    plain = iterations.advance

    def overflowing(*arguments: Any) -> Any:
        found = plain(*arguments)
        found.f = found.f + torch.nan
        return found

    monkeypatch.setattr(iterations, "advance", overflowing)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_it_alone_finds_the_same_solution(name: str, zeros: bool, falls: list[int]) -> None:
    problem = transport(zeros=zeros)
    found = SOLVERS[name](*problem, epsilon=0.05, tolerance=1e-11)
    assert found.converged
    assert sum(falls) == found.iterations
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        patch.setattr(iterations, "advance", PLAIN)
        expected = SOLVERS[name](*problem, epsilon=0.05, tolerance=1e-11)
    assert_close(found.plan, expected.plan, atol=1e-10, rtol=1e-7)
    assert_close(found.value, expected.value)
    assert_close(found.g, expected.g)


PLAIN = iterations.advance


@pytest.mark.usefixtures("no_kernels")
def test_a_batch_and_its_error(falls: list[int]) -> None:
    cost, a, b = (torch.stack(x) for x in zip(transport(seed=0), transport(seed=1), strict=True))
    found = sinkhorn(cost, a, b, epsilon=0.05, max_iterations=7, tolerance=0)
    assert falls == [7]
    assert_close(found.marginal_error, (found.plan.sum(-1) - a).abs().sum(-1))
    assert_close(found.plan.sum(-2), b)


def far_apart() -> Transport:
    """Scalings of e^100 within the first ten iterations: too much for float32."""
    cost = torch.tensor([[0.0, 9.0, 7.0], [8.0, 0.5, 0.0]])
    return Transport(cost, torch.tensor([0.9, 0.1]), torch.tensor([1e-3, 0.2, 0.799]))


@pytest.mark.parametrize("name", SOLVERS)
def test_overflow_is_survived(name: str, falls: list[int]) -> None:
    found = SOLVERS[name](*far_apart(), epsilon=1e-2, scaling=None, max_iterations=5000)
    cost, a, b = (x.double() for x in far_apart())
    precise = SOLVERS[name](cost, a / a.sum(), b / b.sum(), epsilon=1e-2, tolerance=1e-10, max_iterations=5000)
    assert found.converged
    assert_close(found.plan.double(), precise.plan, atol=2e-5, rtol=0)
    assert_close(found.value.double(), precise.value, atol=1e-4, rtol=1e-4)


def test_overflow_goes_through_it(falls: list[int]) -> None:
    sinkhorn(*far_apart(), epsilon=1e-2, scaling=None, max_iterations=5000)
    assert falls
