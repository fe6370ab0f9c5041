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
from counterpoise.kernels._library import LIBRARY, define, differentiable, in_transform, runs_on, wants_plain

CROSS_ENTROPY, FOCAL, ASYMMETRIC = 0, 1, 2
NORMALIZERS = ("number", "count", "weight", "positives")  # what the kernel can divide by; the place is its code
_INPUTS = (
    "Tensor logits, Tensor target, Tensor? mask, Tensor? multiplicative, Tensor? additive, Tensor? margin, "
    "Tensor? class_weight"
)
_STATE = 5  # numbers a row

# Outputs are arguments: allocating them here costs a tenth of what it does behind the stable interface.
define(f"rows_each({_INPUTS}, float[] settings, Tensor(a!) losses, Tensor(b!) state) -> ()")
define(f"rows_backward({_INPUTS}, float[] settings, Tensor state, Tensor by_row, Tensor(a!) grad) -> ()")
define(
    f"rows_total({_INPUTS}, Tensor? weight, float[] settings, Tensor(a!) value, Tensor(b!)? state, "
    "Tensor(c!)? factor, Tensor(d!)? grad) -> ()"
)

_each_op = torch.ops.counterpoise.rows_each.default
_backward_op = torch.ops.counterpoise.rows_backward.default
_total_op = torch.ops.counterpoise.rows_total.default


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
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
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
        vectors: multiplicative, additive, margin and class weights, each (C,) or None.

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
    dense = [x if x is None else x.to(logits.device, computed).contiguous() for x in vectors]
    inputs = (y.contiguous() if y.ndim == 1 else y.reshape(-1), flat_mask, *dense)
    settings = [kind, scale, smoothing, gamma_pos, gamma_neg, detach, ignore_index]
    try:
        if not (sync or reduction == "none" or logits.ndim > 2):
            w = None if weight is None else weight.to(computed).contiguous()
            settings += _divisor(kind, reduction, normalizer)
            return _total(logits, (*inputs, w), settings, plain, options)
        losses = _each(logits, inputs, [*settings, 0, 1.0], plain)
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
        carried = combine_inner(ones if dense[3] is None else dense[3][y.where(counted, 0)], counted, inner)[0]
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


def _by_entry(mask: Tensor, y: Tensor) -> Tensor:
    """A mask by row or by entry, flat, one an entry."""
    whole = mask if mask.ndim == y.ndim else mask.reshape(-1, *[1] * (y.ndim - 1)).expand(y.shape)
    return whole.reshape(-1).contiguous()


def _divisor(kind: int, reduction: str, normalizer: str | float) -> tuple[float, float]:
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


Inputs = tuple[Tensor | None, ...]
Options = tuple[Any, ...]


def _total(logits: Tensor, inputs: Inputs, settings: list[float], plain: Callable[..., Tensor], o: Options) -> Tensor:
    """The reduced loss; inputs are target, mask, the four class vectors and row weights."""
    if torch.compiler.is_compiling():
        return _TracedTotal.apply(logits, settings, *inputs)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Total.apply(logits, (inputs, settings, plain, o))
    return _run_total(logits.contiguous(), inputs, settings)[0]


def _each(logits: Tensor, inputs: Inputs, settings: list[float], plain: Callable[..., Tensor]) -> Tensor:
    """One loss an entry, flat; inputs are target, mask and the four class vectors."""
    if torch.compiler.is_compiling():
        return _TracedEach.apply(logits, settings, *inputs)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Each.apply(logits, (inputs, settings, plain))
    return _run_each(_as_rows(logits), inputs, settings)[0]


def _new(logits: Tensor, *shape: int) -> Tensor:
    wide = logits.dtype == torch.float32 or logits.dtype == torch.float64
    return logits.new_empty(shape) if wide else logits.new_empty(shape, dtype=torch.float32)


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


for _name in ("rows_each", "rows_backward", "rows_total"):
    torch.library.register_fake(f"counterpoise::{_name}", lambda *_: None, lib=LIBRARY)
