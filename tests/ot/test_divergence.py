"""Sinkhorn divergence: a distance of clouds, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import counterpoise.ot._inputs as inputs
from counterpoise.ot import SquaredEuclidean, sinkhorn, sinkhorn_divergence


def cloud(n: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Points (n, 2) and masses of total one, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, a = torch.randn(n, 2, generator=generator, dtype=torch.float64), torch.rand(n, generator=generator).double()
    return x + shift, a / a.sum()


@pytest.mark.parametrize("p", [1, 2])
def test_it_is_zero_of_a_cloud_to_itself_however_it_is_written(p: int) -> None:
    x, a = cloud(6, 0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(sinkhorn_divergence(x, x[order], a, a[order], epsilon=0.5, p=p).item(), 0.0, atol=1e-9, rtol=0)
    doubled = torch.cat([x, x]), torch.cat([a, a]) / 2
    found = sinkhorn_divergence(x, doubled[0], a, doubled[1], epsilon=0.5, p=p)
    assert_close(found.item(), 0.0, atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 50.0])
def test_it_is_positive_of_clouds_that_differ_and_symmetric(p: int, epsilon: float) -> None:
    for seed in range(5):
        (x, a), (y, b) = cloud(6, seed), cloud(5, 100 + seed)
        there = sinkhorn_divergence(x, y, a, b, epsilon=epsilon, p=p)
        assert there > 1e-4
        assert_close(there, sinkhorn_divergence(y, x, b, a, epsilon=epsilon, p=p), atol=1e-8, rtol=1e-6)


def test_it_is_transport_less_half_of_each_cloud_to_itself() -> None:
    (x, a), (y, b) = cloud(6, 0), cloud(5, 1)
    tight = {"epsilon": 0.5, "tolerance": 1e-11, "max_iterations": 20_000}
    parts = [
        sinkhorn(SquaredEuclidean(u, v, scale=0.5), c, d, **tight).value
        for u, v, c, d in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    ]
    found = sinkhorn_divergence(x, y, a, b, **tight)
    assert_close(found, parts[0] - parts[1] / 2 - parts[2] / 2)


def test_a_shifted_cloud_is_half_the_squared_shift_away_at_any_epsilon() -> None:
    x, a = cloud(8, 0)
    for epsilon in (0.1, 1.0, 100.0):
        found = sinkhorn_divergence(x, x + 3.0, a, a, epsilon=epsilon, tolerance=1e-9, max_iterations=10_000)
        assert_close(found.item(), 0.5 * 2 * 3.0**2, rtol=1e-6, atol=0)


def test_a_large_epsilon_leaves_the_squared_distance_of_the_means() -> None:
    (x, a), (y, b) = cloud(6, 0), cloud(5, 1)
    expected = 0.5 * (a @ x - b @ y).square().sum()
    assert_close(sinkhorn_divergence(x, y, a, b, epsilon=1e6, tolerance=1e-12), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_are_those_of_finite_differences(p: int) -> None:
    (x, a), (y, b) = cloud(5, 0), cloud(4, 1)
    leaves = [t.requires_grad_() for t in (x, y, a.log(), b.log())]

    def function(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, a.softmax(0), b.softmax(0), epsilon=0.3, p=p, tolerance=1e-13)

    assert torch.autograd.gradcheck(function, leaves)


def test_clouds_in_tiles_have_the_same_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, a), (y, b) = cloud(60, 0), cloud(50, 1)
    found = []
    for formed in (2**24, 0):
        monkeypatch.setattr(inputs, "FORMED", formed)
        leaves = [t.clone().requires_grad_() for t in (x, y, a, b)]
        value = sinkhorn_divergence(*leaves, epsilon=0.3, tolerance=1e-11)
        found.append([value, *torch.autograd.grad(value, leaves)])
    assert_close(found[1], found[0])


def test_clouds_of_a_batch_are_independent_and_masses_of_zero_are_not_there() -> None:
    several = [(*cloud(6, seed), *cloud(5, 10 + seed)) for seed in range(3)]
    x, a, y, b = (torch.stack(t) for t in zip(*several, strict=True))
    a = torch.cat([a[:, :-1], torch.zeros(3, 1, dtype=a.dtype)], 1)
    a = a / a.sum(1, keepdim=True)
    together = sinkhorn_divergence(x, y, a, b, epsilon=0.3, tolerance=1e-10)
    for i in range(3):
        alone = sinkhorn_divergence(x[i, :-1], y[i], a[i, :-1], b[i], epsilon=0.3, tolerance=1e-10)
        assert_close(together[i], alone)


def test_minimising_it_moves_a_cloud_onto_another() -> None:
    (x, _), (y, _) = cloud(8, 0), cloud(8, 1, shift=2.0)
    x = x.requires_grad_()
    for _ in range(60):
        (grad,) = torch.autograd.grad(sinkhorn_divergence(x, y, epsilon=0.02, max_iterations=5000, tolerance=1e-5), x)
        x = (x - 8 * grad).detach().requires_grad_()
    assert sinkhorn_divergence(x, y, epsilon=0.02, max_iterations=5000, tolerance=1e-5) < 5e-3


def test_not_converging_is_warned_of_once() -> None:
    (x, a), (y, b) = cloud(6, 0), cloud(5, 1)
    with pytest.warns(UserWarning, match=r"sinkhorn_divergence did not converge in 3 iterations") as caught:
        sinkhorn_divergence(x, y, a, b, epsilon=0.01, max_iterations=3)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_what_does_not_fit_is_refused() -> None:
    (x, a), (y, b) = cloud(6, 0), cloud(5, 1)
    with pytest.raises(ValueError, match=r"p is 3, expected one of \[1, 2\]"):
        sinkhorn_divergence(x, y, a, b, epsilon=0.1, p=3)
    with pytest.raises(ValueError, match=r"y has shape \(5, 1\), expected \(..., K, d\)"):
        sinkhorn_divergence(x, y[:, :1], a, b, epsilon=0.1)
    with pytest.raises(ValueError, match=r"epsilon is nan|epsilon is inf|expected a number"):
        sinkhorn_divergence(x, y, a, b, epsilon=math.nan)
