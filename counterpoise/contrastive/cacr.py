r"""CACR, contrastive attraction and contrastive repulsion: far positives pull more, near negatives push more.

.. math::
   \pi^+(p \mid i) = \mathrm{softmax}_p\big({+t^+} c(z_i, z_p)\big), \qquad
   \pi^-(n \mid i) = \mathrm{softmax}_n\big({-t^-} c(z_i, z_n)\big)

.. math::
   \ell_i = \alpha \sum_p \pi^+(p \mid i)\, c(z_i, z_p) - \beta \sum_n \pi^-(n \mid i)\, c(z_i, z_n)

with c the squared distance of unit vectors ("euclidean", 2 - 2 cos) or "cosine" (1 - cos). Positives p are the other
views of example i, negatives n are other examples. t is an inverse temperature: 0 gives the plain mean (the released
"none", "without_w1", "without_w2"), infinity the farthest positive or the nearest negative.

Three releases, three losses that are not interchangeable; ``mode`` chooses.

- "in_batch" (beside SimCLR): views of the batch attract all other views; of two views the first repels the second's
  other examples, ``symmetric=True`` adds the other direction. The gradient flows through the weights too.
- "queue" (beside MoCo): queries attract the keys of a momentum encoder and repel a bank and, with ``intra_batch``, the
  other queries. The release cached the first view's products with the queue and reused them for every view; here each
  view has its own.
- "cross_view" (beside MoCo v3): for a key, weights over the queries of its example's other views scale both forces:
  :math:`\ell_k = \sum_q \pi^+(q \mid k) \big(\alpha\, c(q, k) - \beta \sum_n \pi^-(n \mid q)\, c(q, n)\big)`, n other
  examples' keys. The release's T is :math:`t^+ = 1/T`, :math:`t^- = 1/(2T)`; its "euclidean" is "cosine" with
  :math:`t^+ = 2/T`, :math:`t^- = 1/T`, summed over examples.

``cost="rbf"`` keeps the Euclidean attraction. "in_batch" repels by :math:`\beta \log` of the batch mean of
:math:`\sum_n \pi^- e^{-\kappa c}`, one number a pair of views and so no value per row; "cross_view" by
:math:`\frac{\beta}{t^-} \log \sum_n e^{-t^- c}` with the positive among the n, whose gradient is that of the Euclidean
form with its weights held fixed: :math:`1 / t^-` times a cross-entropy.

Compiled kernels hold one tile of the negatives' costs at a time (:mod:`counterpoise.kernels.pairwise`), but for "rbf"
in the batch; plain PyTorch, and what ``torch.compile`` traces, takes rows in tiles.

Several ranks: local rows against the rows of all ranks, gathered with gradient.

Source: Zheng et al., Contrastive Attraction and Contrastive Repulsion for Representation Learning, 2023, and the
released code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from counterpoise._core import Loss, No, Spec, reduce_losses, without_autocast
from counterpoise.contrastive._cacr import (
    NEEDS,
    Examples,
    Settings,
    conditional_weights,
    in_tiles,
    log_batch_mean,
    log_mean_kernel,
    log_sum,
    log_sum_in_tiles,
    mean_cost_in_tiles,
    of_all_ranks,
    others,
    prepare,
    settings,
    weighted_mean,
)
from counterpoise.contrastive._teacher import as_keys, meeting, student_and_teacher
from counterpoise.contrastive._views import stack_views
from counterpoise.kernels import pairwise
from counterpoise.memory import MemoryBank


def cacr_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    bank: MemoryBank | None = None,
    mode: str = "in_batch",
    cost: str = "euclidean",
    attraction_weight: float = 1.0,
    repulsion_weight: float = 1.0,
    attraction_sharpness: float = 1.0,
    repulsion_sharpness: float = 2.0,
    kernel_sharpness: float = 2.0,
    positive_prior: float = 0.0,
    symmetric: bool = False,
    intra_batch: bool = True,
    weight_gradient: str | None = None,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    r"""CACR; the formulas are at the top of this file.

    Args:
        z: "in_batch": (N, d), or (V, N, d) several views, N over all ranks at least 2. Else (N, d) or (V, N, d)
            queries.
        other: "in_batch": (N, d) the second view. Else keys of a momentum encoder, detached here: (N, d) of another
            view, or (L, N, d) of the first L views of the same examples, which the queries of other views meet.
        bank: "queue": negatives; read, never written. Enqueue the keys of a step after its loss. Slots never filled do
            not count; without any negative there is attraction alone.
        mode: "in_batch", "queue" or "cross_view".
        cost: "euclidean", "cosine" or, but for "queue", "rbf".
        attraction_weight: alpha >= 0; repulsion_weight: beta >= 0.
        attraction_sharpness: t+ >= 0; repulsion_sharpness: t- >= 0 (> 0 for "rbf" with "cross_view"). The releases use
            1 and 0.9 (CIFAR-10) or 2 (other data); 1 and 0.5 with "cross_view".
        kernel_sharpness: kappa > 0 of "rbf" with "in_batch".
        positive_prior: tau in [0, 1), the share of positives among the negatives, "in_batch" without "rbf"; the release
            uses 0.1. Each anchor's repulsion r from a view becomes (r - tau c) / (1 - tau), c the distance to its own
            positive there: as released, though correcting the mean of the negatives asks for + tau beta c.
        symmetric: "in_batch": both views of a pair repel the other's examples.
        intra_batch: "queue": the other queries of the batch are negatives too.
        weight_gradient: through which conditional weights the gradient flows: "full", "none" or, for "queue",
            "intra_batch", those of the other queries alone. None = "full" for "in_batch" and "none" for the others;
            the released queue form is "intra_batch".
        normalize: to unit length first.
        weight: (N,), of all views of an example; mask: (N,) bool, a masked example is neither anchor nor key.
        reduction: "none" gives (V*N,), view-major, one value an anchor; with "cross_view" (L*N,), the anchors are the
            keys. "mean", "sum". "rbf" with "in_batch" has no values per anchor.
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: keys and denominators of all ranks, once a process group exists.

    Returns:
        (V*N,), (L*N,) or 0-d, at least float32.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; one example over all ranks and no bank.
    """
    s = settings(
        mode=mode,
        cost=cost,
        attraction_weight=attraction_weight,
        repulsion_weight=repulsion_weight,
        attraction_sharpness=attraction_sharpness,
        repulsion_sharpness=repulsion_sharpness,
        kernel_sharpness=kernel_sharpness,
        positive_prior=positive_prior,
        symmetric=symmetric,
        intra_batch=intra_batch,
        weight_gradient=weight_gradient,
        normalize=normalize,
        reduction=reduction,
        sync=sync,
        weighted=weight is not None or mask is not None,
    )
    x, keys, same_views = _examples(z, other, bank, weight, mask, s)
    with without_autocast(x.z):
        if bank is not None:
            losses = _queue(x, keys, same_views, bank, s)
        else:
            losses = _in_batch(x, s) if mode == "in_batch" else _cross_view(x, keys, same_views, s)
    return reduce_losses(
        losses.flatten(),
        counted=None if mask is None else mask.repeat(len(losses)),
        weight=None if weight is None else weight.repeat(len(losses)),
        reduction=reduction,
        normalizer=normalizer,
        sync=s.sync,
    )


class CACRLoss(Loss):
    """Module form of :func:`cacr_loss`: ``loss(view1, view2)``, or with keys and a bank ``loss(q, k, bank=bank)``.

    ``loss.spec.needs`` says what its mode needs: "queue" a momentum encoder and a bank, "cross_view" a momentum encoder
    and a prediction head.

    Args:
        mode: "in_batch", "queue" or "cross_view".
        cost: "euclidean", "cosine" or "rbf".
        attraction_weight: alpha >= 0.
        repulsion_weight: beta >= 0.
        attraction_sharpness: t+ >= 0.
        repulsion_sharpness: t- >= 0.
        kernel_sharpness: kappa > 0.
        positive_prior: tau in [0, 1).
        symmetric: both views of a pair repel.
        intra_batch: the other queries repel beside a bank.
        weight_gradient: "full", "intra_batch", "none" or None.
        normalize: to unit length first.
    """

    spec = Spec(
        task="two_view",
        source="Zheng et al., Contrastive Attraction and Contrastive Repulsion for Representation Learning, 2023",
        distributed="gathers",
    )

    def __init__(
        self,
        mode: str = "in_batch",
        cost: str = "euclidean",
        attraction_weight: float = 1.0,
        repulsion_weight: float = 1.0,
        attraction_sharpness: float = 1.0,
        repulsion_sharpness: float = 2.0,
        kernel_sharpness: float = 2.0,
        positive_prior: float = 0.0,
        symmetric: bool = False,
        intra_batch: bool = True,
        weight_gradient: str | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            mode=mode,
            cost=cost,
            attraction_weight=attraction_weight,
            repulsion_weight=repulsion_weight,
            attraction_sharpness=attraction_sharpness,
            repulsion_sharpness=repulsion_sharpness,
            kernel_sharpness=kernel_sharpness,
            positive_prior=positive_prior,
            symmetric=symmetric,
            intra_batch=intra_batch,
            weight_gradient=weight_gradient,
            normalize=normalize,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        settings(**{name: value for name, value in self.options.items() if name != "normalizer"})
        self.spec = replace(self.spec, needs=NEEDS[mode])
        if (mode, cost) == ("in_batch", "rbf"):
            self.spec = replace(self.spec, per_row=No("the log of a mean over the batch has no value per anchor"))

    def forward(
        self,
        z: Tensor,
        other: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        bank: MemoryBank | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Views (N, d) to the reduced loss; ``labels`` are refused."""
        if labels is not None:
            raise ValueError("labels are given, expected none: CACR tells examples apart, not classes")
        return cacr_loss(z, other, bank=bank, weight=weight, mask=mask, **self.options)


def _examples(
    z: Tensor, other: Tensor | None, bank: MemoryBank | None, weight: Tensor | None, mask: Tensor | None, s: Settings
) -> tuple[Examples, Tensor, bool]:
    """Queries, keys (L, N, d) (in the batch the queries themselves), and whether view u of both is the same view."""
    if s.mode == "in_batch":
        queries, teacher, same_views = stack_views(z, other), None, True
        if len(queries) < 2:
            raise ValueError("z holds one view, expected two or more: the others attract")
    else:
        queries, teacher, same_views = student_and_teacher(z, other, every="query" if s.mode == "queue" else "key")
    if (bank is None) == (s.mode == "queue"):
        came = "None" if bank is None else "given"
        raise ValueError(f'bank is {came} in mode {s.mode!r}, expected one in mode "queue" alone')
    if bank is not None and bank.keys.shape[1] != queries.shape[2]:
        raise ValueError(f"bank has width {bank.keys.shape[1]}, expected {queries.shape[2]}, that of z")
    x = prepare(queries, weight, mask, normalize=s.unit, sync=s.sync)
    if len(x.all_ids) == 1 and bank is None:
        raise ValueError("z holds one example, expected at least two: the others repel")
    return x, x.z if teacher is None else as_keys(teacher, mask, normalize=s.unit), same_views


def _attraction(cost: Tensor, pairs: Tensor, s: Settings) -> Tensor:
    """(V, N) mean cost of the positives, from the costs (V, L, N) and which views meet, (V, L)."""
    of_weights = cost if s.gradient == "full" else cost.detach()
    return s.alpha * weighted_mean(cost, of_weights, s.t_plus, pairs[:, :, None], 1)


class _Negatives(NamedTuple):
    """Keys that repel, of which the first so many are fixed."""

    z: Tensor
    """(B, M, d): B views, each repelling by itself"""
    ids: Tensor
    """(M,), -1 for those of a bank"""
    usable: Tensor | None
    """(M,) bool"""
    fixed: int = 0


def _repulsion(q: Tensor, ids: Tensor, negatives: _Negatives, s: Settings) -> Tensor:
    """(n, B) mean cost of the negatives, negated; for "rbf" the log of a mean or a sum of exp(-cost)."""
    views, keys, _ = negatives.z.shape
    log_of_sum = s.mode == "cross_view" and s.cost == "rbf"
    if (log_of_sum or s.cost != "rbf") and len(q) * keys > pairwise.SMALL and pairwise.serves(q, negatives.z):
        return torch.stack([_repulsion_in_tiles(q, ids, z, negatives, s) for z in negatives.z], 1)

    def costs(q: Tensor) -> Tensor:
        return s.costs.between(q, negatives.z.flatten(0, 1)).unflatten(1, (views, keys))

    def rows(q: Tensor, ids: Tensor) -> Tensor:
        if log_of_sum:
            every = torch.ones_like(negatives.ids, dtype=torch.bool)
            return log_sum(-s.t_minus * costs(q), every if negatives.usable is None else negatives.usable) / s.t_minus
        candidate = others(ids, negatives.ids, negatives.usable)[:, None]
        if s.gradient == "none" and s.cost != "rbf":
            with torch.no_grad():
                weights, some = conditional_weights(costs(q), -s.t_minus, candidate)
            return torch.where(some, -s.costs.mean(q, negatives.z, weights), 0)
        cost = of_weights = costs(q)
        if s.gradient != "full":
            fixed = negatives.fixed if s.gradient == "intra_batch" else keys
            of_weights = torch.cat([cost[..., :fixed].detach(), cost[..., fixed:]], -1)
        if s.cost == "rbf":
            return log_mean_kernel(cost, of_weights, -s.t_minus, s.kappa, candidate)
        return -weighted_mean(cost, of_weights, -s.t_minus, candidate)

    return in_tiles(rows, q, ids, views * keys)


def _repulsion_in_tiles(q: Tensor, ids: Tensor, z: Tensor, negatives: _Negatives, s: Settings) -> Tensor:
    """(n,): :func:`_repulsion` by the keys ``z`` (M, d) of one view, without the (n, M) costs."""
    if s.cost == "rbf":
        return log_sum_in_tiles(s.costs, q, z, -s.t_minus, negatives.usable) / s.t_minus
    fixed = {"none": None, "intra_batch": negatives.fixed, "full": 0}[s.gradient]
    return -mean_cost_in_tiles(
        s.costs,
        q,
        z,
        -s.t_minus,
        (ids, negatives.ids),
        negatives.usable,
        fixed=fixed,
        constant=negatives.fixed,
        even=s.even,
    )


def _in_batch(x: Examples, s: Settings) -> Tensor:
    """(V, N): each view attracts all others, and the first of a pair repels the second's other examples."""
    views, z, keys = range(len(x.z)), x.z.unbind(), of_all_ranks(x.z, sync=s.sync).unbind()
    cost = s.costs.pairs(x.z, x.z)
    attracted = _attraction(cost, meeting(x.z, x.z, True), s)
    against = [[u for u in views if u > v or (s.symmetric and u != v)] for v in views]
    repelled = [
        _repulsion(z[v], x.ids, _Negatives(torch.stack([keys[i] for i in u]), x.all_ids, x.usable), s)
        for v, u in enumerate(against)
        if u
    ]
    if s.cost == "rbf":
        return attracted + s.beta * log_batch_mean(torch.cat(repelled, 1), x, sync=s.sync).mean()
    rows = []
    for v, u in enumerate(against):
        r = s.beta * repelled[v] if u else attracted.new_zeros(len(x.ids), 1)
        if s.tau and u:
            r = (r - s.tau * cost[v, u].T) / (1 - s.tau)
        rows.append(r.sum(1))
    return attracted + len(views) / sum(map(len, against)) * torch.stack(rows)


def _queue(x: Examples, keys: Tensor, same_views: bool, bank: MemoryBank, s: Settings) -> Tensor:
    """(V, N): queries attract keys of other views, and repel the bank and the other queries of their own view."""
    attracted = _attraction(s.costs.pairs(x.z, keys), meeting(x.z, keys, same_views), s)
    banked = bank.keys.to(x.z, copy=True)  # it may be written to before the backward pass
    ids, usable = torch.full_like(bank.labels, -1), bank.valid
    if s.intra_batch:
        ids = torch.cat([ids, x.all_ids])
        usable = torch.cat([usable, torch.ones_like(x.all_ids, dtype=torch.bool) if x.usable is None else x.usable])
    repelled = []
    for q, of_batch in zip(x.z, of_all_ranks(x.z, sync=s.sync), strict=True):
        z = torch.cat([banked, of_batch]) if s.intra_batch else banked
        repelled.append(_repulsion(q, x.ids, _Negatives(z[None], ids, usable, len(banked)), s)[:, 0])
    return attracted + s.beta * torch.stack(repelled)


def _cross_view(x: Examples, keys: Tensor, same_views: bool, s: Settings) -> Tensor:
    """(L, N): the forces between a key and its example's queries, under the key's weights over them."""
    cost, everywhere = s.costs.pairs(x.z, keys), of_all_ranks(keys, sync=s.sync)
    forces = []
    for u, z in enumerate(everywhere):
        queries = [v for v in range(len(x.z)) if not (same_views and v == u)]
        q, ids = x.z[queries].flatten(0, 1), x.ids.repeat(len(queries))
        r = _repulsion(q, ids, _Negatives(z[None], x.all_ids, x.usable), s)[:, 0].unflatten(
            0, (len(queries), len(x.ids))
        )
        of_weights = cost[queries, u] if s.gradient == "full" else cost[queries, u].detach()
        weights = (s.t_plus * of_weights).softmax(0)
        forces.append((weights * (s.alpha * cost[queries, u] + s.beta * r)).sum(0))
    return torch.stack(forces)
