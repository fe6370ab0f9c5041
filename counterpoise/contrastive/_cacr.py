"""What the forms of CACR are put together from: costs, softmax weights over them, examples of all ranks, tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from counterpoise._core import check_choice, check_number, world_size
from counterpoise.contrastive._views import as_rows
from counterpoise.distributed import gather_rows
from counterpoise.kernels import pair_rules, pairwise

TILE_ELEMENTS = 2**24  # at most so many costs are held at a time
SHARPEST = 1e6  # float32 holds what it is multiplied with

NEEDS: dict[str, tuple[str, ...]] = {
    "in_batch": (),
    "queue": ("momentum_encoder", "bank"),
    "cross_view": ("momentum_encoder", "predictor"),
}
COSTS = {
    "in_batch": ("euclidean", "cosine", "rbf"),
    "queue": ("euclidean", "cosine"),
    "cross_view": ("euclidean", "cosine", "rbf"),
}
GRADIENTS = {"in_batch": ("full", "none"), "queue": ("none", "intra_batch", "full"), "cross_view": ("none", "full")}


class Examples(NamedTuple):
    """Embeddings of V views of N examples, and what identifies the M examples of all ranks."""

    z: Tensor
    """(V, N, d)"""
    ids: Tensor
    """(N,) int64, their places among those of all ranks"""
    all_ids: Tensor
    """(M,) int64"""
    usable: Tensor | None
    """(M,) bool"""
    counted: Tensor | None
    """(N,) bool"""
    weight: Tensor | None
    """(N,)"""


def prepare(views: Tensor, weight: Tensor | None, mask: Tensor | None, *, normalize: bool, sync: bool) -> Examples:
    """Examples of ``views`` (V, N, d); weight and mask (N,) are checked, what is masked becomes zero."""
    v, n, _ = views.shape
    rows = as_rows(views, None, weight, mask, normalize=normalize, sync=sync)
    ids, usable = rows.ids[:n, 1], mask
    if sync:  # on every rank, masked or not
        usable = gather_rows(torch.ones_like(ids) if mask is None else mask.long()) > 0
    return Examples(rows.z.unflatten(0, (v, n)), ids, gather_rows(ids) if sync else ids, usable, mask, weight)


def of_all_ranks(views: Tensor, *, sync: bool) -> Tensor:
    """(V, M, d) from the (V, N, d) of each rank, with gradient."""
    return gather_rows(views.transpose(0, 1)).transpose(0, 1) if sync else views


class Costs(NamedTuple):
    """Costs of two embeddings: 1 - their product for ``cosine``, else the squared distance (2 - 2 cos if ``unit``)."""

    cosine: bool
    unit: bool

    def between(self, q: Tensor, k: Tensor) -> Tensor:
        """(n, M) costs between ``q`` (n, d) and ``k`` (M, d), in one product."""
        if self.cosine or self.unit:
            factor = 1 if self.cosine else 2
            return torch.addmm(q.new_full((1,), factor), q, k.T, alpha=-factor)
        return torch.addmm(q.square().sum(1, keepdim=True) + k.square().sum(1), q, k.T, alpha=-2)

    def mean(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        """(n, B) means of the costs between ``q`` (n, d) and ``k`` (B, M, d) under ``weights`` (n, B, M).

        The costs are linear in the products, so their mean is the cost of a mean key: no (n, M) gradient is formed.
        """
        product = (q[:, None] * torch.einsum("nbm,bmd->nbd", weights, k)).sum(-1)
        if self.cosine or self.unit:
            return 1 - product if self.cosine else 2 - 2 * product
        return q.square().sum(1, keepdim=True) + torch.einsum("nbm,bm->nb", weights, k.square().sum(-1)) - 2 * product

    def as_products(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """Rows whose products p (n, M) make the costs, a + b p: both, a and b."""
        if self.cosine or self.unit:
            factor = 1.0 if self.cosine else 2.0
            return q, k, factor, -factor
        one = torch.ones_like(q[:, :1]), torch.ones_like(k[:, :1])
        squares = q.square().sum(1, keepdim=True), k.square().sum(1, keepdim=True)
        return torch.cat([q, squares[0], one[0]], 1), torch.cat([-2 * k, one[1], squares[1]], 1), 0.0, 1.0

    def pairs(self, q: Tensor, k: Tensor) -> Tensor:
        """(V, L, N) costs between the views ``q`` (V, N, d) and ``k`` (L, N, d) of the same examples."""
        products = _among_views(q) if q is k else torch.stack([(view * k).sum(-1) for view in q])
        if self.cosine or self.unit:
            return 1 - products if self.cosine else 2 - 2 * products
        return q.square().sum(-1)[:, None] + k.square().sum(-1) - 2 * products


def _among_views(z: Tensor) -> Tensor:
    """(V, V, N) products of the views ``z`` (V, N, d) of the same examples, of one with itself without gradient."""
    views, own = z.unbind(), z.detach().square().sum(-1)
    found = {pair: (views[pair[0]] * views[pair[1]]).sum(-1) for pair in itertools.combinations(range(len(z)), 2)}
    row = lambda v: [own[v] if u == v else found[min(u, v), max(u, v)] for u in range(len(z))]  # noqa: E731
    return torch.stack([torch.stack(row(v)) for v in range(len(z))])


def conditional_weights(
    of_weights: Tensor, sharpness: float, candidate: Tensor, dim: int = -1
) -> tuple[Tensor, Tensor]:
    """softmax(sharpness * of_weights) along ``dim`` over the candidates, and where there is one."""
    logits, some = _among(sharpness * of_weights, candidate, dim)
    return logits.softmax(dim), some


def weighted_mean(cost: Tensor, of_weights: Tensor, sharpness: float, candidate: Tensor, dim: int = -1) -> Tensor:
    """Mean of ``cost`` along ``dim`` under the conditional weights; 0 where there is no candidate."""
    weights, some = conditional_weights(of_weights, sharpness, candidate, dim)
    return torch.where(some, (weights * cost).sum(dim), 0)


def log_mean_kernel(cost: Tensor, of_weights: Tensor, sharpness: float, kernel: float, candidate: Tensor) -> Tensor:
    """Log of the mean of exp(-kernel * cost) along the last dimension, under those weights; 0 without candidates."""
    logits, some = _among(sharpness * of_weights, candidate, -1)
    return torch.where(some, (logits.log_softmax(-1) - kernel * cost).logsumexp(-1), 0)


def log_sum(logits: Tensor, candidate: Tensor) -> Tensor:
    """Log-sum-exp along the last dimension; 0 without candidates."""
    logits, some = _among(logits, candidate, -1)
    return torch.where(some, logits.logsumexp(-1), 0)


def mean_cost_in_tiles(
    costs: Costs,
    q: Tensor,
    k: Tensor,
    sharpness: float,
    ids: tuple[Tensor, Tensor],
    usable: Tensor | None,
    *,
    fixed: int | None,
    constant: int,
    even: bool,
) -> Tensor:
    """(n,): :func:`weighted_mean` of the costs of ``q`` (n, d) and ``k`` (M, d) over usable keys of other ids.

    Args:
        ids: of the queries and of the keys; where the key of a query's id is found, it stands so far behind the
            constant ones.
        fixed: the weights of so many first keys carry no gradient; None = none of them does.
        constant: so many first keys have none themselves, and no id.
        even: all queries are likely to weigh the same.
    """
    q, k, constant_cost, factor = costs.as_products(q, k)
    weights = None if usable is None else torch.where(usable, 0.0, -torch.inf)
    rules = pair_rules.pairs(q, itself=ids[0] + constant, log_weight=weights, sharpness=sharpness * factor)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        products = q @ k.T
        straight = products.shape[1] if fixed is None else fixed
        of_weights = torch.cat([products[:, :straight].detach(), products[:, straight:]], 1)
        return (weighted_mean(products, of_weights, sharpness * factor, others(*ids, usable)),)

    mean, log_sum = pairwise.softmax_mean(q, k, rules, plain, fixed=fixed, constant=constant, even=even)
    return torch.where(log_sum == -torch.inf, 0, constant_cost + factor * mean)


def log_sum_in_tiles(costs: Costs, q: Tensor, k: Tensor, sharpness: float, usable: Tensor | None) -> Tensor:
    """(n,): :func:`log_sum` of ``sharpness`` times the costs over the usable keys."""
    q, k, constant_cost, factor = costs.as_products(q, k)
    weights = None if usable is None else torch.where(usable, 0.0, -torch.inf)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        every = torch.ones_like(k[:, 0], dtype=torch.bool) if usable is None else usable
        sums = log_sum(sharpness * factor * (q @ k.T), every)
        return sums, torch.zeros_like(sums)

    rules = pair_rules.pairs(q, log_weight=weights, sharpness=sharpness * factor)
    found = pairwise.masked_sums(q, k, rules, plain).log_sum_exp
    return torch.where(found == -torch.inf, 0, found + sharpness * constant_cost)


def _among(logits: Tensor, candidate: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Logits, at the lowest number (-inf alone would make NaN) for what is no candidate; and where there is one."""
    return torch.where(candidate, logits, torch.finfo(logits.dtype).min), candidate.any(dim)


def in_tiles(function: Callable[[Tensor, Tensor], Tensor], q: Tensor, ids: Tensor, width: int) -> Tensor:
    """``function(q, ids)``, in tiles of rows that are recomputed in the backward pass where it would not fit."""
    rows = max(1, TILE_ELEMENTS // max(width, 1))
    if len(q) <= rows:
        return function(q, ids)
    tiles = [slice(start, start + rows) for start in range(0, len(q), rows)]
    return torch.cat([checkpoint(function, q[tile], ids[tile], use_reentrant=False) for tile in tiles])


def others(ids: Tensor, key_ids: Tensor, usable: Tensor | None) -> Tensor:
    """(n, M) bool: usable keys of other examples than the query's."""
    different = ids[:, None] != key_ids
    return different if usable is None else different & usable


def log_batch_mean(logs: Tensor, x: Examples, *, sync: bool) -> Tensor:
    """(P,) log of the weighted mean over the examples of all ranks of exp(``logs``), (N, P); 0 where none counts."""
    w = torch.ones_like(logs[:, 0]) if x.weight is None else x.weight.to(logs.dtype)
    w = w if x.counted is None else torch.where(x.counted, w, 0)
    if sync:
        logs, w = gather_rows(logs), gather_rows(w)
    mass = w.sum()
    counted = (w > 0)[:, None]
    return log_sum((logs + torch.where(w > 0, w, 1).log()[:, None]).T, counted.T) - torch.where(mass > 0, mass, 1).log()


class Settings(NamedTuple):
    """The options by the symbols of the equations."""

    mode: str
    cost: str
    alpha: float
    beta: float
    t_plus: float
    t_minus: float
    kappa: float
    tau: float
    symmetric: bool
    intra_batch: bool
    gradient: str
    unit: bool
    sync: bool
    even: bool
    """all anchors are likely to weigh the same"""

    @property
    def costs(self) -> Costs:
        """How two embeddings are compared."""
        return Costs(cosine=self.cost == "cosine", unit=self.unit)


def settings(
    *,
    mode: str,
    cost: str,
    attraction_weight: float,
    repulsion_weight: float,
    attraction_sharpness: float,
    repulsion_sharpness: float,
    kernel_sharpness: float,
    positive_prior: float,
    symmetric: bool,
    intra_batch: bool,
    weight_gradient: str | None,
    normalize: bool,
    reduction: str,
    sync: bool,
    weighted: bool = False,
) -> Settings:
    """The options; raises for values out of range and for what a mode does not have."""
    check_choice("mode", mode, NEEDS)
    check_choice("cost", cost, COSTS[mode])
    check_number("attraction_weight", attraction_weight, 0)
    check_number("repulsion_weight", repulsion_weight, 0)
    check_number("attraction_sharpness", attraction_sharpness, 0, SHARPEST)
    check_number(
        "repulsion_sharpness", repulsion_sharpness, 0, SHARPEST, open_low=mode == "cross_view" and cost == "rbf"
    )
    check_number("kernel_sharpness", kernel_sharpness, 0, SHARPEST, open_low=True)
    check_number("positive_prior", positive_prior, 0)
    gradient = GRADIENTS[mode][0] if weight_gradient is None else weight_gradient
    check_choice("weight_gradient", gradient, GRADIENTS[mode])
    if positive_prior >= 1 or (positive_prior and (mode != "in_batch" or cost == "rbf")):
        raise ValueError(
            f'positive_prior is {positive_prior}, expected a number in [0, 1) in mode "in_batch" without "rbf", else 0'
        )
    if symmetric and mode != "in_batch":
        raise ValueError(f'symmetric is True in mode {mode!r}, expected mode "in_batch"')
    if mode == "queue" and not normalize:
        raise ValueError("normalize is False, expected True with a bank: its keys are unit vectors")
    if (mode, cost, reduction) == ("in_batch", "rbf", "none"):
        raise ValueError('reduction is "none", expected "mean" or "sum": "rbf" takes the log of a mean over the batch')
    return Settings(
        mode,
        cost,
        attraction_weight,
        repulsion_weight,
        attraction_sharpness,
        repulsion_sharpness,
        kernel_sharpness,
        positive_prior,
        symmetric,
        intra_batch,
        gradient,
        normalize,
        sync and world_size() > 1,
        not weighted and mode != "cross_view" and reduction != "none",
    )
