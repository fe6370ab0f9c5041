r"""The one InfoNCE: queries against keys, with rules for what is positive and what is a candidate.

.. math:: \ell_i = -\sum_j t_{ij} \Big( s_{ij} - \log \sum_{k \in \mathrm{cand}(i)} a_k e^{s_{ik}} \Big), \qquad
          s_{ij} = \frac{q_i \cdot k_j}{\tau}

with t the positive rule normalised to sum to one over j, and a_k = exp(key_log_weight_k). Rules are functions of ids,
so they can be evaluated on a tile. Compiled kernels hold one tile of similarities at a time
(:mod:`counterpoise.kernels.pairwise`) wherever the rules are those of this file and the key weights are not learned.
Everything else, and what ``torch.compile`` traces, is plain PyTorch: beyond ``tile_elements`` similarities the rows are
taken in tiles that are recomputed in the backward pass. Either way memory grows with the tile and not with N * M.

Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018, eq. 4; the masked form
with target distributions is the common one behind NT-Xent, SupCon and soft variants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from counterpoise._core import at_least_float32, without_autocast
from counterpoise.kernels import pair_rules, pairwise

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


def same_class(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Positive rule across two modalities: the same label, and the row's own counterpart."""
    known = key_ids[None, :, 1] >= 0
    return ((query_ids[:, None, 1] == key_ids[None, :, 1]) & known) | ~not_self(query_ids, key_ids)


def positive_or_bank(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Candidate rule of a memory bank: the query's positives and the bank's keys (row -1), not the other rows."""
    return same_label(query_ids, key_ids) | (key_ids[None, :, 0] < 0)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    query_ids: Tensor,
    key_ids: Tensor,
    positive: Rule | Tensor = same_label,
    candidate: Rule | None = not_self,
    itself: Tensor | None = None,
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
        positive: (n, M) bool or probabilities >= 0, normalised over the keys here; or no rule but the positives
            themselves, (N, P) int64 indices of keys, which costs no (n, M) mask.
        candidate: (n, M) bool: what the log-sum-exp runs over; None = every key.
        itself: (N,) int64, the key that is the row itself and so no candidate: ``not_self`` without a mask.
        key_log_weight: (M,), added to a key's logits in the log-sum-exp; -inf takes the key out, also as a positive.
        extra_logits: (N, K) further candidates that are never positive, already divided by the temperature.
        temperature: divisor > 0, a number, 0-d or (N,).
        row_weight: (N,), multiplies the row losses.
        tile_elements: at most this many similarities are held at a time.

    Returns:
        loss (0 for a row without positives), log-sum-exp (-inf without a candidate), log-probability of the positives
        (their mean; 0 without any), and which rows have a positive.
    """
    q, k = at_least_float32(queries), at_least_float32(keys)
    tau = temperature.to(q.dtype) if isinstance(temperature, Tensor) else temperature
    rules = _Rules(
        query_ids, key_ids, positive, candidate, itself, None if key_log_weight is None else key_log_weight.to(q.dtype)
    )
    extra = None if extra_logits is None else extra_logits.to(q.dtype)
    if _streams(q, k, rules, alone=queries is keys):
        sums = _streamed(q, k, rules, tau, extra, alone=queries is keys)
    else:
        q = q / (tau[:, None] if isinstance(tau, Tensor) and tau.ndim else tau)
        sums = _in_rows(q, k, rules, extra, max(1, tile_elements // max(len(k), 1)))
    lse, log_prob, valid = _log_probabilities(*sums)
    loss = torch.where(valid, -log_prob, 0)
    return InfoNCE(loss if row_weight is None else loss * row_weight.to(loss.dtype), lse, log_prob, valid)


class _Rules(NamedTuple):
    """Arguments of :func:`info_nce` that say which pairs count."""

    query_ids: Tensor
    key_ids: Tensor
    positive: Rule | Tensor
    candidate: Rule | None
    itself: Tensor | None
    weights: Tensor | None

    def rows(self, tile: slice) -> _Rules:
        """Those of a tile of rows."""
        return self._replace(
            query_ids=self.query_ids[tile],
            positive=self.positive[tile] if isinstance(self.positive, Tensor) else self.positive,
            itself=None if self.itself is None else self.itself[tile],
        )


_KNOWN: dict[Rule | None, int] = {
    None: pair_rules.EVERY,
    not_self: pair_rules.NOT_SELF,
    same_label: pair_rules.SAME_LABEL,
    same_class: pair_rules.SAME_CLASS,
    positive_or_bank: pair_rules.POSITIVE_OR_BANK,
}


def _streams(q: Tensor, k: Tensor, rules: _Rules, *, alone: bool) -> bool:
    """Whether the kernels know the rules, and there are more pairs than a matrix holds as well.

    Two tensors that both have a gradient cost a fourth product in tiles: without masks a matrix serves for longer.
    """
    known = rules.candidate in _KNOWN and (isinstance(rules.positive, Tensor) or rules.positive in _KNOWN)
    learned = rules.weights is not None and rules.weights.requires_grad
    bare = isinstance(rules.positive, Tensor) and rules.candidate is None
    dearer = bare and not alone and q.requires_grad and k.requires_grad
    limit = pairwise.SMALL * (pairwise.DEARER if dearer else 1)
    return known and not learned and len(q) * len(k) > limit and pairwise.serves(q, k)


def _streamed(
    q: Tensor, k: Tensor, rules: _Rules, tau: float | Tensor, extra_logits: Tensor | None, *, alone: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, similarity to the positives and their mass, in tiles; ``alone``: the queries are the keys."""
    index = rules.positive if isinstance(rules.positive, Tensor) else None
    candidate = _KNOWN[rules.candidate]
    alive = None if rules.weights is None or index is None else (rules.weights != -torch.inf)[index].to(q.dtype)
    known = pair_rules.pairs(
        q,
        positive=pair_rules.NONE if index is not None else _KNOWN[rules.positive],  # type: ignore[index]
        candidate=candidate,
        query_ids=rules.query_ids,
        key_ids=rules.key_ids,
        index=index,
        probability=alive,
        itself=rules.itself,
        log_weight=rules.weights,
    )
    by_row = isinstance(tau, Tensor) and tau.ndim > 0
    by_ids = index is None or candidate != pair_rules.EVERY
    mirrored = (
        alone
        and not by_row
        and rules.weights is None
        and (rules.query_ids is rules.key_ids or not by_ids)
        and candidate != pair_rules.POSITIVE_OR_BANK
        and (rules.itself is None or _is_range(rules.itself))
    )
    if mirrored:  # one tensor on both sides
        q = k = q / tau**0.5
    else:
        q = q / (tau[:, None] if by_row else tau)  # type: ignore[index]
    sums = pairwise.masked_sums(q, k, known, lambda q, k: _plain_sums(q, k, *_evaluated(q, rules)), mirrored=mirrored)
    mass = sums.mass
    if index is not None:
        mass = torch.full_like(mass, index.shape[1]) if alive is None else alive.sum(1)
    lse = sums.log_sum_exp
    return lse if extra_logits is None else _joined(lse, extra_logits), sums.similarity, mass


def _is_range(itself: Tensor) -> bool:
    """Whether rows are numbered in order, where that can be read without stalling; devices take any numbers."""
    return not itself.is_cpu or torch.equal(itself, torch.arange(len(itself)))


def _joined(lse: Tensor, extra_logits: Tensor) -> Tensor:
    """Log-sum-exp (n,) with further logits (n, K), -inf without any."""
    logits = torch.cat([lse[:, None], extra_logits], dim=1)
    some = (logits != -torch.inf).any(1)
    return torch.where(some, torch.where(some[:, None], logits, 0).logsumexp(1), -torch.inf)


def _in_rows(
    q: Tensor, k: Tensor, rules: _Rules, extra_logits: Tensor | None, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`_streamed` gives, from whole rows of similarities, so many at a time."""
    if len(q) <= rows:
        return _tile(q, k, rules, extra_logits)
    parts = []
    for start in range(0, len(q), rows):
        tile = slice(start, start + rows)
        extra = None if extra_logits is None else extra_logits[tile]
        parts.append(checkpoint(_tile, q[tile], k, rules.rows(tile), extra, use_reentrant=False))
    lse, similarity, mass = (torch.cat(column) for column in zip(*parts, strict=True))
    return lse, similarity, mass


def _log_probabilities(lse: Tensor, similarity: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, mean log-probability of the positives and validity, each (n,)."""
    valid = (mass > 0) & (lse != -torch.inf)  # NaN is a value too
    mean = similarity / torch.where(mass > 0, mass, 1)
    return lse, torch.where(valid, mean - torch.where(valid, lse, 0), 0), valid


def _evaluated(q: Tensor, rules: _Rules) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of a tile of rows: positives and, by index, where; candidates, the row itself, log weights."""
    if isinstance(rules.positive, Tensor):
        index, t = rules.positive, torch.ones_like(rules.positive, dtype=torch.bool)
    else:
        index, t = None, rules.positive(rules.query_ids, rules.key_ids)
    t = t if t.dtype == torch.bool else t.to(q.dtype)
    if rules.weights is not None:
        alive = rules.weights != -torch.inf if index is None else (rules.weights != -torch.inf)[index]
        t = t & alive if t.dtype == torch.bool else torch.where(alive, t, 0)
    candidates = None if rules.candidate is None else rules.candidate(rules.query_ids, rules.key_ids)
    return t, index, candidates, rules.itself, rules.weights


def _tile(q: Tensor, k: Tensor, rules: _Rules, extra_logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, similarity to the positives and their mass of a tile of rows, each (n,)."""
    t, *terms = _evaluated(q, rules)
    lse, similarity = _sums(q, k, t, *terms, extra_logits)
    return lse, similarity, t.sum(1, dtype=q.dtype)


def _sums(q: Tensor, k: Tensor, t: Tensor, *terms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the candidates and similarity to the positives, each (n,): fused where that can be done."""
    *fusible, extra_logits = terms
    learned = extra_logits is not None or any(x is not None and x.requires_grad for x in (t, *fusible))
    transformed = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(q)
    if learned or transformed or not len(k):
        return _plain_sums(q, k, t, *terms)
    return _FusedSums.apply(q, k, t, *fusible)


def _plain_sums(
    q: Tensor,
    k: Tensor,
    t: Tensor,
    index: Tensor | None,
    candidates: Tensor | None,
    itself: Tensor | None,
    weights: Tensor | None,
    extra_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :class:`_FusedSums` computes, as it is written; ``t`` is that of all keys (n, M) or of ``index`` (n, P)."""
    with without_autocast(q):
        s = q @ k.T
    similarity = _chosen(t, s if index is None else s.gather(1, index)).sum(1)
    logits = s if candidates is None else torch.where(candidates, s, -torch.inf)
    if itself is not None:
        logits = logits.scatter(1, itself[:, None], -torch.inf)
    if weights is not None:
        logits = logits + weights
    if extra_logits is not None:
        logits = torch.cat([logits, extra_logits], dim=1)
    some = (logits != -torch.inf).any(1)
    return torch.where(some, torch.where(some[:, None], logits, 0).logsumexp(1), -torch.inf), similarity


def _chosen(t: Tensor, x: Tensor) -> Tensor:
    """``t * x`` that is 0 where t is, whatever x."""
    return torch.where(t, x, 0) if t.dtype == torch.bool else torch.where(t > 0, t * x, 0)


class _FusedSums(torch.autograd.Function):
    """:func:`_plain_sums` in place: one (n, M) matrix is kept and one more is made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        t: Tensor,
        index: Tensor | None,
        candidates: Tensor | None,
        itself: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(q):
            s = q @ k.T
        similarity = _chosen(t, s if index is None else s.gather(1, index)).sum(1)
        if candidates is not None:
            s.masked_fill_(~candidates, -torch.inf)
        if itself is not None:
            s.scatter_(1, itself[:, None], -torch.inf)
        if weights is not None:
            s.add_(weights)
        top = s.amax(1)
        top = torch.where(top == -torch.inf, 0, top)
        terms = s.sub_(top[:, None]).exp_()
        total = terms.sum(1)
        ctx.save_for_backward(q, k, t, index, candidates, itself, weights, terms, total)
        return total.log() + top, similarity

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, t, index, candidates, itself, weights, terms, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated: it must have a graph
            sums = _plain_sums(q, k, t, index, candidates, itself, weights)
            leaves = [x for x, needed in zip((q, k), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(sums, leaves, grads, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), *[None] * 5
        of_sum, of_similarity = grads
        share = torch.where(total == 0, 0, of_sum / total)[:, None]
        pull = _chosen(t, of_similarity[:, None])
        grad = pull.addcmul_(terms, share) if index is None else (terms * share).scatter_add_(1, index, pull)
        with without_autocast(q):
            grad_q = grad @ k if ctx.needs_input_grad[0] else None
            grad_k = grad.T @ q if ctx.needs_input_grad[1] else None
        return grad_q, grad_k, *[None] * 5
