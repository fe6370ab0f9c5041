r"""Barlow Twins: the cross-correlation of two views should be the identity.

.. math:: C = \frac{1}{N} \hat z_1^\top \hat z_2, \qquad
          L = \sum_i (C_{ii} - 1)^2 + \lambda \sum_{i \ne j} C_{ij}^2

with each feature standardised over the batch (biased variance plus eps). The statistics are those of the batch over all
ranks, so several ranks give what one process gives on the whole batch (lightly standardises each rank by itself, which
is another loss).

Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021, eq. 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterpoise._core import No, Spec, at_least_float32, check_number, check_per_row, without_autocast, world_size
from counterpoise.contrastive._views import stack_views
from counterpoise.distributed import all_reduce_sum


def barlow_twins_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    off_diagonal_weight: float = 0.0051,
    eps: float = 1e-5,
    scale: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = True,
) -> Tensor:
    """Barlow Twins; the formula is at the top of this file, lambda is ``off_diagonal_weight``.

    Args:
        z: (N, d), or both views as (2, N, d); other: (N, d) the second view. N over all ranks is at least 2.
        off_diagonal_weight: lambda >= 0.
        eps: > 0, added to the variance.
        scale: > 0, multiplies the loss (solo-learn uses 0.1).
        weight: (N,) >= 0, example weights in the batch statistics; mask: (N,) bool, False leaves an example out.
        sync: statistics of all ranks, once a process group exists.

    Returns:
        0-d, at least float32: one value a batch. Without any counted example, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit, or a batch of one example (what a mask
            leaves is not counted: that would stall a device).
    """
    check_number("off_diagonal_weight", off_diagonal_weight, 0)
    check_number("eps", eps, 0, open_low=True)
    check_number("scale", scale, 0, open_low=True)
    views = stack_views(z, other)
    if len(views) != 2:
        raise ValueError(f"z holds {len(views)} views, expected two: z and other, or z of shape (2, N, d)")
    check_per_row("weight", weight, views[0])
    check_per_row("mask", mask, views[0], dtype=torch.bool)
    sync = sync and world_size() > 1
    if views.shape[1] == 1 and not sync:
        raise ValueError("z holds one example, expected at least two: the batch is standardised")
    x = at_least_float32(views)
    u = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)
    if mask is not None:
        x, u = torch.where(mask[None, :, None], x, 0), torch.where(mask, u, 0)

    def total(value: Tensor) -> Tensor:
        return all_reduce_sum(value) if sync else value

    with without_autocast(x):
        mass = total(u.sum())
        n = torch.where(mass > 0, mass, 1)
        centred = x - total((u[:, None] * x).sum(1, keepdim=True)) / n
        variance = total((u[:, None] * centred.square()).sum(1, keepdim=True)) / n
        first, second = centred / (variance + eps).sqrt()
        c = total((u[:, None] * first).T @ second) / n
    diagonal = c.diagonal()
    on, off = (diagonal - 1).square().sum(), c.square().sum() - diagonal.square().sum()
    return torch.where(mass > 0, scale * (on + off_diagonal_weight * off), c.sum() * 0)


class BarlowTwinsLoss(nn.Module):
    """Module form of :func:`barlow_twins_loss`: ``loss(view1, view2)``.

    Args:
        off_diagonal_weight: lambda >= 0.
        eps: > 0, added to the variance.
        scale: > 0.
    """

    spec = Spec(
        task="two_view",
        source="Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021, eq. 1",
        distributed="statistics",
        per_row=No("one value a batch: the loss is a function of the batch's correlation matrix"),
        weight_linear=No("weights enter the batch statistics, which are scale-free in them"),
    )

    def __init__(
        self, off_diagonal_weight: float = 0.0051, eps: float = 1e-5, scale: float = 1.0, sync: bool = True
    ) -> None:
        super().__init__()
        check_number("off_diagonal_weight", off_diagonal_weight, 0)
        check_number("eps", eps, 0, open_low=True)
        check_number("scale", scale, 0, open_low=True)
        self.off_diagonal_weight = off_diagonal_weight
        self.eps = eps
        self.scale = scale
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
            weight=weight,
            mask=mask,
            sync=self.sync,
        )
