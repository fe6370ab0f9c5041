"""Rows that grow, ids and the rows that hold them, and vectors kept by torch: what an index stands on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counterpoise.neighbors.exact import Keys, search


class GrowingRows:
    """Rows of one shape in memory that doubles when it is full, so that many small additions cost what one does."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like[:0].clone()
        self._length = 0

    @property
    def rows(self) -> Tensor:
        """A view of what is there."""
        return self._memory[: self._length]

    def append(self, x: Tensor) -> None:
        """Copies ``x`` behind the last row."""
        length = self._length + len(x)
        if length > len(self._memory):
            grown = self._memory.new_empty(max(length, 2 * len(self._memory)), *x.shape[1:])
            grown[: self._length] = self.rows
            self._memory = grown
        self._memory[self._length : length] = x
        self._length = length

    def keep(self, kept: Tensor) -> None:
        """Keeps the rows where ``kept`` is True, in their order."""
        self._memory = self.rows[kept]
        self._length = len(self._memory)


class IdTable:
    """Which row holds which id. A row without one holds -1."""

    def __init__(self) -> None:
        self._ids = GrowingRows(torch.empty(0, dtype=torch.int64))
        self._sorted: tuple[Tensor, Tensor] | None = None
        self.largest = -1

    @property
    def ids(self) -> Tensor:
        """(N,) int64 ids by row."""
        return self._ids.rows

    def append(self, ids: Tensor) -> None:
        """The ids of new rows."""
        self._ids.append(ids)
        self._sorted = None
        self.largest = max(self.largest, int(ids.max()) if len(ids) else -1)

    def rows_of(self, ids: Tensor) -> Tensor:
        """(M,) the row of each id, -1 where none holds it."""
        if len(self.ids) == 0:
            return torch.full_like(ids, -1)
        if self._sorted is None:
            self._sorted = torch.sort(self.ids)
        values, order = self._sorted
        at = torch.searchsorted(values, ids).clamp_max(len(values) - 1)
        return torch.where(values[at] == ids, order[at], -1)

    def keep(self, kept: Tensor) -> None:
        """Drops the rows where ``kept`` is False; those behind move up."""
        self._ids.keep(kept)
        self._sorted = None

    def clear(self, rows: Tensor) -> None:
        """Leaves ``rows`` where they are, without ids."""
        self._ids.rows[rows] = -1
        self._sorted = None


class TorchStore:
    """Prepared vectors in one tensor, searched exactly. Removal copies the rows that stay."""

    def __init__(self, dim: int, metric: str, device: torch.device | None) -> None:
        self.dim, self.metric, self.device = dim, metric, device
        self.table = IdTable()
        self._vectors: GrowingRows | None = None
        self._keys: Keys | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the first vectors added; None before."""
        return None if self._vectors is None else self._vectors.rows.dtype

    def add(self, vectors: Tensor, ids: Tensor) -> None:
        """New rows; their first decide dtype and, where it was left open, device."""
        if self._vectors is None:
            self._vectors = GrowingRows(vectors.to(self.device or vectors.device))
        self._vectors.append(vectors.to(self._vectors.rows))
        self.table.append(ids)
        self._keys = None

    def update(self, vectors: Tensor, ids: Tensor) -> None:
        """Writes over the rows of known ids."""
        x = self.vectors
        x[self.table.rows_of(ids).to(x.device)] = vectors.to(x)
        self._keys = None

    def remove(self, ids: Tensor) -> None:
        """Drops the rows of known ids."""
        kept = torch.ones(len(self.table.ids), dtype=torch.bool)
        kept[self.table.rows_of(ids)] = False
        self.table.keep(kept)
        if self._vectors is not None:
            self._vectors.keep(kept.to(self._vectors.rows.device))
        self._keys = None

    @property
    def vectors(self) -> Tensor:
        """(N, dim)."""
        return torch.empty(0, self.dim) if self._vectors is None else self._vectors.rows

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Costs and ids of prepared queries, on the device of the vectors."""
        if self._keys is None:
            self._keys = Keys(self.vectors, self.table.ids.to(self.vectors.device), self.metric)
        return search(self._keys, queries.to(self.vectors), k)

    def rebuild(self) -> None:
        """Nothing to do: there is no structure beside the vectors."""

    def save(self, file: str) -> dict[str, Any]:
        """All of it as tensors; nothing goes beside."""
        return {"ids": self.table.ids.clone(), "vectors": self.vectors.clone()}

    def load(self, file: str, state: dict[str, Any]) -> None:
        """What :meth:`save` returned."""
        self.add(state["vectors"], state["ids"])
