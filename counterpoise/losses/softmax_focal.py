r"""Softmax focal loss: cross-entropy that fades for examples already classified well.

.. math:: \ell_i = a_{y_i} (1 - p_i)^{\gamma} (-\log p_i), \qquad p_i = \mathrm{softmax}(z_i)_{y_i}

log(1 - p) is the log-sum-exp over the other classes less that over all, so values and gradients stay finite for every
gamma at any logit. Class weights a multiply the loss and leave p alone (one widely copied release takes p from the
weighted cross-entropy instead). kornia's "mean" divides by N * C; here it is the mean over rows.

Source: Lin et al., Focal Loss for Dense Object Detection, 2017, appendix; Detectron's and kornia's softmax form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, at_least_float32, check_number, combine_inner, reduce_losses
from counterpoise.losses._inputs import check_multiclass, class_indices, class_vector


def softmax_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    class_weight: Tensor | None = None,
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
        target: class indices (N,) or (N, d1, ...) of any integer type or bool.
        gamma: focusing exponent >= 0; 0 is cross-entropy.
        alpha: in [0, 1]: class 0 is the background and weighs 1 - alpha, every other class alpha; None = off.
        class_weight: (C,) weights instead of ``alpha``.
        normalizer: "positives" divides by the number of counted entries of a class other than 0, the foreground.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    check_multiclass(logits, target, mask, weight)
    check_number("gamma", gamma, 0)
    if target.is_floating_point():
        raise TypeError(f"target has dtype {target.dtype}, expected class indices of an integer type")
    z = at_least_float32(logits)
    if z.shape[1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected at least two classes")
    target, counted = class_indices(target, z.shape[1], ignore_index, mask)
    if counted is not None:
        z = torch.where(counted.unsqueeze(1), z, 0)  # what does not count may hold NaN
    a = focal_class_weight(alpha, class_weight, z)
    carried = None if a is None else a[target]
    if carried is None and normalizer == "weight":
        carried = torch.ones_like(target, dtype=z.dtype)  # as class weights of one
    losses = _focal(z, target, gamma)
    losses = losses if carried is None else losses * carried
    foreground = target > 0
    if counted is not None:
        losses, foreground = torch.where(counted, losses, 0), foreground & counted
    rows, counted_rows = combine_inner(losses, counted, inner)
    return reduce_losses(
        rows,
        counted=counted_rows,
        weight=weight,
        carried_weight=None if carried is None else combine_inner(carried, counted, inner)[0],
        positives=foreground.sum(),
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _focal(z: Tensor, target: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma * -log p per entry."""
    y = target.unsqueeze(1)
    lse = z.logsumexp(1)
    log_p = z.gather(1, y).squeeze(1) - lse
    if gamma == 0:
        return -log_p
    others = z.scatter(1, y, -torch.inf)
    alone = (others == -torch.inf).all(1)  # every other class is masked: p = 1 and the loss is 0
    others = torch.where(alone.unsqueeze(1), 0, others)
    log_one_minus_p = torch.where(alone, 0, others.logsumexp(1) - lse)
    return torch.where(alone, 0, torch.exp(gamma * log_one_minus_p)) * -log_p


def focal_class_weight(alpha: float | None, class_weight: Tensor | None, logits: Tensor) -> Tensor | None:
    """(C,) weights from either way of giving them, or None; raises ValueError for both."""
    if alpha is None:
        return None if class_weight is None else class_vector("class_weight", class_weight, logits)
    if class_weight is not None:
        raise ValueError("alpha and class_weight were both given, expected one of them: they would multiply")
    check_number("alpha", alpha, 0, 1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(classes == 0, 1 - alpha, alpha).to(logits)


class SoftmaxFocalLoss(Loss):
    """Module form of :func:`softmax_focal_loss`; ``class_weight`` is a buffer.

    Args:
        gamma: focusing exponent >= 0.
        alpha: in [0, 1], background class 0 against the others; None = off.
        class_weight: (C,) numbers instead of ``alpha``.
    """

    spec = Spec(task="multiclass", source="Lin et al., Focal Loss for Dense Object Detection, 2017, softmax form")
    class_weight: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            gamma=gamma,
            alpha=alpha,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("gamma", gamma, 0)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (N, C, ...) and class indices to the reduced loss."""
        return softmax_focal_loss(
            logits, target, class_weight=self.class_weight, weight=weight, mask=mask, **self.options
        )
