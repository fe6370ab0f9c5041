r"""Softmax focal loss: cross-entropy that fades for examples already classified well.

.. math:: \ell_i = a_{y_i} (1 - p_i)^{\gamma} (-\log p_i), \qquad p_i = \mathrm{softmax}(z_i)_{y_i}

For a target distribution t (probabilities, or a smoothed label: smoothing comes first) the cross-entropy is that of t,
p_i = sum_c t_c p_ic and a_i = sum_c t_c a_c, as the sigmoid form has it; with two classes the two forms are one.

log(1 - p) is the log-sum-exp over the other classes less that over all, so values and gradients stay finite for every
gamma at any logit. Class weights a multiply the loss and leave p alone (one widely copied release takes p from the
weighted cross-entropy instead). kornia's "mean" divides by N * C; here it is the mean over rows.

Source: Lin et al., Focal Loss for Dense Object Detection, 2017, appendix; Detectron's and kornia's softmax form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from counterpoise._core import Loss, Spec, at_least_float32, check_number, check_within, combine_inner, reduce_losses
from counterpoise.kernels import rows
from counterpoise.losses._inputs import (
    along_classes,
    as_distribution,
    check_class_vector,
    check_multiclass,
    class_indices,
    expand_mask,
    smooth,
)


def softmax_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Focal loss of exclusive classes; the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...) with C >= 2. -inf marks a masked class.
        target: class indices (N,) or (N, d1, ...) of any integer type or bool, or probabilities of the logits' shape.
        gamma: focusing exponent >= 0; 0 is cross-entropy.
        alpha: in [0, 1]: class 0 is the background and weighs 1 - alpha, every other class alpha; None = off.
        class_weight: (C,) weights instead of ``alpha``.
        label_smoothing: in [0, 1], mass spread evenly over the classes that are not masked.
        normalizer: "positives" divides by the number of counted entries of a class other than 0, the foreground (of
            probabilities: by their mass off class 0), at least one.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    check_multiclass(logits, target, mask, weight)
    check_number("gamma", gamma, 0)
    check_number("label_smoothing", label_smoothing, 0, 1)
    if logits.shape[1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected at least two classes")
    a = focal_class_weight(alpha, class_weight, logits)
    plain = partial(
        _plain, target=target, gamma=gamma, a=a, label_smoothing=label_smoothing, ignore_index=ignore_index, mask=mask
    )
    if not rows.runs_rows(logits, target, weight, mask, a):
        return plain(logits, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)
    formula = (rows.FOCAL, 1.0, label_smoothing, gamma, 0.0, False, ignore_index)
    options = (weight, inner, reduction, normalizer, sync)
    return rows.row_loss(formula, logits, target, plain, (None, None, None, a), mask, options)


def _plain(
    logits: Tensor,
    *,
    target: Tensor,
    gamma: float,
    a: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    mask: Tensor | None,
    weight: Tensor | None,
    inner: str,
    **reduction: Any,
) -> Tensor:
    """What the kernel computes, as it is written."""
    z = at_least_float32(logits)
    if target.is_floating_point():
        target, counted = _probabilities(target, mask)
        foreground = 1 - target[:, 0].to(z.dtype)
    else:
        target, counted = class_indices(target, z.shape[1], ignore_index, mask)
        foreground = (target > 0).to(z.dtype)
    if counted is not None:
        z = torch.where(counted.unsqueeze(1), z, 0)  # what does not count may hold NaN
        foreground = torch.where(counted, foreground, 0)
    a = None if a is None else a.to(z)
    if target.is_floating_point() or label_smoothing > 0:
        t = smooth(as_distribution(target, z), z, label_smoothing)
        losses = _soft_focal(z, t, gamma)
        carried = None if a is None else (t * along_classes(a, z)).sum(1)
    else:
        losses = _focal(z, target, gamma)
        carried = None if a is None else a[target]
    losses = losses if carried is None else losses * carried
    if carried is None and reduction["normalizer"] == "weight":
        carried = torch.ones_like(losses)  # as class weights of one
    if counted is not None:
        losses = torch.where(counted, losses, 0)
    combined, counted_rows = combine_inner(losses, counted, inner)
    return reduce_losses(
        combined,
        counted=counted_rows,
        weight=weight,
        carried_weight=None if carried is None else combine_inner(carried, counted, inner)[0],
        positives=foreground.sum(),
        **reduction,
    )


def _probabilities(target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Target probabilities, checked, with 0 where an entry does not count, and which entries do (None = all)."""
    counted = None if mask is None else expand_mask(mask, target[:, 0])
    if counted is not None:
        target = torch.where(counted.unsqueeze(1), target, 0)
    check_within("target", target, 0, 1, what="probabilities")
    return target, counted


def _focal(z: Tensor, target: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma * -log p per entry."""
    if gamma == 0:
        return z.logsumexp(1) - z.gather(1, target.unsqueeze(1)).squeeze(1)
    log_p, log_not_p = target_log_probabilities(z, target)
    return torch.exp(gamma * log_not_p) * -log_p


def _soft_focal(z: Tensor, t: Tensor, gamma: float) -> Tensor:
    """(1 - sum_c t_c p_c)^gamma * -sum_c t_c log p_c per entry."""
    log_p = log_softmax(z, 1)
    cross_entropy = -torch.where(t == 0, 0, t * log_p).sum(1)  # 0 * log 0 = 0
    if gamma == 0:
        return cross_entropy
    rest = torch.where(t < 1, log_p + torch.log1p(-torch.where(t < 1, t, 0)), -torch.inf)
    return torch.exp(gamma * _logsumexp_or_zero(rest)) * cross_entropy


def target_log_probabilities(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of the target class per entry; the second is 0 where every other class is masked (p = 1)."""
    y = target.unsqueeze(1)
    lse = z.logsumexp(1)
    others = z.scatter(1, y, -torch.inf)
    return z.gather(1, y).squeeze(1) - lse, _logsumexp_or_zero(others, lse)


def _logsumexp_or_zero(x: Tensor, less: Tensor | float = 0.0) -> Tensor:
    """logsumexp over classes, less ``less``; 0 without gradient where every entry is -inf."""
    nothing = (x == -torch.inf).all(1)
    x = torch.where(nothing.unsqueeze(1), 0, x)
    return torch.where(nothing, 0, x.logsumexp(1) - less)


def focal_class_weight(alpha: float | None, class_weight: Tensor | None, logits: Tensor) -> Tensor | None:
    """(C,) weights from either way of giving them, or None; raises ValueError for both."""
    if alpha is None:
        if class_weight is not None:
            check_class_vector("class_weight", class_weight, logits)
        return class_weight
    if class_weight is not None:
        raise ValueError("alpha and class_weight were both given, expected one of them: they would multiply")
    check_number("alpha", alpha, 0, 1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(classes == 0, 1 - alpha, alpha)


class SoftmaxFocalLoss(Loss):
    """Module form of :func:`softmax_focal_loss`; ``class_weight`` is a buffer.

    Args:
        gamma: focusing exponent >= 0.
        alpha: in [0, 1], background class 0 against the others; None = off.
        class_weight: (C,) numbers instead of ``alpha``.
        label_smoothing: in [0, 1].
    """

    spec = Spec(task="multiclass", source="Lin et al., Focal Loss for Dense Object Detection, 2017, softmax form")

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            gamma=gamma,
            alpha=alpha,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("gamma", gamma, 0)
        check_number("label_smoothing", label_smoothing, 0, 1)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (N, C, ...) and their targets to the reduced loss."""
        return softmax_focal_loss(
            logits, target, class_weight=self.class_weight, weight=weight, mask=mask, **self.options
        )
