"""Balanced assignment: the released loop, its limits, and several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.ot import balanced_assignment
from tests.pool import Pool

B, K = 9, 3


def scores(b: int = B, k: int = K) -> Tensor:
    return torch.rand(b, k, dtype=torch.float64, generator=torch.Generator().manual_seed(b)) * 2 - 1


def by_scaling(s: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Prototypes to 1 / K, then examples to 1 / B, on exponentials."""
    q = (s / epsilon).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_it_is_the_alternate_scaling_of_exponentials(epsilon: float, iterations: int) -> None:
    ours = balanced_assignment(scores(), epsilon=epsilon, iterations=iterations)
    assert_close(ours, by_scaling(scores(), epsilon, iterations))


def by_logarithms(s: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The formula as it stands."""
    s = s / epsilon
    g = torch.zeros(len(s), dtype=s.dtype)
    for _ in range(iterations):
        f = (s - g[:, None]).logsumexp(0)
        g = (s - f).logsumexp(1)
    return (s - f - g[:, None]).exp()


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4])
def test_products_and_logarithms_give_the_same_codes(iterations: int, spread: float) -> None:
    """Scores far beyond what an exponential of them could hold."""
    s = spread * scores(40, 7)
    assert_close(balanced_assignment(s, iterations=iterations), by_logarithms(s, 0.05, iterations))
    found = balanced_assignment(s.float(), iterations=iterations)
    assert_close(found.sum(1), torch.ones(40))


def test_each_row_is_a_distribution() -> None:
    assert_close(balanced_assignment(scores()).sum(1), torch.ones(B, dtype=torch.float64))


def test_in_the_limit_each_prototype_gets_its_share() -> None:
    q = balanced_assignment(scores(), epsilon=0.5, iterations=200)
    assert_close(q.sum(0), torch.full((K,), B / K, dtype=torch.float64))


def test_a_shift_of_all_scores_is_not_seen_nor_in_the_limit_that_of_a_prototype_or_an_example() -> None:
    assert_close(balanced_assignment(scores() + 1000), balanced_assignment(scores()))
    of_prototypes, of_examples = torch.tensor([0.3, -0.2, 0.0]), torch.linspace(-1, 1, B)[:, None]
    settled = balanced_assignment(scores(), epsilon=0.5, iterations=300)
    for shift in (of_prototypes, of_examples):
        assert_close(balanced_assignment(scores() + shift, epsilon=0.5, iterations=300), settled)


def test_a_large_epsilon_gives_uniform_codes_and_a_small_one_one_hot_codes() -> None:
    assert_close(
        balanced_assignment(scores(), epsilon=1e6), torch.full((B, K), 1 / K, dtype=torch.float64), atol=1e-5, rtol=0
    )
    axes = torch.eye(K, dtype=torch.float64)
    assert_close(balanced_assignment(axes, epsilon=1e-3), axes)


def test_one_example_gets_uniform_codes() -> None:
    assert_close(balanced_assignment(scores(1)), torch.full((1, K), 1 / K, dtype=torch.float64))


def test_a_prototype_far_from_all_examples_is_no_division_by_zero() -> None:
    s = scores().float()
    s[:, 1] = -1e4
    q = balanced_assignment(s)
    assert q.isfinite().all()
    assert_close(q.sum(1), torch.ones(B))
    assert q[:, 1].sum() > 1


def test_half_precision_does_not_overflow() -> None:
    s = scores().half()
    assert_close(balanced_assignment(s), balanced_assignment(s.float()))


def test_no_gradient_flows() -> None:
    assert not balanced_assignment(scores().requires_grad_()).requires_grad


def test_what_is_masked_has_no_part_and_no_code() -> None:
    s, mask = scores(), torch.arange(B) % 4 > 0
    expected = balanced_assignment(s[mask])
    s[~mask] = torch.nan
    q = balanced_assignment(s, mask=mask)
    assert_close(q[mask], expected)
    assert (q[~mask] == 0).all()


def test_nan_is_not_repaired() -> None:
    s = scores()
    s[2, 1] = torch.nan
    assert balanced_assignment(s).isnan().any(1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balanced_assignment(scores()[0]), r"scores has shape \(3,\)"),
        (lambda: balanced_assignment(scores(), epsilon=0.0), r"epsilon is 0.0, expected a number in \(0, inf\]"),
        (lambda: balanced_assignment(scores(), iterations=0), r"iterations is 0, expected a number in \[1, inf\]"),
        (lambda: balanced_assignment(scores(), mask=torch.ones(2) > 0), r"mask has shape \(2,\), expected \(9,\)"),
    ],
    ids=["shape", "epsilon", "iterations", "mask"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def share(rank: int, split: tuple[int, ...], masked: bool) -> Tensor:
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    mask = torch.arange(B) % 4 > 0 if masked else None
    return balanced_assignment(scores()[rows], mask=None if mask is None else mask[rows])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("split", [(3, 3, 3), (5, 0, 4)])
def test_several_ranks_give_the_codes_of_one(split: tuple[int, ...], masked: bool, ranks: Pool) -> None:
    assert_close(torch.cat(ranks.run(share, split, masked)), share(0, (B,), masked))
