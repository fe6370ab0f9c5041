r"""One adjusted softmax cross-entropy, of which the long-tail losses are named settings.

.. math:: \ell_i = -\sum_c w_c\, t_{ic} \log \mathrm{softmax}\big(s\,(z_i \odot d + \iota - m \odot t_i)\big)_c

with the target distribution t (one-hot for class indices), an additive vector iota, a multiplicative vector d
(VS-loss writes Delta = 1/d), a target margin m, a scale s and class weights w.

========================  =====================================================
cross-entropy             all off
logit adjustment          iota_c = tau * log(prior_c)
balanced softmax          iota_c = log(n_c)
vector scaling            d_c = (n_c / n_max)^gamma, iota_c = tau * log(prior_c)
LDAM                      m_c = max_margin * (n_c / n_min)^(-1/4), s = 30
class-balanced            w_c by effective number
========================  =====================================================

Source: Menon et al., Long-tail learning via logit adjustment, 2021 (pairwise form); unified here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import log_softmax

from counterpoise._core import at_least_float32, check_number, check_within, combine_inner, reduce_losses
from counterpoise.kernels import rows, soft_rows
from counterpoise.losses._inputs import (
    along_classes,
    as_distribution,
    check_class_vector,
    check_multiclass,
    class_indices,
    class_vector,
    expand_mask,
    smooth,
)

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def adjusted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    additive: Tensor | None = None,
    multiplicative: Tensor | None = None,
    margin: Tensor | None = None,
    scale: float = 1.0,
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
    """Cross-entropy of adjusted logits; the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...). -inf marks a masked class; float16 and bfloat16 are computed in float32.
        target: class indices (N,) or (N, d1, ...) of any integer type or bool, or probabilities of the logits' shape.
        additive, multiplicative, margin, class_weight: (C,) vectors; None = off.
        scale: multiplies the adjusted logits, > 0.
        label_smoothing: in [0, 1], mass spread evenly over the classes that are not masked.
        ignore_index: a target with this value does not count.
        weight: (N,), multiplies row losses.
        mask: bool, True = counts; (N,) rows or the shape of the class indices.
        inner: how the entries of a dense row (d1, ...) combine: "mean" over those that count, "sum", or "none".
        reduction: "none" gives (N,), or the entries with inner="none"; "mean", "sum".
        normalizer: what "mean" divides by: "count" (rows that count), "weight" (sum of weight * class weight: for
            class indices (N,) what torch divides by), "positives" (as "count") or a number.
        sync: denominators are summed over ranks.

    Returns:
        (N,) or 0-d, at least float32.

    Raises:
        ValueError, TypeError: a shape, type or class index that does not fit.
    """
    check_multiclass(logits, target, mask, weight)
    if scale != 1.0:
        check_number("scale", scale, 0, open_low=True)
    if label_smoothing != 0.0:
        check_number("label_smoothing", label_smoothing, 0, 1)
    vectors = (multiplicative, additive, margin, class_weight)
    if multiplicative is not None:
        check_class_vector("multiplicative", multiplicative, logits)
    if additive is not None:
        check_class_vector("additive", additive, logits)
    if margin is not None:
        check_class_vector("margin", margin, logits)
    if class_weight is not None:
        check_class_vector("class_weight", class_weight, logits)

    def plain(z: Tensor, **options: Any) -> Tensor:
        return _plain(z, target, vectors, scale, label_smoothing, ignore_index, mask, **options)

    options = (weight, inner, reduction, normalizer, sync)
    if rows.runs_rows(logits, target, weight, mask, *vectors):
        formula = (rows.CROSS_ENTROPY, scale, label_smoothing, 0.0, 0.0, False, ignore_index)
        return rows.row_loss(formula, logits, target, plain, vectors, mask, options)
    if soft_rows.runs_soft_rows(logits, target, weight, mask, *vectors):
        given = (logits, target, plain, vectors, mask, options)
        return soft_rows.soft_row_loss(*given, scale=scale, smoothing=label_smoothing)
    return plain(logits, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)


def _plain(
    logits: Tensor,
    target: Tensor,
    vectors: Vectors,
    scale: float,
    label_smoothing: float,
    ignore_index: int,
    mask: Tensor | None,
    *,
    weight: Tensor | None,
    inner: str,
    **reduction: Any,
) -> Tensor:
    """What the kernel computes, as it is written."""
    z = at_least_float32(logits)
    soft = target.is_floating_point()
    counted: Tensor | None
    if soft:
        counted = mask if mask is None else expand_mask(mask, target[:, 0])
        if counted is not None:
            target = torch.where(counted.unsqueeze(1), target, 0)
        check_within("target", target, 0, 1, what="probabilities")
    else:
        target, counted = class_indices(target, z.shape[1], ignore_index, mask)
    if counted is not None:
        z = torch.where(counted.unsqueeze(1), z, 0)  # what does not count may hold NaN
    multiplicative, additive, margin, class_weight = vectors
    adjusted = adjust(z, target, additive, multiplicative, margin, scale)
    w = None if class_weight is None else class_weight.to(z)
    if soft or label_smoothing > 0:
        losses, carried = _soft_cross_entropy(adjusted, target, w, label_smoothing)
    else:
        losses = torch_cross_entropy(adjusted, target, weight=w, reduction="none")
        carried = None if w is None else w[target]
    if carried is None and reduction["normalizer"] == "weight":
        carried = torch.ones_like(losses)  # as class weights of one
    if counted is not None:
        losses = torch.where(counted, losses, 0)
    combined, counted_rows = combine_inner(losses, counted, inner)
    if carried is not None:
        carried = combine_inner(carried, counted, inner)[0]
    return reduce_losses(combined, counted=counted_rows, weight=weight, carried_weight=carried, **reduction)


def adjust(
    z: Tensor,
    target: Tensor,
    additive: Tensor | None,
    multiplicative: Tensor | None,
    margin: Tensor | None,
    scale: float,
) -> Tensor:
    """scale * (z * multiplicative + additive - margin * target), each where it is given."""
    if multiplicative is not None:
        z = z * along_classes(class_vector("multiplicative", multiplicative, z), z)
    if additive is not None:
        z = z + along_classes(class_vector("additive", additive, z), z)
    if margin is not None:
        m = class_vector("margin", margin, z)
        if target.is_floating_point():
            z = z - along_classes(m, z) * target.to(z.dtype)
        else:
            z = z.scatter_add(1, target.unsqueeze(1), -m[target].unsqueeze(1))
    return z if scale == 1.0 else z * scale


def _soft_cross_entropy(
    z: Tensor, target: Tensor, w: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor | None]:
    """-sum_c w_c t_c log p_c with smoothed t, and the weight that each entry carries."""
    t = as_distribution(target, z)
    carried = None if w is None else (t * along_classes(w, z)).sum(1)
    t = smooth(t, z, label_smoothing)
    if w is not None:
        t = t * along_classes(w, z)
    log_p = log_softmax(z, dim=1)
    return -torch.where(t == 0, 0, t * log_p).sum(1), carried  # 0 * log 0 = 0
