r"""An index of vectors with ids that stay: add, update, remove, search, save; torch by itself, or FAISS.

.. math::
    \cos(q, x) = \frac{q^\top x}{\lVert q \rVert \lVert x \rVert}, \qquad
    d(q, x) = \lVert q - x \rVert, \qquad
    q^\top x

``kind="flat"`` compares a query with every vector, and its answers are exact: values are computed in float64 and
rounded once, and ties go to the smaller id, in both back ends (:mod:`~counterpoise.neighbors.exact`). ``"ivf"`` and
``"hnsw"`` are FAISS' approximate kinds: faster, with answers that depend on their settings; measure their recall
against a flat index on some queries. Distances are distances; FAISS gives their squares.

Source: FAISS' part: Johnson et al., Billion-scale similarity search with GPUs, 2017; the exact part: derived.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_number, check_per_row, world_size
from counterpoise.distributed import gather_rows, row_offset
from counterpoise.neighbors.exact import METRICS, as_values, best, check_finite, prepare
from counterpoise.neighbors.faiss_stores import FaissFlat, FaissHNSW, FaissIVF, FaissSettings
from counterpoise.neighbors.rows import TorchStore

FAISS_KINDS = {"flat": FaissFlat, "ivf": FaissIVF, "hnsw": FaissHNSW}
SCHEMA_VERSION = 1


class NeighborIndex:
    """Vectors with ids, and the nearest of them to any query. Nothing here carries a gradient.

    Args:
        dim: width d of a vector.
        metric: "cosine", "euclidean" or "inner_product". A zero vector has cosine 0 to everything.
        kind: "flat", exact; "ivf" or "hnsw", approximate, by FAISS.
        backend: "torch" (flat only), "faiss", or "auto": torch for a flat index, about as fast on a CPU, else FAISS.
        device: where torch keeps the vectors; None: where the first ones are. FAISS keeps them on the host.
        num_lists: inverted lists (FAISS: nlist); None: about the square root of the number of vectors.
        num_probes: lists that a query looks into (nprobe); all of them make "ivf" exact but for rounding.
        num_links: neighbours that a node of "hnsw" is linked to (M).
        build_width, search_width: candidates that "hnsw" follows when it links and when it searches (efConstruction,
            efSearch).
        num_gpus: GPUs that FAISS searches on, 0 for none; at most 2048 neighbours there. Not run on a GPU yet.
        shard: cut the vectors among the GPUs, rather than copy all to each.
        seed: of the k-means that places the centres of "ivf".

    Raises:
        ValueError, TypeError: a setting out of range, or one that does not go with another.
        ImportError: FAISS is wanted and missing. RuntimeError: it sees fewer GPUs than wanted.
    """

    def __init__(
        self,
        dim: int,
        metric: str = "cosine",
        *,
        kind: str = "flat",
        backend: str = "auto",
        device: torch.device | str | None = None,
        num_lists: int | None = None,
        num_probes: int = 16,
        num_links: int = 32,
        build_width: int = 64,
        search_width: int = 64,
        num_gpus: int = 0,
        shard: bool = False,
        seed: int = 0,
    ) -> None:
        counts = {"dim": dim, "num_probes": num_probes, "num_links": num_links, "build_width": build_width}
        for name, value in {**counts, "search_width": search_width}.items():
            check_number(name, value, 1)
        if num_lists is not None:
            check_number("num_lists", num_lists, 1)
        check_number("num_gpus", num_gpus, 0)
        check_choice("metric", metric, METRICS)
        check_choice("kind", kind, FAISS_KINDS)
        check_choice("backend", backend, ("auto", "torch", "faiss"))
        self.dim, self.metric, self.kind = dim, metric, kind
        self.backend = ("torch" if kind == "flat" and num_gpus == 0 else "faiss") if backend == "auto" else backend
        self._settings = FaissSettings(
            num_lists, num_probes, num_links, build_width, search_width, num_gpus, shard, seed
        )
        self._store = self._make_store(device)

    def _make_store(self, device: torch.device | str | None) -> Any:
        if self.backend == "torch":
            if self.kind != "flat" or self._settings.num_gpus:
                raise ValueError(f"backend is 'torch' with kind {self.kind!r} and num_gpus, expected kind 'flat' and 0")
            return TorchStore(self.dim, self.metric, None if device is None else torch.device(device))
        if device is not None:
            raise ValueError(f"device is {str(device)!r} with FAISS, expected None: its vectors are on the host")
        if self.kind == "hnsw" and self._settings.num_gpus:
            raise ValueError(f"num_gpus is {self._settings.num_gpus}, expected 0: FAISS walks its graphs on the host")
        return FAISS_KINDS[self.kind](self.dim, self.metric, self._settings)

    def __len__(self) -> int:
        return int((self._store.table.ids >= 0).sum())

    @property
    def ids(self) -> Tensor:
        """(N,) int64 ids in the index, ascending."""
        ids = self._store.table.ids
        return ids[ids >= 0].sort().values

    def add(self, vectors: Tensor, ids: Tensor | None = None) -> Tensor:
        """Adds ``vectors`` (M, d), finite, under ``ids`` (M,); returns the ids.

        With torch the first vectors decide the dtype: float64 is kept, narrower types become float32. FAISS keeps
        float32 only.

        Args:
            vectors: (M, d).
            ids: (M,) whole numbers >= 0, distinct and not in the index; None goes on from the largest that ever was.

        Raises:
            ValueError, TypeError: another width, numbers that are not finite, ids that are taken, or float64 vectors
                for a torch index of float32.
        """
        vectors = self._checked("vectors", vectors)
        if ids is None:
            start = self._store.table.largest + 1
            ids = torch.arange(start, start + len(vectors))
        else:
            ids = self._checked_ids(ids, vectors)
            taken = ids[self._store.table.rows_of(ids) >= 0]
            if len(taken):
                raise ValueError(f"ids holds {int(taken[0])}, which is in the index, expected new ids: use update")
        if len(ids):
            self._store.add(vectors, ids)
        return ids

    def update(self, ids: Tensor, vectors: Tensor) -> None:
        """Puts ``vectors`` (M, d) in the place of those under ``ids`` (M,).

        Raises:
            ValueError, TypeError: as :meth:`add`, or an id that is not in the index.
        """
        vectors = self._checked("vectors", vectors)
        ids = self._known_ids(ids, vectors)
        if len(ids):
            self._store.update(vectors, ids)

    def remove(self, ids: Tensor) -> None:
        """Takes out what is under ``ids`` (M,).

        Raises:
            ValueError, TypeError: ids that are no distinct whole numbers, or one that is not in the index.
        """
        ids = self._known_ids(ids, torch.as_tensor(ids))
        if len(ids):
            self._store.remove(ids)

    def rebuild(self) -> None:
        """Places the centres of "ivf" anew, or builds the graph of "hnsw" without what was removed. Flat: nothing."""
        self._store.rebuild()

    @torch.no_grad()
    def search(
        self, queries: Tensor, k: int, *, exclude: Tensor | None = None, sync: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest vectors to each query.

        Args:
            queries: (Q, d), finite; taken to the dtype of the index.
            k: >= 1.
            exclude: (Q,) an id that each query must not find, such as its own; -1 for none.
            sync: every rank holds an index of its own vectors, with ids distinct over ranks, and asks all of them
                together; queries may differ in number. All ranks must call.

        Returns:
            Values (Q, k) and ids (Q, k) int64, on the device of ``queries``. Similarities come largest first, distances
            smallest first, ties by the smaller id. Where fewer than k are found, ids are -1 and the values infinitely
            far: inf for distances, -inf for similarities.

        Raises:
            ValueError, TypeError: another width, numbers that are not finite, or k below 1.
        """
        check_number("k", k, 1)
        check_finite("queries", queries, width=self.dim)
        check_per_row("exclude", exclude, queries)
        wanted = k if exclude is None else k + 1
        prepared = prepare(queries, self.metric)
        costs, ids = self._search_ranks(prepared, wanted) if sync else self._store.search(prepared, wanted)
        costs, ids = costs.to(queries.device), ids.to(queries.device)
        if exclude is not None:
            costs, ids = _without(costs, ids, exclude)
        return as_values(costs, self.metric), ids

    def _search_ranks(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Every rank's index answers every rank's queries; a rank keeps the answers to its own."""
        if world_size() == 1:
            return self._store.search(queries, k)
        start = row_offset(queries)
        found = self._store.search(gather_rows(queries), k)
        own = slice(start, start + len(queries))
        costs, ids = (
            gather_rows(x.to(queries.device)).unflatten(0, (world_size(), -1))[:, own].transpose(0, 1).flatten(1)
            for x in found
        )
        return best(costs, ids, k)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the settings and torch's tensors to ``path`` (plain data), and FAISS' index to ``path`` + ".faiss"."""
        path = Path(path)
        state = {
            "schema_version": SCHEMA_VERSION,
            "settings": {"dim": self.dim, "metric": self.metric, "kind": self.kind, "backend": self.backend}
            | vars(self._settings),
            "largest": self._store.table.largest,
            "state": self._store.save(f"{path}.faiss"),
        }
        aside = path.with_name(path.name + ".part")
        torch.save(state, aside)
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> NeighborIndex:
        """What :meth:`save` wrote; ``device`` as for the constructor."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {saved['schema_version']}, expected {SCHEMA_VERSION}")
        index = cls(**saved["settings"], device=device)
        index._store.load(f"{path}.faiss", saved["state"])
        index._store.table.largest = saved["largest"]
        return index

    def _checked(self, name: str, vectors: Tensor) -> Tensor:
        check_finite(name, vectors, width=self.dim)
        if self.backend == "torch" and vectors.dtype == torch.float64 and self._store.dtype == torch.float32:
            raise TypeError(f"{name} has dtype torch.float64, expected torch.float32 as the vectors in the index have")
        return prepare(vectors, self.metric)

    def _checked_ids(self, ids: Tensor, like: Tensor) -> Tensor:
        ids = torch.as_tensor(ids)
        check_per_row("ids", ids, like)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids has dtype {ids.dtype}, expected whole numbers")
        ids = ids.detach().to("cpu", torch.int64)
        if len(ids) and int(ids.min()) < 0:
            raise ValueError(f"ids holds {int(ids.min())}, expected numbers >= 0")
        in_order = ids.sort().values
        twice = in_order[1:][in_order[1:] == in_order[:-1]]
        if len(twice):
            raise ValueError(f"ids holds {int(twice[0])} twice, expected distinct ids")
        return ids

    def _known_ids(self, ids: Tensor, like: Tensor) -> Tensor:
        ids = self._checked_ids(ids, like)
        unknown = ids[self._store.table.rows_of(ids) < 0]
        if len(unknown):
            raise ValueError(f"ids holds {int(unknown[0])}, expected ids that are in the index")
        return ids

    def __repr__(self) -> str:
        kept = f"kind={self.kind!r}, backend={self.backend!r}"
        return f"NeighborIndex(dim={self.dim}, metric={self.metric!r}, {kept}, len={len(self)})"


def _without(costs: Tensor, ids: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
    """Drops the excluded id of each row, or else the last."""
    last = (ids == exclude.to(ids)[:, None]) & (ids >= 0)
    order = last.to(torch.uint8).argsort(dim=1, stable=True)[:, :-1]
    return costs.gather(1, order), ids.gather(1, order)
