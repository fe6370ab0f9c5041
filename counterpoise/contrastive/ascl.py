r"""ASCL, adaptive soft contrastive learning: the teacher key's neighbours in the bank become soft positives.

With k_i the teacher's key, z_1 .. z_K the bank, d_j = k_i . z_j and :math:`r = \mathrm{softmax}(d / \tau')`:

.. math::
   c_i = 1 + \frac{\sum_j r_j \log r_j}{\log K}, \qquad
   y_{i0} = 1, \quad y_{ij} = \min(1, \kappa\, c_i\, r_j), \qquad
   \ell_i = -\sum_{j=0}^{K} \frac{y_{ij}}{\sum_l y_{il}} \log \frac{e^{s_{ij}}}{\sum_l e^{s_{il}}}

with :math:`s_{i0} = q_i \cdot k_i / \tau` and :math:`s_{ij} = q_i \cdot z_j / \tau`. The confidence c_i in [0, 1] is 0
where no neighbour stands out (then it is MoCo's loss) and 1 where one does. Kinds:

========================  ===============================================================
"adaptive" (ASCL)         :math:`y_{ij} = \min(1, \kappa\, c_i\, r_j)`
"adaptive_hard" (AHCL)    :math:`y_{ij} = c_i` for the kappa nearest, else 0
"hard"                    :math:`y_{ij} = 1` for the kappa nearest, else 0
"normal"                  :math:`y_{ij} = 0`: NT-Xent with a bank
========================  ===============================================================

Targets carry no gradient and are made from the bank as it is: enqueue the keys after the loss. Only slots ever filled
count, also for K: with one of them or none, c is 0. The release starts with a bank of random vectors instead.

Several ranks: rows are independent of one another, given that all ranks hold the same bank.

Source: Feng and Patras, Adaptive Soft Contrastive Learning, 2022, and the released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from counterpoise._core import (
    Loss,
    Spec,
    check_choice,
    check_embeddings,
    check_number,
    reduce_losses,
    without_autocast,
    world_size,
)
from counterpoise.contrastive._teacher import as_keys, student_and_teacher
from counterpoise.contrastive._views import as_rows
from counterpoise.contrastive.info_nce import info_nce
from counterpoise.kernels import pair_rules, pairwise
from counterpoise.memory import MemoryBank

KINDS = ("adaptive", "adaptive_hard", "hard", "normal")


class ASCLTargets(NamedTuple):
    """What :func:`ascl_targets` returns."""

    labels: Tensor
    """(N, 1 + K), rows sum to one; column 0 is the own key"""
    confidence: Tensor
    """(N,) in [0, 1]"""


def ascl_targets(
    keys: Tensor,
    bank: MemoryBank,
    *,
    kind: str = "adaptive",
    num_neighbors: int = 1,
    target_temperature: float = 0.05,
) -> ASCLTargets:
    """Soft labels and confidence of teacher keys; the formulas are at the top of this file. For logging.

    Args:
        keys: (N, d), normalised here.
        bank: of K slots; read, never written.
        kind, num_neighbors, target_temperature: as for :func:`ascl_loss`.

    Returns:
        labels (N, 1 + K), 0 at slots never filled, and confidence (N,), detached and at least float32.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit.
    """
    check_settings(kind, num_neighbors, target_temperature)
    check_embeddings("keys", keys)
    bank = _checked_bank(bank, keys.shape[1])
    k = as_keys(keys.detach()[None], None)[0]
    y, confidence = soft_neighbors(k, bank.keys, bank.valid, kind, num_neighbors, target_temperature)
    labels = torch.cat([torch.ones_like(confidence)[:, None], y], dim=1)
    return ASCLTargets(labels / labels.sum(1, keepdim=True), confidence)


def soft_neighbors(
    keys: Tensor, neighbors: Tensor, candidate: Tensor, kind: str, num_neighbors: int, target_temperature: float
) -> tuple[Tensor, Tensor]:
    """Targets y (N, K) of the ``neighbors`` (K, d) before they are normalised, and the confidence (N,).

    Args:
        keys: (N, d) of unit length, as ``neighbors``.
        candidate: (K,) or (N, K) bool.
        kind, num_neighbors, target_temperature: as for :func:`ascl_loss`.
    """
    with torch.no_grad(), without_autocast(keys):
        logits = keys / target_temperature @ neighbors.to(keys).T
        logits = torch.where(candidate, logits, torch.finfo(logits.dtype).min)  # -inf makes NaN of a row without any
        r, count = logits.softmax(1), candidate.sum(-1)
        most = torch.where(count > 1, count, 2).to(r.dtype).log()
        confidence = torch.where(count > 1, 1 - torch.special.entr(r).sum(1) / most, 0).clamp(0, 1)
        if kind == "adaptive":
            return (r * (num_neighbors * confidence)[:, None]).clamp_max(1), confidence
        y = torch.zeros_like(r)
        if kind != "normal":
            nearest = logits.topk(min(int(num_neighbors), y.shape[1]), dim=1).indices
            height = confidence if kind == "adaptive_hard" else torch.ones_like(confidence)
            y = torch.where(candidate, y.scatter(1, nearest, height[:, None].expand_as(nearest)), 0)
        return y, confidence


def ascl_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    bank: MemoryBank | None = None,
    kind: str = "adaptive",
    num_neighbors: int = 1,
    temperature: float | Tensor = 0.1,
    target_temperature: float = 0.05,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """ASCL; the formulas are at the top of this file. All embeddings are normalised here.

    Args:
        z: (N, d) queries, or (V, N, d) of several views. The release augments them strongly.
        other: keys of a momentum encoder, detached here: (N, d) of another, weakly augmented view, or (L, N, d) of the
            first L views of the same examples. A query's loss is the mean over the keys of views other than its own.
        bank: K keys; read, never written. One never filled leaves nothing to compare with: a zero.
        kind: "adaptive", "adaptive_hard", "hard" or "normal".
        num_neighbors: kappa >= 1. The release uses 1, and 5 on CIFAR-100.
        temperature: tau > 0; a tensor may be learned.
        target_temperature: tau' > 0, of r. Above tau the targets would be softer than the predictions.
        weight: (N,), of all views of an example; mask: (N,) bool, a masked example is no query.
        reduction: "none" gives (V*N,), view-major; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: denominators of all ranks, once a process group exists.

    Returns:
        (V*N,) or 0-d, at least float32.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; no bank.
    """
    check_settings(kind, num_neighbors, target_temperature)
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, 0, open_low=True)
    queries, keys, same_views = student_and_teacher(z, other)
    bank = _checked_bank(bank, queries.shape[2])
    rows = as_rows(queries, None, weight, mask, normalize=True, sync=False)
    views, keys = rows.z.unflatten(0, queries.shape[:2]), as_keys(keys, mask)
    tau = temperature.to(views.dtype) if isinstance(temperature, Tensor) else temperature
    banked = bank.keys.to(views, copy=True)  # it may be written to before the backward pass
    wanted = []
    for k in keys:
        near, mass = _near(k, banked, bank.valid, kind, num_neighbors, target_temperature)
        wanted.append((k + near) / (1 + mass[:, None]))
    losses = []
    for v, q in enumerate(views):
        log_sum = _log_sum(q, banked, bank.valid, tau)
        met = [u for u in range(len(keys)) if not (same_views and u == v)]
        # targets sum to one: their mean log-probability is one logit, that of their mean key, less the log-sum-exp
        of_keys = [torch.logaddexp((q * keys[u]).sum(1) / tau, log_sum) - (q * wanted[u]).sum(1) / tau for u in met]
        losses.append(torch.stack(of_keys).mean(0))
    return reduce_losses(
        torch.cat(losses),
        counted=rows.counted,
        weight=rows.weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync and world_size() > 1,
    )


def _near(
    keys: Tensor, banked: Tensor, valid: Tensor, kind: str, num_neighbors: int, target_temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum of the bank's keys under their targets y (N, d), and of these (N,), without gradient."""
    if kind == "adaptive" and len(keys) * len(banked) > pairwise.SMALL and pairwise.serves(keys, banked):
        return _near_in_tiles(keys, banked, valid, num_neighbors, target_temperature)
    y, _ = soft_neighbors(keys, banked, valid, kind, num_neighbors, target_temperature)
    with without_autocast(keys):
        return y @ banked, y.sum(1)


def _near_in_tiles(
    keys: Tensor, banked: Tensor, valid: Tensor, num_neighbors: int, target_temperature: float
) -> tuple[Tensor, Tensor]:
    """:func:`_near` for "adaptive" without the (N, K) targets. One neighbour's y is c r <= 1 as it is."""
    rules = pair_rules.pairs(keys, log_weight=torch.where(valid, 0.0, -torch.inf), sharpness=1 / target_temperature)
    one = num_neighbors == 1
    mean, log_sum, mean_key = pairwise.softmax_sums(keys, banked, rules, mean_key=one)
    count = valid.sum()
    most = torch.where(count > 1, count, 2).to(mean.dtype).log()
    confidence = torch.where(count > 1, 1 - (log_sum - mean / target_temperature) / most, 0).clamp(0, 1)
    if mean_key is not None:
        return mean_key * confidence[:, None], torch.where(count > 0, confidence, 0)
    return pairwise.clamped_sums(keys, banked, rules, log_sum, num_neighbors * confidence)


def _log_sum(q: Tensor, banked: Tensor, valid: Tensor, temperature: float | Tensor) -> Tensor:
    """(N,) log-sum-exp of the logits against the bank's keys (K, d); -inf for an empty bank."""
    rows, keys = (torch.arange(len(x), device=x.device)[:, None].expand(-1, 2) for x in (q, banked))
    found = info_nce(
        q,
        banked,
        query_ids=rows,
        key_ids=keys,
        positive=rows[:, :0],
        candidate=None,
        key_log_weight=torch.where(valid, 0.0, -torch.inf),
        temperature=temperature,
    )
    return found.log_sum_exp


def check_settings(kind: str, num_neighbors: int, target_temperature: float) -> None:
    """Raises for a kind that is not known, less than one neighbour, or a temperature of 0."""
    check_choice("kind", kind, KINDS)
    check_number("num_neighbors", num_neighbors, 1)
    if num_neighbors % 1:
        raise TypeError(f"num_neighbors is {num_neighbors}, expected a whole number")
    check_number("target_temperature", target_temperature, 0, open_low=True)


def _checked_bank(bank: MemoryBank | None, width: int) -> MemoryBank:
    if bank is None:
        raise ValueError("bank is None, expected a MemoryBank: the neighbours lie in it")
    if bank.keys.shape[1] != width:
        raise ValueError(f"bank has width {bank.keys.shape[1]}, expected {width}, that of the embeddings")
    return bank


class ASCLLoss(Loss):
    """Module form of :func:`ascl_loss`: ``loss(queries, keys, bank=bank)``, then ``bank.enqueue(keys)``.

    Args:
        kind: "adaptive", "adaptive_hard", "hard" or "normal".
        num_neighbors: kappa >= 1.
        temperature: tau > 0.
        target_temperature: tau' > 0.
    """

    spec = Spec(
        task="queue_views",
        needs=("momentum_encoder", "bank"),
        source="Feng and Patras, Adaptive Soft Contrastive Learning, 2022",
    )

    def __init__(
        self,
        kind: str = "adaptive",
        num_neighbors: int = 1,
        temperature: float | Tensor = 0.1,
        target_temperature: float = 0.05,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            kind=kind,
            num_neighbors=num_neighbors,
            temperature=temperature,
            target_temperature=target_temperature,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_settings(kind, num_neighbors, target_temperature)
        if not isinstance(temperature, Tensor):
            check_number("temperature", temperature, 0, open_low=True)

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
        """Queries and keys (N, d) to the reduced loss; ``labels`` are refused."""
        if labels is not None:
            raise ValueError("labels are given, expected none: ASCL finds the neighbours by itself")
        return ascl_loss(z, other, bank=bank, weight=weight, mask=mask, **self.options)
