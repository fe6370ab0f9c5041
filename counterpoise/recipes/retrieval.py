r"""How well pairs find each other: the rank of the true partner among all, by cosine.

.. math:: r_i = 1 + |\{j : s_{ij} > s_{ii}\}| + \tfrac12 |\{j \ne i : s_{ij} = s_{ii}\}|, \qquad
    \text{recall@}k = \frac1N \sum_i [r_i \le k]

Ties count half, so that embeddings that are all the same rank in the middle, and not first.

Source: recall at k as in Faghri et al., VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, 2018,
section 4.1; ties: derived.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise._core import check_embeddings

AT = (1, 5, 10)
ROWS = 1024  # queries compared with everything at once


@torch.no_grad()
def pair_ranks(queries: Tensor, keys: Tensor) -> Tensor:
    """(N,) float64 rank of ``keys[i]`` among all keys, by cosine with ``queries[i]``; 1 is best.

    Args:
        queries, keys: (N, d).

    Raises:
        ValueError, TypeError: shapes that differ.
    """
    check_embeddings("queries", queries)
    check_embeddings("keys", keys, like=queries)
    queries, keys = normalize(queries.double(), dim=1), normalize(keys.double(), dim=1)
    ranks = []
    for rows in torch.arange(len(queries), device=queries.device).split(ROWS):
        similarity = queries[rows] @ keys.T
        own = similarity.gather(1, rows[:, None])
        near = 1e-12  # copies of a key differ by rounding
        ahead, level = (similarity > own + near).sum(1), ((similarity - own).abs() <= near).sum(1)
        ranks.append(1 + ahead + (level - 1) / 2)
    return torch.cat(ranks).double()


def retrieval_scores(there: Tensor, back: Tensor, names: tuple[str, str]) -> dict[str, float]:
    """Recalls at 1, 5 and 10, means over both directions and each alone, and median ranks.

    Args:
        there, back: (N,) ranks of either direction.
        names: of the two, such as ("image_to_table", "table_to_image").
    """
    found = {f"recall_at_{k}": (recall_at(there, k) + recall_at(back, k)) / 2 for k in AT}
    for name, ranks in zip(names, (there, back), strict=True):
        found |= {f"{name}_recall_at_{k}": recall_at(ranks, k) for k in AT}
        found[f"{name}_median_rank"] = float(ranks.median())
    return found


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of ranks (N,) that are at most ``k``."""
    return float((ranks <= k).double().mean())


__all__ = ["AT", "pair_ranks", "recall_at", "retrieval_scores"]
