r"""VICReg: views coincide (invariance), every feature varies (variance), and no two features say the same (covariance).

.. math:: L = \lambda\, \frac{1}{ND} \sum_i \lVert z_{1i} - z_{2i} \rVert^2
          + \mu\, \frac{1}{2} \sum_v \frac{1}{D} \sum_j \max(0,\ 1 - \sqrt{C^{(v)}_{jj} + \epsilon})
          + \nu \sum_v \frac{1}{D} \sum_{j \ne k} \big(C^{(v)}_{jk}\big)^2

with :math:`C^{(v)}` the covariance of view v over the batch, divisor N - 1. The variance term is the mean of the two
views, as released (the printed formula has their sum). Embeddings are not normalised. With V views the first term is
the mean over pairs of views, the second the mean over views, the third twice the mean over views.

The statistics are those of the batch over all ranks, so several ranks give what one process gives on the whole batch.
The squared entries of :math:`X^\top X` sum to those of :math:`X X^\top`; on one process the smaller one is formed.

Source: Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, 2022, eq. 1
to 6, and the released code.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu

from counterpoise._core import No, Spec, at_least_float32, check_number, check_per_row, without_autocast, world_size
from counterpoise.contrastive._views import list_views
from counterpoise.distributed import all_reduce_sum


class VICRegTerms(NamedTuple):
    """The terms of a batch, each 0-d and without its weight; all 0 without any counted example."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    eps: float = 1e-4,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = True,
) -> Tensor:
    """VICReg; the formula is at the top of this file.

    Args:
        invariance_weight, variance_weight, covariance_weight: lambda, mu, nu >= 0.
        z, other, eps, weight, mask, sync: of :func:`vicreg_terms`, which also says what is raised.

    Returns:
        0-d, at least float32: one value a batch. Without any counted example, a zero connected to the graph.
    """
    _check_weights(invariance_weight, variance_weight, covariance_weight)
    terms = vicreg_terms(z, other, eps=eps, weight=weight, mask=mask, sync=sync)
    return (
        invariance_weight * terms.invariance + variance_weight * terms.variance + covariance_weight * terms.covariance
    )


def _check_weights(invariance: float, variance: float, covariance: float) -> None:
    check_number("invariance_weight", invariance, 0)
    check_number("variance_weight", variance, 0)
    check_number("covariance_weight", covariance, 0)


def vicreg_terms(
    z: Tensor,
    other: Tensor | None = None,
    *,
    eps: float = 1e-4,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = True,
) -> VICRegTerms:
    """The terms of a batch, for logging and for objectives of one's own.

    Args:
        z: (N, D), or (V, N, D) several views; other: (N, D) the second view. N over all ranks is at least 2.
        eps: > 0, added to the variances: the gradient at a collapsed feature is finite through it.
        weight: (N,) >= 0, example weights in all statistics (``aweights`` of ``torch.cov``): only ratios matter.
        mask: (N,) bool, False leaves an example out.
        sync: statistics of all ranks, once a process group exists.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit, or a batch of one example (what a mask leaves is not
            counted: that would stall a device).
    """
    check_number("eps", eps, 0, open_low=True)
    views = list_views(z, other)
    if len(views) < 2:
        raise ValueError(f"z holds {len(views)} views, expected at least two: z and other, or z of shape (V, N, D)")
    n = len(views[0])
    check_per_row("weight", weight, views[0])
    check_per_row("mask", mask, views[0], dtype=torch.bool)
    sync = sync and world_size() > 1
    if n == 1 and not sync:
        raise ValueError("z holds one example, expected at least two: variances are taken over the batch")
    if weight is None and mask is None and not sync and n:
        with without_autocast(views[0]):
            return _of_batch([at_least_float32(x) for x in views], eps)
    x = at_least_float32(torch.stack(views))
    u = x.new_ones(n) if weight is None else weight.to(x.dtype)
    if mask is not None:
        x, u = torch.where(mask[None, :, None], x, 0), torch.where(mask, u, 0)
    with without_autocast(x):
        return _weighted(x, u, eps, sync=sync)


def _of_batch(views: list[Tensor], eps: float) -> VICRegTerms:
    """Of views (N, D) that all count once: a view at a time, and variances from the covariance where that is formed."""
    n, d = views[0].shape
    invariance = torch.stack(
        [mse_loss(a, b) for a, b in combinations(views, 2)]
    ).mean()  # first, so that it is last in backward
    variances, squares = [], []
    for x in views:
        centred = x - x.mean(0)
        products = centred @ centred.mT if n < d else centred.mT @ centred
        variances.append((centred.square().sum(0) if n < d else products.diagonal()) / (n - 1))
        squares.append(products.square().sum() / (n - 1) ** 2)
    variance = torch.stack(variances)
    return VICRegTerms(invariance, _hinge(variance, eps), _off_diagonal(torch.stack(squares), variance))


def _weighted(x: Tensor, u: Tensor, eps: float, *, sync: bool) -> VICRegTerms:
    """Of views (V, N, D) and the weights (N,) of their examples."""

    def total(value: Tensor) -> Tensor:
        return all_reduce_sum(value) if sync else value

    v, n, d = x.shape
    pairs = list(combinations(range(v), 2))
    apart = torch.stack([(x[a] - x[b]).square().sum(1) for a, b in pairs]).sum(0)  # (N,)
    mass, mass_of_squares = total(torch.stack([u.sum(), u.square().sum()]))
    some = torch.where(mass > 0, mass, 1)
    divisor = mass - mass_of_squares / some
    divisor = torch.where(divisor > 0, divisor, 1)
    centred = x - total((u[:, None] * x).sum(1, keepdim=True)) / some
    weighted = u[:, None] * centred
    variance = total((weighted * centred).sum(1)) / divisor
    if n < d and not sync:
        squares = (weighted @ centred.mT * (centred @ weighted.mT)).sum((1, 2)) / divisor.square()
    else:
        squares = (total(weighted.mT @ centred) / divisor).square().sum((1, 2))
    invariance = total((u * apart).sum()) / (some * d * len(pairs))
    hinge = torch.where(mass > 0, _hinge(variance, eps), 0)
    return VICRegTerms(invariance, hinge, _off_diagonal(squares, variance))


def _hinge(variance: Tensor, eps: float) -> Tensor:
    """How far the standard deviations (V, D) are below one."""
    return relu(1 - (variance + eps).sqrt()).mean()


def _off_diagonal(squares: Tensor, variance: Tensor) -> Tensor:
    """Twice the mean over views of the squared covariances, divided by D, from the sums (V,) with the diagonal's."""
    return 2 * (squares - variance.square().sum(1)).mean() / variance.shape[1]


class VICRegLoss(nn.Module):
    """Module form of :func:`vicreg_loss`: ``loss(view1, view2)``.

    Args:
        invariance_weight, variance_weight, covariance_weight: lambda, mu, nu >= 0.
        eps: > 0, added to the variances.
    """

    spec = Spec(
        task="two_view",
        source="Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, "
        "2022, eq. 6",
        distributed="statistics",
        per_row=No("one value a batch: variances and covariances are of the batch"),
        weight_linear=No("weights enter the batch statistics, which are scale-free in them"),
    )

    def __init__(
        self,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        eps: float = 1e-4,
        sync: bool = True,
    ) -> None:
        super().__init__()
        _check_weights(invariance_weight, variance_weight, covariance_weight)
        check_number("eps", eps, 0, open_low=True)
        self.invariance_weight = invariance_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.eps = eps
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
        """Views (N, D) to the loss of the batch; ``labels`` and ``bank`` are refused."""
        if labels is not None or bank is not None:
            raise ValueError(f"VICRegLoss got {'labels' if bank is None else 'a bank'}, expected views only")
        return vicreg_loss(
            z,
            other,
            invariance_weight=self.invariance_weight,
            variance_weight=self.variance_weight,
            covariance_weight=self.covariance_weight,
            eps=self.eps,
            weight=weight,
            mask=mask,
            sync=self.sync,
        )
