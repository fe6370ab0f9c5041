r"""Barlow Twins: the cross-correlation of two views should be the identity.

.. math:: C = \frac{1}{N} \hat z_1^\top \hat z_2, \qquad
          L = \sum_i (C_{ii} - 1)^2 + \lambda \sum_{i \ne j} C_{ij}^2

with each feature standardised over the batch: the variance has divisor N - ``correction`` (0), and eps is added to it.
Huang et al.'s variant is ``correction=1, eps=0``, with which identical views have :math:`C_{ii} = (N - 1) / N`. The
statistics are those of the batch over all ranks, so several ranks give what one process gives on the whole batch
(lightly standardises each rank by itself, which is another loss). The squared entries of C sum to the inner product of
:math:`\hat z_1 \hat z_1^\top` and :math:`\hat z_2 \hat z_2^\top`; on one process the cheaper of both is formed.

Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021, eq. 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from counterpoise._core import (
    No,
    Spec,
    at_least_float32,
    check_choice,
    check_embeddings,
    check_number,
    check_per_row,
    without_autocast,
    world_size,
)
from counterpoise.contrastive._views import stack_views
from counterpoise.distributed import all_reduce_sum


def barlow_twins_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    off_diagonal_weight: float = 0.0051,
    eps: float = 1e-5,
    scale: float = 1.0,
    correction: int = 0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = True,
) -> Tensor:
    """Barlow Twins; the formula is at the top of this file, lambda is ``off_diagonal_weight``.

    Args:
        z: (N, d), or both views as (2, N, d); other: (N, d) the second view. N over all ranks is at least 2.
        off_diagonal_weight: lambda >= 0.
        eps: >= 0, added to the variance; a feature without any variance counts as zero.
        scale: > 0, multiplies the loss (solo-learn uses 0.1).
        correction: 0 or 1, what the divisor of the variance is short of N (as in ``torch.var``; with weights as with
            the ``aweights`` of ``torch.cov``).
        weight: (N,) >= 0, example weights in the batch statistics; mask: (N,) bool, False leaves an example out.
        sync: statistics of all ranks, once a process group exists.

    Returns:
        0-d, at least float32: one value a batch. Without any counted example, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit, or a batch of one example (what a mask
            leaves is not counted: that would stall a device).
    """
    _check(off_diagonal_weight, eps, correction, scale)
    first, second = _two_views(z, other)
    check_per_row("weight", weight, first)
    check_per_row("mask", mask, first, dtype=torch.bool)
    sync = sync and world_size() > 1
    if len(first) == 1 and not sync:
        raise ValueError("z holds one example, expected at least two: the batch is standardised")
    u = None
    if weight is not None or mask is not None or sync or len(first) == 0:
        u = first.new_ones(len(first)) if weight is None else weight.to(first.dtype)
        if mask is not None:
            first, second = (torch.where(mask[:, None], view, 0) for view in (first, second))
            u = torch.where(mask, u, 0)
    with without_autocast(first):
        diagonal, squares = _correlation(first, second, u, eps, correction, sync=sync)
        on, off = (diagonal - 1).square().sum(), squares - diagonal.square().sum()
        loss = scale * (on + off_diagonal_weight * off)
        if u is None:
            return loss
        mass = all_reduce_sum(u.sum()) if sync else u.sum()
        return torch.where(mass > 0, loss, squares * 0)


def _check(off_diagonal_weight: float, eps: float, correction: int, scale: float) -> None:
    check_number("off_diagonal_weight", off_diagonal_weight, 0)
    check_number("eps", eps, 0)
    check_choice("correction", correction, (0, 1))
    check_number("scale", scale, 0, open_low=True)


def _two_views(z: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both views (N, d), float32 at least; raises ValueError for shapes that do not fit."""
    if other is not None:
        check_embeddings("z", z)
        check_embeddings("other", other, like=z)
        return at_least_float32(z), at_least_float32(other)
    views = stack_views(z, None)
    if len(views) != 2:
        raise ValueError(f"z holds {len(views)} views, expected two: z and other, or z of shape (2, N, d)")
    first, second = at_least_float32(views)
    return first, second


def _correlation(
    first: Tensor, second: Tensor, u: Tensor | None, eps: float, correction: int, *, sync: bool
) -> tuple[Tensor, Tensor]:
    """Diagonal (D,) and sum of squares of the correlation of views (N, D), with weights (N,) of the examples."""

    def total(value: Tensor) -> Tensor:
        return all_reduce_sum(value) if sync else value

    def weighted(value: Tensor) -> Tensor:
        return value if u is None else u[:, None] * value

    n: Tensor | float = len(first)
    if u is None and eps > 0 and correction == 0:
        first, second = (batch_norm(view, None, None, training=True, eps=eps) for view in (first, second))
    else:
        x = torch.stack([first, second])
        divisor: Tensor | float = n - correction
        if u is not None:
            mass, mass_of_squares = total(torch.stack([u.sum(), u.square().sum()]))
            n = torch.where(mass > 0, mass, 1)
            short = n - correction * mass_of_squares / n
            divisor = torch.where(short > 0, short, 1)
        centred = x - total(weighted(x).sum(1, keepdim=True)) / n
        variance = total(weighted(centred.square()).sum(1, keepdim=True)) / divisor + eps
        first, second = centred / torch.where(variance > 0, variance, 1).sqrt()
    if sync or 2 * len(first) >= first.shape[1]:
        c = total(weighted(first).T @ second) / n
        return c.diagonal(), c.square().sum()
    squares = ((weighted(first) @ first.T) * (second @ weighted(second).T)).sum()
    return (weighted(first) * second).sum(0) / n, squares / n**2


class BarlowTwinsLoss(nn.Module):
    """Module form of :func:`barlow_twins_loss`: ``loss(view1, view2)``.

    Args:
        off_diagonal_weight: lambda >= 0.
        eps: >= 0, added to the variance.
        scale: > 0.
        correction: 0 or 1, what the divisor of the variance is short of N.
    """

    spec = Spec(
        task="two_view",
        source="Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021, eq. 1",
        distributed="statistics",
        per_row=No("one value a batch: the loss is a function of the batch's correlation matrix"),
        weight_linear=No("weights enter the batch statistics, which are scale-free in them"),
    )

    def __init__(
        self,
        off_diagonal_weight: float = 0.0051,
        eps: float = 1e-5,
        scale: float = 1.0,
        correction: int = 0,
        sync: bool = True,
    ) -> None:
        super().__init__()
        _check(off_diagonal_weight, eps, correction, scale)
        self.off_diagonal_weight = off_diagonal_weight
        self.eps = eps
        self.scale = scale
        self.correction = correction
        self.sync = sync

    def forward(
        self,
        z: Tensor,
        other: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        bank: nn.Module | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Views (N, d) to the loss of the batch; ``labels`` and ``bank`` are refused."""
        if labels is not None or bank is not None:
            raise ValueError(f"BarlowTwinsLoss got {'labels' if bank is None else 'a bank'}, expected two views only")
        return barlow_twins_loss(
            z,
            other,
            off_diagonal_weight=self.off_diagonal_weight,
            eps=self.eps,
            scale=self.scale,
            correction=self.correction,
            weight=weight,
            mask=mask,
            sync=self.sync,
        )
