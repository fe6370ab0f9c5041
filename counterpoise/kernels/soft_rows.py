"""Row-wise family with distributions as targets: cross-entropy with probabilities, and divergence from them.

Logits and targets are read once for the loss. On the host the gradient of a mean or sum is made with it, from a row
that is still in the cache; elsewhere the forward pass keeps five numbers a row, from which the backward pass makes the
gradient in one more pass. Second derivatives go through the plain reference. Sums are added in a fixed order: the same
result on every run and for every number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import INNERS, check_choice, check_reduction, combine_inner, reduce_losses
from counterpoise.kernels._library import LIBRARY, TYPES, define, differentiable, in_transform, runs_on, wants_plain
from counterpoise.kernels.rows import Inputs, Options, _as_logits, _as_rows, _by_entry, _call, _new

_INPUTS = (
    "Tensor logits, Tensor target, Tensor? mask, Tensor? multiplicative, Tensor? additive, Tensor? margin, "
    "Tensor? class_weight"
)
_STATE = 5  # numbers a row

define(f"soft_rows_each({_INPUTS}, float[] settings, Tensor(a!) losses, Tensor(b!) state) -> ()")
define(f"soft_rows_backward({_INPUTS}, float[] settings, Tensor state, Tensor by_row, Tensor(a!) grad) -> ()")
define(
    f"soft_rows_total({_INPUTS}, Tensor? weight, float[] settings, Tensor(a!) value, Tensor(b!)? state, "
    "Tensor(c!)? factor, Tensor(d!)? grad) -> ()"
)

_each_op = torch.ops.counterpoise.soft_rows_each.default
_backward_op = torch.ops.counterpoise.soft_rows_backward.default
_total_op = torch.ops.counterpoise.soft_rows_total.default


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
    plain: Callable[..., Tensor],
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scale: float,
    smoothing: float,
    mask: Tensor | None,
    weight: Tensor | None,
    inner: str,
    reduction: str,
    normalizer: str | float,
    sync: bool,
    *,
    divergence: bool = False,
    target_scale: float = 0.0,
) -> Tensor:
    """-sum_c w_c t_c log p_c by row, reduced. Arguments are those of its plain form, which has checked their shapes.

    Args:
        logits, target: (N, C) or (N, C, d1, ...).
        plain: its plain form, ``plain(logits, weight=, inner=, reduction=, normalizer=, sync=)``.
        vectors: multiplicative, additive, margin and class weights, each (C,) or None.
        smoothing: mass of the target that is spread over the classes that are not masked.
        divergence: sum_c w_c t_c (log t_c - log p_c), Kullback's and Leibler's of the target from the softmax; with
            smoothing it is the plain form's.
        target_scale: not 0: the target is logits, say of a teacher, and t the softmax of so many times them.

    Raises:
        ValueError: a target outside [0, 1]; on an accelerator an assertion on the device.
    """
    check_reduction(reduction, normalizer)
    check_choice("inner", inner, INNERS)
    options = (weight, inner, reduction, normalizer, sync)
    if divergence and smoothing > 0:  # the entropy of what is smoothed takes a pass of its own
        return _call(plain, logits, options)
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entries = target[:, 0]
    flat_mask = None if mask is None else _by_entry(mask, entries)
    dense = [x if x is None else x.to(logits.device, computed).contiguous() for x in vectors]
    known_type = logits.is_cpu or target.dtype == logits.dtype  # to the kernels of the device
    t = _as_rows(target if known_type else target.to(computed))
    inputs = (t, flat_mask, *dense)
    settings = [divergence, scale, smoothing, target_scale]
    known = normalizer != "weight" or dense[3] is None  # what is divided by, before the targets have been read
    try:
        if known and not (sync or reduction == "none" or logits.ndim > 2):
            w = None if weight is None else weight.to(computed).contiguous()
            return _total(logits, (*inputs, w), settings + _divisor(reduction, normalizer), plain, options)
        losses = _each(logits, inputs, [*settings, 0, 1.0], plain)
    except RuntimeError as error:
        if "target holds" in str(error):
            _call(plain, logits.detach(), options)  # says which value it was
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


def _total(logits: Tensor, inputs: Inputs, settings: list[float], plain: Callable[..., Tensor], o: Options) -> Tensor:
    """The reduced loss; inputs are target, mask, the four class vectors and row weights."""
    if torch.compiler.is_compiling():
        return _TracedTotal.apply(logits, settings, *inputs)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Total.apply(logits, (inputs, settings, plain, o))
    value = _new(logits)
    _total_op(logits.contiguous(), *inputs, settings, value, None, None, None)
    return value


def _each(logits: Tensor, inputs: Inputs, settings: list[float], plain: Callable[..., Tensor]) -> Tensor:
    """One loss an entry, flat; inputs are target, mask and the four class vectors."""
    if torch.compiler.is_compiling():
        return _TracedEach.apply(logits, settings, *inputs)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Each.apply(logits, (inputs, settings, plain))
    return _run_each(_as_rows(logits), inputs, settings)[0]


def _run_total(z: Tensor, inputs: Inputs, settings: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the rows' states, and the factor of each row in the loss."""
    value, state, factor = _new(z), _new(z, len(z), _STATE), _new(z, len(z))
    _total_op(z, *inputs, settings, value, state, factor, None)
    return value, state, factor


def _run_each(z: Tensor, inputs: Inputs, settings: list[float]) -> tuple[Tensor, Tensor]:
    losses, state = _new(z, len(z)), _new(z, len(z), _STATE)
    _each_op(z, *inputs, settings, losses, state)
    return losses, state


def _run_backward(z: Tensor, inputs: Inputs, settings: list[float], state: Tensor, by_row: Tensor) -> Tensor:
    grad = torch.empty_like(z)
    _backward_op(z, *inputs, settings, state, by_row, grad)
    return grad


class _Total(torch.autograd.Function):
    """The reduced loss of logits (N, C). On the host the first backward pass takes the gradient that came with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Inputs, list[float], Callable[..., Tensor], Options]) -> Tensor:
        ctx.call, (inputs, settings, *_) = call, call
        ctx.save_for_backward(logits)
        z = logits.contiguous()
        # A float16 gradient must not be rounded before it is multiplied by the scale that keeps it from vanishing.
        if logits.is_cpu and logits.dtype != torch.float16:
            value, ctx.kept, ctx.grad = _new(z), None, torch.empty_like(z)
            _total_op(z, *inputs, settings, value, None, None, ctx.grad)
        else:
            value, *ctx.kept = _run_total(z, inputs, settings)
            ctx.grad = None
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        again = wants_plain(upstream)
        if ctx.grad is not None and not again:
            grad, ctx.grad = ctx.grad, None
            scale = upstream.item()
            return (grad if scale == 1 else grad.mul_(scale)), None
        inputs, settings, plain, options = ctx.call
        (logits,) = ctx.saved_tensors
        if again:
            return differentiable(lambda z: _call(plain, z, options), logits, upstream), None
        z = logits.contiguous()
        if ctx.kept is None:  # the graph was retained
            ctx.kept = _run_total(z, inputs, settings)[1:]
        state, factor = ctx.kept
        return _run_backward(z, inputs[:6], settings, state, factor * upstream), None


class _Each(torch.autograd.Function):
    """One loss an entry, flat, of logits (N, C, ...)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Inputs, list[float], Callable[..., Tensor]]) -> Tensor:
        ctx.call = call
        losses, state = _run_each(_as_rows(logits), *call[:2])
        ctx.save_for_backward(logits, state)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, settings, plain = ctx.call
        logits, state = ctx.saved_tensors
        if wants_plain(upstream):
            options = (None, "none", "none", "count", False)
            return differentiable(lambda z: _call(plain, z, options).flatten(), logits, upstream), None
        grad = _run_backward(_as_rows(logits), inputs, settings, state, upstream.contiguous())
        return _as_logits(grad, logits), None


class _TracedTotal(torch.autograd.Function):
    """What ``torch.compile`` traces: the gradient is made in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, settings: list[float], *inputs: Tensor | None) -> Tensor:
        z = logits.contiguous()
        value, state, factor = _run_total(z, inputs, settings)
        ctx.save_for_backward(z, state, factor, *inputs[:6])
        ctx.settings = settings
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, state, factor, *inputs = ctx.saved_tensors
        grad = _run_backward(z, tuple(inputs), ctx.settings, state, factor * upstream)
        return grad, *[None] * 8


class _TracedEach(torch.autograd.Function):
    """What ``torch.compile`` traces of :class:`_Each`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, settings: list[float], *inputs: Tensor | None) -> Tensor:
        losses, state = _run_each(_as_rows(logits), inputs, settings)
        ctx.save_for_backward(logits, state, *inputs)
        ctx.settings = settings
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, state, *inputs = ctx.saved_tensors
        grad = _run_backward(_as_rows(logits), tuple(inputs), ctx.settings, state, upstream.contiguous())
        return _as_logits(grad, logits), *[None] * 7


for _name in ("soft_rows_each", "soft_rows_backward", "soft_rows_total"):
    torch.library.register_fake(f"counterpoise::{_name}", lambda *_: None, lib=LIBRARY)
