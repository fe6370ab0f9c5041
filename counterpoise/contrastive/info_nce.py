r"""The one InfoNCE: queries against keys, with rules for what is positive and what is a candidate.

.. math:: \ell_i = -\sum_j t_{ij} \Big( s_{ij} - \log \sum_{k \in \mathrm{cand}(i)} a_k e^{s_{ik}} \Big), \qquad
          s_{ij} = \frac{q_i \cdot k_j}{\tau}

with t the positive rule normalised to sum to one over j, and a_k = exp(key_log_weight_k). Rules are functions of ids,
so they can be evaluated on a tile of rows: beyond ``tile_elements`` similarities the rows are taken in tiles that are
recomputed in the backward pass, and memory grows with the tile and not with N * M.

Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018, eq. 4; the masked form
with target distributions is the common one behind NT-Xent, SupCon and soft variants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from counterpoise._core import at_least_float32, without_autocast

Rule = Callable[[Tensor, Tensor], Tensor]
"""(query ids (n, 2), key ids (M, 2)) -> (n, M) bool, or probabilities for a positive rule.

Ids are (row, label): the row's identity, and what makes two rows positives (an item, a class). -1 is never the same.
"""


class InfoNCE(NamedTuple):
    """What :func:`info_nce` returns, each (N,)."""

    loss: Tensor
    log_sum_exp: Tensor
    positive_log_prob: Tensor
    valid: Tensor


def not_self(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Candidate rule: every key but the query itself."""
    return query_ids[:, None, 0] != key_ids[None, :, 0]


def same_label(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Positive rule: the same label, and not the query itself."""
    known = key_ids[None, :, 1] >= 0
    return (query_ids[:, None, 1] == key_ids[None, :, 1]) & known & not_self(query_ids, key_ids)


def positive_or_bank(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Candidate rule of a memory bank: the query's positives and the bank's keys (row -1), not the other rows."""
    return same_label(query_ids, key_ids) | (key_ids[None, :, 0] < 0)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    query_ids: Tensor,
    key_ids: Tensor,
    positive: Rule = same_label,
    candidate: Rule = not_self,
    key_log_weight: Tensor | None = None,
    extra_logits: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    row_weight: Tensor | None = None,
    tile_elements: int = 2**24,
) -> InfoNCE:
    """InfoNCE per row; the formula is at the top of this file. Nothing is normalised or gathered here.

    Args:
        queries: (N, d); keys: (M, d). float16 and bfloat16 are computed in float32.
        query_ids: (N, 2), key_ids: (M, 2) int64, see :data:`Rule`.
        positive: (n, M) bool or probabilities >= 0, normalised over the keys here.
        candidate: (n, M) bool: what the log-sum-exp runs over.
        key_log_weight: (M,), added to a key's logits in the log-sum-exp; -inf takes the key out, also as a positive.
        extra_logits: (N, K) further candidates that are never positive, already divided by the temperature.
        temperature: divisor > 0, a number, 0-d or (N,).
        row_weight: (N,), multiplies the row losses.
        tile_elements: at most this many similarities are held at a time.

    Returns:
        loss (0 for a row without positives), log-sum-exp, log-probability of the positives (their mean), and which
        rows have a positive.
    """
    q, k = at_least_float32(queries), at_least_float32(keys)
    tau = temperature.to(q.dtype) if isinstance(temperature, Tensor) else temperature
    q = q / (tau[:, None] if isinstance(tau, Tensor) and tau.ndim else tau)
    rows = max(1, tile_elements // max(len(k), 1))
    whole = len(q) <= rows
    parts = []
    for start in range(0, max(len(q), 1), rows):
        tile = slice(start, start + rows)
        arguments = (
            q[tile],
            k,
            query_ids[tile],
            key_ids,
            positive,
            candidate,
            key_log_weight,
            None if extra_logits is None else extra_logits[tile],
        )
        parts.append(_tile(*arguments) if whole else checkpoint(_tile, *arguments, use_reentrant=False))
    lse, log_prob, valid = (torch.cat(column) for column in zip(*parts, strict=True))
    loss = torch.where(valid, -log_prob, 0)
    return InfoNCE(loss if row_weight is None else loss * row_weight.to(loss.dtype), lse, log_prob, valid)


def _tile(
    q: Tensor,
    k: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    positive: Rule,
    candidate: Rule,
    key_log_weight: Tensor | None,
    extra_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, mean log-probability of the positives and validity of a tile of rows, each (n,)."""
    with without_autocast(q):
        s = q @ k.T
    t = positive(query_ids, key_ids).to(s.dtype)
    logits = torch.where(candidate(query_ids, key_ids), s, -torch.inf)
    if key_log_weight is not None:
        logits = logits + key_log_weight.to(s.dtype)
        t = torch.where(key_log_weight == -torch.inf, 0, t)
    if extra_logits is not None:
        logits = torch.cat([logits, extra_logits.to(s.dtype)], dim=1)
    mass = t.sum(1)
    valid = (mass > 0) & (logits != -torch.inf).any(1)  # NaN is a value too
    lse = torch.where(valid[:, None], logits, 0).logsumexp(1)
    similarity = torch.where(t > 0, t * s, 0).sum(1) / torch.where(mass > 0, mass, 1)
    return lse, torch.where(valid, similarity - lse, 0), valid
