r"""How weights, batch weights and losses become one scalar: the same everywhere.

.. math:: \frac{1}{D} \sum_i w_i\, s_i\, \ell_i

l per-example losses, w what a reweighter says of them (detached), s the batch's own weights. D is 1 for weights that
sum to one, the number of counted rows for weights of mean one, and sum(w s) for raw ones; always over all ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_per_row, sum_over_ranks, world_size


class Reweighter(Protocol):
    """What turns detached losses (N,) into detached weights (N,)."""

    normalization: str

    def __call__(
        self,
        losses: Tensor,
        *,
        target: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Weights (N,) of the losses (N,)."""
        ...


def reweighted_loss(
    losses: Tensor,
    reweighter: Reweighter | None = None,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    target: Tensor | None = None,
    group: Tensor | None = None,
    index: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """The training loss; exact across ranks once gradients are averaged, as DDP does.

    Args:
        losses: (N,) from a loss with ``reduction="none"``.
        reweighter: None = the mean over counted rows, weighted by ``weight``.
        weight: (N,) of the batch; None = ones.
        mask: (N,) bool, True = counts. Rows that do not count are not shown to the reweighter; rows of a loss's
            ``ignore_index`` are not known here, so mask them.
        target, group, index, features: (N, ...) what the reweighter may need.

    Returns:
        0-d: world_size * local sum / D.

    Raises:
        ValueError: losses that are not one a row.
    """
    if losses.ndim != 1:
        raise ValueError(f'losses has shape {tuple(losses.shape)}, expected (N,): use reduction="none"')
    check_per_row("weight", weight, losses)
    check_per_row("mask", mask, losses, dtype=torch.bool)
    s = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)
    if mask is not None:  # what does not count may hold NaN
        losses, s = torch.where(mask, losses, 0), torch.where(mask, s, 0)
    if reweighter is None:
        w, normalization = torch.ones_like(losses), "mean_one"
    else:
        kept = slice(None) if mask is None else mask
        told = {"target": target, "group": group, "index": index, "features": features}
        told = {name: None if x is None else x[kept] for name, x in told.items()}
        w = torch.zeros_like(losses)
        w[kept] = reweighter(losses.detach()[kept], **told).to(losses.dtype)
        normalization = reweighter.normalization
    check_choice("normalization", normalization, ("mean_one", "sum_one", "raw"))
    counted = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    weighted = torch.where(counted > 0, w * s * losses, 0).sum() * world_size()
    if normalization == "sum_one":
        return weighted
    divisor = sum_over_ranks((counted if normalization == "mean_one" else counted * w * s).sum())
    return weighted / torch.where(divisor != 0, divisor, 1)
