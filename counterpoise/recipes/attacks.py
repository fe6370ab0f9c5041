r"""Attacks of bounded size on the inputs of a classifier, for training and for evaluation.

.. math:: \max_{|\delta_j| \le r} \ell(x + \delta, y), \qquad
          \delta \leftarrow \Pi_r\big(\delta + s\, \mathrm{sign} \nabla_x \ell(x + \delta, y)\big)

with l the cross-entropy of the logits: projected gradient ascent. The smooth form of the inner problem has a barrier
of weight c in place of the bound,

.. math:: \max_\delta \ell(x + \delta, y) + c \sum_j \log(r - |\delta_j|)

and is ascended by conditional gradients: the linearised problem has the solution

.. math:: d_j = \mathrm{sign}(g_j)\, (r - c / |g_j|)_+, \qquad \delta \leftarrow \delta + \min(1, s / r)\, (d - \delta)

which is inside the ball at every step, and is the corner of the ball as c goes to zero. Coordinates whose gradient is
below c / r are left alone, so c has to be small against what confident rows still have.

The model is attacked in evaluation mode, and put back: its batch statistics do not move, a row's attack does not
depend on its neighbours, and dropout does not hide the gradient. Training mode, as some released code has it, attacks
another network than the one that is used. Only the inputs are differentiated: parameters get no gradient.

Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018, section 2.1; barrier: Sow et
al., Doubly Robust Instance-Reweighted Adversarial Training, 2024 (the problem; the steps are derived).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from counterpoise._core import at_least_float32, check_choice, check_number, check_per_row

INNER = ("projection", "barrier")


class Attacked(NamedTuple):
    """Inputs (N, ...) and what the model says of them, logits (N, C)."""

    inputs: Tensor
    logits: Tensor


def projected_gradient_attack(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    radius: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    draws: Tensor | None = None,
    low: float | Tensor = -torch.inf,
    high: float | Tensor = torch.inf,
    inner: str = "projection",
    barrier: float = 1e-6,
) -> Tensor:
    """Inputs like ``x``, each entry at most ``radius`` away, of larger cross-entropy; detached.

    Works under ``no_grad`` and in inference mode too.

    Args:
        model: inputs to logits (N, C).
        x: (N, ...) floating.
        target: (N,) class indices.
        radius: >= 0, in units of x; a tensor broadcasts against x, as one radius a channel does.
        step_size: > 0, in units of x, likewise.
        steps: >= 0 gradients.
        draws: of x's shape in [0, 1], where in the ball to start; None = at x.
        low, high: range of the inputs. An entry of x outside of it may move towards it only.
        inner: "projection" or "barrier".
        barrier: c > 0, in units of the loss; read by "barrier" only.

    Raises:
        ValueError: settings out of range, targets that are not one a row, draws of another shape.
    """
    _check(x, target, radius, step_size, steps, draws, inner, barrier)
    with torch.inference_mode(False), torch.no_grad(), in_evaluation_mode(model), without_cast_cache(x.device.type):
        x, target = x.detach().clone(), target.clone()  # of inference mode, they could not be saved for a gradient
        lower, upper = torch.maximum(x - radius, x.clamp_max(low)), torch.minimum(x + radius, x.clamp_min(high))
        moved = x if draws is None else (x + radius * (2 * draws.to(x) - 1)).clamp(lower, upper)
        for _ in range(steps):
            gradient = _input_gradient(model, moved, target)
            if inner == "projection":
                moved = moved + step_size * gradient.sign()
            else:
                goal = gradient.sign() * (radius - barrier / gradient.abs()).clamp_min(0)
                moved = moved + _share(step_size, radius) * (x + goal - moved)
            moved = moved.clamp(lower, upper)
        return moved


@torch.no_grad()
def strongest_attack(
    model: nn.Module, found: Attacked, x: Tensor, target: Tensor, starts: Sequence[Tensor | None], **attack: Any
) -> Attacked:
    """Attacks what is still classified correctly, once from each start, and keeps the worst for the model.

    So more starts, or a larger radius after a smaller one, never help the model.

    Args:
        model: inputs to logits (N, C); in evaluation mode for the while.
        found: the worst inputs so far, inside the ball: x itself to begin with.
        x: (N, ...); target: (N,) class indices.
        starts: the ``draws`` of each attempt.
        attack: further arguments of :func:`projected_gradient_attack`.

    Returns:
        inputs and logits; without a gradient.
    """
    inputs, logits = found.inputs.clone(), found.logits.clone()
    for draws in starts:
        rows = torch.where(logits.argmax(1) == target)[0]
        if not len(rows):
            break
        start = None if draws is None else draws[rows]
        tried = projected_gradient_attack(model, x[rows], target[rows], draws=start, **attack)
        with in_evaluation_mode(model):
            said = model(tried).to(logits.dtype)
        before, after = (cross_entropy(z, target[rows], reduction="none") for z in (logits[rows], said))
        worse = (said.argmax(1) != target[rows]) | (after > before)
        inputs[rows[worse]], logits[rows[worse]] = tried[worse], said[worse]
    return Attacked(inputs, logits)


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside; afterwards each part has the mode that it had."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def without_cast_cache(device: str) -> torch.autocast:
    """Autocast as it is, but without its cache: weights cast in inference mode cannot be differentiated through."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, enabled=enabled, dtype=dtype, cache_enabled=False)


def _input_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Of each row's cross-entropy by that row."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = cross_entropy(at_least_float32(model(x)), target, reduction="sum")
        return torch.autograd.grad(losses, x)[0]


def _share(step_size: float | Tensor, radius: float | Tensor) -> Tensor:
    """min(1, s / r): how much of the way is gone."""
    size, r = torch.as_tensor(step_size), torch.as_tensor(radius)
    return torch.where(r > size, size / r, 1)


def _check(
    x: Tensor,
    target: Tensor,
    radius: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    draws: Tensor | None,
    inner: str,
    barrier: float,
) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x is of type {kind}, expected one floating tensor: other inputs cannot be moved")
    check_per_row("target", target, x)
    if not isinstance(radius, Tensor):
        check_number("radius", radius, 0)
    if not isinstance(step_size, Tensor):
        check_number("step_size", step_size, 0, open_low=True)
    check_number("steps", steps, 0)
    check_choice("inner", inner, INNER)
    check_number("barrier", barrier, 0, open_low=True)
    if draws is not None and draws.shape != x.shape:
        raise ValueError(f"draws has shape {tuple(draws.shape)}, expected that of x, {tuple(x.shape)}")


__all__ = ["Attacked", "in_evaluation_mode", "projected_gradient_attack", "strongest_attack"]
