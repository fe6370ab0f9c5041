"""Row-wise family with distributions as targets: cross-entropy with probabilities, and divergence from them.

How gradients come about stands in ``row_functions.py``. Sums are added in a fixed order: the same result on every run
and for every number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import INNERS, check_choice, check_reduction, combine_inner, reduce_losses
from counterpoise.kernels._library import TYPES, in_transform, runs_on
from counterpoise.kernels.row_functions import (
    Options,
    Plain,
    Vectors,
    as_computed,
    as_rows,
    by_entry,
    call,
    define_member,
    each,
    total,
)

define_member("soft_rows")


def runs_soft_rows(logits: Tensor, target: Tensor, *others: Tensor | None) -> bool:
    """Whether the fused path may run: there are kernels, and probabilities; nothing but ``logits`` has a slope.

    Args:
        logits: (N, C, ...), the differentiable input.
        target: probabilities (or logits) of the same shape, or class indices, which are no business of these kernels.
        others: class vectors, weights, masks; None is skipped.
    """
    if target.dtype not in TYPES or target.requires_grad or not runs_on(logits, "soft_rows_total"):
        return False
    if not torch.compiler.is_compiling() and (type(target) is not Tensor or in_transform()):
        return False
    for x in others:
        if x is not None and x.requires_grad:
            return False
    return target.device == logits.device


def soft_row_loss(
    logits: Tensor,
    target: Tensor,
    plain: Plain,
    vectors: Vectors,
    mask: Tensor | None,
    options: Options,
    *,
    scale: float = 1.0,
    smoothing: float = 0.0,
    divergence: bool = False,
    target_scale: float = 0.0,
) -> Tensor:
    """-sum_c w_c t_c log p_c by row, reduced. Arguments are those of its plain form, which has checked their shapes.

    Args:
        logits, target: (N, C) or (N, C, d1, ...).
        plain: its plain form.
        smoothing: mass of the target that is spread over the classes that are not masked.
        divergence: sum_c w_c t_c (log t_c - log p_c), Kullback's and Leibler's of the target from the softmax; with
            smoothing it is the plain form's.
        target_scale: not 0: the target is logits, say of a teacher, and t the softmax of so many times them.

    Raises:
        ValueError: a target outside [0, 1]; on an accelerator an assertion on the device.
    """
    weight, inner, reduction, normalizer, sync = options
    check_reduction(reduction, normalizer)
    check_choice("inner", inner, INNERS)
    if divergence and smoothing > 0:  # the entropy of what is smoothed takes a pass of its own
        return call(plain, logits, options)
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entries = target[:, 0]
    flat_mask = None if mask is None else by_entry(mask, entries)
    dense = [x if x is None else as_computed(x, logits, computed) for x in vectors]
    known_type = logits.is_cpu or target.dtype == logits.dtype  # to the kernels of the device
    t = as_rows(target if known_type else target.to(computed))
    inputs = (t, flat_mask, *dense)
    settings = [divergence, scale, smoothing, target_scale]
    known = normalizer != "weight" or dense[3] is None  # what is divided by, before the targets have been read
    try:
        if known and not (sync or reduction == "none" or logits.ndim > 2):
            w = None if weight is None else weight.to(computed).contiguous()
            return total("soft_rows", logits, (*inputs, w), settings + _divisor(reduction, normalizer), plain, options)
        losses = each("soft_rows", logits, inputs, [*settings, 0, 1.0], plain)
    except RuntimeError as error:
        if "target holds" in str(error):
            call(plain, logits.detach(), options)  # says which value it was
        raise
    losses = losses.reshape(entries.shape)
    if reduction == "none" and weight is None and (entries.ndim == 1 or inner == "none"):
        return losses
    counted = None if flat_mask is None else flat_mask.reshape(entries.shape)
    rows, counted_rows = combine_inner(losses, counted, inner)
    carried = None
    if normalizer == "weight":
        ones = torch.ones_like(losses, requires_grad=False)
        probabilities = torch.softmax(t.to(computed) * target_scale, 1) if target_scale else t.to(computed)
        masses = ones if dense[3] is None else (probabilities @ dense[3]).reshape(entries.shape)
        carried = combine_inner(masses, counted, inner)[0]
    return reduce_losses(
        rows,
        counted=counted_rows,
        weight=weight,
        carried_weight=carried,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _divisor(reduction: str, normalizer: str | float) -> list[float]:
    """The code of what the kernel divides by, as in rows.NORMALIZERS, and the number if it is one."""
    if reduction == "sum":
        return [0, 1.0]
    if not isinstance(normalizer, str):
        return [0, float(normalizer)]
    return [2 if normalizer == "weight" else 1, 0.0]  # every row that counts is a positive
