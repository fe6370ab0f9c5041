"""Costs between points: their values, and solvers that never hold more than a tile of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import counterpoise.ot._inputs as inputs
import counterpoise.ot.costs as costs
from counterpoise.ot import (
    Cosine,
    Euclidean,
    OTResult,
    PointCost,
    SquaredEuclidean,
    partial_sinkhorn,
    sinkhorn,
    unbalanced_sinkhorn,
)

KINDS = (SquaredEuclidean, Euclidean, Cosine)
SOLVERS: dict[str, Callable[..., OTResult]] = {
    "sinkhorn": lambda *p, **o: sinkhorn(*p, epsilon=0.3, **o),
    "unbalanced": lambda *p, **o: unbalanced_sinkhorn(*p, epsilon=0.3, penalty_a=1.0, penalty_b=float("inf"), **o),
    "partial": lambda *p, **o: partial_sinkhorn(*p, epsilon=0.3, mass=0.8, **o),
}


def points(n: int = 60, k: int = 25, d: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(m, d, generator=generator, dtype=torch.float64) for m in (n, k))
    return x, y + 0.5


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is formed, and a tile has four rows of 25."""
    monkeypatch.setattr(inputs, "FORMED", 0)
    monkeypatch.setattr(costs, "TILE", 100)


# Values


def test_values_are_what_their_names_say() -> None:
    x, y = points()
    differences = x[:, None] - y
    assert_close(SquaredEuclidean(x, y, scale=0.5).matrix(), 0.5 * differences.square().sum(-1))
    assert_close(Euclidean(x, y).matrix(), differences.norm(dim=-1))
    cosine = torch.cosine_similarity(x[:, None], y[None], dim=-1)
    assert_close(Cosine(x, y, scale=3.0).matrix(), 3 - 3 * cosine)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_matrix(kind: type[PointCost]) -> None:
    cost = kind(*points())
    assert cost.shape == (60, 25)
    assert_close(cost.rows(10, 17), cost.matrix()[10:17])


def test_squared_distances_far_from_the_origin_keep_their_digits() -> None:
    x, y = points()
    near, far = SquaredEuclidean(x.float(), y.float()).matrix(), SquaredEuclidean(x.float() + 4096, y.float() + 4096)
    assert_close(far.matrix(), near, atol=5e-3, rtol=5e-3)  # of the points themselves 2e-4 is lost
    assert SquaredEuclidean(x, x).matrix().diagonal().abs().max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_points_meet(kind: type[PointCost]) -> None:
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(kind(x, x).matrix().sum(), x)
    assert grad.isfinite().all()


# Tiles


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_tiles_give_what_the_matrix_gives(kind: type[PointCost], solver: str) -> None:
    cost = kind(*points())
    a, b = torch.rand(60, dtype=torch.float64), torch.rand(25, dtype=torch.float64)
    a[0] = b[0] = 0
    problem = (a / a.sum(), b / b.sum())
    dense = SOLVERS[solver](cost.matrix(), *problem, tolerance=1e-11)
    found = SOLVERS[solver](cost, *problem, tolerance=1e-11)
    assert found.plan is None
    assert found.converged
    assert_close(found.value, dense.value)
    assert_close(found.g, dense.g)
    assert_close(found.plan_rows(3, 20), dense.plan[3:20])
    weights = torch.rand(25, 2, dtype=torch.float64)
    assert_close(found.barycenters(weights), dense.barycenters(weights))
    assert found.barycenters(weights)[0].eq(0).all()


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_envelope_gradients_of_tiles_are_those_of_the_matrix(kind: type[PointCost], solver: str) -> None:
    found = []
    for formed in (False, True):
        x, y = (p.requires_grad_() for p in points())
        a = torch.full((60,), 1 / 60, dtype=torch.float64, requires_grad=True)
        cost = kind(x, y)
        result = SOLVERS[solver](cost.matrix() if formed else cost, a, gradient="envelope", tolerance=1e-11)
        found.append(torch.autograd.grad(3 * result.value, (x, y, a)))
    assert_close(found[0], found[1], atol=1e-9, rtol=1e-6)


@pytest.mark.usefixtures("tiled")
def test_no_more_than_a_tile_is_ever_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = SquaredEuclidean.pairwise

    def seen(self: SquaredEuclidean, x: Tensor, y: Tensor) -> Tensor:
        found = plain(self, x, y)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(SquaredEuclidean, "pairwise", seen)
    x, y = (p.requires_grad_() for p in points())
    sinkhorn(SquaredEuclidean(x, y), epsilon=0.3, gradient="envelope").value.backward()
    assert max(sizes) == 100


@pytest.mark.usefixtures("tiled")
def test_points_of_a_batch_are_tiled_together() -> None:
    x, y = points()
    batch = SquaredEuclidean(torch.stack([x, x + 1]), torch.stack([y, y]))
    found = sinkhorn(batch, epsilon=0.3, tolerance=1e-11)
    for i, shift in enumerate((0, 1)):
        assert_close(
            found.value[i], sinkhorn(SquaredEuclidean(x + shift, y).matrix(), epsilon=0.3, tolerance=1e-11).value
        )


def test_few_points_are_formed_once_and_have_a_plan() -> None:
    x, y = (p.requires_grad_() for p in points())
    result = sinkhorn(SquaredEuclidean(x, y), epsilon=0.3, gradient="implicit", tolerance=1e-9)
    assert result.plan.shape == (60, 25)
    assert all(g.isfinite().all() for g in torch.autograd.grad(result.plan.square().sum(), (x, y)))


def test_a_cost_of_ones_own_is_a_subclass() -> None:
    class Manhattan(PointCost):
        """s |x - y|_1."""

        def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
            return self.scale * (x[..., :, None, :] - y[..., None, :, :]).abs().sum(-1)

    x, y = points()
    assert_close(sinkhorn(Manhattan(x, y), epsilon=1.0).plan, sinkhorn(torch.cdist(x, y, p=1), epsilon=1.0).plan)


# Refused


def test_what_does_not_fit_is_refused() -> None:
    x, y = points()
    with pytest.raises(TypeError, match=r"x is \(60, 3\), torch.int64, expected a floating tensor"):
        SquaredEuclidean(x.long(), y)
    with pytest.raises(TypeError, match=r"y is list, expected a floating tensor"):
        SquaredEuclidean(x, [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"y has shape \(25, 2\), expected \(..., K, d\) as x of \(60, 3\) has it"):
        SquaredEuclidean(x, y[:, :2])
    with pytest.raises(ValueError, match=r"scale is 0, expected"):
        SquaredEuclidean(x, y, scale=0)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
def test_the_gradient_of_a_plan_that_is_never_formed_is_refused(gradient: str) -> None:
    with pytest.raises(ValueError, match=r'expected "none" or "envelope": the plan is not formed'):
        sinkhorn(SquaredEuclidean(*points()), epsilon=0.3, gradient=gradient)
