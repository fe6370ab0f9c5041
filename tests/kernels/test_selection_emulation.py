"""The CUDA kernels of selection on threads of the host, against the CPU's operators and the definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from counterpoise.kernels import selection
from tests.kernels import emulation

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler")
with_cpu = pytest.mark.skipif(
    not kernels.available()["selection_follow"]["cpu"], reason="no compiled kernels of selection to compare with"
)

DISTANCES, FOLLOW, TAKEN, NEAREST = 0, 1, 2, {torch.float32: 3, torch.float64: 4}
SANITIZERS = ["thread", "address"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation.build("selection", tmp_path_factory.mktemp("emulation"))


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- distances and picks ------------------------------------------------------------------------------------------


def distances(program: Path, folder: Path, x: Tensor, rows: Tensor, centres: Tensor, which: Tensor) -> Tensor:
    arrays = {"x": x, "rows": rows, "centres": centres, "which": which}
    numbers = {"operator": DISTANCES, "count": len(rows), "width": x.shape[1]}
    return emulation.run(program, folder, arrays, numbers, {"out": torch.float64})["out"]


def pairs(n: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``n`` pairs, of which every second is a copy of the one before."""
    x, centres = draw(20, width, seed=width), draw(7, width, seed=width + 1)
    x[1::2] = x[::2]
    return x, torch.arange(n) % 20, centres, torch.arange(n) // 20 % 7


@pytest.mark.parametrize(("n", "width"), [(0, 3), (1, 1), (9, 0), (140, 31), (33, 32), (140, 33), (17, 200)])
def test_distances_of_pairs(program: Path, tmp_path: Path, n: int, width: int) -> None:
    x, rows, centres, which = pairs(n, width)
    found = distances(program, tmp_path / "case", x, rows, centres, which)
    torch.testing.assert_close(found, torch.linalg.vector_norm(x[rows] - centres[which], dim=1), rtol=1e-14, atol=0)
    copies = found[: n // 2 * 2].reshape(-1, 2)
    assert torch.equal(copies[:, 0], copies[:, 1]), "copies of a point are at one distance"


def follow(
    program: Path,
    folder: Path,
    points: Tensor,
    index: Tensor,
    distance: Tensor,
    bound: float,
    bound_index: int,
    most: int,
) -> tuple[list[int], list[float], Tensor]:
    """Picks, gaps and the distances that are left."""
    numbers = {"operator": FOLLOW, "threads": 64, "count": len(points), "width": points.shape[1]}
    numbers |= {"bound": bound, "bound_index": bound_index, "most": most}
    results = {"picks": torch.int64, "gaps": torch.float64, "distance": torch.float64, "found": torch.int64}
    arrays = {"points": points, "index": index, "distance": distance}
    out = emulation.run(program, folder, arrays, numbers, results)
    count = int(out["found"])
    return out["picks"][:count].tolist(), out["gaps"][:count].tolist(), out["distance"]


@with_cpu
@pytest.mark.parametrize("points", [draw(70, 5), draw(35, 40).repeat(2, 1), draw(150, 2).mul(3).round()], ids=len)
@pytest.mark.parametrize(("bound", "most"), [(-1.0, 9), (-1.0, 1), (2.0, 25)])
def test_picks_are_those_of_the_cpu(program: Path, tmp_path: Path, points: Tensor, bound: float, most: int) -> None:
    start = torch.linalg.vector_norm(points, dim=1)
    index, left = 3 * torch.arange(len(points)) + 1, start.clone()
    picks, gaps, distance = follow(program, tmp_path / "case", points, index, start, bound, 50, most)
    wanted, their_gaps = selection.follow(points, index, left, bound, 50, most)
    assert picks == wanted
    assert len(picks) > 0
    torch.testing.assert_close(gaps, their_gaps, rtol=1e-14, atol=0)
    torch.testing.assert_close(distance, left, rtol=1e-14, atol=0)
    # To the last bit what the other kernel says, so that copies of a point tie whoever finds them.
    rows, which = torch.arange(len(points)).repeat(len(picks)), torch.tensor(picks).repeat_interleave(len(points)) // 3
    apart = distances(program, tmp_path / "pairs", points, rows, points, which).view(len(picks), -1)
    least = torch.cat([apart, start[None]]).amin(0)
    least[torch.tensor(picks) // 3] = 0
    followed = distance >= bound
    assert torch.equal(distance[followed], least[followed])


def test_following_stops_where_another_point_may_be_farther(program: Path, tmp_path: Path) -> None:
    points = torch.tensor([[0.0], [10.0], [4.0]], dtype=torch.float64)
    index, start = torch.tensor([3, 5, 9]), torch.tensor([8.0, 9.0, 7.0], dtype=torch.float64)

    def picks(bound: float, bound_index: int, most: int) -> tuple[list[int], list[float]]:
        return follow(program, tmp_path / "case", points, index, start, bound, bound_index, most)[:2]

    assert picks(7.5, 4, 9) == ([5, 3], [9.0, 8.0])
    assert picks(9.0, 4, 9) == ([], [])  # a tie with a lower index
    assert picks(9.0, 6, 9) == ([5], [9.0])
    assert picks(-1.0, 0, 2) == ([5, 3], [9.0, 8.0])
    assert picks(-1.0, 0, 9) == ([5, 3, 9], [9.0, 8.0, 4.0])  # then all are at distance 0


# ---- gains --------------------------------------------------------------------------------------------------------


def taken(
    program: Path, folder: Path, tile: Tensor, rounding: float, before: Tensor, after: Tensor | None, out: Tensor
) -> Tensor:
    numbers = {"operator": TAKEN, "rows": tile.shape[0], "columns": tile.shape[1], "rounding": rounding}
    arrays = {"tile": tile, "before": before, "after": after, "out": out}
    return emulation.run(program, folder, arrays, numbers, {"out": torch.float64})["out"]


@with_cpu
@pytest.mark.parametrize("rounding", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (1, 1), (63, 33), (65, 31), (200, 70), (1100, 3)])
def test_taken_gains_are_those_of_the_cpu(
    program: Path, tmp_path: Path, rows: int, columns: int, rounding: float
) -> None:
    """To the last bit: the same sums in the same order."""
    tile, before = draw(rows, columns), draw(1, rows, seed=1)[0].abs()
    tile = tile if rounding < 0 else tile.square() - 0.01
    for after in (None, before / 2, before.clone()):
        out = draw(1, columns, seed=2)[0]
        found = taken(program, tmp_path / "case", tile, rounding, before, after, out)
        selection.add_taken(out, tile, rounding, before, after)
        assert torch.equal(found, out)


# ---- least costs --------------------------------------------------------------------------------------------------


def by_tiles(
    program: Path, folder: Path, costs: Tensor, count: int, widths: list[int], parts: int = 1, threads: int = 64
) -> tuple[Tensor, Tensor]:
    """What the kernel keeps of tiles of these widths, in the order in which it keeps it."""
    near, keys = costs.new_zeros(len(costs), count), torch.zeros(len(costs), count, dtype=torch.int64)
    start = 0
    for tile in costs.split(widths, dim=1):
        numbers = {"operator": NEAREST[costs.dtype], "threads": threads, "parts": parts, "queries": len(costs)}
        numbers |= {"columns": tile.shape[1], "count": count, "start": start, "first": start == 0}
        arrays = {"costs": tile, "near": near, "keys": keys}
        out = emulation.run(program, folder, arrays, numbers, {"near": costs.dtype, "keys": torch.int64})
        near, keys = (out[name].view(len(costs), count) for name in ("near", "keys"))
        start += tile.shape[1]
    return near, keys


def least(costs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` least of each row, in order, ties by the column; NaN as infinity."""
    known = costs.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    values, columns = known.sort(dim=1, stable=True)
    return values[:, :count], columns[:, :count]


def assert_the_least(found: tuple[Tensor, Tensor], costs: Tensor, count: int) -> None:
    wanted = least(costs, count)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "widths"), [(1, [1, 700]), (7, [64, 1, 800]), (64, [70, 633, 1000])], ids=str)
def test_the_least_costs_over_tiles(
    program: Path, tmp_path: Path, widths: list[int], count: int, dtype: torch.dtype
) -> None:
    costs = draw(5, sum(widths)).to(dtype)
    costs[1] = costs[1].mul(2).round()
    costs[2], costs[3] = costs[2].sort().values, costs[3].sort(descending=True).values
    costs[4] = 0
    assert_the_least(by_tiles(program, tmp_path / "case", costs, count, widths), costs, count)


@with_cpu
def test_the_set_is_that_of_the_cpu(program: Path, tmp_path: Path) -> None:
    costs = draw(3, 1500).float().mul(4).round()
    costs[1, ::2], costs[2] = torch.nan, torch.inf
    found = by_tiles(program, tmp_path / "case", costs, 17, [600, 900])
    kept = selection.nearest_of(costs[:, :600], 17)
    assert kept is not None
    selection.see_nearest(costs[:, 600:], 600, *kept)
    for ours, theirs in zip(found, kept, strict=True):
        assert torch.equal(ours.sort(1).values, theirs.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_are_kept(program: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    costs = draw(1, 6000).to(dtype).sort(dim=1, descending=True).values
    assert_the_least(by_tiles(program, tmp_path / "case", costs, 2048, [2100, 3900], threads=128), costs, 2048)


def test_both_sides_know_how_many_may_be_kept() -> None:
    source = (Path(__file__).parents[2] / "csrc" / "cuda" / "selection_nearest.cuh").read_text()
    assert f"nearest_most = {selection.NEAREST};" in source


@pytest.mark.parametrize("first", [2500, 2501])
def test_a_row_may_be_shared(program: Path, tmp_path: Path, first: int) -> None:
    costs = draw(2, 4001).float().mul(20).round()
    costs[1, ::3] = torch.nan
    assert_the_least(by_tiles(program, tmp_path / "case", costs, 30, [first, 4001 - first], parts=3), costs, 30)


def test_costs_that_are_not_finite_are_the_last(program: Path, tmp_path: Path) -> None:
    costs = draw(6, 1000)
    costs[0], costs[1, :990], costs[2, ::3], costs[3, 5], costs[4] = (
        torch.nan,
        torch.inf,
        torch.nan,
        -torch.inf,
        torch.inf,
    )
    assert_the_least(by_tiles(program, tmp_path / "case", costs, 12, [400, 600]), costs, 12)


# ---- under the sanitizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_race_and_nothing_beside_an_array(tmp_path: Path, sanitizer: str) -> None:
    program, case = emulation.build("selection", tmp_path, sanitizer), tmp_path / "case"
    x, rows, centres, which = pairs(19, 40)
    found = distances(program, case, x, rows, centres, which)
    torch.testing.assert_close(found, torch.linalg.vector_norm(x[rows] - centres[which], dim=1), rtol=1e-14, atol=0)
    points = draw(70, 3)
    picks, _, _ = follow(program, case, points, torch.arange(70), points.norm(dim=1), 0.5, 0, 5)
    assert len(picks) == 5
    tile, before = draw(130, 40).square(), draw(1, 130)[0].abs()
    assert taken(program, case, tile, 0.0, before, before / 2, torch.zeros(40, dtype=torch.float64)).isfinite().all()
    costs = draw(2, 1300).sort(dim=1, descending=True).values
    assert_the_least(by_tiles(program, case, costs, 5, [600, 700]), costs, 5)
    assert_the_least(by_tiles(program, case, costs.float(), 5, [1300], parts=2), costs.float(), 5)
