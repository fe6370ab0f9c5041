"""Fused distances, gains and picks against the plain ones: the same picks, also where points tie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from counterpoise.kernels import selection
from counterpoise.neighbors import nearest_neighbors
from counterpoise.samplers import Selection, craig, facility_location, k_center_greedy

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


def definition(tile: Tensor, rounding: float, before: Tensor, after: Tensor) -> Tensor:
    costs = tile if rounding < 0 else torch.where(tile > rounding, tile, 0).sqrt()
    high, low = before[:, None], after[:, None]
    return ((high - costs).clamp_min(0) - (low - costs).clamp_min(0)).sum(0)


@pytest.mark.parametrize("rounding", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (1, 1), (63, 15), (64, 16), (65, 17), (200, 130)])
def test_taken_gains_are_those_of_the_definition(rows: int, columns: int, rounding: float) -> None:
    tile, before = draw(rows, columns), draw(1, rows, seed=1)[0].abs()
    tile = tile if rounding < 0 else tile.square() - 0.01
    for after in (before / 2, before - 0.01, before, torch.zeros(rows, dtype=torch.float64)):
        found = torch.ones(columns, dtype=torch.float64)
        selection.add_taken(found, tile, rounding, before, after.clamp_min(0))
        torch.testing.assert_close(found, 1 + definition(tile, rounding, before, after.clamp_min(0)))
    found = torch.zeros(columns, dtype=torch.float64)
    selection.add_taken(found, tile, rounding, before)
    wanted = definition(tile, rounding, before, torch.full_like(before, -1e300))
    torch.testing.assert_close(found, wanted)


def test_nothing_is_taken_by_costs_of_at_least_those_so_far() -> None:
    costs = draw(64, 32).abs() + 0.1
    found = torch.zeros(32, dtype=torch.float64)
    selection.add_taken(found, costs.square(), 0.0, costs.amin(1), torch.zeros(64, dtype=torch.float64))
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-13)
    selection.add_taken(found.zero_(), costs, -1.0, costs.amin(1), torch.zeros(64, dtype=torch.float64))
    assert (found == 0).all()


def test_the_same_for_every_number_of_threads() -> None:
    tile, before, threads = draw(1000, 300).square(), draw(1, 1000)[0].abs(), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(torch.zeros(300, dtype=torch.float64))
            selection.add_taken(found[-1], tile, 0.0, before, before / 3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def groups(n: int) -> Tensor:
    return draw(n // 8, 6).repeat(8, 1) + torch.arange(8).repeat_interleave(n // 8)[:, None] % 2


@pytest.mark.parametrize(
    "select",
    [
        lambda x: facility_location(x, 120),
        lambda x: facility_location(x.float(), 120),
        lambda x: facility_location(x, 60, metric="cosine"),
        lambda x: facility_location(x, 60, method="stochastic"),
        lambda x: facility_location(x, 60, targets=torch.arange(len(x)) % 3),
        lambda x: facility_location(x, 60, already_selected=torch.tensor([5, 2])),
        lambda x: facility_location(similarity=(x @ x.T).abs(), budget=60),
        lambda x: craig(x, torch.arange(len(x)) % x.shape[1], 60),
    ],
    ids=["distance", "float32", "cosine", "stochastic", "by class", "goes on", "dense", "craig"],
)
@pytest.mark.parametrize("points", [draw(800, 9), groups(800), draw(800, 9).round()], ids=["normal", "copies", "grid"])
def test_facility_location_picks_the_same(points: Tensor, select: Callable[[Tensor], Selection]) -> None:
    found = select(points)
    with kernels.disabled():
        wanted = select(points)
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.weights, wanted.weights)
    torch.testing.assert_close(found.gains, wanted.gains, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("select", [facility_location, k_center_greedy])
def test_picks_do_not_depend_on_the_precision_of_products(select: Callable[..., Selection]) -> None:
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            found.append(select(draw(1000, 64).float(), 100))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].gains, found[1].gains)  # type: ignore[arg-type]


def test_operators_are_what_torch_expects() -> None:
    x, rows = draw(5, 3), torch.tensor([0, 4])
    torch.library.opcheck(
        torch.ops.counterpoise.selection_distances, (x, rows, x, rows, x.new_empty(2)), test_utils="test_schema"
    )
    with pytest.raises(RuntimeError, match="contiguous doubles"):
        torch.ops.counterpoise.selection_distances(x.float(), rows, x, rows, x.new_empty(2))
    taken, gains = torch.ops.counterpoise.selection_taken, x.new_zeros(3)
    for after in (None, x[:, 0].contiguous() - 1):
        torch.library.opcheck(taken, (x, 0.0, x[:, 0].contiguous(), after, gains), test_utils="test_schema")
        torch.library.opcheck(taken, (x, 0.0, x[:, 0].contiguous(), after, gains), test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match="contiguous doubles"):
        taken(x, 0.0, x[:, 0], None, gains)


def least(costs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` least of each row, in order, ties by the column; NaN as infinity."""
    known = costs.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    values, columns = known.sort(dim=1, stable=True)
    return values[:, :count], columns[:, :count]


def by_tiles(costs: Tensor, count: int, widths: list[int]) -> tuple[Tensor, Tensor]:
    """What the operator finds in tiles of these widths, in the order of :func:`least`."""
    first, *rest = costs.split(widths, dim=1)
    found = selection.nearest_of(first, count)
    assert found is not None
    start = first.shape[1]
    for tile in rest:
        selection.see_nearest(tile, start, *found)
        start += tile.shape[1]
    near, keys = found
    keys, order = keys.sort(dim=1)
    values, again = near.gather(1, order).sort(dim=1, stable=True)
    return values, keys.gather(1, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("widths", [[64], [64, 1, 200], [70, 64, 63, 300, 65]], ids=str)
def test_the_least_costs_over_tiles(widths: list[int], count: int, dtype: torch.dtype) -> None:
    costs = draw(9, sum(widths)).to(dtype)
    for x in (costs, costs.mul(2).round(), costs.sort(dim=1).values, costs.sort(dim=1, descending=True).values):
        found, wanted = by_tiles(x, count, widths), least(x, count)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_costs_that_are_not_finite_are_the_last() -> None:
    costs = draw(6, 100)
    costs[0], costs[1, :90], costs[2, ::3], costs[3, 5], costs[4] = (
        torch.nan,
        torch.inf,
        torch.nan,
        -torch.inf,
        torch.inf,
    )
    found, wanted = by_tiles(costs, 12, [40, 60]), least(costs, 12)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1][[2, 3, 5]], wanted[1][[2, 3, 5]])
    assert all(len(keys.unique()) == 12 for keys in found[1])


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner_product"])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("kind", ["normal", "copies", "grid", "float64", "huge", "sorted"])
def test_neighbours_are_the_same(kind: str, k: int, metric: str) -> None:
    keys, queries = draw(6000, 8), draw(70, 8, seed=1)
    if kind == "copies":
        keys, queries = keys[:1500].repeat(4, 1), keys[:70]
    elif kind == "grid":
        keys, queries = keys.round(), queries.round()
    elif kind == "huge":  # products overflow in float32, costs do not all
        keys, queries = keys * 1e18, queries * 1e18
    elif kind == "sorted":
        keys = keys[keys.norm(dim=1).argsort(descending=True)]
    if kind != "float64":
        keys, queries = keys.float(), queries.float()
    found = nearest_neighbors(queries, keys, k, metric=metric)
    with kernels.disabled():
        wanted = nearest_neighbors(queries, keys, k, metric=metric)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_the_least_costs_do_not_depend_on_the_threads() -> None:
    costs, threads, found = draw(300, 5000).float().mul(3).round(), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(selection.nearest_of(costs, 20))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))  # type: ignore[arg-type]


def test_the_operator_of_least_costs_is_what_torch_expects() -> None:
    costs, near, keys = draw(3, 9), draw(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    operator = torch.ops.counterpoise.selection_nearest
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(operator, (costs, 0, True, near, keys), test_utils=test)
    for arguments in ((costs.half(), 0, True, near.half(), keys), (costs, 0, True, near.float(), keys)):
        with pytest.raises(RuntimeError, match="contiguous floats or doubles"):
            operator(*arguments)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        operator(costs[:, :1].contiguous(), 0, True, near, keys)
