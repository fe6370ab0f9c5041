r"""Sigmoid focal loss: binary cross-entropy that fades for entries already classified well.

.. math:: \ell = \alpha_t (1 - p_t)^{\gamma}\, \mathrm{BCE}(z, t), \qquad
          p_t = p t + (1 - p)(1 - t), \quad \alpha_t = \alpha t + (1 - \alpha)(1 - t)

alpha multiplies the *positives*; 0.25 goes with gamma = 2 in detection. Here it is off by default, since 0.25 on a
classification task silently quarters the positives. torchvision defaults to alpha = 0.25 and reduction "none"; the
paper sums and divides by the number of foreground anchors (``inner="sum", normalizer="positives"``).

log(1 - p_t) is formed without forming 1 - p_t, so values and gradients stay finite for every gamma at any logit; the
textbook form has NaN gradients for gamma in (0, 1).

Source: Lin et al., Focal Loss for Dense Object Detection, 2017, eq. 5.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from counterpoise import kernels
from counterpoise._core import Loss, Spec, check_number, combine_inner, readable, reduce_losses
from counterpoise.kernels.binary import binary_loss, focal
from counterpoise.losses._inputs import check_multilabel, labels_and_live


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Focal loss of independent labels; the formula is at the top of this file.

    Args:
        logits: (N,) or (N, C, ...). -inf marks a masked class; float16 and bfloat16 are computed in float32.
        target: of the logits' shape, in [0, 1]; any type, soft labels included.
        alpha: weight of positives in [0, 1], None = off.
        gamma: focusing exponent >= 0; 0 is binary cross-entropy.
        weight: (N,), multiplies row losses.
        mask: bool, True = counts; (N,) rows or the logits' shape.
        inner: how a row's entries combine: "mean" over those that count, "sum", or "none".
        reduction: "none" gives (N,), or the entries with inner="none"; "mean", "sum".
        normalizer: what "mean" divides by: "count" (rows that count), "weight" (sum of weight), "positives" (sum of
            the labels that count, at least one) or a number.
        sync: denominators are summed over ranks.

    Returns:
        (N,), the logits' shape, or 0-d; at least float32.

    Raises:
        ValueError, TypeError: a shape, type, label or setting that does not fit.
    """
    check_multilabel(logits, target, mask, weight)
    check_number("gamma", gamma, 0)
    if alpha is not None:
        check_number("alpha", alpha, 0, 1)
    plain = partial(_plain, target=target, alpha=alpha, gamma=gamma, mask=mask)
    options: dict[str, Any] = {"weight": weight, "inner": inner, "reduction": reduction, "normalizer": normalizer}
    if kernels.runs_on(logits, "binary_total"):
        return binary_loss(focal(alpha, gamma), logits, target, plain, mask=mask, sync=sync, **options)
    return plain(logits, sync=sync, **options)


def _plain(
    logits: Tensor,
    *,
    target: Tensor,
    alpha: float | None,
    gamma: float,
    mask: Tensor | None,
    inner: str,
    sync: bool = False,
    **reduction: Any,
) -> Tensor:
    """What the kernel computes, as it is written."""
    z, t, counted = labels_and_live(logits, target, mask)
    log_p, log_not_p = binary_log_probabilities(z, t, soft=target.is_floating_point() and holds_soft_labels(t))
    losses = -log_p if gamma == 0 else -log_p * torch.exp(gamma * log_not_p)
    if alpha is not None:
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    rows, counted_rows = combine_inner(losses, counted, inner)
    return reduce_losses(rows, counted=counted_rows, positives=t.sum(), sync=sync, **reduction)


def binary_log_probabilities(z: Tensor, t: Tensor, *, soft: bool) -> tuple[Tensor, Tensor]:
    """-BCE(z, t) and log(1 - p_t); ``soft`` says that labels between 0 and 1 may occur.

    For a hard label these are the two log-sigmoids of u = (2t - 1) z. torch's form of BCE cancels where a negative is
    easy, and the mixture's logarithm of a hard label's other side would poison second derivatives.
    """
    u = (2 * t - 1) * z
    log_p, log_not_p = logsigmoid(u), logsigmoid(-u)
    if not soft:
        return log_p, log_not_p
    between = (t > 0) & (t < 1)
    s = torch.where(between, t, 0.5)
    of_one, of_zero = logsigmoid(z), logsigmoid(-z)
    bce = s * of_one + (1 - s) * of_zero
    mixed = torch.log(s * torch.sigmoid(-z) + (1 - s) * torch.sigmoid(z))  # never less than min(s, 1 - s)
    return torch.where(between, bce, log_p), torch.where(between, mixed, log_not_p)


def holds_soft_labels(t: Tensor) -> bool:
    """Whether a label lies between 0 and 1, where that can be read without stalling a device; else True."""
    return not readable(t) or bool(((t > 0) & (t < 1)).any())


class SigmoidFocalLoss(Loss):
    """Module form of :func:`sigmoid_focal_loss`.

    Args:
        alpha: weight of positives in [0, 1], None = off.
        gamma: focusing exponent >= 0.
    """

    spec = Spec(task="multilabel", source="Lin et al., Focal Loss for Dense Object Detection, 2017, eq. 5")

    def __init__(
        self,
        alpha: float | None = None,
        gamma: float = 2.0,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(alpha=alpha, gamma=gamma, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)
        check_number("gamma", gamma, 0)
        if alpha is not None:
            check_number("alpha", alpha, 0, 1)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits and labels of one shape to the reduced loss."""
        return sigmoid_focal_loss(logits, target, weight=weight, mask=mask, **self.options)
