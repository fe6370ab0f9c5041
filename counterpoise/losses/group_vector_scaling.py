r"""Vector scaling by group: examples of small groups must win by a wider margin.

.. math:: \ell_i = \log\Big(1 + e^{\iota_{g_i}} \sum_{c \ne y_i} e^{\Delta_{g_i} (z_{ic} - z_{iy_i})}\Big), \qquad
          \Delta_g = (n_g / n_{\max})^{\gamma}, \quad \iota_g = \tau \log(n_{\max} / n_g)

that is, cross-entropy of Delta_g z with iota_g taken off the target. With two classes and u = z_1 - z_0 it is the
binary form :math:`\log(1 + \exp(-(2y - 1) \Delta_g u + \iota_g))`. Equal groups, or gamma = tau = 0, are cross-entropy.
A group may be anything known while training: (class, attribute), or the label itself (:func:`scaled_margin_loss` with
``group=target`` is the label-imbalanced binary form).

The released group code shifts both logits of a row by the same iota, which cancels in its softmax; its binary code
multiplies the logit by 30 (``multiplicative=30 * Delta``).

Source: Kini et al., Label-Imbalanced and Group-Sensitive Classification under Overparameterization, 2021, binary
definition; more than two classes and the form of iota_g are derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, at_least_float32, check_number, check_per_row, check_within, readable
from counterpoise.losses._inputs import check_multiclass, class_indices
from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy

GroupCounts = Sequence[int] | Tensor


def group_vector_scaling_loss(
    logits: Tensor,
    target: Tensor,
    group: Tensor,
    *,
    group_counts: GroupCounts,
    gamma: float = 0.3,
    tau: float = 1.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Group-sensitive cross-entropy; the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...); target: class indices (N,) or (N, d1, ...) of any integer type or bool.
        group: (N,) group indices in [0, G - 1].
        group_counts: (G,) training examples a group, each >= 1.
        gamma: exponent >= 0 of the scaling; 0 is off.
        tau: strength >= 0 of the margin; 0 is off.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    delta, iota = group_scaling(group_counts, gamma, tau)
    return scaled_margin_loss(
        logits,
        target,
        group,
        multiplicative=delta,
        additive=iota,
        ignore_index=ignore_index,
        weight=weight,
        mask=mask,
        inner=inner,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def scaled_margin_loss(
    logits: Tensor,
    target: Tensor,
    group: Tensor,
    *,
    multiplicative: Tensor,
    additive: Tensor,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """The same with Delta ``multiplicative`` and iota ``additive`` given, each (G,)."""
    check_multiclass(logits, target, mask, weight)
    if target.is_floating_point():
        raise TypeError(f"target has dtype {target.dtype}, expected class indices of an integer type")
    check_per_row("group", group, logits)
    if multiplicative.ndim != 1 or multiplicative.shape != additive.shape:
        raise ValueError(
            f"additive has shape {tuple(additive.shape)}, expected that of multiplicative, (G,), which has "
            f"{tuple(multiplicative.shape)}"
        )
    check_within("group", group, 0, len(multiplicative) - 1, what="group indices")
    z = at_least_float32(logits)
    target, counted = class_indices(target, z.shape[1], ignore_index, mask)
    of_row = (-1, *[1] * (z.ndim - 1))
    delta = multiplicative.to(z)[group.long()].reshape(of_row)
    iota = additive.to(z)[group.long()].reshape(of_row)
    y = target.unsqueeze(1)
    return adjusted_cross_entropy(
        (z * delta).scatter_add(1, y, -iota.expand(y.shape)),
        target,
        weight=weight,
        mask=counted,
        inner=inner,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def group_scaling(group_counts: GroupCounts, gamma: float, tau: float) -> tuple[Tensor, Tensor]:
    """Delta in (0, 1] and iota >= 0, each (G,) float64."""
    check_number("gamma", gamma, 0)
    check_number("tau", tau, 0)
    n = torch.as_tensor(group_counts).double()
    if n.ndim != 1 or n.numel() == 0 or (readable(n) and bool((n < 1).any())):
        raise ValueError(f"group_counts is {n.tolist()}, expected (G,) numbers >= 1 with G >= 1")
    ratio = n / n.max()
    return ratio**gamma, -tau * torch.log(ratio)


class GroupVectorScalingLoss(Loss):
    """Module form of :func:`group_vector_scaling_loss`; the counts are a buffer.

    Args:
        group_counts: (G,) training examples a group, each >= 1.
        gamma: exponent >= 0 of the scaling.
        tau: strength >= 0 of the margin.
    """

    spec = Spec(
        task="grouped",
        source="Kini et al., Label-Imbalanced and Group-Sensitive Classification under Overparameterization, 2021",
        needs=("group_counts",),
        origin="derived",
    )
    group_counts: Tensor

    def __init__(
        self,
        group_counts: GroupCounts,
        gamma: float = 0.3,
        tau: float = 1.0,
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            gamma=gamma,
            tau=tau,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        group_scaling(group_counts, gamma, tau)
        self.register_buffer("group_counts", torch.as_tensor(group_counts).to(torch.int64).clone())

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        group: Tensor,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Raw logits (N, C, ...), class indices and groups (N,) to the reduced loss; predict with the raw logits."""
        return group_vector_scaling_loss(
            logits, target, group, group_counts=self.group_counts, weight=weight, mask=mask, **self.options
        )
