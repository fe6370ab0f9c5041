"""The index: ids that stay through additions, updates and removals, in torch and in FAISS, and after a restart."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from counterpoise.neighbors import NeighborIndex, faiss_stores, nearest_neighbors
from tests.neighbors.brute import neighbors_of
from tests.neighbors.test_exact import METRICS, bits, normal
from tests.pool import Pool

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="FAISS is not installed")
BACKENDS = ["torch", pytest.param("faiss", marks=needs_faiss)]
ALL_LISTS = {"num_lists": 12, "num_probes": 12}
KINDS = [  # settings under which every kind finds all of a small set
    {"backend": "torch"},
    pytest.param({"backend": "faiss"}, marks=needs_faiss),
    pytest.param({"kind": "ivf", **ALL_LISTS}, marks=needs_faiss),
    pytest.param({"kind": "hnsw", "search_width": 600, "build_width": 200}, marks=needs_faiss),
]


def shuffled(n: int, most: int = 2000) -> Tensor:
    """Distinct ids in no order."""
    return torch.randperm(most, generator=torch.Generator().manual_seed(3))[:n]


def agree(index: NeighborIndex, queries: Tensor, keys: Tensor, ids: Tensor, k: int = 7) -> None:
    """The index holds ``keys`` under ``ids`` and finds the nearest of them."""
    values, found = index.search(queries, k)
    expected, at = neighbors_of(queries, keys, k, index.metric, ids)
    assert index.ids.tolist() == sorted(ids.tolist())
    assert len(index) == len(ids)
    assert torch.equal(found, at)
    assert_close(values, expected, rtol=1e-5, atol=1e-6)


# Life of a vector


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_it_finds_what_was_added_updated_and_not_removed(metric: str, settings: dict[str, Any], tmp_path: Path) -> None:
    keys, ids, queries = normal(600), shuffled(600), normal(40, seed=1)
    index = NeighborIndex(8, metric, **settings)
    assert torch.equal(index.add(keys[:400], ids[:400]), ids[:400])
    agree(index, queries, keys[:400], ids[:400])
    index.add(keys[400:], ids[400:])
    agree(index, queries, keys, ids)

    moved = normal(50, seed=2)
    index.update(ids[100:150], moved)
    keys = torch.cat([keys[:100], moved, keys[150:]])
    agree(index, queries, keys, ids)

    index.remove(ids[:130])
    keys, ids = keys[130:], ids[130:]
    agree(index, queries, keys, ids)
    index.save(tmp_path / "index.pt")
    index.rebuild()
    agree(index, queries, keys, ids)

    loaded = NeighborIndex.load(tmp_path / "index.pt")
    assert repr(loaded) == repr(index)
    agree(loaded, queries, keys, ids)
    loaded.add(normal(5, seed=4))
    loaded.remove(ids[:200])
    more = torch.arange(5) + int(shuffled(600).max()) + 1
    agree(loaded, queries, torch.cat([keys[200:], normal(5, seed=4)]), torch.cat([ids[200:], more]))


@pytest.mark.parametrize("settings", KINDS)
def test_ids_count_up_by_themselves_and_are_not_given_twice(settings: dict[str, Any]) -> None:
    index = NeighborIndex(8, **settings)
    assert index.add(normal(20)).tolist() == list(range(20))
    assert index.add(normal(2, seed=1), torch.tensor([40, 30])).tolist() == [40, 30]
    index.remove(torch.tensor([40]))
    assert index.add(normal(1, seed=2)).tolist() == [41]


@pytest.mark.parametrize("settings", KINDS)
def test_an_empty_index_pads_and_fills_again(settings: dict[str, Any]) -> None:
    index = NeighborIndex(8, "euclidean", **{**settings, "num_lists": None})
    queries = normal(3, seed=1)
    assert index.search(queries, 2)[1].tolist() == [[-1, -1]] * 3
    ids = index.add(normal(4))
    values, found = index.search(queries, 6)
    assert found[:, 4:].tolist() == [[-1, -1]] * 3
    assert bool((values[:, 4:] == torch.inf).all())
    assert torch.equal(found[:, :4].sort().values, ids.expand(3, -1))
    index.remove(ids)
    index.rebuild()
    assert len(index) == 0
    assert index.search(queries, 2)[1].tolist() == [[-1, -1]] * 3
    index.add(normal(4), ids)
    assert bool((index.search(queries, 1)[1] >= 0).all())


@pytest.mark.parametrize("settings", KINDS)
def test_each_query_can_leave_one_out(settings: dict[str, Any]) -> None:
    keys, ids = normal(300), shuffled(300)
    index = NeighborIndex(8, **settings)
    index.add(keys, ids)
    excluded = torch.where(torch.arange(300) % 2 == 0, ids, -1)
    _, found = index.search(keys, 5, exclude=excluded)
    _, all_of_them = neighbors_of(keys, keys, 6, "cosine", ids)
    assert torch.equal(found[::2], all_of_them[::2, 1:])
    assert torch.equal(found[1::2], all_of_them[1::2, :5])
    _, everything = index.search(keys[:2], 300, exclude=ids[:2])
    assert everything[:, -1].tolist() == [-1, -1]
    assert bool((everything != ids[:2, None]).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_smaller_id_in_whatever_order_it_came(backend: str, metric: str) -> None:
    keys, queries, ids = bits(400), bits(30, seed=1), shuffled(400)
    index = NeighborIndex(5, metric, backend=backend)
    index.add(keys, ids)
    _, found = index.search(queries, 25)
    assert torch.equal(found, neighbors_of(queries, keys, 25, metric, ids)[1])


# FAISS and torch


@needs_faiss
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [0, 3000])
def test_flat_faiss_is_torch_bit_for_bit(metric: str, offset: float) -> None:
    keys, queries = normal(900, 24) + offset, normal(64, 24, seed=1) + offset
    answers = []
    for backend in ("torch", "faiss"):
        index = NeighborIndex(24, metric, backend=backend)
        index.add(keys, shuffled(900))
        answers.append(index.search(queries, 11))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


@needs_faiss
def test_some_lists_find_most_and_all_lists_find_all() -> None:
    centres = normal(40, 16) * 4
    keys, queries = centres.repeat(50, 1) + normal(2000, 16, seed=1), centres + normal(40, 16, seed=2)
    _, exact = nearest_neighbors(queries, keys, 10)
    recall = []
    for probes in (1, 4, 40):
        index = NeighborIndex(16, kind="ivf", num_lists=40, num_probes=probes)
        index.add(keys)
        found = index.search(queries, 10)[1]
        recall.append(float((found[:, :, None] == exact[:, None]).any(2).float().mean()))
    assert recall[0] <= recall[1] <= recall[2] == 1
    assert recall[1] > 0.9


@needs_faiss
def test_lists_are_placed_when_all_that_came_before_the_first_search_is_known() -> None:
    in_parts, at_once = (NeighborIndex(8, kind="ivf", num_lists=9, num_probes=2) for _ in range(2))
    for part in normal(500).split(60):
        in_parts.add(part)
    at_once.add(normal(500))
    queries = normal(30, seed=1)
    assert torch.equal(in_parts.search(queries, 5)[1], at_once.search(queries, 5)[1])


@needs_faiss
def test_waiting_vectors_can_be_updated_removed_and_saved(tmp_path: Path) -> None:
    index = NeighborIndex(8, "euclidean", kind="ivf", **ALL_LISTS)
    index.add(normal(100))
    index.remove(torch.arange(10))
    index.update(torch.tensor([50]), torch.full((1, 8), 9.0))
    index.save(tmp_path / "index.pt")
    loaded = NeighborIndex.load(tmp_path / "index.pt")
    for each in (index, loaded):
        assert each.search(torch.full((1, 8), 9.0), 1)[1].tolist() == [[50]]
        assert len(each) == 90


@needs_faiss
def test_a_rebuild_follows_vectors_that_drifted() -> None:
    index = NeighborIndex(16, "euclidean", kind="ivf", num_lists=30, num_probes=2)
    ids = index.add(normal(1500, 16))
    index.search(normal(1, 16), 1)
    drifted = normal(30, 16, seed=5).repeat(50, 1) + 0.1 * normal(1500, 16, seed=6) + 50
    index.update(ids, drifted)

    def fullest_against_even() -> float:
        return float(index._store.index.invlists.imbalance_factor())

    assert fullest_against_even() > 10, "a query would look through nearly everything"
    index.rebuild()
    assert fullest_against_even() < 3
    _, exact = nearest_neighbors(drifted[:200], drifted, 10, metric="euclidean")
    found = index.search(drifted[:200], 10)[1]
    assert (found[:, :, None] == exact[:, None]).any(2).float().mean() > 0.9


@needs_faiss
def test_a_graph_of_mostly_removed_vectors_is_built_anew() -> None:
    index = NeighborIndex(8, kind="hnsw")
    index.add(normal(100))
    index.remove(torch.arange(49))
    assert len(index._store.table.ids) == 100
    index.remove(torch.arange(49, 60))
    assert len(index._store.table.ids) == len(index) == 40


@needs_faiss
def test_faiss_has_the_threads_of_torch_and_gives_them_back() -> None:
    import faiss

    seen: list[int] = []
    index = NeighborIndex(4, backend="faiss")
    index.add(normal(10, 4))
    inner = index._store.searcher

    def searcher(k: int) -> Any:
        seen.append(faiss.omp_get_max_threads())
        return inner(k)

    index._store.searcher = searcher
    before, threads = faiss.omp_get_max_threads(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        index.search(normal(2, 4), 1)
    finally:
        torch.set_num_threads(threads)
    assert seen == [3]
    assert faiss.omp_get_max_threads() == before


class Asked(torch.utils.data.Dataset[Tensor]):
    """Searches in the worker."""

    def __init__(self, index: NeighborIndex, queries: Tensor) -> None:
        self.index, self.queries = index, queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, i: int) -> Tensor:
        return self.index.search(self.queries[i : i + 1], 4)[1][0]


@needs_faiss
def test_forked_workers_of_a_loader_can_search() -> None:
    index = NeighborIndex(32, backend="faiss")
    index.add(normal(5000, 32))
    queries = normal(8, 32, seed=1)
    expected = index.search(queries, 4)[1]  # FAISS' threads are up before the fork
    loader = DataLoader(Asked(index, queries), num_workers=1, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


@needs_faiss
@pytest.mark.parametrize(("gpus", "shard"), [(2, True), (1, False)])
def test_gpus_are_asked_for_by_faiss_own_means(monkeypatch: pytest.MonkeyPatch, gpus: int, shard: bool) -> None:
    """What is asked of FAISS; no GPU runs here."""
    import faiss

    calls: list[tuple[bool, list[int], int]] = []

    class Options:
        shard = False

    def to_gpus(index: Any, co: Options, gpus: list[int]) -> Any:
        calls.append((co.shard, gpus, index.ntotal))
        return index

    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", Options, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", to_gpus)
    index = NeighborIndex(8, num_gpus=gpus, shard=shard)
    assert index.backend == "faiss"
    ids = index.add(normal(50))
    for _ in range(2):
        index.search(normal(3, seed=1), 2)
    index.remove(ids[:10])
    agree(index, normal(3, seed=1), normal(50)[10:], ids[10:])
    assert calls == [(shard, list(range(gpus)), n) for n in (50, 40)]
    with pytest.raises(ValueError, match="k is 2508, expected at most 2048 on a GPU"):
        NeighborIndex(8, num_gpus=1)._store.searcher(2508)


# Tensors of a GPU, as far as a CPU can tell


class OnOneGPU:
    """What FAISS gives for one GPU, with its vectors on the host."""

    def __init__(self, index: Any) -> None:
        self.index, self.given = index, []

    def getDevice(self) -> int:
        return 0

    def search(self, x: Any, k: int) -> Any:
        self.given.append(x)
        return self.index.search(x, k)


@needs_faiss
def test_only_queries_on_a_gpu_for_an_index_in_one_piece_there_skip_the_host() -> None:
    here, there = (SimpleNamespace(is_cuda=at) for at in (False, True))
    whole, shards = OnOneGPU(None), object()
    told = [faiss_stores.stays_on_gpu(x, index) for x in (here, there) for index in (whole, shards)]  # type: ignore[arg-type]
    assert told == [False, False, True, False]


IN_A_PROCESS_OF_ITS_OWN = """
import faiss, sys, torch
from counterpoise.neighbors import KMeans, NeighborIndex
from counterpoise.neighbors import faiss_stores as stores
from tests.neighbors.test_exact import normal
from tests.neighbors.test_index import OnOneGPU

keys, queries, cpu = normal(300), normal(20, seed=1), torch.device("cpu")
kinds = {"flat": {}, "ivf": {"num_lists": 4}, "hnsw": {}}

def found():
    answers = []
    for kind, options in kinds.items():
        index = NeighborIndex(8, "euclidean", kind=kind, backend="faiss", **options)
        index.add(keys[:200])
        index.search(queries, 3)
        index.add(keys[200:])
        index.update(torch.arange(5), keys[50:55])
        index.remove(torch.arange(90, 99))
        answers += index.search(queries, 5)
    return [*answers, KMeans(3, backend="faiss").fit(keys).centroids]

before = found()
assert "faiss.contrib.torch_utils" not in sys.modules, "nothing on the host needs it"
index = faiss.IndexFlatL2(8)
index.add(keys.numpy())
expected = stores.search_arrays(index, queries, 5)
for given in (queries, queries.double(), queries.T.contiguous().T, queries.repeat(1, 2)[:, :8]):
    one = OnOneGPU(index)
    values, labels = stores.search_tensors(one, given, 5, cpu)
    assert "faiss.contrib.torch_utils" in sys.modules
    (x,) = one.given
    assert x.dtype == torch.float32 and x.is_contiguous() and x.device == cpu
    assert isinstance(values, torch.Tensor) and labels.dtype == torch.int64
    torch.testing.assert_close((values, labels), expected)
    assert (x.data_ptr() == queries.data_ptr()) == (given is queries), "a copy only where one is needed"
for a, b in zip(before, found(), strict=True):
    assert torch.equal(a, b), "the host's calls go on as before"

# the whole way, with the host in the part of the GPU
stores.stays_on_gpu = lambda queries, searcher: hasattr(searcher, "getDevice")
real, used = stores.search_tensors, []
stores.search_tensors = lambda s, q, k, device: (used.append(device), real(s, q, k, cpu))[1]
for kind, options in kinds.items():
    if kind != "hnsw":
        index = NeighborIndex(8, "euclidean", kind=kind, backend="faiss", **options)
        index.add(keys)
        plain = index.search(queries, 5)
        index._store.searcher = lambda k, store=index._store: OnOneGPU(store.index)
        torch.testing.assert_close(index.search(queries, 5), plain)
assert used == [torch.device("cuda", 0)] * 2
"""


@needs_faiss
def test_tensors_reach_an_index_on_a_gpu_as_faiss_asks_and_the_host_is_left_alone() -> None:
    """In a process of its own, as FAISS' torch_utils changes its classes for good."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Torch alone


def test_torch_keeps_the_dtype_of_the_first_vectors() -> None:
    index = NeighborIndex(8, "euclidean")
    keys = 1 + 1e-9 * normal(50, dtype=torch.float64)
    index.add(keys)
    index.add(torch.zeros(1, 8))
    values, found = index.search(keys[:5], 1)
    assert values.dtype == torch.float64
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_small_additions_cost_what_one_does() -> None:
    index = NeighborIndex(4)
    blocks = set()
    for row in normal(3000, 4):
        index.add(row[None])
        blocks.add(index._store.vectors.data_ptr())
    assert len(blocks) <= 13
    assert torch.equal(index.search(normal(3000, 4)[5:9], 1)[1][:, 0], torch.arange(5, 9))


def test_the_caller_may_write_over_what_it_added() -> None:
    keys = normal(10)
    index = NeighborIndex(8)
    index.add(keys)
    keys.zero_()
    assert bool((index.search(normal(10), 1)[0] > 0.99).all())


# Several ranks


def ask_all_ranks(rank: int, sizes: list[int], queries: list[int], backend: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    keys, asked = normal(sum(sizes)), normal(sum(queries), seed=1)
    index = NeighborIndex(8, "euclidean", backend=backend)
    ids = torch.arange(sum(sizes)).split(sizes)[rank]
    index.add(keys[ids], ids)
    return index.search(asked.split(queries)[rank], 6, sync=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[40, 40, 40], [3, 90, 27], [0, 60, 60]])
def test_ranks_that_hold_a_part_each_find_what_one_that_holds_all_does(
    ranks: Pool, sizes: list[int], backend: str
) -> None:
    queries = [5, 0, 11]
    answers = ranks.run(ask_all_ranks, sizes, queries, backend)
    values, found = (torch.cat([answer[i] for answer in answers]) for i in (0, 1))
    expected, at = neighbors_of(normal(16, seed=1), normal(sum(sizes)), 6, "euclidean")
    assert torch.equal(found, at)
    assert_close(values, expected)


def test_without_a_process_group_sync_changes_nothing() -> None:
    index = NeighborIndex(8)
    index.add(normal(50))
    assert torch.equal(index.search(normal(4), 3, sync=True)[1], index.search(normal(4), 3)[1])


# What is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dim": 0}, "dim is 0, expected a number in"),
        ({"metric": "euclid"}, "metric is 'euclid', expected one of .* did you mean 'euclidean'"),
        ({"kind": "pq"}, "kind is 'pq', expected one of"),
        ({"backend": "sklearn"}, "backend is 'sklearn', expected one of"),
        ({"num_lists": 0}, "num_lists is 0"),
        ({"num_probes": 0}, "num_probes is 0"),
        ({"num_gpus": -1}, "num_gpus is -1"),
        ({"kind": "ivf", "backend": "torch"}, "backend is 'torch' with kind 'ivf'"),
        ({"backend": "faiss", "device": "cpu"}, "device is 'cpu' with FAISS, expected None"),
        ({"kind": "hnsw", "num_gpus": 1}, "num_gpus is 1, expected 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        NeighborIndex(**{"dim": 4, **settings})


@needs_faiss
def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(RuntimeError, match="num_gpus is 99, but this build of FAISS sees"):
        NeighborIndex(4, num_gpus=99)


@needs_faiss
def test_more_lists_than_vectors_are_refused() -> None:
    index = NeighborIndex(8, kind="ivf", num_lists=30)
    index.add(normal(20))
    with pytest.raises(ValueError, match="num_lists is 30, expected at most the 20 vectors"):
        index.search(normal(1), 1)


def test_without_faiss_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'counterpoise\[faiss\]'"):
        NeighborIndex(4, kind="hnsw")
    assert NeighborIndex(4).backend == "torch"


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize(
    ("ids", "error", "told"),
    [
        ([1, 1], ValueError, "ids holds 1 twice, expected distinct ids"),
        ([-1, 8], ValueError, "ids holds -1, expected numbers >= 0"),
        ([8], ValueError, r"ids has shape \(1,\), expected \(2,\)"),
        ([0.5, 1.5], TypeError, "ids has dtype torch.float32, expected whole numbers"),
        ([3, 30], ValueError, "ids holds 3, which is in the index, expected new ids: use update"),
    ],
)
def test_ids_that_cannot_be_added_are_refused(
    settings: dict[str, Any], ids: list[int], error: type[Exception], told: str
) -> None:
    index = NeighborIndex(8, **settings)
    index.add(normal(5))
    with pytest.raises(error, match=told):
        index.add(normal(2), torch.tensor(ids))
    assert len(index) == 5


def test_unknown_ids_are_refused() -> None:
    index = NeighborIndex(8)
    index.add(normal(5))
    for change in (lambda: index.remove(torch.tensor([2, 7])), lambda: index.update(torch.tensor([7]), normal(1))):
        with pytest.raises(ValueError, match="ids holds 7, expected ids that are in the index"):
            change()
    assert len(index) == 5


def test_vectors_and_queries_that_do_not_fit_are_refused() -> None:
    index = NeighborIndex(8)
    with pytest.raises(ValueError, match=r"vectors has shape \(2, 7\), expected \(N, 8\)"):
        index.add(normal(2, 7))
    with pytest.raises(ValueError, match="vectors holds NaN or infinity"):
        index.add(normal(2) / 0)
    index.add(normal(2))
    with pytest.raises(TypeError, match=r"vectors has dtype torch.float64, expected torch.float32"):
        index.add(normal(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="k is 0"):
        index.search(normal(1), 0)
    with pytest.raises(ValueError, match=r"exclude has shape \(2,\), expected \(1,\)"):
        index.search(normal(1), 1, exclude=torch.tensor([0, 1]))


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({"schema_version": 99}, tmp_path / "index.pt")
    with pytest.raises(ValueError, match="schema version 99, expected 1"):
        NeighborIndex.load(tmp_path / "index.pt")
