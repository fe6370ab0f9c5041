"""Vectors kept by FAISS: flat, inverted lists (IVF), and navigable small worlds (HNSW).

FAISS is imported when a store is made, never with this file. It takes numpy views of torch's memory, without a copy,
and hands back numpy arrays. Two traps are dealt with here. FAISS and torch each bring an OpenMP of their own, so every
call runs with as many threads as torch has: one in the workers of a ``DataLoader``, where a forked pool of threads
would wait for ever. And FAISS forms distances as :math:`|q|^2 - 2 q^T x + |x|^2` in float32, so a flat search only
proposes candidates, and :mod:`~counterpoise.neighbors.exact` has the last word: both back ends give the same numbers.

On GPUs, a copy of the index is made by ``index_cpu_to_gpus_list``, whole on every GPU or cut in shards
(``GpuMultipleClonerOptions.shard``); the index on the host stays what is changed and saved. Queries that are on a GPU
go to a copy on a single GPU by ``faiss.contrib.torch_utils``, in float32 and contiguous, and what is found stays there;
replicas and shards on several GPUs take them from the host. That module is imported at the first such query, not
before: it puts methods of its own into FAISS' classes, whose ``search`` takes no parameters, so that everything on the
host calls FAISS' own by ``search_numpy`` from then on. No GPU has run any of this yet.

Source: Johnson et al., Billion-scale similarity search with GPUs, 2017; HNSW: Malkov and Yashunin, Efficient and robust
approximate nearest neighbor search using Hierarchical Navigable Small World graphs, 2016.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoise.neighbors.exact import Keys, best, search
from counterpoise.neighbors.rows import GrowingRows, IdTable

MOST_ON_GPU = 2048  # neighbours that FAISS finds on a GPU
POINTS_A_LIST = 39  # fewer points a list than this, and FAISS warns that they are too few to place it


def load_faiss() -> Any:
    """The module, or an ImportError that says what to install."""
    try:
        import faiss
    except ImportError as missing:
        raise ImportError(
            "this index needs FAISS: pip install 'counterpoise[faiss]', or 'counterpoise[faiss-gpu]' in its place",
            name="faiss",
        ) from missing
    return faiss


@contextmanager
def threads_of_torch() -> Iterator[None]:
    """FAISS computes with as many threads as torch does."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def as_array(x: Tensor) -> Any:
    """Float32 rows as numpy, a view where they are that already."""
    return x.detach().to("cpu", torch.float32).contiguous().numpy()


def stays_on_gpu(queries: Tensor, searcher: Any) -> bool:
    """Whether FAISS can read the queries where they are: on a GPU, as is the whole index, in one piece."""
    return queries.is_cuda and hasattr(searcher, "getDevice")


def search_arrays(searcher: Any, queries: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """FAISS' values and labels, (Q, k) each, on the host, whether or not its methods have been replaced."""
    own = getattr(searcher, "search_numpy", searcher.search)
    values, labels = own(as_array(queries), k, **options)
    return torch.from_numpy(values), torch.from_numpy(labels)


def search_tensors(searcher: Any, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """FAISS' values and labels, (Q, k) each, on ``device``, where the index is, without a copy on the host."""
    load_faiss()
    importlib.import_module("faiss.contrib.torch_utils")
    values, labels = searcher.search(queries.detach().to(device, torch.float32).contiguous(), k)
    return values, labels


@dataclass(frozen=True)
class FaissSettings:
    """What the stores are made with; each reads its own."""

    num_lists: int | None
    num_probes: int
    num_links: int
    build_width: int
    search_width: int
    num_gpus: int
    shard: bool
    seed: int


class FaissStore:
    """What the three kinds share: the metric, threads, GPUs, and files."""

    dtype = torch.float32

    def __init__(self, dim: int, metric: str, settings: FaissSettings) -> None:
        self.faiss = load_faiss()
        self.dim, self.metric, self.settings = dim, metric, settings
        self.measure = self.faiss.METRIC_L2 if metric == "euclidean" else self.faiss.METRIC_INNER_PRODUCT
        self.table = IdTable()
        self.index: Any = None
        self._on_gpus: Any = None
        if settings.num_gpus > 0:
            self._check_gpus()

    def _check_gpus(self) -> None:
        there = self.faiss.get_num_gpus() if hasattr(self.faiss, "GpuMultipleClonerOptions") else 0
        if self.settings.num_gpus > there:
            raise RuntimeError(f"num_gpus is {self.settings.num_gpus}, but this build of FAISS sees {there}")

    def changed(self) -> None:
        """The copies on GPUs are out of date."""
        self._on_gpus = None

    def searcher(self, k: int) -> Any:
        """What is searched: the index, or its copies on GPUs."""
        if self.settings.num_gpus == 0:
            return self.index
        if k > MOST_ON_GPU:
            raise ValueError(f"k is {k}, expected at most {MOST_ON_GPU} on a GPU")
        if self._on_gpus is None:
            options = self.faiss.GpuMultipleClonerOptions()
            options.shard = self.settings.shard
            gpus = list(range(self.settings.num_gpus))
            self._on_gpus = self.faiss.index_cpu_to_gpus_list(self.index, co=options, gpus=gpus)
        return self._on_gpus

    def ask(self, queries: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        """FAISS' own values and labels, (Q, k) each: on the GPU for queries there and an index there, else on the host.

        Options are of a search on the host.
        """
        searcher = self.searcher(k)
        with threads_of_torch():
            if stays_on_gpu(queries, searcher):
                return search_tensors(searcher, queries, k, torch.device("cuda", searcher.getDevice()))
            return search_arrays(searcher, queries, k, **options)

    def approximate(self, queries: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Costs, ascending, and labels; inf and -1 where there are no more."""
        values, labels = self.ask(queries, k, **options)
        costs = values.clamp_min(0).sqrt() if self.metric == "euclidean" else -values
        return costs.masked_fill(labels < 0, torch.inf), labels

    def rebuild(self) -> None:
        """Builds what there is beside the vectors anew."""

    def save(self, file: str) -> dict[str, Any]:
        """Ids as a tensor; the index goes into ``file`` by FAISS' own means, where there is one."""
        if self.index is not None:
            aside = Path(f"{file}.aside")
            self.faiss.write_index(self.index, str(aside))
            aside.replace(file)
        return {"ids": self.table.ids.clone(), "stored": self.index is not None}

    def load(self, file: str, state: dict[str, Any]) -> None:
        """What :meth:`save` wrote."""
        if state["stored"]:
            self.index = self.faiss.read_index(file)
        self.table.append(state["ids"])


class FaissFlat(FaissStore):
    """Every vector as it is; FAISS proposes, :func:`~counterpoise.neighbors.exact.search` decides."""

    def __init__(self, dim: int, metric: str, settings: FaissSettings) -> None:
        super().__init__(dim, metric, settings)
        self.index = self.faiss.IndexFlat(dim, self.measure)
        self._keys: Keys | None = None

    def changed(self) -> None:
        """The lengths of vectors are out of date too."""
        super().changed()
        self._keys = None

    @property
    def vectors(self) -> Tensor:
        """(N, dim), a view of FAISS' memory until the next addition or removal."""
        if self.index.ntotal == 0:
            return torch.empty(0, self.dim)
        numbers = self.faiss.rev_swig_ptr(self.index.get_xb(), self.index.ntotal * self.dim)
        return torch.from_numpy(numbers.reshape(-1, self.dim))

    def add(self, vectors: Tensor, ids: Tensor) -> None:
        """New rows."""
        self.index.add(as_array(vectors))
        self.table.append(ids)
        self.changed()

    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Writes over the rows of known ids."""
        self.vectors[self.table.rows_of(ids)] = vectors.to("cpu", torch.float32)
        self.changed()

    def remove(self, ids: Tensor) -> None:
        """Drops the rows of known ids; those behind move up, in FAISS as in the table."""
        kept = torch.ones(len(self.table.ids), dtype=torch.bool)
        kept[self.table.rows_of(ids)] = False
        self.index.remove_ids((~kept).nonzero().flatten().numpy())
        self.table.keep(kept)
        self.changed()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Costs and ids of prepared queries, exactly."""
        if self._keys is None:
            self._keys = Keys(self.vectors, self.table.ids, self.metric)
        # the exact part is on the host, where the vectors are, the proposals where the queries came from
        return search(self._keys, queries.to("cpu", torch.float32), k, lambda host, n: self._propose(queries, host, n))

    def _propose(self, given: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, rows = (x.cpu() for x in self.ask(given, count))
        if self.metric == "euclidean":
            return values.double() - queries.double().square().sum(1, keepdim=True), rows
        return -values, rows


class FaissIVF(FaissStore):
    """Inverted lists: each vector in the list of its nearest centre, of which a query looks into a few.

    The centres are placed by k-means at the first search or :meth:`rebuild`, when all that was added is known. What is
    added later goes into the lists that there are; where vectors drift, :meth:`rebuild` places the centres anew.
    """

    def __init__(self, dim: int, metric: str, settings: FaissSettings) -> None:
        super().__init__(dim, metric, settings)
        self._waiting = GrowingRows(torch.empty(0, dim))

    def add(self, vectors: Tensor, ids: Tensor) -> None:
        """Into the lists, or to those that wait for the first search."""
        if self.index is None:
            self._waiting.append(vectors.cpu())
        else:
            with threads_of_torch():
                self.index.add_with_ids(as_array(vectors), ids.numpy())
        self.table.append(ids)
        self.changed()

    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Takes them out of their lists and adds them again."""
        self.remove(ids)
        self.add(vectors, ids)

    def remove(self, ids: Tensor) -> None:
        """Looks through all lists."""
        kept = torch.ones(len(self.table.ids), dtype=torch.bool)
        kept[self.table.rows_of(ids)] = False
        if self.index is None:
            self._waiting.keep(kept)
        else:
            self.index.remove_ids(ids.numpy())
        self.table.keep(kept)
        self.changed()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Costs and ids of prepared queries, of the lists that are looked into."""
        if self.index is None and len(self.table.ids):
            self._build(self._waiting.rows, self.table.ids)
        if self.index is None:
            shape = (len(queries), k)
            return torch.full(shape, torch.inf), torch.full(shape, -1)
        self.index.nprobe = self.settings.num_probes
        return best(*self.approximate(queries, k), k)

    def _build(self, vectors: Tensor, ids: Tensor) -> None:
        """Places the centres and fills the lists."""
        lists = self.settings.num_lists or max(1, min(round(math.sqrt(len(ids))), len(ids) // POINTS_A_LIST))
        if lists > len(ids):
            raise ValueError(f"num_lists is {lists}, expected at most the {len(ids)} vectors that there are")
        self.index = self.faiss.IndexIVFFlat(
            self.faiss.IndexFlat(self.dim, self.measure), self.dim, lists, self.measure
        )
        self.index.cp.seed = self.settings.seed
        self.index.cp.spherical = self.metric != "euclidean"
        self.index.cp.min_points_per_centroid = 1  # the number of lists was chosen, here or by the caller
        with threads_of_torch():
            self.index.train(as_array(vectors))
            self.index.add_with_ids(as_array(vectors), ids.numpy())
        self._waiting = GrowingRows(torch.empty(0, self.dim))
        self.changed()

    def rebuild(self) -> None:
        """Places the centres anew, from the vectors that there are now."""
        if len(self.table.ids) == 0:
            self.index = None
            return
        if self.index is None:
            self._build(self._waiting.rows, self.table.ids)
            return
        self._build(*self._listed())

    def _listed(self) -> tuple[Tensor, Tensor]:
        """Vectors and ids as the lists hold them."""
        lists = self.index.invlists
        vectors, ids = np.empty((self.index.ntotal, self.dim), np.float32), np.empty(self.index.ntotal, np.int64)
        end = 0
        for number in range(self.index.nlist):
            size = lists.list_size(number)
            if size == 0:
                continue
            codes = self.faiss.rev_swig_ptr(lists.get_codes(number), size * self.index.code_size)
            vectors[end : end + size] = codes.view(np.float32).reshape(size, self.dim)
            ids[end : end + size] = self.faiss.rev_swig_ptr(lists.get_ids(number), size)
            end += size
        return torch.from_numpy(vectors), torch.from_numpy(ids)

    def save(self, file: str) -> dict[str, Any]:
        """The lists in ``file``, or the vectors that still wait for them."""
        return {**super().save(file), "waiting": self._waiting.rows.clone()}

    def load(self, file: str, state: dict[str, Any]) -> None:
        """What :meth:`save` wrote."""
        super().load(file, state)
        self._waiting.append(state["waiting"])


class FaissHNSW(FaissStore):
    """A graph of near vectors, walked greedily. It cannot lose a vector: what is removed stays, and is passed over.

    A vector that changes is removed and added. When more than half of the graph is passed over, it is built anew.
    """

    def __init__(self, dim: int, metric: str, settings: FaissSettings) -> None:
        super().__init__(dim, metric, settings)
        self._start()

    def _start(self) -> None:
        self.index = self.faiss.IndexHNSWFlat(self.dim, self.settings.num_links, self.measure)
        self.index.hnsw.efConstruction = self.settings.build_width

    def add(self, vectors: Tensor, ids: Tensor) -> None:
        """New nodes of the graph."""
        with threads_of_torch():
            self.index.add(as_array(vectors))
        self.table.append(ids)

    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Removes and adds."""
        self.remove(ids)
        self.add(vectors, ids)

    def remove(self, ids: Tensor) -> None:
        """Passes them over from now on."""
        self.table.clear(self.table.rows_of(ids))
        if 2 * int((self.table.ids < 0).sum()) > len(self.table.ids):
            self.rebuild()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Costs and ids of prepared queries, as far as the walk finds them."""
        options = self.faiss.SearchParametersHNSW(efSearch=max(self.settings.search_width, k))
        gone = (self.table.ids < 0).nonzero().flatten()
        if len(gone):
            passed_over = self.faiss.IDSelectorBatch(gone.numpy())
            options.sel = self.faiss.IDSelectorNot(passed_over)
        costs, rows = self.approximate(queries, k, params=options)
        ids = torch.cat([self.table.ids, torch.tensor([-1])])[rows]  # row -1 is no row
        return best(costs, ids, k)

    def rebuild(self) -> None:
        """A new graph of what is left."""
        kept = self.table.ids >= 0
        storage = self.faiss.downcast_index(self.index.storage)
        numbers = self.faiss.rev_swig_ptr(storage.get_xb(), self.index.ntotal * self.dim) if len(kept) else np.empty(0)
        vectors, ids = torch.from_numpy(numbers.reshape(-1, self.dim))[kept], self.table.ids[kept]
        self.table = IdTable()
        self._start()
        self.add(vectors, ids)
