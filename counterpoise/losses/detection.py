r"""Classification of anchors as RetinaNet does it: focal loss over all anchors, divided by the foreground ones alone.

.. math:: L_b = \frac{\sum_{a, k} \mathrm{FL}(z_{bak}, [y_{ba} = k])}{\max(1, |\{a : y_{ba} \ge 0\}|)}, \qquad
          L = \frac1B \sum_b L_b

An image holds a hundred thousand anchors, almost all of them easy background: their number must not set the scale, and
an image without any foreground still has a loss (divided by 1). Three normalisers are in use:

- each image by its own foreground, then the mean over images: torchvision, the default here;
- the batch's sum by the batch's foreground: the paper and Detectron (``per_image=False, normalizer="positives"``);
- the batch's sum by a moving average of the foreground: detectron2 (``ema_momentum=0.9``). There it is kept by each
  process for itself and lost with it; here it is the same on all ranks and travels in checkpoints.

Start the classification layer with :func:`initialize_classification_layer`: without the prior's bias the first steps
diverge, as every anchor votes for every class with probability 1/2.

Source: Lin et al., Focal Loss for Dense Object Detection, 2017, sections 3.3, 4.1 and 5.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from counterpoise._core import (
    Loss,
    Spec,
    check_number,
    check_per_row,
    check_within,
    combine_inner,
    in_second_pass,
    reduce_losses,
    sum_over_ranks,
    world_size,
)
from counterpoise.losses._inputs import expand_mask
from counterpoise.losses.sigmoid_focal import sigmoid_focal_loss

BACKGROUND, IGNORED = -1, -2


def retinanet_classification_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    per_image: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Focal loss of anchors, one value an image; the formula is at the top of this file.

    Args:
        logits: (B, A, K): images, anchors, classes without the background.
        target: (B, A) class index in [0, K - 1] of the box that an anchor matches, -1 = background, -2 = between the
            thresholds, does not count.
        alpha: weight of positives in [0, 1], None = off.
        gamma: focusing exponent >= 0.
        per_image: each image's sum is divided by its own foreground anchors, at least one.
        weight: (B,), multiplies image losses.
        mask: bool, True = counts; (B,) images or (B, A) anchors.
        reduction: "none" gives (B,); "mean", "sum".
        normalizer: what "mean" divides by: "count" (images that count), "weight" (sum of weight), "positives" (the
            foreground anchors that count, at least one; with ``per_image=False``) or a number.
        sync: denominators are summed over ranks.

    Returns:
        (B,) or 0-d, at least float32.

    Raises:
        ValueError, TypeError: a shape, type, class index or setting that does not fit.
    """
    _check_anchors(logits, target, mask)
    check_per_row("weight", weight, logits)
    counted = target != IGNORED
    if mask is not None:
        counted = counted & expand_mask(mask, target)
    target = torch.where(counted, target.long(), BACKGROUND)
    check_within("target", target, BACKGROUND, logits.shape[2] - 1, what="class indices, -1 or -2")
    classes = torch.arange(logits.shape[2], device=logits.device)
    entries = sigmoid_focal_loss(
        logits,
        target.unsqueeze(2) == classes,
        alpha=alpha,
        gamma=gamma,
        mask=counted.unsqueeze(2).expand_as(logits),
        inner="none",
        reduction="none",
    )
    foreground = (target >= 0).sum(1)
    images, counted_images = combine_inner(entries.sum(2), counted, "sum")
    if per_image:
        images = images / foreground.clamp_min(1)
    return reduce_losses(
        images,
        counted=counted_images,
        weight=weight,
        positives=foreground.sum(),
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _check_anchors(logits: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, expected a floating type")
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, A, K)")
    if target.is_floating_point():
        raise TypeError(f"target has dtype {target.dtype}, expected class indices of an integer type")
    if target.shape != logits.shape[:2]:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected {tuple(logits.shape[:2])}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in (target.shape[:1], target.shape)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected a bool tensor of shape "
            f"{tuple(target.shape[:1])} or {tuple(target.shape)}"
        )


def sigmoid_prior_bias(prior: float = 0.01) -> float:
    """-log((1 - prior) / prior): the bias at which a sigmoid starts with probability ``prior`` in (0, 1)."""
    check_number("prior", prior, 0, 1, open_low=True)
    if prior == 1:
        raise ValueError("prior is 1, expected a probability in (0, 1)")
    return -math.log((1 - prior) / prior)


def softmax_prior_bias(num_classes: int, prior: float = 0.01) -> Tensor:
    """(K + 1,) float64 biases of a softmax whose class 0 is the background and whose K others share ``prior``.

    The background's is log(K (1 - prior) / prior), the others' are 0.
    """
    check_number("num_classes", num_classes, 1)
    biases = torch.zeros(num_classes + 1, dtype=torch.float64)
    biases[0] = math.log(num_classes) - sigmoid_prior_bias(prior)
    return biases


@torch.no_grad()
def initialize_classification_layer(
    layer: nn.Module, prior: float = 0.01, std: float = 0.01, *, softmax: bool = False
) -> None:
    """Draws the weights of a last linear or convolutional ``layer`` from N(0, std^2) and sets its bias by ``prior``.

    Args:
        layer: has a weight and a bias.
        prior: probability in (0, 1) with which an anchor starts as foreground.
        std: > 0, of the weights.
        softmax: the outputs are a background (first) and K classes, instead of K sigmoids.

    Raises:
        ValueError: a layer without a bias, softmax outputs that are not one set of K + 1, or settings out of range.
    """
    check_number("std", std, 0, open_low=True)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        raise ValueError(f"layer is {layer!r}, expected one with a weight and a bias")
    start = softmax_prior_bias(len(bias) - 1, prior) if softmax else torch.tensor(sigmoid_prior_bias(prior))
    nn.init.normal_(weight, std=std)
    bias.copy_(start)


class RetinaNetClassificationLoss(Loss):
    """Module form of :func:`retinanet_classification_loss`, and its form with a moving average.

    Args:
        alpha: weight of positives in [0, 1], None = off.
        gamma: focusing exponent >= 0.
        per_image: each image's sum is divided by its own foreground anchors.
        ema_momentum: None, or in [0, 1): "mean" divides the batch's sum by a moving average of the batch's foreground
            anchors (over all ranks), of which this much stays at each step; in place of ``per_image`` and
            ``normalizer``. The current batch is part of it. It moves in ``train()`` mode only, not in ``second_pass()``
            and not on logits that are not finite.
        ema_start: > 0, foreground anchors before the first step.

    Buffers: ema_foreground () float64, persistent; with ``ema_momentum`` only.
    """

    spec = Spec(task="anchors", source="Lin et al., Focal Loss for Dense Object Detection, 2017, section 4.1")
    ema_foreground: Tensor

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        per_image: bool = True,
        ema_momentum: float | None = None,
        ema_start: float = 100.0,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha, gamma=gamma, per_image=per_image, reduction=reduction, normalizer=normalizer, sync=sync
        )
        check_number("gamma", gamma, 0)
        check_number("ema_start", ema_start, 0, open_low=True)
        if alpha is not None:
            check_number("alpha", alpha, 0, 1)
        self.ema_momentum = ema_momentum
        if ema_momentum is not None:
            check_number("ema_momentum", ema_momentum, 0, 1)
            self.register_buffer("ema_foreground", torch.tensor(ema_start, dtype=torch.float64))

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, A, K) and anchor labels (B, A) to the reduced loss."""
        if self.ema_momentum is None or self.reduction != "mean":
            return retinanet_classification_loss(logits, target, weight=weight, mask=mask, **self.options)
        options = {**self.options, "per_image": False, "reduction": "sum", "sync": False}
        total = retinanet_classification_loss(logits, target, weight=weight, mask=mask, **options)
        self._follow(total, target, mask, self.ema_momentum)
        return total * world_size() / self.ema_foreground.to(total.dtype)

    @torch.no_grad()
    def _follow(self, total: Tensor, target: Tensor, mask: Tensor | None, momentum: float) -> None:
        """Moves the average by this batch's foreground over all ranks."""
        if not self.training or in_second_pass():
            return
        foreground = target >= 0
        if mask is not None:
            foreground = foreground & expand_mask(mask, target)
        batch = sum_over_ranks(torch.stack([foreground.sum(), ~total.isfinite()]).to(self.ema_foreground.dtype))
        moved = momentum * self.ema_foreground + (1 - momentum) * batch[0].clamp_min(1)
        self.ema_foreground.copy_(torch.where(batch[1] == 0, moved, self.ema_foreground))
