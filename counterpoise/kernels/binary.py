"""Element-wise family: losses of independent labels, where each entry's value and slope come from its logit and label.

The CPU kernel emits the gradient in the pass that makes the loss: the backward pass then hands it over, scaled in place
where the upstream gradient is not one. What is differentiated a second time or by row is recomputed from the inputs,
the second derivative through the plain reference. Sums are added in blocks of a fixed size, in order: the same result
on every run and for every number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import INNERS, check_choice, check_reduction, check_within, readable, reduce_losses
from counterpoise.kernels._library import LIBRARY, define, differentiable, transformed

FOCAL, ASYMMETRIC, FOCAL_STAR = 0, 1, 2
_TARGETS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int64})
_CHUNK = 512  # entries that the CPU kernel takes together; shorter rows share a chunk
_SETTINGS = (
    "Tensor logits, Tensor target, Tensor? mask, Tensor? entry_weight, int row, int kind, float gamma_pos, "
    "float gamma_neg, float alpha_pos, float alpha_neg, float margin, float log_eps, float beta, bool detach"
)

define(f"binary_rows({_SETTINGS}) -> (Tensor, Tensor)")
define(f"binary_rows_backward({_SETTINGS}, Tensor by_row) -> Tensor")
define(f"binary_total({_SETTINGS}, Tensor? weight, bool mean_in_row, float divisor) -> (Tensor, Tensor)")
define(f"binary_total_grad({_SETTINGS}, Tensor? weight, bool mean_in_row, float divisor) -> (Tensor, Tensor)")
define(
    f"binary_total_backward({_SETTINGS}, Tensor? weight, bool mean_in_row, Tensor upstream, Tensor divisor) -> Tensor"
)

_ops = torch.ops.counterpoise


@dataclass(frozen=True)
class Binary:
    """One loss of the family with its settings; the formulas stand in the files of the losses."""

    kind: int
    gamma_pos: float
    gamma_neg: float
    alpha_pos: float = 1.0
    alpha_neg: float = 1.0
    margin: float = 0.0
    log_eps: float = -float("inf")
    beta: float = 0.0
    detach: bool = False

    def arguments(self) -> tuple[int, float, float, float, float, float, float, float, bool]:
        """In the order of the schemas."""
        return (
            self.kind,
            self.gamma_pos,
            self.gamma_neg,
            self.alpha_pos,
            self.alpha_neg,
            self.margin,
            self.log_eps,
            self.beta,
            self.detach,
        )


def focal(alpha: float | None, gamma: float) -> Binary:
    """Sigmoid focal loss."""
    return Binary(FOCAL, gamma, gamma, *_alphas(alpha))


def focal_star(alpha: float | None, gamma: float, beta: float) -> Binary:
    """Focal*."""
    return Binary(FOCAL_STAR, gamma, gamma, *_alphas(alpha), beta=beta)


def asymmetric(
    gamma_neg: float, gamma_pos: float, margin: float, eps: float | None, detach_weight: bool
) -> Binary:
    """Asymmetric loss."""
    log_eps = -float("inf") if eps is None else math.log(eps)
    return Binary(ASYMMETRIC, gamma_pos, gamma_neg, margin=margin, log_eps=log_eps, detach=detach_weight)


def _alphas(alpha: float | None) -> tuple[float, float]:
    return (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)


def binary_loss(
    loss: Binary,
    logits: Tensor,
    target: Tensor,
    plain: Callable[..., Tensor],
    *,
    class_weight: Tensor | None = None,
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

    Raises:
        ValueError: a label outside [0, 1]; on an accelerator an assertion on the device.
    """
    check_reduction(reduction, normalizer)
    check_choice("inner", inner, INNERS)
    by_entry = logits.ndim == 1 or inner == "none"
    row = 1 if by_entry else math.prod(logits.shape[1:])
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    classes = None if class_weight is None else class_weight.to(logits.device, computed)
    inputs = (
        (target if target.dtype in _TARGETS else target.long()).contiguous(),
        None if mask is None else _fitted(mask, logits, by_entry),
        None if classes is None or by_entry else _whole_rows(classes, row),
        row,
    )
    apart = by_entry and (classes is not None or (weight is not None and logits.ndim > 1))
    try:
        if not (apart or sync or reduction == "none" or normalizer in ("weight", "positives")):
            divisor = 1.0 if reduction == "sum" else 0.0 if isinstance(normalizer, str) else float(normalizer)
            w = None if weight is None else weight.to(computed).contiguous()
            again = partial(plain, weight=weight, inner=inner, reduction=reduction, normalizer=normalizer)
            return _total(logits, (*inputs, *loss.arguments(), w, inner == "mean" and not by_entry, divisor), again)
        again = partial(plain, weight=None, inner="none" if by_entry else "sum", reduction="none", normalizer="count")
        sums, counts = _rows(logits, (*inputs, *loss.arguments()), again)
    except RuntimeError:
        _check_labels(logits, target, mask)  # says which label it was
        raise
    if by_entry:
        sums, counts = sums.reshape(logits.shape), counts.reshape(logits.shape)
        sums = sums if classes is None else sums * classes.reshape(-1, *[1] * (logits.ndim - 2))
    elif inner == "mean":
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


def _fitted(mask: Tensor, logits: Tensor, by_entry: bool) -> Tensor:
    """A mask by row or by entry; by entry alone where every entry is a row of its own."""
    if by_entry and mask.ndim < logits.ndim:
        mask = mask.reshape(-1, *[1] * (logits.ndim - 1)).expand(logits.shape)
    return mask.contiguous()


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


def _total(logits: Tensor, settings: tuple[Any, ...], plain: Callable[[Tensor], Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return _TracedTotal.apply(logits, *settings)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _ops.binary_total(logits.contiguous(), *settings)[0]
    return _Total.apply(logits, settings, plain)


def _rows(logits: Tensor, settings: tuple[Any, ...], plain: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return _TracedRows.apply(logits, *settings)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _ops.binary_rows(logits.contiguous(), *settings)
    return _Rows.apply(logits, settings, plain)


class _Total(torch.autograd.Function):
    """The reduced loss. On the host the gradient comes with it, and the first backward pass takes it away."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, settings: tuple[Any, ...], plain: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.settings, ctx.plain, ctx.grad = settings, plain, None
        ctx.save_for_backward(logits)
        z = logits.contiguous()
        if logits.is_cpu:
            value, ctx.grad = _ops.binary_total_grad(z, *settings)
        else:
            value, ctx.divisor = _ops.binary_total(z, *settings)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed(upstream):
            return differentiable(ctx.plain, logits, upstream), None, None
        grad, ctx.grad = ctx.grad, None
        if grad is not None:
            scale = upstream.item()
            return (grad if scale == 1 else grad.mul_(scale)), None, None
        if logits.is_cpu and not hasattr(ctx, "divisor"):  # the graph was retained
            ctx.divisor = _ops.binary_total(logits.contiguous(), *ctx.settings)[1]
        *most, divisor = ctx.settings
        return _ops.binary_total_backward(logits.contiguous(), *most, upstream, ctx.divisor), None, None


class _Rows(torch.autograd.Function):
    """Sums of rows, and how many entries of each count."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, settings: tuple[Any, ...], plain: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        ctx.settings, ctx.plain = settings, plain
        ctx.save_for_backward(logits)
        sums, counts = _ops.binary_rows(logits.contiguous(), *settings)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed(upstream):
            return differentiable(lambda z: ctx.plain(z).flatten(), logits, upstream), None, None
        return _ops.binary_rows_backward(logits.contiguous(), *ctx.settings, upstream.contiguous()), None, None


class _TracedTotal(torch.autograd.Function):
    """What ``torch.compile`` traces: the gradient is made in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *settings: Any) -> Tensor:
        z = logits.contiguous()
        value, divisor = _ops.binary_total(z, *settings)
        ctx.save_for_backward(z, divisor, *settings[:3], settings[-3])
        ctx.numbers = settings[3:-3], settings[-2]
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, divisor, *inputs, weight = ctx.saved_tensors
        numbers, mean_in_row = ctx.numbers
        grad = _ops.binary_total_backward(z, *inputs, *numbers, weight, mean_in_row, upstream.contiguous(), divisor)
        return grad, *[None] * (len(inputs) + len(numbers) + 3)


class _TracedRows(torch.autograd.Function):
    """What ``torch.compile`` traces of :class:`_Rows`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        z = logits.contiguous()
        sums, counts = _ops.binary_rows(z, *settings)
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(z, *settings[:3])
        ctx.numbers = settings[3:]
        return sums, counts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, *inputs = ctx.saved_tensors
        grad = _ops.binary_rows_backward(z, *inputs, *ctx.numbers, upstream.contiguous())
        return grad, *[None] * (len(inputs) + len(ctx.numbers))


def _by_row(logits: Tensor, row: int) -> Tensor:
    computed = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((logits.numel() // row if row else 0,), dtype=computed)


@torch.library.register_fake("counterpoise::binary_rows", lib=LIBRARY)
def _(logits: Tensor, target: Tensor, mask: Tensor | None, entry_weight: Tensor | None, row: int, *_: Any) -> Any:
    return _by_row(logits, row), _by_row(logits, row)


@torch.library.register_fake("counterpoise::binary_total", lib=LIBRARY)
def _(logits: Tensor, *_: Any) -> Any:
    return _by_row(logits.new_empty(1), 1)[0], _by_row(logits.new_empty(1), 1)[0]


@torch.library.register_fake("counterpoise::binary_total_grad", lib=LIBRARY)
def _(logits: Tensor, *_: Any) -> Any:
    return _by_row(logits.new_empty(1), 1)[0], torch.empty_like(logits)


for _name in ("binary_rows_backward", "binary_total_backward"):
    torch.library.register_fake(f"counterpoise::{_name}", lambda logits, *_: torch.empty_like(logits), lib=LIBRARY)
