"""VICReg: the three terms by loops, what each does not see, and the smaller of two products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from counterpoise.contrastive import VICRegLoss, vicreg_loss, vicreg_terms
from counterpoise.memory import MemoryBank

N, WIDTH = 7, 3


def views(n: int = N, width: int = WIDTH, count: int = 2) -> Tensor:
    return 0.7 * torch.randn(count, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def variance_of(z: Tensor, eps: float = 1e-4) -> float:
    """Mean over features of the hinge of the standard deviation."""
    hinges = [max(0.0, 1 - math.sqrt(float(z[:, j].var()) + eps)) for j in range(z.shape[1])]
    return sum(hinges) / len(hinges)


def covariance_of(z: Tensor) -> float:
    """Sum of the squares off the diagonal, divided by the width."""
    c, d = z.T.cov(), z.shape[1]
    return sum(float(c[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / d


@pytest.mark.parametrize(("n", "width"), [(N, WIDTH), (4, 9)], ids=["more examples", "more features"])
def test_the_terms_are_the_loops(n: int, width: int) -> None:
    first, second = views(n, width)
    terms = vicreg_terms(first, second)
    assert_close(terms.invariance, mse_loss(first, second))
    assert_close(terms.variance.item(), (variance_of(first) + variance_of(second)) / 2)
    assert_close(terms.covariance.item(), covariance_of(first) + covariance_of(second))


def test_the_loss_is_their_weighted_sum() -> None:
    terms = vicreg_terms(views())
    assert_close(vicreg_loss(views()), 25 * terms.invariance + 25 * terms.variance + terms.covariance)
    ours = vicreg_loss(views(), invariance_weight=1.0, variance_weight=2.0, covariance_weight=3.0)
    assert_close(ours, terms.invariance + 2 * terms.variance + 3 * terms.covariance)


def test_several_views_are_means_over_pairs_and_views() -> None:
    z = views(count=3)
    terms = vicreg_terms(z)
    pairs = [mse_loss(z[a], z[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert_close(terms.invariance, torch.stack(pairs).mean())
    assert_close(terms.variance.item(), sum(map(variance_of, z)) / 3)
    assert_close(terms.covariance.item(), 2 * sum(map(covariance_of, z)) / 3)


def test_a_view_given_twice_changes_variance_and_covariance_not() -> None:
    z = views()
    terms, again = vicreg_terms(z), vicreg_terms(torch.cat([z, z]))
    assert_close(again.variance, terms.variance)
    assert_close(again.covariance, terms.covariance)


def test_a_shift_of_both_views_is_not_seen() -> None:
    first, second = views()
    shift = torch.tensor([3.0, -20.0, 0.5])
    assert_close(vicreg_loss(first + shift, second + shift), vicreg_loss(first, second))


def test_a_shift_of_one_view_is_seen_by_the_invariance_alone() -> None:
    first, second = views()
    moved, terms = vicreg_terms(first + 2, second), vicreg_terms(first, second)
    assert moved.invariance > terms.invariance
    assert_close(moved[1:], terms[1:])


def test_it_is_symmetric_in_the_views_and_in_the_order_of_features_and_examples() -> None:
    first, second = views()
    features, examples = torch.tensor([2, 0, 1]), torch.tensor([3, 6, 0, 2, 1, 5, 4])
    for a, b in ((second, first), (first[:, features], second[:, features]), (first[examples], second[examples])):
        assert_close(vicreg_loss(a, b), vicreg_loss(first, second))


def test_spread_and_uncorrelated_features_that_agree_cost_nothing() -> None:
    corners = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)])
    assert abs(vicreg_loss(corners, corners).item()) < 1e-6


def test_a_collapsed_view_costs_the_hinge_and_its_gradient_is_finite() -> None:
    point = torch.full((4, WIDTH), 5.0, dtype=torch.float64, requires_grad=True)
    terms = vicreg_terms(point, point)
    sum(terms).backward()
    assert_close(terms.variance.item(), 0.99)
    assert terms.covariance.item() == 0
    assert point.grad is not None
    assert point.grad.isfinite().all()


def test_scaling_by_s_scales_the_covariance_term_by_its_fourth_power() -> None:
    assert_close(vicreg_terms(3 * views()).covariance, 81 * vicreg_terms(views()).covariance)
    assert vicreg_terms(100 * views()).variance.item() == 0


@pytest.mark.parametrize(("n", "width"), [(N, WIDTH), (N, 9)])
def test_a_masked_example_is_as_good_as_absent(n: int, width: int) -> None:
    z = views(n, width)
    mask = torch.tensor([True, True, False, True, False, True, True])
    expected = vicreg_terms(z[:, mask])
    z[:, ~mask] = torch.nan
    assert_close(vicreg_terms(z, mask=mask), expected)


@pytest.mark.parametrize(("n", "width"), [(N, WIDTH), (N, 9)])
def test_weights_are_those_of_the_covariance_of_torch(n: int, width: int) -> None:
    first, second = views(n, width)
    weight = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    terms, off = vicreg_terms(first, second, weight=weight), ~torch.eye(width, dtype=torch.bool)
    covariances = [z.T.cov(aweights=weight) for z in (first, second)]
    hinges = [(1 - (c.diagonal() + 1e-4).sqrt()).clamp_min(0).mean() for c in covariances]
    assert_close(terms.invariance, (weight * (first - second).square().mean(1)).sum() / weight.sum())
    assert_close(terms.variance, sum(hinges) / 2)
    assert_close(terms.covariance, sum(c[off].square().sum() for c in covariances) / width)


def test_only_ratios_of_weights_matter() -> None:
    weight = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(vicreg_loss(views(), weight=9 * weight), vicreg_loss(views(), weight=weight))
    assert_close(vicreg_loss(views(), weight=torch.full((N,), 4.0)), vicreg_loss(views()))


def test_nothing_that_counts_gives_zeros_connected_to_the_graph() -> None:
    z = views().requires_grad_()
    terms = vicreg_terms(z, mask=torch.zeros(N, dtype=torch.bool))
    sum(terms).backward()
    assert [term.item() for term in terms] == [0, 0, 0]
    assert z.grad is not None
    assert (z.grad == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loss: loss(*views(1)), r"z holds one example, expected at least two: variances are taken over"),
        (lambda loss: loss(views()[0]), r"z holds 1 views, expected at least two"),
        (lambda loss: loss(*views(), labels=torch.arange(N)), r"VICRegLoss got labels, expected views only"),
        (lambda loss: loss(*views(), bank=MemoryBank(4, WIDTH)), r"VICRegLoss got a bank, expected views only"),
        (lambda _: VICRegLoss(eps=0.0), r"eps is 0.0, expected a number in \(0, inf\]"),
        (lambda _: VICRegLoss(covariance_weight=-1.0), r"covariance_weight is -1.0, expected a number in"),
    ],
    ids=["one example", "one view", "labels", "bank", "eps", "weight"],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(VICRegLoss())
