"""Barlow Twins: loops over features as the reference, symmetries, and examples left out or counted twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from counterpoise.contrastive import BarlowTwinsLoss, barlow_twins_loss
from counterpoise.memory import MemoryBank

N, WIDTH = 7, 3


def views(n: int = N) -> Tensor:
    """(2, n, 3), the second view a noisy copy of the first."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 3.0, 0.5])
    return torch.stack([z, z + torch.randn(n, WIDTH, dtype=torch.float64, generator=generator)])


def correlation(first: Tensor, second: Tensor, eps: float) -> list[list[float]]:
    """C entry by entry."""

    def standardised(z: Tensor) -> list[list[float]]:
        columns = []
        for column in z.T.tolist():
            mean = sum(column) / len(column)
            variance = sum((x - mean) ** 2 for x in column) / len(column)
            columns.append([(x - mean) / math.sqrt(variance + eps) for x in column])
        return columns

    a, b = standardised(first), standardised(second)
    return [[sum(x * y for x, y in zip(u, v, strict=True)) / len(first) for v in b] for u in a]


def loss_of(c: list[list[float]], off_diagonal_weight: float) -> float:
    on = sum((c[i][i] - 1) ** 2 for i in range(WIDTH))
    off = sum(c[i][j] ** 2 for i in range(WIDTH) for j in range(WIDTH) if i != j)
    return on + off_diagonal_weight * off


def test_it_is_the_printed_formula() -> None:
    expected = loss_of(correlation(*views(), eps=1e-5), 0.0051)
    assert math.isclose(barlow_twins_loss(*views()).item(), expected, rel_tol=1e-12)


def test_the_standardisation_is_batch_norm_without_affine_in_training() -> None:
    norm = nn.BatchNorm1d(WIDTH, affine=False, dtype=torch.float64)
    first, second = views()
    c = norm(first).T @ norm(second) / N
    expected = (c.diagonal() - 1).square().sum() + 0.3 * (c - c.diagonal().diag()).square().sum()
    assert_close(barlow_twins_loss(first, second, off_diagonal_weight=0.3), expected)


def test_identical_views_have_the_diagonal_variance_over_variance_plus_eps() -> None:
    z = views()[0]
    variance = z.var(0, correction=0)
    ours = barlow_twins_loss(z, z, off_diagonal_weight=0.0, eps=0.1)
    assert_close(ours, (variance / (variance + 0.1) - 1).square().sum())


def test_with_the_unbiased_variance_identical_views_have_a_diagonal_short_of_one() -> None:
    z = views()[0]
    ours = barlow_twins_loss(z, z, off_diagonal_weight=0.0, eps=0.0, correction=1)
    assert_close(ours.item(), WIDTH / N**2)


def test_the_unbiased_variance_with_weights_is_that_of_torch() -> None:
    first, second = views()
    weight = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share, whitened = weight / weight.sum(), []
    for z in (first, second):
        whitened.append((z - share @ z) / z.T.cov(aweights=weight).diagonal().sqrt())
    c = whitened[0].T @ (share[:, None] * whitened[1])
    expected = (c - torch.eye(WIDTH)).square().sum()
    ours = barlow_twins_loss(first, second, off_diagonal_weight=1.0, eps=0.0, correction=1, weight=weight)
    assert_close(ours, expected)


@pytest.mark.parametrize("options", [{}, {"weight": torch.tensor([1.0, 0.5, 2.0])}])
def test_with_more_features_than_examples_it_is_the_same_formula(options: dict[str, Tensor]) -> None:
    """Then the products between examples are formed, and not those between features."""
    first, second = torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = options.get("weight", torch.ones(3)).double()
    share = weight / weight.sum()
    standard = [(z - share @ z) / (share @ (z - share @ z).square() + 1e-5).sqrt() for z in (first, second)]
    c = standard[0].T @ (share[:, None] * standard[1])
    expected = (c.diagonal() - 1).square().sum() + 0.3 * (c - c.diagonal().diag()).square().sum()
    assert_close(barlow_twins_loss(first, second, off_diagonal_weight=0.3, **options), expected)


def test_without_eps_a_feature_that_does_not_vary_counts_as_zero() -> None:
    z = torch.tensor([[1.0, 2.0], [1.0, -2.0]], requires_grad=True)
    loss = barlow_twins_loss(z, z, eps=0.0)
    loss.backward()
    assert loss.item() == 1
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_weight_one_is_the_squared_distance_to_the_identity() -> None:
    c = torch.tensor(correlation(*views(), eps=1e-5), dtype=torch.float64)
    expected = (c - torch.eye(WIDTH)).square().sum()
    assert_close(barlow_twins_loss(*views(), off_diagonal_weight=1.0), expected)


def test_it_does_not_see_an_affine_map_of_a_feature() -> None:
    first, second = views()
    scale, shift = torch.tensor([2.0, 50.0, 7.0]), torch.tensor([-3.0, 0.0, 100.0])
    for flipped in (scale, scale * torch.tensor([1, -1, 1])):  # both views alike, so a sign cancels
        moved = barlow_twins_loss(first * flipped + shift, second * flipped - shift, eps=1e-12)
        assert_close(moved, barlow_twins_loss(first, second, eps=1e-12), rtol=1e-9, atol=0)


def test_it_does_not_see_a_permutation_of_features_or_of_examples() -> None:
    first, second = views()
    features, examples = torch.tensor([2, 0, 1]), torch.tensor([3, 6, 0, 2, 1, 5, 4])
    assert_close(barlow_twins_loss(first[:, features], second[:, features]), barlow_twins_loss(first, second))
    assert_close(barlow_twins_loss(first[examples], second[examples]), barlow_twins_loss(first, second))


def test_it_is_symmetric_in_the_two_views() -> None:
    first, second = views()
    assert_close(barlow_twins_loss(first, second), barlow_twins_loss(second, first))


def test_collapsed_features_cost_one_each() -> None:
    constant = torch.full((4, WIDTH), 5.0, requires_grad=True)
    loss = barlow_twins_loss(constant, constant)
    loss.backward()
    assert loss.item() == WIDTH
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


def test_scale_multiplies_the_loss() -> None:
    assert_close(barlow_twins_loss(*views(), scale=0.1), 0.1 * barlow_twins_loss(*views()))


def test_a_masked_example_is_as_good_as_absent() -> None:
    z = views()
    mask = torch.tensor([True, True, False, True, False, True, True])
    assert_close(barlow_twins_loss(*z, mask=mask), barlow_twins_loss(*z[:, mask]))
    z[:, ~mask] = torch.nan
    assert barlow_twins_loss(*z, mask=mask).isfinite()


def test_whole_weights_count_an_example_several_times() -> None:
    z, times = views(), torch.tensor([1, 2, 0, 3, 1, 1, 4])
    assert_close(barlow_twins_loss(*z, weight=times), barlow_twins_loss(*z.repeat_interleave(times, dim=1)))


def test_only_ratios_of_weights_matter() -> None:
    z, weight = views(), torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(barlow_twins_loss(*z, weight=9 * weight), barlow_twins_loss(*z, weight=weight))


def test_nothing_that_counts_gives_a_zero_connected_to_the_graph() -> None:
    z = views().requires_grad_()
    loss = barlow_twins_loss(z, mask=torch.zeros(N, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_views_given_apart_or_stacked_are_the_same() -> None:
    assert torch.equal(BarlowTwinsLoss()(views()), BarlowTwinsLoss()(*views()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loss: loss(*views(1)), r"z holds one example, expected at least two: the batch is standardised"),
        (lambda loss: loss(torch.zeros(3, N, WIDTH)), r"z holds 3 views, expected two"),
        (lambda loss: loss(views()[0]), r"z holds 1 views, expected two"),
        (lambda loss: loss(*views(), labels=torch.arange(N)), r"BarlowTwinsLoss got labels, expected two views only"),
        (lambda loss: loss(*views(), bank=MemoryBank(4, WIDTH)), r"BarlowTwinsLoss got a bank, expected two views"),
        (lambda _: BarlowTwinsLoss(eps=-1.0), r"eps is -1.0, expected a number in \[0, inf\]"),
        (lambda _: BarlowTwinsLoss(correction=2), r"correction is 2, expected one of \[0, 1\]"),
        (lambda _: BarlowTwinsLoss(off_diagonal_weight=-1.0), r"off_diagonal_weight is -1.0, expected a number in"),
    ],
    ids=["one example", "three views", "one view", "labels", "bank", "eps", "correction", "lambda"],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(BarlowTwinsLoss())
