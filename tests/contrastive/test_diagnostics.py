"""Signs of collapse: what they say of a point, a line, a sphere."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from counterpoise.contrastive import collapse_statistics


def sphere(n: int = 400, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_point_has_no_spread_and_uniformity_zero() -> None:
    found = collapse_statistics(torch.ones(5, 3, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64))
    assert_close(found.std, torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(found.uniformity, torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(found.alignment, torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_sphere_is_spread_over_all_directions() -> None:
    found = collapse_statistics(sphere())
    assert found.std > 0.99
    assert 7.8 < found.effective_rank <= 8
    assert found.alignment.isnan()


def test_a_line_uses_one_direction() -> None:
    ends = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [1, 0, 0], [-1, 0, 0]])
    found = collapse_statistics(ends)
    assert_close(found.effective_rank, torch.tensor(1.0), atol=1e-4, rtol=0)
    assert_close(found.std, torch.tensor(1.0))


def test_uniformity_and_alignment_are_their_formulas() -> None:
    z, other = sphere(6, 3), sphere(6, 3, seed=1)
    units = [x / x.norm(dim=1, keepdim=True) for x in (z, other)]
    pairs = [(i, j) for i in range(6) for j in range(i)]
    mean = sum(math.exp(-2 * float((units[0][i] - units[0][j]).square().sum())) for i, j in pairs) / len(pairs)
    found = collapse_statistics(z, other)
    assert math.isclose(float(found.uniformity), math.log(mean), rel_tol=1e-12)
    assert math.isclose(float(found.alignment), float((units[0] - units[1]).square().sum(1).mean()), rel_tol=1e-12)


def test_lengths_do_not_count() -> None:
    z = sphere(20, 4)
    for a, b in zip(collapse_statistics(z, 2 * z), collapse_statistics(3 * z, z), strict=True):
        assert_close(a, b)


def test_one_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"z has shape \(1, 4\), expected at least two"):
        collapse_statistics(torch.ones(1, 4))
