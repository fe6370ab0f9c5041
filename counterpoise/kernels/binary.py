"""Element-wise family: losses of independent labels, where each entry's value and slope come from its logit and label.

The kernels emit the gradient in the pass that makes the loss, on an accelerator where there are no masks or weights:
the backward pass then hands it over, scaled in place or made again where the upstream gradient is not one. What is
differentiated a second time or by row is recomputed from the inputs, the second derivative through the plain reference.
Sums are added in blocks of a fixed size, in order: the same result on every run and for every number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoise._core import INNERS, check_choice, check_reduction, check_within, readable, reduce_losses
from counterpoise.kernels._library import (
    LIBRARY,
    TYPES,
    define,
    differentiable,
    gradient_like,
    in_transform,
    scalar_like,
    wants_plain,
)

FOCAL, ASYMMETRIC, FOCAL_STAR = 0, 1, 2
_TARGETS = TYPES | {torch.bool, torch.uint8, torch.int64}
_CHUNK = 512  # entries that the CPU kernel takes together; shorter rows share a chunk
_INPUTS = "Tensor logits, Tensor target, Tensor? mask, Tensor? entry_weight"

# Outputs are arguments: allocating them here costs a tenth of what it does behind the stable interface.
define(f"binary_rows({_INPUTS}, float[] settings, Tensor(a!) sums, Tensor(b!) counts) -> ()")
define(f"binary_rows_backward({_INPUTS}, float[] settings, Tensor by_row, Tensor(a!) grad) -> ()")
define(
    f"binary_total({_INPUTS}, Tensor? weight, float[] settings, Tensor(a!) value, Tensor(b!)? divisor, "
    "Tensor(c!)? grad) -> ()"
)
define(
    f"binary_total_backward({_INPUTS}, Tensor? weight, float[] settings, Tensor upstream, Tensor divisor, "
    "Tensor(a!) grad) -> ()"
)

_rows_op = torch.ops.counterpoise.binary_rows.default
_rows_backward_op = torch.ops.counterpoise.binary_rows_backward.default
_total_op = torch.ops.counterpoise.binary_total.default
_total_backward_op = torch.ops.counterpoise.binary_total_backward.default


class Binary(NamedTuple):
    """One loss of the family with its settings, in the order of the schemas; the formulas stand at the losses."""

    kind: int
    gamma_pos: float
    gamma_neg: float
    alpha_pos: float = 1.0
    alpha_neg: float = 1.0
    margin: float = 0.0
    log_eps: float = -float("inf")
    beta: float = 0.0
    detach: bool = False


def focal(alpha: float | None, gamma: float) -> Binary:
    """Sigmoid focal loss."""
    return Binary(FOCAL, gamma, gamma, *_alphas(alpha))


def focal_star(alpha: float | None, gamma: float, beta: float) -> Binary:
    """Focal*."""
    return Binary(FOCAL_STAR, gamma, gamma, *_alphas(alpha), beta=beta)


def asymmetric(gamma_neg: float, gamma_pos: float, margin: float, eps: float | None, detach_weight: bool) -> Binary:
    """Asymmetric loss."""
    log_eps = -math.inf if eps is None else math.log(eps)
    return Binary(ASYMMETRIC, gamma_pos, gamma_neg, 1.0, 1.0, margin, log_eps, 0.0, detach_weight)


def _alphas(alpha: float | None) -> tuple[float, float]:
    return (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)


def binary_loss(
    loss: Binary,
    logits: Tensor,
    target: Tensor,
    plain: Callable[..., Tensor],
    *,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    weight: Tensor | None,
    mask: Tensor | None,
    inner: str,
    reduction: str,
    normalizer: str | float,
    sync: bool,
) -> Tensor:
    """A loss of the family, reduced. The arguments are those of its plain form, which has checked their shapes.

    Args:
        loss: which one.
        plain: its plain form, ``plain(logits, weight=, inner=, reduction=, normalizer=)``, for second derivatives.
        class_weight: (C,) of the entries.
        pos_weight: (C,) of their positive part, of cross-entropy (focal with exponent 0) alone.

    Raises:
        ValueError: a label outside [0, 1]; on an accelerator an assertion on the device.
    """
    check_reduction(reduction, normalizer)
    check_choice("inner", inner, INNERS)
    by_entry = logits.ndim == 1 or inner == "none"
    if _only_plain(target, class_weight, pos_weight, weight) or (by_entry and pos_weight is not None):
        return plain(logits, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)
    row = 1 if by_entry else logits.shape[1] if logits.ndim == 2 else math.prod(logits.shape[1:])
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    classes, positives = (None if x is None else x.to(logits.device, computed) for x in (class_weight, pos_weight))
    inputs = (
        (target if target.dtype in _TARGETS else target.long()).contiguous(),
        None if mask is None else _fitted(mask, logits, by_entry),
        None if by_entry else _entry_weights(classes, positives, row),
    )
    mean_in_row = inner == "mean" and not by_entry
    apart = by_entry and (classes is not None or (weight is not None and logits.ndim > 1))
    try:
        if not (apart or sync or reduction == "none" or normalizer in ("weight", "positives")):
            divisor = 1.0 if reduction == "sum" else 0.0 if isinstance(normalizer, str) else float(normalizer)
            w = None if weight is None else weight.to(computed).contiguous()
            again = partial(plain, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer)
            return _total(logits, (*inputs, w), [row, *loss, mean_in_row, divisor], again)
        again = partial(plain, weight=None, inner="none" if by_entry else "sum", reduction="none", normalizer="count")
        sums, counts = _rows(logits, inputs, [row, *loss, False, 0.0], again)
    except RuntimeError:
        _check_labels(logits, target, mask)  # says which label it was
        raise
    if by_entry:
        sums, counts = sums.reshape(logits.shape), counts.reshape(logits.shape)
        sums = sums if classes is None else sums * classes.reshape(-1, *[1] * (logits.ndim - 2))
    elif mean_in_row:
        sums = sums / counts.clamp_min(1)
    return reduce_losses(
        sums,
        counted=counts > 0,
        weight=weight,
        positives=_positives(logits, target, mask).to(computed) if normalizer == "positives" else None,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _only_plain(target: Tensor, *others: Tensor | None) -> bool:
    """Whether something besides the logits has a slope, or a transform is at work."""
    if target.requires_grad or (not torch.compiler.is_compiling() and in_transform()):
        return True
    given = [x for x in others if x is not None]  # nearly always none
    return bool(given) and any(x.requires_grad for x in given)


def _fitted(mask: Tensor, logits: Tensor, by_entry: bool) -> Tensor:
    """A mask by row or by entry; by entry alone where every entry is a row of its own."""
    if by_entry and mask.ndim < logits.ndim:
        mask = mask.reshape(-1, *[1] * (logits.ndim - 1)).expand(logits.shape)
    return mask.contiguous()


def _entry_weights(classes: Tensor | None, positives: Tensor | None, row: int) -> Tensor | None:
    """Those of whole rows, (row,); with weights of the positive part below them, (2, row)."""
    if positives is None:
        return None if classes is None else _whole_rows(classes, row)
    both = torch.ones_like(positives) if classes is None else classes, positives
    return torch.stack([_whole_rows(x, row) for x in both])


def _whole_rows(classes: Tensor, row: int) -> Tensor:
    """(C,) as the weights of a row's entries, and of as many rows as share a chunk."""
    by_entry = classes.repeat_interleave(row // len(classes)) if row != len(classes) else classes
    return by_entry.repeat(_CHUNK // row) if row < _CHUNK else by_entry.contiguous()


def _live(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    live = ~((logits == -torch.inf) & (target == 0))
    return live if mask is None else live & mask.reshape(*mask.shape, *[1] * (logits.ndim - mask.ndim))


def _positives(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    return torch.where(_live(logits, target, mask), target, 0).sum()


def _check_labels(logits: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if readable(target):
        check_within("target", torch.where(_live(logits, target, mask), target, 0), 0, 1, what="labels")


Inputs = tuple[Tensor | None, ...]
Plain = Callable[[Tensor], Tensor]


def _total(logits: Tensor, inputs: Inputs, settings: list[float], plain: Plain) -> Tensor:
    """The reduced loss; inputs are target, mask, entry weights and row weights."""
    if torch.compiler.is_compiling():
        return _TracedTotal.apply(logits, *inputs, settings)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Total.apply(logits, (inputs, settings, plain))
    value = _new(logits)
    _total_op(logits.contiguous(), *inputs, settings, value, None, None)
    return value


def _rows(logits: Tensor, inputs: Inputs, settings: list[float], plain: Plain) -> tuple[Tensor, Tensor]:
    """Sums of rows and how many entries of each count; inputs are target, mask and entry weights."""
    if torch.compiler.is_compiling():
        return _TracedRows.apply(logits, *inputs, settings)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Rows.apply(logits, (inputs, settings, plain))
    return _run_rows(logits.contiguous(), inputs, settings)


def _new(logits: Tensor, *shape: int) -> Tensor:
    wide = logits.dtype == torch.float32 or logits.dtype == torch.float64
    return logits.new_empty(shape) if wide else logits.new_empty(shape, dtype=torch.float32)


def _run_rows(z: Tensor, inputs: Inputs, settings: list[float]) -> tuple[Tensor, Tensor]:
    row = int(settings[0])
    rows = z.numel() // row if row else len(z)
    sums, counts = _new(z, rows), _new(z, rows)
    if not row:  # rows without entries
        return sums.zero_(), counts.zero_()
    _rows_op(z, *inputs, settings, sums, counts)
    return sums, counts


class _Total(torch.autograd.Function):
    """The reduced loss. The gradient comes with it where it can, and the first backward pass takes it away."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Inputs, list[float], Plain]) -> Tensor:
        ctx.call, (inputs, settings, _) = call, call
        # On an accelerator what comes from above decides whether they are read again: that they are as they were.
        ctx.save_for_backward(logits, *(() if logits.is_cpu else inputs))
        value, z = scalar_like(logits), logits.contiguous()
        # A float16 gradient must not be rounded before the scale that keeps it from vanishing has multiplied it. On an
        # accelerator it is made again where there is such a scale, of which the host does not know.
        emits = logits.dtype != torch.float16 if logits.is_cpu else inputs[1] is inputs[2] is inputs[3] is None
        ctx.grad = gradient_like(z) if emits else None
        ctx.divisor = None if emits and logits.is_cpu else _new(logits, 2) if emits else _new(logits)
        _total_op(z, *inputs, settings, value, ctx.divisor, ctx.grad)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        again = wants_plain(upstream)
        grad = None if again else ctx.__dict__.pop("grad", None)  # at once, should two threads come
        if grad is not None and grad.is_cpu:
            scale = upstream.item()
            return (grad if scale == 1 else grad.mul_(scale)), None
        inputs, settings, plain = ctx.call
        logits = ctx.saved_tensors[0]
        if again:
            return differentiable(plain, logits, upstream), None
        z = logits.contiguous()
        if ctx.divisor is None:  # the graph was retained
            ctx.divisor = _new(logits)
            _total_op(z, *inputs, settings, _new(logits), ctx.divisor, None)
        divisor = ctx.divisor
        if grad is None or torch.cuda.is_current_stream_capturing():  # a graph may run its backward pass more than once
            grad, divisor = gradient_like(z), divisor.flatten()[0]
        _total_backward_op(z, *inputs, settings, upstream, divisor, grad)
        return grad, None


class _Rows(torch.autograd.Function):
    """Sums of rows, and how many entries of each count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Inputs, list[float], Plain]) -> tuple[Tensor, Tensor]:
        ctx.call = call
        ctx.save_for_backward(logits)
        sums, counts = _run_rows(logits.contiguous(), *call[:2])
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, settings, plain = ctx.call
        (logits,) = ctx.saved_tensors
        if wants_plain(upstream):
            return differentiable(lambda z: plain(z).flatten(), logits, upstream), None
        z = logits.contiguous()
        grad = gradient_like(z)
        _rows_backward_op(z, *inputs, settings, upstream.contiguous(), grad)
        return grad, None


class _TracedTotal(torch.autograd.Function):
    """What ``torch.compile`` traces: the gradient is made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        entry_weight: Tensor | None,
        weight: Tensor | None,
        settings: list[float],
    ) -> Tensor:
        z, value, divisor = logits.contiguous(), _new(logits), _new(logits)
        _total_op(z, target, mask, entry_weight, weight, settings, value, divisor, None)
        ctx.save_for_backward(z, target, mask, entry_weight, weight, divisor)
        ctx.settings = settings
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, *inputs, divisor = ctx.saved_tensors
        grad = gradient_like(z)
        _total_backward_op(z, *inputs, ctx.settings, upstream.contiguous(), divisor, grad)
        return grad, None, None, None, None, None


class _TracedRows(torch.autograd.Function):
    """What ``torch.compile`` traces of :class:`_Rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        entry_weight: Tensor | None,
        settings: list[float],
    ) -> tuple[Tensor, Tensor]:
        z = logits.contiguous()
        sums, counts = _run_rows(z, (target, mask, entry_weight), settings)
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(z, target, mask, entry_weight)
        ctx.settings = settings
        return sums, counts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, *inputs = ctx.saved_tensors
        grad = gradient_like(z)
        _rows_backward_op(z, *inputs, ctx.settings, upstream.contiguous(), grad)
        return grad, None, None, None, None


for _name in ("binary_rows", "binary_rows_backward", "binary_total", "binary_total_backward"):
    LIBRARY.impl(f"{_name}", lambda *_: None, "Meta")
