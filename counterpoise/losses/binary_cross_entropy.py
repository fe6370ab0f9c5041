r"""Binary cross-entropy of independent labels, with weights of classes and of their positives.

.. math:: \ell_{ic} = -w_c \big(\pi_c\, t_{ic} \log p_{ic} + (1 - t_{ic}) \log(1 - p_{ic})\big),
          \qquad p = \operatorname{sigmoid}(z)

w is ``class_weight``, pi is ``pos_weight``; both are ones by default. torch's ``BCEWithLogitsLoss`` has w as
``weight``, and its mean divides by all entries: here it is over the entries of a row that count, then over rows, which
is the same where every entry counts.

Source: the likelihood of independent Bernoulli variables, as torch.nn.BCEWithLogitsLoss has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from counterpoise import kernels
from counterpoise._core import Loss, Spec, combine_inner, reduce_losses
from counterpoise.kernels.binary import binary_loss, focal
from counterpoise.losses._inputs import along_classes, check_class_vector, check_multilabel, labels_and_live
from counterpoise.losses.sigmoid_focal import holds_soft_labels


def binary_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Binary cross-entropy of independent labels; the formula is at the top of this file.

    Args:
        logits: (N,) or (N, C, ...). -inf marks a masked class; float16 and bfloat16 are computed in float32.
        target: of the logits' shape, in [0, 1]; any type, soft labels included.
        class_weight: (C,), multiplies the entries of a class; None = ones.
        pos_weight: (C,), multiplies the positive part of a class's entries; None = ones. A number above 1 trades
            precision for recall.
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
    if class_weight is not None:
        check_class_vector("class_weight", class_weight, logits)
    if pos_weight is not None:
        check_class_vector("pos_weight", pos_weight, logits)
    plain = partial(_plain, target=target, class_weight=class_weight, pos_weight=pos_weight, mask=mask)
    options: dict[str, Any] = {"weight": weight, "inner": inner, "reduction": reduction, "normalizer": normalizer}
    if kernels.runs_on(logits, "binary_total"):
        options |= {"class_weight": class_weight, "pos_weight": pos_weight, "mask": mask, "sync": sync}
        return binary_loss(focal(None, 0.0), logits, target, plain, **options)
    return plain(logits, sync=sync, **options)


def _plain(
    logits: Tensor,
    *,
    target: Tensor,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    mask: Tensor | None,
    inner: str,
    sync: bool = False,
    **reduction: Any,
) -> Tensor:
    """What the kernel computes, as it is written."""
    z, t, counted = labels_and_live(logits, target, mask)
    positive = None if pos_weight is None else along_classes(pos_weight.to(z), z)
    losses = _entries(z, t, positive, soft=target.is_floating_point() and holds_soft_labels(t))
    if class_weight is not None:
        losses = losses * along_classes(class_weight.to(z), z)
    rows, counted_rows = combine_inner(losses, counted, inner)
    return reduce_losses(rows, counted=counted_rows, positives=t.sum(), sync=sync, **reduction)


def _entries(z: Tensor, t: Tensor, positive: Tensor | None, *, soft: bool) -> Tensor:
    """The loss of each entry; ``soft`` says that labels between 0 and 1 may occur.

    That of a hard label is a log-sigmoid of its own side alone: zero times the other side's infinity is not formed.
    """
    losses = -logsigmoid((2 * t - 1) * z)
    if positive is not None:
        losses = torch.where(t == 1, positive * losses, losses)
    if not soft:
        return losses
    between = (t > 0) & (t < 1)
    s = torch.where(between, t, 0.5)
    of_one = s if positive is None else positive * s
    return torch.where(between, -of_one * logsigmoid(z) - (1 - s) * logsigmoid(-z), losses)


class BinaryCrossEntropyLoss(Loss):
    """Module form of :func:`binary_cross_entropy_loss`; ``class_weight`` and ``pos_weight`` are buffers.

    Args:
        class_weight: (C,) numbers, None = ones.
        pos_weight: (C,) numbers that multiply the positive part, None = ones.
    """

    spec = Spec(task="multilabel", source="the likelihood of independent labels; torch.nn.BCEWithLogitsLoss")
    pos_weight: Tensor | None

    def __init__(
        self,
        class_weight: Sequence[float] | Tensor | None = None,
        pos_weight: Sequence[float] | Tensor | None = None,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)
        given = None if pos_weight is None else torch.as_tensor(pos_weight).detach().clone()
        self.register_buffer("pos_weight", given)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits and labels of one shape to the reduced loss."""
        return binary_cross_entropy_loss(
            logits,
            target,
            class_weight=self.class_weight,
            pos_weight=self.pos_weight,
            weight=weight,
            mask=mask,
            **self.options,
        )
