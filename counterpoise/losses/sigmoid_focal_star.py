r"""Focal*: binary cross-entropy of steepened logits, the focal loss's sibling without a modulating factor.

.. math:: \ell = -\frac{\alpha_t}{\gamma} \log \sigma(\gamma u + \beta), \qquad u = (2 t - 1) z, \quad
          \alpha_t = \alpha t + (1 - \alpha)(1 - t)

gamma = 1 and beta = 0 is binary cross-entropy for hard labels; a soft label shrinks u (0.5 costs log 2 / gamma at any
logit), which is not the cross-entropy of that label. fvcore has no beta.

Source: Lin et al., Focal Loss for Dense Object Detection, 2017, appendix A (beta from memory); fvcore's form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from counterpoise import kernels
from counterpoise._core import Loss, Spec, check_number, combine_inner, reduce_losses
from counterpoise.kernels.binary import binary_loss, focal_star
from counterpoise.losses._inputs import check_multilabel, labels_and_live


def sigmoid_focal_star_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
    beta: float = 0.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Focal* of independent labels; the formula is at the top of this file.

    Args:
        logits: (N,) or (N, C, ...); target: of the logits' shape, in [0, 1].
        alpha: weight of positives in [0, 1], None = off.
        gamma: steepness > 0.
        beta: shift, any number.

    The other arguments, the shapes returned and the errors are those of :func:`sigmoid_focal_loss`.
    """
    check_multilabel(logits, target, mask, weight)
    check_focal_star(alpha, gamma, beta)
    plain = partial(_plain, target=target, alpha=alpha, gamma=gamma, beta=beta, mask=mask)
    options: dict[str, Any] = {"weight": weight, "inner": inner, "reduction": reduction, "normalizer": normalizer}
    if kernels.runs_on(logits, "binary_total"):
        return binary_loss(focal_star(alpha, gamma, beta), logits, target, plain, mask=mask, sync=sync, **options)
    return plain(logits, sync=sync, **options)


def _plain(
    logits: Tensor,
    *,
    target: Tensor,
    alpha: float | None,
    gamma: float,
    beta: float,
    mask: Tensor | None,
    inner: str,
    sync: bool = False,
    **reduction: Any,
) -> Tensor:
    """What the kernel computes, as it is written."""
    z, t, counted = labels_and_live(logits, target, mask)
    losses = -logsigmoid(gamma * (2 * t - 1) * z + beta) / gamma
    if alpha is not None:
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    rows, counted_rows = combine_inner(losses, counted, inner)
    return reduce_losses(rows, counted=counted_rows, positives=t.sum(), sync=sync, **reduction)


def check_focal_star(alpha: float | None, gamma: float, beta: float) -> None:
    """Raises ValueError or TypeError unless every setting lies in its range."""
    if alpha is not None:
        check_number("alpha", alpha, 0, 1)
    check_number("gamma", gamma, 0, open_low=True)
    check_number("beta", beta)


class SigmoidFocalStarLoss(Loss):
    """Module form of :func:`sigmoid_focal_star_loss`.

    Args:
        alpha: weight of positives in [0, 1], None = off.
        gamma: steepness > 0.
        beta: shift.
    """

    spec = Spec(task="multilabel", source="Lin et al., Focal Loss for Dense Object Detection, 2017, appendix A")

    def __init__(
        self,
        alpha: float | None = None,
        gamma: float = 2.0,
        beta: float = 0.0,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            gamma=gamma,
            beta=beta,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_focal_star(alpha, gamma, beta)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits and labels of one shape to the reduced loss."""
        return sigmoid_focal_star_loss(logits, target, weight=weight, mask=mask, **self.options)
