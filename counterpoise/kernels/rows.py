"""Row-wise family: softmax losses of a row with a class index, where a row's loss comes from all of its logits.

How gradients come about stands in ``row_functions.py``. Sums are added in a fixed order: the same result on every run
and for every number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import INNERS, check_choice, check_reduction, combine_inner, reduce_losses
from counterpoise.kernels._library import in_transform, runs_on
from counterpoise.kernels.row_functions import (
    Options,
    Plain,
    Vectors,
    as_computed,
    by_entry,
    call,
    define_member,
    each,
    total,
)

CROSS_ENTROPY, FOCAL, ASYMMETRIC = 0, 1, 2
Formula = tuple[int, float, float, float, float, bool, int]
"""kind, scale, smoothing, gamma_pos, gamma_neg, detach, ignore_index"""
NORMALIZERS = ("number", "count", "weight", "positives")  # what the kernel can divide by; the place is its code

define_member("rows")


def runs_rows(logits: Tensor, target: Tensor, *others: Tensor | None) -> bool:
    """Whether the fused path may run: there are kernels, and class indices; nothing but ``logits`` has a slope.

    Args:
        logits: (N, C, ...), the differentiable input.
        target: class indices, or probabilities, which have none.
        others: class vectors, weights, masks; None is skipped.
    """
    if not runs_on(logits, "rows_total") or target.is_floating_point() or target.is_cpu != logits.is_cpu:
        return False
    for x in others:
        if x is not None and x.requires_grad:
            return False
    return (type(target) is Tensor and not in_transform()) or torch.compiler.is_compiling()


def row_loss(
    formula: Formula,
    logits: Tensor,
    target: Tensor,
    plain: Plain,
    vectors: Vectors,
    mask: Tensor | None,
    options: Options,
) -> Tensor:
    """A loss of the family, reduced. The arguments are those of its plain form, which has checked their shapes.

    Args:
        formula: which one, with its numbers.
        plain: its plain form.

    Raises:
        ValueError: a class index out of range; on an accelerator an assertion on the device.
    """
    weight, inner, reduction, normalizer, sync = options
    kind, smoothing, ignore_index = formula[0], formula[2], formula[6]
    check_reduction(reduction, normalizer)
    check_choice("inner", inner, INNERS)
    if kind == FOCAL and smoothing > 0 and normalizer == "weight":  # smoothing spreads the class weights of a row
        return call(plain, logits, options)
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    y = target if target.dtype == torch.int64 else target.long()
    flat_mask = None if mask is None else by_entry(mask, y)
    multiplicative, additive, margin, class_weight = vectors
    inputs = (
        y.contiguous() if y.ndim == 1 else y.reshape(-1),
        flat_mask,
        None if multiplicative is None else as_computed(multiplicative, logits, computed),
        None if additive is None else as_computed(additive, logits, computed),
        None if margin is None else as_computed(margin, logits, computed),
        None if class_weight is None else as_computed(class_weight, logits, computed),
    )
    try:
        if not (sync or reduction == "none" or logits.ndim > 2):
            w = None if weight is None else weight.to(computed).contiguous()
            settings = [*formula, *_divisor(kind, reduction, normalizer)]
            return total("rows", logits, (*inputs, w), settings, plain, options)
        losses = each("rows", logits, inputs, [*formula, 0, 1.0], plain)
    except RuntimeError as error:
        if "class index" in str(error):
            call(plain, logits.detach(), options)  # says which index it was
        raise
    losses = losses.reshape(y.shape)
    if reduction == "none" and weight is None and (y.ndim == 1 or inner == "none"):
        return losses
    counted = y != ignore_index if flat_mask is None else (y != ignore_index) & flat_mask.reshape(y.shape)
    rows, counted_rows = combine_inner(losses, counted, inner)
    carried = None
    if normalizer == "weight":
        ones = torch.ones_like(losses, requires_grad=False)
        carried = combine_inner(ones if inputs[5] is None else inputs[5][y.where(counted, 0)], counted, inner)[0]
    return reduce_losses(
        rows,
        counted=counted_rows,
        weight=weight,
        carried_weight=carried,
        positives=((y > 0) & counted).sum() if kind == FOCAL else None,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _divisor(kind: int, reduction: str, normalizer: str | float) -> tuple[float, float]:
    """The code of what the kernel divides by, and the number if it is one."""
    if reduction == "mean" and normalizer == "count":
        return 1, 0.0
    if reduction == "sum":
        return 0, 1.0
    if not isinstance(normalizer, str):
        return 0, float(normalizer)
    if normalizer == "positives" and kind != FOCAL:
        return 1, 0.0
    return NORMALIZERS.index(normalizer), 0.0
