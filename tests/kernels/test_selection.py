"""Fused distances and farthest-first picks against the plain ones: the same picks, also where points tie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from counterpoise.kernels import selection
from counterpoise.samplers import Selection, k_center_greedy

pytestmark = pytest.mark.skipif(
    not kernels.available()["selection_follow"]["cpu"], reason="no compiled kernels of selection"
)


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(x: Tensor, budget: int) -> tuple[Selection, Selection]:
    found = k_center_greedy(x, budget, first=0)
    with kernels.disabled():
        return found, k_center_greedy(x, budget, first=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "budget"), [(1, 1, 1), (300, 1, 40), (2000, 33, 100), (3000, 64, 300)])
def test_the_same_picks(n: int, d: int, budget: int, dtype: torch.dtype) -> None:
    found, wanted = both(draw(n, d).to(dtype), budget)
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.assignment, wanted.assignment)  # type: ignore[arg-type]
    torch.testing.assert_close(found.gains, wanted.gains, rtol=1e-12, atol=1e-12)


def test_copies_tie_and_the_lowest_index_wins() -> None:
    x = draw(400, 20).repeat(5, 1)
    found, wanted = both(x, 700)
    assert torch.equal(found.indices, wanted.indices)
    assert found.notes == wanted.notes
    assert len(found.indices) == 400
    assert int(found.indices.max()) < 400


def test_points_on_a_grid() -> None:
    """Many distances are equal, and exact."""
    axis = torch.arange(12.0)
    x = torch.cartesian_prod(axis, axis, axis)
    found, wanted = both(x, 200)
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.gains, wanted.gains)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [0, 1, 31, 32, 33, 200])
def test_distances_are_those_of_the_definition(width: int) -> None:
    x, centres = draw(50, width), draw(7, width, seed=1)
    rows, which = torch.randint(50, (90,)), torch.randint(7, (90,))
    wanted = torch.linalg.vector_norm(x[rows] - centres[which], dim=1)
    torch.testing.assert_close(selection.distances(x, rows, centres, which), wanted, rtol=1e-14, atol=0)
    alone = torch.cat(
        [selection.distances(x, r, centres, w) for r, w in zip(rows[:, None], which[:, None], strict=True)]
    )
    assert torch.equal(alone, selection.distances(x, rows, centres, which))


def test_following_stops_where_another_point_may_be_farther() -> None:
    points = torch.tensor([[0.0], [10.0], [4.0]], dtype=torch.float64)
    index = torch.tensor([3, 5, 9])
    distance = torch.tensor([8.0, 9.0, 7.0], dtype=torch.float64)
    assert selection.follow(points, index, distance.clone(), 7.5, 4, 9) == ([5, 3], [9.0, 8.0])
    assert selection.follow(points, index, distance.clone(), 9.0, 4, 9) == ([], [])  # a tie with a lower index
    assert selection.follow(points, index, distance.clone(), 9.0, 6, 9) == ([5], [9.0])
    assert selection.follow(points, index, distance.clone(), -1.0, 0, 2) == ([5, 3], [9.0, 8.0])


def test_operators_are_what_torch_expects() -> None:
    x, rows = draw(5, 3), torch.tensor([0, 4])
    torch.library.opcheck(
        torch.ops.counterpoise.selection_distances, (x, rows, x, rows, x.new_empty(2)), test_utils="test_schema"
    )
    with pytest.raises(RuntimeError, match="contiguous doubles"):
        torch.ops.counterpoise.selection_distances(x.float(), rows, x, rows, x.new_empty(2))
