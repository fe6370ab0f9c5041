"""Exact search: the definition's answers, whatever the tiles; close and equal vectors included."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from counterpoise.neighbors import exact, nearest_neighbors
from tests.neighbors.brute import neighbors_of, values_of

METRICS = ("cosine", "euclidean", "inner_product")
DTYPES = (torch.float32, torch.float64)


def normal(n: int, d: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(n: int, d: int = 5, seed: int = 0) -> Tensor:
    """Few distinct rows, so that nearly everything ties."""
    return torch.randint(2, (n, d), generator=torch.Generator().manual_seed(seed)).float()


# The definition


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_finds_what_sorting_all_pairs_finds(metric: str, dtype: torch.dtype) -> None:
    keys, queries = normal(700, dtype=dtype), normal(60, seed=1, dtype=dtype)
    values, indices = nearest_neighbors(queries, keys, 9, metric=metric)
    expected, at = neighbors_of(queries, keys, 9, metric)
    assert torch.equal(indices, at)
    assert values.dtype == dtype
    assert_close(values, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_smaller_index(metric: str) -> None:
    keys, queries = bits(400), bits(50, seed=1)
    values, indices = nearest_neighbors(queries, keys, 20, metric=metric)
    assert torch.equal(indices, neighbors_of(queries, keys.double(), 20, metric)[1])
    same = values[:, 1:] == values[:, :-1]
    assert same.float().mean() > 0.8
    assert bool((indices[:, 1:] > indices[:, :-1])[same].all())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("tile", "rows"), [(64, 4), (1000, 7), (1 << 16, 512)])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, metric: str, tile: int, rows: int) -> None:
    keys, queries = torch.cat([normal(300), normal(100)]), torch.cat([normal(20, seed=1), normal(20)])
    expected = nearest_neighbors(queries, keys, 6, metric=metric)
    monkeypatch.setattr(exact, "TILE", tile)
    monkeypatch.setattr(exact, "ROWS", rows)
    monkeypatch.setattr(exact, "AGAIN", 3)
    found = nearest_neighbors(queries, keys, 6, metric=metric)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("order", ["random", "falling", "rising"])
@pytest.mark.parametrize("count", [1, 7, 100, 3003])
def test_candidates_gathered_over_tiles_are_the_least(count: int, order: str) -> None:
    costs = normal(40, 3003)
    if order != "random":
        costs = costs.sort(dim=1, descending=order == "falling").values
    tiles, start = costs.split(max(count, 177), dim=1), max(count, 177)
    best = exact._BestSoFar(*tiles[0].topk(count, largest=False), count)
    for tile in tiles[1:]:
        best.see(tile, start)
        start += tile.shape[1]
    near, at = best.settled()
    assert torch.equal(near, costs.gather(1, at))
    assert torch.equal(near.sort().values, costs.sort().values[:, :count])


# Where products lose digits


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_key_is_at_no_distance_from_itself(metric: str) -> None:
    keys = normal(500) * 1000 + 500
    values, indices = nearest_neighbors(keys, keys, 1, metric=metric)
    assert torch.equal(indices[:, 0], torch.arange(500))
    assert bool((values == (0 if metric == "euclidean" else 1)).all())


def test_copies_are_at_one_distance() -> None:
    keys, queries = normal(1, 33).expand(1000, -1), normal(5, 33, seed=1)
    values, indices = nearest_neighbors(queries, keys, 50, metric="euclidean")
    assert bool((values == values[:, :1]).all())
    assert torch.equal(indices, torch.arange(50).expand(5, -1))


def test_neighbours_far_from_the_origin_are_told_apart() -> None:
    keys, queries = normal(400) + 10_000, normal(30, seed=1) + 10_000
    product = queries.square().sum(1, keepdim=True) - 2 * queries @ keys.T + keys.square().sum(1)
    expected, at = neighbors_of(queries, keys, 5, "euclidean")
    values, indices = nearest_neighbors(queries, keys, 5, metric="euclidean")
    assert not torch.equal(product.topk(5, largest=False).indices, at), "the plain product would do"
    assert torch.equal(indices, at)
    assert_close(values, expected)


def test_vectors_too_long_to_square_are_found() -> None:
    keys, queries = normal(200) * 1e20, normal(10) * 1e20
    values, indices = nearest_neighbors(queries, keys, 3, metric="euclidean")
    assert torch.equal(indices, neighbors_of(queries, keys, 3, "euclidean")[1])
    assert bool(values.isfinite().all())


def test_lower_precision_of_products_changes_nothing() -> None:
    keys, queries = normal(500), normal(40, seed=1)
    expected = nearest_neighbors(queries, keys, 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_neighbors(queries, keys, 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# The metrics and each other


def test_on_unit_vectors_the_three_agree() -> None:
    keys, queries = normalize(normal(300, dtype=torch.float64)), normalize(normal(20, seed=1, dtype=torch.float64))
    (cosine, by_cosine), (distance, by_distance), (product, by_product) = (
        nearest_neighbors(queries, keys, 8, metric=metric) for metric in METRICS
    )
    assert torch.equal(by_cosine, by_distance)
    assert torch.equal(by_cosine, by_product)
    assert_close(cosine, product)
    assert_close(distance.square(), 2 - 2 * cosine)


def test_the_cosine_sees_directions_only() -> None:
    keys, queries = normal(300), normal(20, seed=1)
    lengths = torch.linspace(0.01, 100, 300)[:, None]
    expected, at = nearest_neighbors(queries, keys, 5)
    values, indices = nearest_neighbors(3 * queries, lengths * keys, 5)
    assert torch.equal(indices, at)
    assert_close(values, expected)


def test_a_zero_vector_has_cosine_zero() -> None:
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest_neighbors(torch.tensor([[2.0, 0.0]]), keys, 3)[0].tolist() == [[1, 0, -1]]
    values, indices = nearest_neighbors(torch.zeros(1, 2), keys, 3)
    assert values.tolist() == [[0, 0, 0]]
    assert indices.tolist() == [[0, 1, 2]]


# Types, gradients, limits


def test_half_precision_is_raised_to_float32() -> None:
    keys = normal(100).half()
    values, indices = nearest_neighbors(keys[:9], keys, 4)
    expected, at = nearest_neighbors(keys[:9].float(), keys.float(), 4)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)
    assert torch.equal(indices, at)


def test_no_gradient_is_carried() -> None:
    keys = normal(20).requires_grad_()
    assert not nearest_neighbors(keys, keys, 2)[0].requires_grad


def test_beyond_the_keys_there_is_padding() -> None:
    values, indices = nearest_neighbors(normal(2), normal(3, seed=1), 5, metric="euclidean")
    assert indices[:, 3:].tolist() == [[-1, -1]] * 2
    assert values[:, 3:].tolist() == [[torch.inf] * 2] * 2
    similarities, _ = nearest_neighbors(normal(2), normal(0), 2)
    assert similarities.tolist() == [[-torch.inf] * 2] * 2


def test_no_query_gives_no_answer() -> None:
    values, indices = nearest_neighbors(normal(0), normal(3), 2)
    assert values.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 0}, "k is 0, expected a number in"),
        ({"metric": "manhattan"}, "metric is 'manhattan', expected one of"),
        ({"queries": normal(4, 3)}, r"queries has shape \(4, 3\), expected \(N, 8\)"),
        ({"queries": normal(4) / 0}, "queries holds NaN or infinity"),
        ({"keys": torch.full((3, 8), torch.nan)}, "keys holds NaN or infinity"),
        ({"keys": torch.zeros(3, 8, dtype=torch.int64)}, r"keys has shape \(3, 8\) and dtype torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], told: str) -> None:
    arguments = {"queries": normal(4), "keys": normal(5), "k": 2, **change}
    with pytest.raises(ValueError, match=told):
        nearest_neighbors(**arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_the_tile_and_not_with_the_pairs() -> None:
    job = """
import re, torch
from pathlib import Path
from counterpoise.neighbors import nearest_neighbors
torch.set_num_threads(1)
def memory(line):
    return int(re.search(line + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
x = torch.randn(40_000, 16)
nearest_neighbors(x[:5], x[:100], 3)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
nearest_neighbors(x[:20_000], x, 10, metric="euclidean")
print(memory("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", job], check=True, capture_output=True, text=True).stdout
    assert float(out) < 300, "all pairs would take 3 GB"


def test_the_brute_force_is_torch_cdist() -> None:
    q, x = normal(5, dtype=torch.float64), normal(9, seed=1, dtype=torch.float64)
    assert_close(values_of(q, x, "euclidean"), torch.cdist(q, x))
