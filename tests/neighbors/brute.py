"""The definition: every pair in float64 by differences or sums, sorted with ties by the smaller id."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def values_of(queries: Tensor, keys: Tensor, metric: str) -> Tensor:
    """(Q, N) in float64."""
    q, x = queries.double(), keys.double()
    if metric == "euclidean":
        return (q[:, None] - x).square().sum(2).sqrt()
    if metric == "cosine":
        q, x = normalize(q, dim=1), normalize(x, dim=1)
    return (q[:, None] * x).sum(2)


def neighbors_of(
    queries: Tensor, keys: Tensor, k: int, metric: str, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values, rounded to the dtype of ``keys`` before they are compared, and ids."""
    ids = torch.arange(len(keys)) if ids is None else ids
    ids, order = ids.sort()
    values = values_of(queries, keys[order], metric).to(keys.dtype)
    at = values.argsort(dim=1, stable=True, descending=metric != "euclidean")[:, :k]
    return values.gather(1, at), ids[at]
