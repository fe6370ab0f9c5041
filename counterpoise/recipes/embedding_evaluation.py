"""What embeddings are worth where labels are known: nearest neighbours, a linear probe, and how pairs compare."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise.neighbors import KNNClassifier

BINS = 40  # of the histograms of cosine similarities, over [-1, 1]
QUANTILES = (0.1, 0.5, 0.9)


def knn_scores(
    features: Tensor, target: Tensor, queries: Tensor, num_classes: int, *, k: int = 20, temperature: float = 0.1
) -> Tensor:
    """(M, C) shares of the votes of the ``k`` nearest examples by cosine, each weighted by exp(cosine / temperature).

    Args:
        features: (N, d) of the examples whose classes are known, target (N,).
        queries: (M, d).
        k: >= 1; no more than there are examples vote.

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, section 3.4.
    """
    judge = KNNClassifier(k, temperature=temperature).fit(features, target, num_classes)
    return judge.predict(queries)


class LinearProbe:
    """A logistic regression on standardised features, with balanced class weights.

    scikit-learn's with its own L2 penalty (C = 1), in at most 300 steps.

    Args:
        features: (N, d) of the examples whose classes are known, target (N,).
        num_classes: C; a class without an example has log-probability -inf.
    """

    def __init__(self, features: Tensor, target: Tensor, num_classes: int) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self.num_classes = num_classes
        self.scaler = StandardScaler().fit(features.double().numpy())
        self.regression = LogisticRegression(max_iter=300, class_weight="balanced")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps are the protocol
            self.regression.fit(self.scaler.transform(features.double().numpy()), target.numpy())

    def __call__(self, queries: Tensor) -> Tensor:
        """(M, C) log-probabilities of queries (M, d)."""
        found = torch.full((len(queries), self.num_classes), -torch.inf)
        log_prob = self.regression.predict_log_proba(self.scaler.transform(queries.double().numpy()))
        found[:, torch.from_numpy(self.regression.classes_)] = torch.from_numpy(log_prob).float()
        return found


def recalls(scores: Tensor, target: Tensor) -> list[float | None]:
    """(C,) recall of each class; None for one without an example."""
    right = (scores.argmax(1) == target).double()
    counts = target.bincount(minlength=scores.shape[1])
    hits = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, target, right)
    return [float(h / n) if n else None for h, n in zip(hits, counts, strict=True)]


def pair_similarities(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the two views of an example (N,), and of views of different examples (N * (N - 1),)."""
    table = normalize(first.float(), dim=1) @ normalize(second.float(), dim=1).T
    others = ~torch.eye(len(table), dtype=torch.bool, device=table.device)
    return table.diagonal(), table[others]


def similarity_quantiles(positive: Tensor, negative: Tensor) -> dict[str, float]:
    """The 10, 50 and 90 % quantiles of both, by name."""
    found: dict[str, float] = {}
    for name, values in (("positive", positive), ("negative", negative)):
        at = torch.quantile(values[:: -(-len(values) // 1_000_000)], values.new_tensor(QUANTILES))
        found |= {f"{name}_similarity_{round(100 * q)}": float(x) for q, x in zip(QUANTILES, at, strict=True)}
    return found


def similarity_histograms(positive: Tensor, negative: Tensor) -> dict[str, Any]:
    """Shares of both in equal bins over [-1, 1]."""
    edges = np.linspace(-1, 1, BINS + 1)
    shares = {
        name: np.histogram(values.clamp(-1, 1).cpu().numpy(), edges)[0] / max(len(values), 1)
        for name, values in (("positive", positive), ("negative", negative))
    }
    return {"edges": edges.tolist(), **{name: share.tolist() for name, share in shares.items()}}
