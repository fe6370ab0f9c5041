"""The multi-level estimate: by hand, and unbiased for the value of the largest batch."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import cvar_value, multilevel_estimate, multilevel_sizes

worst_half = partial(cvar_value, alpha=0.5)


def test_sizes_double_and_probabilities_halve() -> None:
    sizes, probabilities = multilevel_sizes(base=4, levels=3)
    assert sizes == [8, 16, 32]
    assert_close(probabilities, [4 / 7, 2 / 7, 1 / 7])


def test_it_is_the_formula() -> None:
    losses = torch.tensor([1.0, 4.0, 3.0, 2.0, 0.0, 6.0, 5.0, 7.0])
    expected = 4.0 + (5.5 - (3.5 + 6.5) / 2) / 0.25
    assert_close(multilevel_estimate(losses, worst_half, base=2, probability=0.25).item(), expected)


def test_the_mean_is_that_of_the_largest_batch_alone() -> None:
    """Every batch of independent draws of three values, and every size, with its probability."""
    values = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)

    def batches(n: int) -> list[Tensor]:
        return [values[list(picked)] for picked in product(range(3), repeat=n)]

    sizes, probabilities = multilevel_sizes(base=1, levels=2)
    mean = 0.0
    for n, p in zip(sizes, probabilities, strict=True):
        found = [multilevel_estimate(losses, worst_half, base=1, probability=p) for losses in batches(n)]
        mean += p * torch.stack(found).mean().item()
    largest = torch.stack([worst_half(losses) for losses in batches(4)]).mean().item()
    small = torch.stack([worst_half(losses) for losses in batches(2)]).mean().item()
    assert_close(mean, largest)
    assert small < largest - 0.1


def test_its_gradient_sums_to_one() -> None:
    losses = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    multilevel_estimate(losses, worst_half, base=4, probability=0.25).backward()
    assert_close(losses.grad.sum().item(), 1.0)
    assert (losses.grad < 0).any()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (6, {"base": 4, "probability": 0.5}, r"losses has 6 rows, expected an even number of at least 2 \* base = 8"),
        (7, {"base": 2, "probability": 0.5}, r"losses has 7 rows, expected an even number"),
        (8, {"base": 0, "probability": 0.5}, r"base is 0, expected a number in \[1, inf\]"),
        (8, {"base": 2, "probability": 0.0}, r"probability is 0.0, expected a number in \(0.*, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(rows: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multilevel_estimate(torch.ones(rows), worst_half, **options)  # type: ignore[arg-type]
