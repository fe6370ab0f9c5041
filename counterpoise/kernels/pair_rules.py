"""Which pairs of queries and keys are positives, which are candidates, and how a product becomes a logit: what the
operators of the pairwise family evaluate inside a tile, from ids, so that no mask of all pairs is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EVERY, NOT_SELF, SAME_LABEL, SAME_CLASS, POSITIVE_OR_BANK, NONE = range(6)
_UNSIGNED = 2**31 - 1


@dataclass(frozen=True)
class Pairs:
    """What is positive, what is a candidate, and how a product becomes a logit; made by :func:`pairs`."""

    positive: int
    candidate: int
    query_ids: Tensor | None
    key_ids: Tensor | None
    index: Tensor | None
    probability: Tensor | None
    itself: Tensor | None
    log_weight: Tensor | None
    sharpness: float

    def arguments(self) -> tuple[Any, ...]:
        """In the order of the schemas."""
        return (
            self.positive,
            self.candidate,
            self.query_ids,
            self.key_ids,
            self.index,
            self.probability,
            self.itself,
            self.log_weight,
            self.sharpness,
        )


def pairs(
    like: Tensor,
    *,
    positive: int = NONE,
    candidate: int = EVERY,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    index: Tensor | None = None,
    probability: Tensor | None = None,
    itself: Tensor | None = None,
    log_weight: Tensor | None = None,
    sharpness: float = 1.0,
) -> Pairs:
    """Rules for the tiles of queries and keys that are like ``like``.

    Args:
        positive: SAME_LABEL or SAME_CLASS, or NONE: then ``index`` says, or there are none.
        candidate: any rule.
        query_ids, key_ids: (N, 2) and (M, 2) int64, row and label.
        index: (N, P) int64; probability: (N, P), None = ones.
        itself: (N,) int64, a key that is no candidate.
        log_weight: (M,), added to a key's logits; -inf takes it out, also as a positive by rule.
        sharpness: what products are multiplied with.
    """
    weights = None if log_weight is None else log_weight.detach().to(like.dtype).contiguous()
    ids: tuple[Tensor | None, Tensor | None] = (None, None)
    if query_ids is not None and key_ids is not None and not {positive, candidate} <= {EVERY, NONE}:
        ids = _narrow(query_ids, key_ids, weights)
    some = None if index is None or index.shape[1] == 0 else index.contiguous()
    likely = None if some is None or probability is None else probability.to(like.dtype).contiguous()
    own = None if itself is None else itself.contiguous()
    return Pairs(positive, candidate, *ids, some, likely, own, weights, sharpness)


def _narrow(query_ids: Tensor, key_ids: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids as (2, N), for the CPU in int32: equality and the sign are all that rules ask for.

    A key that is taken out has an unknown label and nobody's row, so that it is no positive.
    """
    ids = torch.cat([query_ids, key_ids])
    if ids.is_cpu and (ids.min() <= -_UNSIGNED or ids.max() > _UNSIGNED):
        values, ids = ids.unique(return_inverse=True)
        ids = ids - (values < 0).sum()
    ids = ids.T.to(torch.int32 if ids.is_cpu else torch.int64, memory_format=torch.contiguous_format)
    queries, keys = (x.contiguous() for x in ids.split([len(query_ids), len(key_ids)], dim=1))
    if weights is not None:
        nobody = torch.tensor([[torch.iinfo(ids.dtype).min], [-1]], dtype=ids.dtype, device=ids.device)
        keys = torch.where(weights == -torch.inf, nobody, keys)
    return queries, keys
