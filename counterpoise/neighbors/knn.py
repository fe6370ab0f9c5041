r"""Votes of the nearest neighbours, and the graph of them: how good are features, without training anything on them.

.. math:: p_c(q) = \sum_{i \in N_k(q)} \frac{e^{s_i / \tau}}{\sum_{j \in N_k(q)} e^{s_j / \tau}} \, [y_i = c]

with similarities s_i (a distance counts negative) and a temperature tau; uniform votes are the limit of a large tau. Wu
et al. use k = 200 and tau = 0.07 and do not divide by the sum, which leaves the winner the same.

Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_number, check_per_row, check_within
from counterpoise.neighbors.index import NeighborIndex

VOTES = ("softmax", "uniform")


def knn_graph(
    features: Tensor, k: int, metric: str = "cosine", *, backend: str = "auto", kind: str = "flat"
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest other examples of every example.

    Args:
        features: (N, d), finite.
        k: >= 1.
        metric, backend, kind: as :class:`NeighborIndex` has them.

    Returns:
        Indices (N, k) int64, -1 beyond the N - 1 others, and values (N, k): similarities or distances, nearest first.

    Raises:
        ValueError, TypeError: a shape or setting that does not fit.
    """
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ValueError(f"features has shape {tuple(getattr(features, 'shape', ()))}, expected (N, d)")
    index = NeighborIndex(features.shape[1], metric, backend=backend, kind=kind)
    ids = index.add(features)
    values, neighbors = index.search(features, k, exclude=ids.to(features.device))
    return neighbors, values


class KNNClassifier:
    """Classes by the votes of the k nearest training examples.

    Args:
        k: neighbours that vote, >= 1; all examples where there are fewer.
        temperature: tau > 0, not read by uniform votes.
        votes: "softmax" of the similarities (of negative distances), or "uniform".
        metric, backend, kind: as :class:`NeighborIndex` has them.

    Raises:
        ValueError, TypeError: a setting out of range.
    """

    def __init__(
        self,
        k: int = 20,
        *,
        temperature: float = 0.07,
        votes: str = "softmax",
        metric: str = "cosine",
        backend: str = "auto",
        kind: str = "flat",
    ) -> None:
        check_number("k", k, 1)
        check_number("temperature", temperature, 0, open_low=True)
        check_choice("votes", votes, VOTES)
        self.k, self.temperature, self.votes = k, temperature, votes
        self.metric, self.backend, self.kind = metric, backend, kind
        self._index: NeighborIndex | None = None

    def fit(self, features: Tensor, labels: Tensor, num_classes: int | None = None) -> KNNClassifier:
        """Remembers ``features`` (N, d) and their ``labels`` (N,), class indices; ``num_classes``: or the largest + 1.

        Raises:
            ValueError, TypeError: no example, labels of another length or type, or outside [0, num_classes - 1].
        """
        check_per_row("labels", labels, features)
        if len(features) == 0 or labels.is_floating_point():
            raise ValueError(f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected class indices")
        self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
        check_within("labels", labels, 0, self.num_classes - 1, what="class indices")
        self._index = NeighborIndex(features.shape[1], self.metric, backend=self.backend, kind=self.kind)
        self._index.add(features)
        self._labels = labels.long()
        return self

    @torch.no_grad()
    def predict(self, queries: Tensor, *, exclude: Tensor | None = None) -> Tensor:
        """(Q, C) shares of the votes, which sum to one; ``exclude`` (Q,) leaves a training example out for each query.

        Raises:
            RuntimeError: before :meth:`fit`. ValueError, TypeError: queries that do not fit.
        """
        if self._index is None:
            raise RuntimeError("predict was called before fit")
        values, ids = self._index.search(queries, min(self.k, len(self._labels)), exclude=exclude)
        found = ids >= 0
        similarities = torch.where(found, -values if self.metric == "euclidean" else values, -torch.inf)
        logits = similarities / self.temperature if self.votes == "softmax" else torch.where(found, 0.0, similarities)
        weights = torch.where(found, logits.softmax(1), 0.0)  # nothing found at all: no vote
        of = self._labels.to(ids.device)[ids.clamp_min(0)]
        return weights.new_zeros(len(queries), self.num_classes).scatter_add_(1, of, weights)
