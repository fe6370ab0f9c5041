r"""Asymmetric loss for many labels: positives and negatives fade differently, and easy negatives cost exactly nothing.

.. math:: \ell = -\big(t \log p + (1 - t) \log(1 - p_m)\big)\,(1 - p_t)^{\gamma_t}, \qquad p_m = \max(p - m, 0),

          1 - p_t = (1 - p)\, t + p_m (1 - t), \qquad \gamma_t = \gamma_+ t + \gamma_- (1 - t)

so that a positive costs :math:`(1 - p)^{\gamma_+} (-\log p)` and a negative
:math:`p_m^{\gamma_-} (-\log(1 - p_m))`, which is 0 for p <= m and at most
:math:`-(1 - m)^{\gamma_-} \log m`: a negative that the network is sure of counts as mislabelled.

With m > 0 the textbook form has NaN gradients for gamma in (0, 1); here negatives below the margin are cut out before
the power. The released code clamps probabilities at ``eps=1e-8``, which leaves positives below it without any gradient;
``eps=None`` is the exact form. Its class defaults are gamma_pos = 1 and the sum over all entries; its training script
(:meth:`AsymmetricLoss.coco_recipe`) and the paper take gamma_pos = 0. To tune, start from gammas 0 / 0 and no margin
(binary cross-entropy), then 2 / 2 (focal), then 2 / 1, then add the margin.

Source: Ben-Baruch et al., Asymmetric Loss For Multi-Label Classification, 2021, eq. 4 to 7 and the released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from counterpoise import kernels
from counterpoise._core import Loss, Spec, check_number, combine_inner, reduce_losses
from counterpoise.kernels import binary
from counterpoise.losses._inputs import along_classes, check_class_vector, check_multilabel, labels_and_live
from counterpoise.losses.sigmoid_focal import holds_soft_labels


def asymmetric_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    margin: float = 0.05,
    detach_weight: bool = False,
    eps: float | None = None,
    class_weight: Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Asymmetric loss of independent labels; the formula is at the top of this file.

    Args:
        logits: (N,) or (N, C, ...). -inf marks a masked class; float16 and bfloat16 are computed in float32.
        target: of the logits' shape, in [0, 1]; any type, soft labels included.
        gamma_neg, gamma_pos: focusing exponents >= 0 of negatives and positives; both 0 is no focusing.
        margin: m in [0, 1), a probability; negatives below it cost nothing.
        detach_weight: no gradient through the focusing factor; the value is the same.
        eps: None, or the released code's lower bound in (0, 1) of the probabilities inside the logarithms.
        class_weight: (C,), multiplies the entries of a class; None = ones.
        weight: (N,), multiplies row losses.
        mask: bool, True = counts; (N,) rows or the logits' shape.
        inner: how a row's entries combine: "mean" over those that count, "sum", or "none".
        reduction: "none" gives (N,), or the entries with inner="none"; "mean", "sum".
        normalizer: what "mean" divides by: "count" (rows that count), "weight" (sum of weight), "positives" (sum of
            the labels that count, at least one) or a number. The released code sums over all entries.
        sync: denominators are summed over ranks.

    Returns:
        (N,), the logits' shape, or 0-d; at least float32.

    Raises:
        ValueError, TypeError: a shape, type, label or setting that does not fit.
    """
    check_multilabel(logits, target, mask, weight)
    check_asymmetry(gamma_neg, gamma_pos, margin, eps)
    if class_weight is not None:
        check_class_vector("class_weight", class_weight, logits)
    settings = (gamma_neg, gamma_pos, margin, eps, detach_weight)
    plain = partial(_plain, target=target, settings=settings, class_weight=class_weight, mask=mask)
    options: dict[str, Any] = {"weight": weight, "inner": inner, "reduction": reduction, "normalizer": normalizer}
    if kernels.runs_on(logits, "binary_total"):
        loss = binary.asymmetric(*settings)
        return binary.binary_loss(
            loss, logits, target, plain, class_weight=class_weight, mask=mask, sync=sync, **options
        )
    return plain(logits, sync=sync, **options)


def _plain(
    logits: Tensor,
    *,
    target: Tensor,
    settings: tuple[float, float, float, float | None, bool],
    class_weight: Tensor | None,
    mask: Tensor | None,
    inner: str,
    sync: bool = False,
    **reduction: Any,
) -> Tensor:
    """What the kernel computes, as it is written."""
    gamma_neg, gamma_pos, margin, eps, detach_weight = settings
    z, t, counted = labels_and_live(logits, target, mask)
    soft = target.is_floating_point() and holds_soft_labels(t)
    cross_entropy, focus = _terms(z, t, gamma_neg, gamma_pos, margin, eps, soft=soft)
    if focus is not None and detach_weight:
        focus = focus.detach()
    losses = cross_entropy if focus is None else cross_entropy * focus
    if margin > 0 or eps is not None:  # bounded: what is not finite would come out finite
        losses = torch.where(z < torch.inf, losses, torch.nan)
    if class_weight is not None:
        losses = losses * along_classes(class_weight.to(z), z)
    rows, counted_rows = combine_inner(losses, counted, inner)
    return reduce_losses(rows, counted=counted_rows, positives=t.sum(), sync=sync, **reduction)


def _terms(
    z: Tensor, t: Tensor, gamma_neg: float, gamma_pos: float, margin: float, eps: float | None, *, soft: bool
) -> tuple[Tensor, Tensor | None]:
    """-t log p - (1 - t) log(1 - p_m), and (1 - p_t)^gamma_t or None where both gammas are 0.

    ``soft`` says that labels between 0 and 1 may occur. A negative below the margin has a first term of 0, and then any
    constant as the second: p_m = 0 is never raised to a power.
    """
    log_p, positive = logsigmoid(z), t == 1
    below = None
    if margin > 0:
        shifted = torch.sigmoid(z) - margin
        below = shifted <= 0
        shifted = torch.where(below, 0.5, shifted)
        log_not_shifted = torch.where(below, 0, torch.log1p(-shifted))
    else:
        log_not_shifted = logsigmoid(-z)
    of_one, of_zero = log_p, log_not_shifted
    if eps is not None:
        of_one, of_zero = of_one.clamp_min(math.log(eps)), of_zero.clamp_min(math.log(eps))
    cross_entropy, focus = -torch.where(positive, of_one, of_zero), None
    if gamma_neg > 0 or gamma_pos > 0:
        on_one = 1.0 if gamma_pos == 0 else torch.exp(gamma_pos * logsigmoid(-z))
        on_zero = torch.exp(gamma_neg * log_p) if below is None else shifted**gamma_neg
        focus = torch.where(positive, on_one, on_zero)
    if not soft:
        return cross_entropy, focus
    between = (t > 0) & (t < 1)
    s = torch.where(between, t, 0.5)
    cross_entropy = torch.where(between, -s * of_one - (1 - s) * of_zero, cross_entropy)
    if focus is None:
        return cross_entropy, None
    p_m = torch.sigmoid(z) if below is None else torch.where(below, 0, shifted)
    log_not_p_t = torch.log(s * torch.sigmoid(-z) + (1 - s) * p_m)
    return cross_entropy, torch.where(between, torch.exp((gamma_pos * s + gamma_neg * (1 - s)) * log_not_p_t), focus)


def check_asymmetry(gamma_neg: float, gamma_pos: float, margin: float, eps: float | None) -> None:
    """Raises ValueError or TypeError unless every setting lies in its range."""
    check_number("gamma_neg", gamma_neg, 0)
    check_number("gamma_pos", gamma_pos, 0)
    check_number("margin", margin, 0, 1)
    if margin == 1:
        raise ValueError("margin is 1, expected a number in [0, 1): no negative would cost anything")
    if eps is not None:
        check_number("eps", eps, 0, 1, open_low=True)


class AsymmetricLoss(Loss):
    """Module form of :func:`asymmetric_loss`; ``class_weight`` is a buffer.

    Args:
        gamma_neg, gamma_pos: focusing exponents >= 0 of negatives and positives.
        margin: in [0, 1); negatives of a probability below it cost nothing.
        detach_weight: no gradient through the focusing factor.
        eps: None, or the released code's lower bound of the probabilities inside the logarithms.
        class_weight: (C,) numbers, None = ones.
    """

    spec = Spec(
        task="multilabel",
        source="Ben-Baruch et al., Asymmetric Loss For Multi-Label Classification, 2021, eq. 7",
    )

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        margin: float = 0.05,
        detach_weight: bool = False,
        eps: float | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            gamma_neg=gamma_neg,
            gamma_pos=gamma_pos,
            margin=margin,
            detach_weight=detach_weight,
            eps=eps,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_asymmetry(gamma_neg, gamma_pos, margin, eps)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    @classmethod
    def coco_recipe(cls) -> AsymmetricLoss:
        """The authors' script for MS-COCO: gammas 4 and 0, margin 0.05, factor detached, clamped, summed."""
        return cls(detach_weight=True, eps=1e-8, inner="sum", reduction="sum")

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits and labels of one shape to the reduced loss."""
        return asymmetric_loss(logits, target, class_weight=self.class_weight, weight=weight, mask=mask, **self.options)
