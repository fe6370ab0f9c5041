"""What clusters are worth: against classes that training never saw, and, without any, by themselves.

Clusters are matched with classes one to one such that most examples agree (the Hungarian method); a cluster without a
class counts as wrong, and so does a class without a cluster. *Accuracy* is over examples, *balanced accuracy* the mean
over classes of the share found: what papers on imbalanced clustering print as ACC is the latter. Mutual information
and the Rand index need no matching.

The released evaluation of P2OT takes the first int(0.3 K) classes by index as head and the last as tail: right only if
indices are sorted by size, and at K = 3 no class at all is head and every one tail. Here the classes are sorted.

Source: Zhang, Ren, He, P2OT: Progressive Partial Optimal Transport for Deep Imbalanced Clustering, 2024, section 5.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import check_number, check_per_row, check_within
from counterpoise.recipes.evaluation import BANDS

FRACTIONS = (0.3, 0.4, 0.3)


@dataclass(frozen=True)
class ClusterEvaluation:
    """What :func:`clustering_metrics` returns; plain JSON types, never NaN.

    Attributes:
        scalars: accuracy, balanced_accuracy, head_accuracy, medium_accuracy, tail_accuracy, macro_f1,
            mutual_information (normalised by the arithmetic mean), all in [0, 1], and adjusted_rand_index in [-1/2, 1];
            None where undefined.
        per_class: lists of length C: recall, precision, f1 (None where undefined), train_count, test_count, band, and
            cluster, the one matched (None without).
        contingency: (K, C) examples of each cluster and class.
        matched: examples whose cluster is that of their class.
    """

    scalars: dict[str, float | None]
    per_class: dict[str, list[Any]]
    contingency: list[list[int]]
    matched: int


def clustering_metrics(
    clusters: Tensor,
    target: Tensor,
    *,
    num_clusters: int,
    num_classes: int,
    class_counts: Sequence[int] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    thresholds: tuple[int, int] | None = None,
) -> ClusterEvaluation:
    """Evaluates clusters against classes; the two may differ in number.

    A class without an example is left out of every mean over classes.

    Args:
        clusters: (N,) cluster of each example in [0, num_clusters - 1], N >= 1.
        target: (N,) class indices in [0, num_classes - 1].
        num_clusters: K >= 1.
        num_classes: C >= 1.
        class_counts: (C,) by which classes are head, medium or tail; None = those of ``target``.
        fractions, thresholds: see :func:`class_bands`.

    Raises:
        ValueError, TypeError: shapes that do not fit, or an index out of range.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    check_number("num_clusters", num_clusters, 1)
    check_number("num_classes", num_classes, 1)
    check_per_row("target", target, clusters)
    check_within("clusters", clusters, 0, num_clusters - 1, what="cluster indices")
    check_within("target", target, 0, num_classes - 1, what="class indices")
    found, labels = clusters.cpu().long(), target.cpu().long()
    if not len(labels):
        raise ValueError("clusters has shape (0,), expected at least one example")
    table = torch.bincount(found * num_classes + labels, minlength=num_clusters * num_classes)
    table = table.reshape(num_clusters, num_classes)
    cluster_of = match_clusters(table)
    support = table.sum(0)
    counts = support.tolist() if class_counts is None else [int(n) for n in class_counts]
    band = class_bands(counts, fractions=fractions, thresholds=thresholds)
    rates, matched = _per_class(table, cluster_of)
    kept = [c for c in range(num_classes) if support[c]]
    recall = rates["recall"]
    scalars = {
        "accuracy": matched / len(labels),
        "balanced_accuracy": _mean([recall[c] for c in kept]),
        **{f"{b}_accuracy": _mean([recall[c] for c in kept if band[c] == b]) for b in BANDS},
        "macro_f1": _mean([rates["f1"][c] for c in kept]),
        "mutual_information": float(normalized_mutual_info_score(labels.numpy(), found.numpy())),
        "adjusted_rand_index": float(adjusted_rand_score(labels.numpy(), found.numpy())),
    }
    per_class = {**rates, "train_count": counts, "test_count": support.tolist(), "band": band, "cluster": cluster_of}
    return ClusterEvaluation(scalars, per_class, table.tolist(), matched)


def match_clusters(table: Tensor) -> list[int | None]:
    """(C,) the cluster of each class, one to one, such that the examples (K, C) that agree are most; None without."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    cluster_of: list[int | None] = [None] * table.shape[1]
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        cluster_of[column] = row
    return cluster_of


def class_bands(
    class_counts: Sequence[int],
    *,
    fractions: Sequence[float] = FRACTIONS,
    thresholds: tuple[int, int] | None = None,
) -> list[str]:
    """Head, medium or tail for each of C classes, sorted by count.

    Args:
        class_counts: (C,) examples a class, in any order; classes of equal count stay together.
        fractions: shares of the classes that are head, medium and tail, >= 0, of sum one. A class belongs where the
            middle of its rank lies: of 10 classes 3, 4 and 3; of 3 one each; a single one is medium.
        thresholds: (many, few) instead: head has more than ``many`` examples, tail fewer than ``few``.

    Raises:
        ValueError: fractions or thresholds that are none.
    """
    if thresholds is not None:
        many, few = thresholds
        check_number("few", few, 0, many)
        return ["head" if n > many else "tail" if n < few else "medium" for n in class_counts]
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(f"fractions is {tuple(fractions)}, expected three numbers >= 0 of sum one")
    ascending, bands = sorted(class_counts), []
    for n in class_counts:
        rank = len(ascending) - (bisect_left(ascending, n) + bisect_right(ascending, n)) / 2
        place = rank / len(ascending)
        bands.append(BANDS[(place >= fractions[0]) + (place >= fractions[0] + fractions[1])])
    return bands


def label_free_metrics(probabilities: Tensor) -> dict[str, float]:
    """What can be said of clusters without classes.

    Args:
        probabilities: (N, K) of each example's clusters, rows of sum one, N >= 1.

    Returns:
        confidence (mean largest probability), effective_clusters (exp of the entropy of the clusters' shares, in
        [1, K]), empty_clusters, largest_share.
    """
    share = probabilities.argmax(1).bincount(minlength=probabilities.shape[1]).double() / len(probabilities)
    return {
        "confidence": float(probabilities.amax(1).double().mean()),
        "effective_clusters": float(torch.special.entr(share).sum().exp()),
        "empty_clusters": float((share == 0).sum()),
        "largest_share": float(share.max()),
    }


def shared_information(first: Tensor, second: Tensor) -> Tensor:
    """What the clusters of one view (N, K) tell of those of the other, over log K, in [0, 1]; 0-d, for logits."""
    p, q = (z.double().softmax(1) for z in (first, second))
    joint = p.T @ q / len(p)
    joint = (joint + joint.T) / 2
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    told = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, apart)
    return (told.sum() / max(math.log(p.shape[1]), 1e-12)).clamp(0, 1).float()


def _per_class(table: Tensor, cluster_of: list[int | None]) -> tuple[dict[str, list[float | None]], int]:
    """Recall, precision and F1 of each class after matching, and how many examples match."""
    rates: dict[str, list[float | None]] = {"recall": [], "precision": [], "f1": []}
    sizes, support, matched = table.sum(1).tolist(), table.sum(0).tolist(), 0
    for label, cluster in enumerate(cluster_of):
        hits = 0 if cluster is None else int(table[cluster, label])
        predicted = 0 if cluster is None else sizes[cluster]
        matched += hits
        rates["recall"].append(hits / support[label] if support[label] else None)
        rates["precision"].append(hits / predicted if predicted else None)
        rates["f1"].append(2 * hits / (support[label] + predicted) if support[label] else None)
    return rates, matched


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None


__all__ = [
    "FRACTIONS",
    "ClusterEvaluation",
    "class_bands",
    "clustering_metrics",
    "label_free_metrics",
    "match_clusters",
    "shared_information",
]
