r"""Asymmetric loss for exclusive classes: softmax cross-entropy whose target and other classes fade differently.

.. math:: \ell_i = -\sum_c s_{ic}\, w_{ic} \log p_{ic}, \qquad
          w_{ic} = \begin{cases} (1 - p_{iy})^{\gamma_+} & c = y_i \\ p_{ic}^{\gamma_-} & c \ne y_i \end{cases}

with p = softmax(z) and the smoothed target s = (1 - epsilon) [c = y] + epsilon / C. The weights multiply
log-probabilities, so without smoothing gamma_neg multiplies zeros and does nothing: gamma_pos = 0 is then
cross-entropy, and any gamma_pos is softmax focal loss.

The released code has no ``detach_weight``; a widely used copy (timm's) defaults to gamma_pos = 1.

Source: Ben-Baruch et al., Asymmetric Loss For Multi-Label Classification, 2021; the released single-label code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, at_least_float32, check_number, combine_inner, reduce_losses
from counterpoise.kernels import rows
from counterpoise.losses._inputs import check_class_vector, check_multiclass, class_indices
from counterpoise.losses.softmax_focal import target_log_probabilities


def asymmetric_single_label_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    label_smoothing: float = 0.1,
    detach_weight: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Asymmetric loss of exclusive classes; the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...) with C >= 2. -inf marks a masked class.
        target: class indices (N,) or (N, d1, ...) of any integer type or bool.
        gamma_neg, gamma_pos: exponents >= 0 of the other classes and of the target.
        label_smoothing: epsilon in [0, 1], mass spread evenly over the classes that are not masked.
        detach_weight: no gradient through w; the value is the same.
        class_weight: (C,), multiplies the losses of a target class; None = ones.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    check_multiclass(logits, target, mask, weight)
    check_number("gamma_neg", gamma_neg, 0)
    check_number("gamma_pos", gamma_pos, 0)
    check_number("label_smoothing", label_smoothing, 0, 1)
    if target.is_floating_point():
        raise TypeError(f"target has dtype {target.dtype}, expected class indices of an integer type")
    if logits.shape[1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected at least two classes")
    if class_weight is not None:
        check_class_vector("class_weight", class_weight, logits)
    settings = {
        "gamma_neg": gamma_neg,
        "gamma_pos": gamma_pos,
        "label_smoothing": label_smoothing,
        "detach_weight": detach_weight,
    }
    plain = partial(
        _plain, target=target, settings=settings, class_weight=class_weight, ignore_index=ignore_index, mask=mask
    )
    if not rows.runs_rows(logits, target, weight, mask, class_weight):
        return plain(logits, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)
    formula = (rows.ASYMMETRIC, 1.0, label_smoothing, gamma_pos, gamma_neg, detach_weight, ignore_index)
    options = (weight, inner, reduction, normalizer, sync)
    return rows.row_loss(formula, logits, target, plain, (None, None, None, class_weight), mask, options)


def _plain(
    logits: Tensor,
    *,
    target: Tensor,
    settings: dict[str, Any],
    class_weight: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    weight: Tensor | None,
    inner: str,
    **reduction: Any,
) -> Tensor:
    """What the kernel computes, as it is written."""
    z = at_least_float32(logits)
    target, counted = class_indices(target, z.shape[1], ignore_index, mask)
    if counted is not None:
        z = torch.where(counted.unsqueeze(1), z, 0)  # what does not count may hold NaN
    carried = None if class_weight is None else class_weight.to(z)[target]
    losses = _asymmetric(z, target, **settings)
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
        **reduction,
    )


def _asymmetric(
    z: Tensor, target: Tensor, gamma_neg: float, gamma_pos: float, label_smoothing: float, *, detach_weight: bool
) -> Tensor:
    """-sum_c s_c w_c log p_c per entry."""
    log_p_y, log_not_p_y = target_log_probabilities(z, target)
    w_y = torch.exp(gamma_pos * log_not_p_y) if gamma_pos > 0 else torch.ones_like(log_p_y)
    on_target = -log_p_y * (w_y.detach() if detach_weight else w_y)
    if label_smoothing == 0:
        return on_target
    live = z > -torch.inf
    share = label_smoothing / live.sum(1).to(z.dtype)
    other = live.scatter(1, target.unsqueeze(1), False)
    log_p = torch.where(other, z - z.logsumexp(1, keepdim=True), 0)
    w = torch.exp(gamma_neg * log_p)
    off_target = -(log_p * (w.detach() if detach_weight else w)).sum(1)
    return (1 - label_smoothing + share) * on_target + share * off_target


class AsymmetricSingleLabelLoss(Loss):
    """Module form of :func:`asymmetric_single_label_loss`; ``class_weight`` is a buffer.

    Args:
        gamma_neg, gamma_pos: exponents >= 0 of the other classes and of the target.
        label_smoothing: in [0, 1].
        detach_weight: no gradient through the weights.
        class_weight: (C,) numbers, None = ones.
    """

    spec = Spec(
        task="multiclass",
        source="Ben-Baruch et al., Asymmetric Loss For Multi-Label Classification, 2021, released single-label form",
    )

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        label_smoothing: float = 0.1,
        detach_weight: bool = False,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            gamma_neg=gamma_neg,
            gamma_pos=gamma_pos,
            label_smoothing=label_smoothing,
            detach_weight=detach_weight,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("gamma_neg", gamma_neg, 0)
        check_number("gamma_pos", gamma_pos, 0)
        check_number("label_smoothing", label_smoothing, 0, 1)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (N, C, ...) and class indices to the reduced loss."""
        return asymmetric_single_label_loss(
            logits, target, class_weight=self.class_weight, weight=weight, mask=mask, **self.options
        )
