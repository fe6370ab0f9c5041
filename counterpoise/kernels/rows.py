"""Row-wise family: softmax losses of a row with a class index, where a row's loss comes from all of its logits.

The CPU kernel emits the gradient of a mean or sum with the loss, while a row is still in the cache; the backward pass
then hands it over, scaled in place where the upstream gradient is not one. Elsewhere the forward pass keeps five
numbers a row, from which the backward pass makes the gradient in one more pass over the logits. Second derivatives go
through the plain reference. Sums are added in a fixed order: the same result on every run and for every number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import INNERS, check_choice, check_reduction, combine_inner, reduce_losses
from counterpoise.kernels._library import LIBRARY, define, differentiable, in_transform, runs_on

CROSS_ENTROPY, FOCAL, ASYMMETRIC = 0, 1, 2
NORMALIZERS = ("number", "count", "weight", "positives")  # what the kernel can divide by; the place is its code
_SETTINGS = (
    "Tensor logits, Tensor target, Tensor? mask, Tensor? additive, Tensor? multiplicative, Tensor? margin, "
    "Tensor? class_weight, int kind, float scale, float smoothing, float gamma_pos, float gamma_neg, bool detach, "
    "int ignore_index"
)
_STATE = 5  # numbers a row

define(f"rows_each({_SETTINGS}) -> (Tensor, Tensor)")
define(f"rows_backward({_SETTINGS}, Tensor state, Tensor by_row) -> Tensor")
define(f"rows_total({_SETTINGS}, Tensor? weight, int normalizer, float number) -> (Tensor, Tensor, Tensor)")
define(f"rows_total_grad({_SETTINGS}, Tensor? weight, int normalizer, float number) -> (Tensor, Tensor)")

_ops = torch.ops.counterpoise


def runs_rows(logits: Tensor, target: Tensor, *others: Tensor | None) -> bool:
    """Whether the fused path may run: there are kernels, and class indices; nothing but ``logits`` has a slope.

    Args:
        logits: (N, C, ...), the differentiable input.
        target: class indices, or probabilities, which have none.
        others: class vectors, weights, masks; None is skipped.
    """
    if target.dtype.is_floating_point or not runs_on(logits, "rows_total"):
        return False
    if not torch.compiler.is_compiling() and (type(target) is not Tensor or in_transform()):
        return False
    for x in others:
        if x is not None and x.requires_grad:
            return False
    return target.is_cpu == logits.is_cpu


def row_loss(
    kind: int,
    logits: Tensor,
    target: Tensor,
    plain: Callable[..., Tensor],
    *,
    additive: Tensor | None = None,
    multiplicative: Tensor | None = None,
    margin: Tensor | None = None,
    class_weight: Tensor | None = None,
    scale: float = 1.0,
    smoothing: float = 0.0,
    gamma_pos: float = 0.0,
    gamma_neg: float = 0.0,
    detach: bool = False,
    ignore_index: int,
    weight: Tensor | None,
    mask: Tensor | None,
    inner: str,
    reduction: str,
    normalizer: str | float,
    sync: bool,
) -> Tensor:
    """A loss of the family, reduced. The arguments are those of its plain form, which has checked their shapes.

    Args:
        kind: which formula: CROSS_ENTROPY, FOCAL or ASYMMETRIC.
        plain: its plain form, ``plain(logits, weight=, inner=, reduction=, normalizer=, sync=)``.

    Raises:
        ValueError: a class index out of range; on an accelerator an assertion on the device.
    """
    check_reduction(reduction, normalizer)
    check_choice("inner", inner, INNERS)
    options = (weight, inner, reduction, normalizer, sync)
    if kind == FOCAL and smoothing > 0 and normalizer == "weight":  # smoothing spreads the class weights of a row
        return _call(plain, logits, options)
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    y = target if target.dtype == torch.int64 else target.long()
    flat_mask = None if mask is None else _by_entry(mask, y)
    weights = _vector(class_weight, logits, computed)
    settings = (
        y.contiguous() if y.ndim == 1 else y.reshape(-1),
        flat_mask,
        _vector(additive, logits, computed),
        _vector(multiplicative, logits, computed),
        _vector(margin, logits, computed),
        weights,
        kind,
        float(scale),
        float(smoothing),
        float(gamma_pos),
        float(gamma_neg),
        detach,
        ignore_index,
    )
    try:
        if not (sync or reduction == "none" or logits.ndim > 2):
            w = None if weight is None else weight.to(computed).contiguous()
            return _total(logits, (*settings, w, *_divisor(kind, reduction, normalizer)), plain, options)
        losses = _each(logits, settings, plain)
    except RuntimeError as error:
        if "class index" in str(error):
            _call(plain, logits.detach(), options)  # says which index it was
        raise
    losses = losses.reshape(y.shape)
    if reduction == "none" and weight is None and (y.ndim == 1 or inner == "none"):
        return losses
    counted = y != ignore_index if flat_mask is None else (y != ignore_index) & flat_mask.reshape(y.shape)
    rows, counted_rows = combine_inner(losses, counted, inner)
    carried = None
    if normalizer == "weight":
        ones = torch.ones_like(losses, requires_grad=False)
        carried = combine_inner(ones if weights is None else weights[y.where(counted, 0)], counted, inner)[0]
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


def _vector(x: Tensor | None, logits: Tensor, computed: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(logits.device, computed).contiguous()


def _by_entry(mask: Tensor, y: Tensor) -> Tensor:
    """A mask by row or by entry, flat, one an entry."""
    return (mask if mask.ndim == y.ndim else mask.reshape(-1, *[1] * (y.ndim - 1)).expand(y.shape)).reshape(-1)


def _divisor(kind: int, reduction: str, normalizer: str | float) -> tuple[int, float]:
    """The code of what the kernel divides by, and the number if it is one."""
    if reduction == "sum":
        return 0, 1.0
    if not isinstance(normalizer, str):
        return 0, float(normalizer)
    if normalizer == "positives" and kind != FOCAL:
        return 1, 0.0
    return NORMALIZERS.index(normalizer), 0.0


def _call(plain: Callable[..., Tensor], logits: Tensor, options: tuple[Any, ...]) -> Tensor:
    weight, inner, reduction, normalizer, sync = options
    return plain(logits, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)


def _as_rows(logits: Tensor) -> Tensor:
    """(N, C, ...) as contiguous rows of classes: a copy, unless the classes are innermost in memory already."""
    return (logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)).contiguous()


def _as_logits(rows: Tensor, logits: Tensor) -> Tensor:
    """The inverse, for gradients."""
    if logits.ndim == 2:
        return rows
    return rows.reshape(logits.shape[0], *logits.shape[2:], logits.shape[1]).movedim(-1, 1)


def _total(logits: Tensor, settings: tuple[Any, ...], plain: Callable[..., Tensor], options: tuple[Any, ...]) -> Tensor:
    if torch.compiler.is_compiling():
        return _TracedTotal.apply(logits, *settings)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _ops.rows_total(logits.contiguous(), *settings)[0]
    return _Total.apply(logits, (settings, plain, options))


def _each(logits: Tensor, settings: tuple[Any, ...], plain: Callable[..., Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return _TracedEach.apply(logits, *settings)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _ops.rows_each(_as_rows(logits), *settings)[0]
    return _Each.apply(logits, (settings, plain, (None, "none", "none", "count", False)))


_Call = tuple[tuple[Any, ...], Callable[..., Tensor], tuple[Any, ...]]  # the operator's settings, and the plain form


class _Total(torch.autograd.Function):
    """The reduced loss of logits (N, C). On the host the first backward pass takes the gradient that came with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        ctx.call, ctx.grad, ctx.kept = call, None, None
        ctx.save_for_backward(logits)
        # A float16 gradient must not be rounded before it is multiplied by the scale that keeps it from vanishing.
        if logits.is_cpu and logits.dtype != torch.float16:
            value, ctx.grad = _ops.rows_total_grad(logits.contiguous(), *call[0])
        else:
            value, *ctx.kept = _ops.rows_total(logits.contiguous(), *call[0])
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        settings, plain, options = ctx.call
        again = torch.is_grad_enabled() or in_transform()
        if ctx.grad is not None and not again:
            grad, ctx.grad = ctx.grad, None
            scale = upstream.item()
            return (grad if scale == 1 else grad.mul_(scale)), None
        (logits,) = ctx.saved_tensors
        if again:
            return differentiable(lambda z: _call(plain, z, options), logits, upstream), None
        z = logits.contiguous()
        if ctx.kept is None:  # the graph was retained
            ctx.kept = _ops.rows_total(z, *settings)[1:]
        state, factor = ctx.kept
        return _ops.rows_backward(z, *settings[:13], state, factor * upstream), None


class _Each(torch.autograd.Function):
    """One loss an entry, flat, of logits (N, C, ...)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        losses, state = _ops.rows_each(_as_rows(logits), *call[0])
        ctx.save_for_backward(logits, state)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        settings, plain, options = ctx.call
        logits, state = ctx.saved_tensors
        if torch.is_grad_enabled() or in_transform():
            return differentiable(lambda z: _call(plain, z, options).flatten(), logits, upstream), None
        grad = _ops.rows_backward(_as_rows(logits), *settings, state, upstream.contiguous())
        return _as_logits(grad, logits), None


class _TracedTotal(torch.autograd.Function):
    """What ``torch.compile`` traces: the gradient is made in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *settings: Any) -> Tensor:
        z = logits.contiguous()
        value, state, factor = _ops.rows_total(z, *settings)
        ctx.save_for_backward(z, state, factor, *settings[:6])
        ctx.numbers = settings[6:13]
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, state, factor, *inputs = ctx.saved_tensors
        grad = _ops.rows_backward(z, *inputs, *ctx.numbers, state, factor * upstream)
        return grad, *[None] * 16


class _TracedEach(torch.autograd.Function):
    """What ``torch.compile`` traces of :class:`_Each`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *settings: Any) -> Tensor:
        losses, state = _ops.rows_each(_as_rows(logits), *settings)
        ctx.save_for_backward(logits, state, *settings[:6])
        ctx.numbers = settings[6:]
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, state, *inputs = ctx.saved_tensors
        grad = _ops.rows_backward(_as_rows(logits), *inputs, *ctx.numbers, state, upstream.contiguous())
        return _as_logits(grad, logits), *[None] * 13


def _fake(logits: Tensor, *shape: int) -> Tensor:
    return logits.new_empty(shape, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("counterpoise::rows_each", lib=LIBRARY)
def _(logits: Tensor, *_: Any) -> Any:
    return _fake(logits, logits.shape[0]), _fake(logits, logits.shape[0], _STATE)


@torch.library.register_fake("counterpoise::rows_total", lib=LIBRARY)
def _(logits: Tensor, *_: Any) -> Any:
    return _fake(logits), _fake(logits, logits.shape[0], _STATE), _fake(logits, logits.shape[0])


@torch.library.register_fake("counterpoise::rows_total_grad", lib=LIBRARY)
def _(logits: Tensor, *_: Any) -> Any:
    return _fake(logits), torch.empty_like(logits)


@torch.library.register_fake("counterpoise::rows_backward", lib=LIBRARY)
def _(logits: Tensor, *_: Any) -> Any:
    return torch.empty_like(logits)
