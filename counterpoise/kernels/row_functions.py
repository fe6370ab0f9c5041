"""What the two members of the row-wise family share: schemas, autograd functions, and the shapes that rows come in.

A member is three operators on logits (N, C): ``<name>_total`` makes the reduced loss, ``<name>_each`` one loss for each
entry, and ``<name>_backward`` the gradient, from the numbers that the other two keep of a row. The gradient of a mean
or sum is emitted with the loss, while a row is still in the cache or in shared memory; the backward pass then hands it
over, scaled in place where the upstream gradient is not one. Second derivatives go through the plain reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise.kernels._library import (
    LIBRARY,
    cpu_function,
    define,
    differentiable,
    gradient_like,
    scalar_like,
    seen_by_others,
    wants_plain,
)

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""multiplicative, additive, margin and class weights, each (C,)"""
Options = tuple[Tensor | None, str, str, str | float, bool]
"""weight, inner, reduction, normalizer, sync"""
Inputs = tuple[Tensor | None, ...]
"""target, mask, the vectors and, of a total, row weights"""
Plain = Callable[..., Tensor]
"""The plain form: ``plain(logits, weight=, inner=, reduction=, normalizer=, sync=)``"""

_INPUTS = (
    "Tensor logits, Tensor target, Tensor? mask, Tensor? multiplicative, Tensor? additive, Tensor? margin, "
    "Tensor? class_weight"
)
_STATE = 5  # numbers a row


@cache
def _common() -> Callable[..., int]:
    """The host's function for what is asked for nearly always; the dispatcher alone takes longer than a small loss."""
    p, n = ctypes.c_void_p, ctypes.c_int64
    return cpu_function("counterpoise_rows_common", ctypes.c_int, p, p, p, p, n, n, p, p, p) or (lambda *_: 1)


@lru_cache
def _formula(*numbers: float) -> Any:
    """type, kind, scale, gamma, ignore_index and what is divided by, as C has them."""
    return (ctypes.c_double * len(numbers))(*numbers)


_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # as csrc numbers them
_COMMON_KINDS = (0, 1)  # cross-entropy and focal


# On an accelerator alone.
define("scale_gradient_(Tensor(a!) grad, Tensor upstream) -> ()")
LIBRARY.impl("scale_gradient_", lambda *_: None, "Meta")
_scale_op = torch.ops.counterpoise.scale_gradient_.default


class _Operators(NamedTuple):
    each: Any
    backward: Any
    total: Any


_MEMBERS: dict[str, _Operators] = {}


def define_member(name: str) -> None:
    """The operators of a member, without implementations.

    Outputs are arguments: allocating them here costs a tenth of what it does behind the stable interface.
    """
    define(f"{name}_each({_INPUTS}, float[] settings, Tensor(a!) losses, Tensor(b!) state) -> ()")
    define(f"{name}_backward({_INPUTS}, float[] settings, Tensor state, Tensor by_row, Tensor(a!) grad) -> ()")
    define(
        f"{name}_total({_INPUTS}, Tensor? weight, float[] settings, Tensor(a!) value, Tensor(b!)? state, "
        "Tensor(c!)? factor, Tensor(d!)? grad) -> ()"
    )
    for part in _Operators._fields:
        LIBRARY.impl(f"{name}_{part}", lambda *_: None, "Meta")
    made = (getattr(torch.ops.counterpoise, f"{name}_{part}").default for part in _Operators._fields)
    _MEMBERS[name] = _Operators(*made)


def as_computed(x: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A class vector as the operators read it; nearly always it is that already."""
    if x.is_cpu and logits.is_cpu and type(x) is Tensor and x.dtype == dtype and x.is_contiguous():
        return x
    return x.to(logits.device, dtype).contiguous()


def by_entry(mask: Tensor, y: Tensor) -> Tensor:
    """A mask by row or by entry, flat, one an entry."""
    whole = mask if mask.ndim == y.ndim else mask.reshape(-1, *[1] * (y.ndim - 1)).expand(y.shape)
    return whole.reshape(-1).contiguous()


def as_rows(logits: Tensor) -> Tensor:
    """(N, C, ...) as contiguous rows of classes: a copy, unless the classes are innermost in memory already."""
    return (logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)).contiguous()


def _as_logits(rows: Tensor, logits: Tensor) -> Tensor:
    """The inverse, for gradients."""
    if logits.ndim == 2:
        return rows
    return rows.reshape(logits.shape[0], *logits.shape[2:], logits.shape[1]).movedim(-1, 1)


def call(plain: Plain, logits: Tensor, options: Options) -> Tensor:
    """The plain form."""
    weight, inner, reduction, normalizer, sync = options
    return plain(logits, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)


def total(member: str, logits: Tensor, inputs: Inputs, settings: list[float], plain: Plain, options: Options) -> Tensor:
    """The reduced loss of logits (N, C)."""
    if torch.compiler.is_compiling():
        return _TracedTotal.apply(logits, member, settings, *inputs)
    if logits.requires_grad and torch.is_grad_enabled():
        return _apply_total(logits, (member, inputs, settings, plain, options))
    return _run_total(member, logits.contiguous(), inputs, settings)[0]


def each(member: str, logits: Tensor, inputs: Inputs, settings: list[float], plain: Plain) -> Tensor:
    """One loss an entry, flat, of logits (N, C, ...)."""
    if torch.compiler.is_compiling():
        return _TracedEach.apply(logits, member, settings, *inputs)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Each.apply(logits, (member, inputs, settings, plain))
    return _run_each(member, as_rows(logits), inputs, settings)[0]


def _new(logits: Tensor, *shape: int) -> Tensor:
    wide = logits.dtype == torch.float32 or logits.dtype == torch.float64
    return logits.new_empty(shape) if wide else logits.new_empty(shape, dtype=torch.float32)


def _run_total(member: str, z: Tensor, inputs: Inputs, settings: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the rows' states, and the factor of each row in the loss."""
    value, state, factor = _new(z), _new(z, len(z), _STATE), _new(z, len(z))
    _MEMBERS[member].total(z, *inputs, settings, value, state, factor, None)
    return value, state, factor


def _run_each(member: str, z: Tensor, inputs: Inputs, settings: list[float]) -> tuple[Tensor, Tensor]:
    losses, state = _new(z, len(z)), _new(z, len(z), _STATE)
    _MEMBERS[member].each(z, *inputs, settings, losses, state)
    return losses, state


def _run_backward(
    member: str, z: Tensor, inputs: Inputs, settings: list[float], state: Tensor, by_row: Tensor
) -> Tensor:
    grad = gradient_like(z)
    _MEMBERS[member].backward(z, *inputs[:6], settings, state, by_row, grad)
    return grad


def _emit(member: str, z: Tensor, inputs: Inputs, settings: list[float], value: Tensor, grad: Tensor) -> None:
    """The loss with its gradient."""
    y, mask, multiplicative, additive, margin, class_weight, weight = inputs
    if mask is multiplicative is class_weight is weight is None and member == "rows" and z.is_cpu and y is not None:
        kind, scale, smoothing, gamma, _, _, ignore_index, divisor, number = settings
        negated = (additive is not None and additive.is_neg()) or (margin is not None and margin.is_neg())
        if smoothing == 0 and kind in _COMMON_KINDS and not negated and not seen_by_others(z):
            shift = None if additive is None else additive.data_ptr()
            below = None if margin is None else margin.data_ptr()
            formula = _formula(_TYPES[z.dtype], kind, scale, gamma, ignore_index, divisor, number)
            places = value.data_ptr(), grad.data_ptr()
            if not _common()(z.data_ptr(), y.data_ptr(), shift, below, *z.shape, formula, *places):
                return
    _MEMBERS[member].total(z, *inputs, settings, value, None, None, grad)  # says what is wrong, where something is


def _times(grad: Tensor, upstream: Tensor) -> Tensor:
    """A gradient times what comes from above, nearly always one; nothing waits for a device to say so."""
    if not grad.is_cpu:
        if torch.cuda.is_current_stream_capturing():  # a graph may run its backward pass more than once
            return grad * upstream
        _scale_op(grad, upstream)
        return grad
    scale = upstream.item()
    return grad if scale == 1 else grad.mul_(scale)


class _Total(torch.autograd.Function):
    """:func:`total`. The first backward pass takes the gradient that came with the loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call_: tuple[str, Inputs, list[float], Plain, Options]) -> Tensor:
        ctx.call = call_
        member, inputs, settings, _, _ = call_
        ctx.save_for_backward(logits)
        z = logits.contiguous()
        # A float16 gradient must not be rounded before it is multiplied by the scale that keeps it from vanishing.
        if logits.dtype != torch.float16:
            value, ctx.kept, ctx.grad = scalar_like(z), None, gradient_like(z)
            _emit(member, z, inputs, settings, value, ctx.grad)
        else:
            value, *ctx.kept = _run_total(member, z, inputs, settings)
            ctx.grad = None
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        again = wants_plain(upstream)
        grad = None if again else ctx.__dict__.pop("grad", None)  # at once, should two threads come
        if grad is not None:
            return _times(grad, upstream), None
        member, inputs, settings, plain, options = ctx.call
        (logits,) = ctx.saved_tensors
        if again:
            return differentiable(lambda z: call(plain, z, options), logits, upstream), None
        z = logits.contiguous()
        if ctx.kept is None:  # the graph was retained
            ctx.kept = _run_total(member, z, inputs, settings)[1:]
        state, factor = ctx.kept
        return _run_backward(member, z, inputs, settings, state, factor * upstream), None


# What Function.apply does before this is for functorch transforms, which have taken the plain path by now.
_apply_total = super(torch.autograd.Function, _Total).apply


class _Each(torch.autograd.Function):
    """:func:`each`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call_: tuple[str, Inputs, list[float], Plain]) -> Tensor:
        ctx.call = call_
        member, inputs, settings, _ = call_
        losses, state = _run_each(member, as_rows(logits), inputs, settings)
        ctx.save_for_backward(logits, state)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        member, inputs, settings, plain = ctx.call
        logits, state = ctx.saved_tensors
        if wants_plain(upstream):
            options: Options = (None, "none", "none", "count", False)
            return differentiable(lambda z: call(plain, z, options).flatten(), logits, upstream), None
        grad = _run_backward(member, as_rows(logits), inputs, settings, state, upstream.contiguous())
        return _as_logits(grad, logits), None


class _TracedTotal(torch.autograd.Function):
    """What ``torch.compile`` traces: the gradient is made in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, member: str, settings: list[float], *inputs: Tensor | None) -> Tensor:
        z = logits.contiguous()
        value, state, factor = _run_total(member, z, inputs, settings)
        ctx.save_for_backward(z, state, factor, *inputs[:6])
        ctx.member, ctx.settings = member, settings
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, state, factor, *inputs = ctx.saved_tensors
        grad = _run_backward(ctx.member, z, tuple(inputs), ctx.settings, state, factor * upstream)
        return grad, *[None] * 9


class _TracedEach(torch.autograd.Function):
    """What ``torch.compile`` traces of :class:`_Each`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, member: str, settings: list[float], *inputs: Tensor | None) -> Tensor:
        losses, state = _run_each(member, as_rows(logits), inputs, settings)
        ctx.save_for_backward(logits, state, *inputs)
        ctx.member, ctx.settings = member, settings
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, state, *inputs = ctx.saved_tensors
        z = as_rows(logits)
        grad = _run_backward(ctx.member, z, tuple(inputs), ctx.settings, state, upstream.contiguous())
        return _as_logits(grad, logits), *[None] * 8
