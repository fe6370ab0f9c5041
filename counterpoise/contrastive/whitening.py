r"""Whitening: features of a batch, or examples, made uncorrelated and of variance one.

.. math:: \Sigma = \frac{1}{M - c} \sum_{m=1}^{M} (x_m - \mu)(x_m - \mu)^\top, \qquad
          \Sigma' = (1 - \epsilon)\, \Sigma + \epsilon I, \qquad z_m = W (x_m - \mu), \quad W \Sigma' W^\top = I

with c the ``correction``. ``kind="cholesky"`` takes :math:`W = L^{-1}` of :math:`\Sigma' = L L^\top`: cheapest, but it
depends on the order of the variables. ``kind="zca"`` takes the symmetric :math:`W = \Sigma'^{-1/2}`, of all whitenings
the one that moves x least; it turns with x. (PCA whitening is left out: its axes are free to flip and to swap places
from batch to batch, and training with it collapses.)

``axis="batch"``: the variables are the D features, the observations m the S examples. ``axis="channel"``: the other way
round, each example centred over its channels and the covariance one between examples. ``groups`` splits the channels
into blocks that are whitened by themselves.

A covariance of P variables has rank M - 1 at most, so a batch needs S > D examples, and a channel group
S < D / groups, unless epsilon > 0. The gradient of an eigendecomposition blows up where eigenvalues meet, and at the
optimum of whitening all are equal. So for "zca" it is taken without gradient, and Newton steps on
:math:`W \Sigma' W = I` carry the gradient: they divide by :math:`\sqrt{\lambda_i} + \sqrt{\lambda_j}`, which is never a
difference, and give the first and second derivative exactly.

Source: Ermolov et al., Whitening for Self-Supervised Representation Learning, 2021, eq. 4 and 5; "zca" and the channel
axis: Weng et al., An Investigation into Whitening Loss for Self-supervised Learning, 2022. The Newton steps are derived
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from counterpoise._core import (
    PreciseBuffers,
    at_least_float32,
    check_choice,
    check_embeddings,
    check_number,
    in_second_pass,
    readable,
    without_autocast,
    world_size,
)
from counterpoise.distributed import all_reduce_sum

KINDS = ("cholesky", "zca")
AXES = ("batch", "channel")
SINGULAR = ("raise", "shrink")
SHRINKAGE = 1e-3  # what on_singular="shrink" mixes in of the mean variance


class Settings(NamedTuple):
    """The options of :func:`whiten`, as objectives pass them on."""

    kind: str = "cholesky"
    axis: str = "batch"
    groups: int = 1
    eps: float = 0.0
    correction: float = 1
    on_singular: str = "raise"

    def check(self) -> Settings:
        """Itself; raises unless all of them are known."""
        check_choice("kind", self.kind, KINDS)
        check_choice("axis", self.axis, AXES)
        check_number("groups", self.groups, 1)
        check_number("eps", self.eps, 0, 1)
        check_number("correction", self.correction, 0)
        check_choice("on_singular", self.on_singular, SINGULAR)
        return self


def whiten(
    x: Tensor,
    *,
    kind: str = "cholesky",
    axis: str = "batch",
    groups: int = 1,
    eps: float = 0.0,
    correction: float = 1,
    permutation: Tensor | None = None,
    weight: Tensor | None = None,
    on_singular: str = "raise",
) -> Tensor:
    """Whitened ``x``; the formula is at the top of this file.

    Args:
        x: (..., S, D), S examples of D features; leading dimensions are batches of their own.
        kind: "cholesky" or "zca".
        axis: "batch" whitens features over examples, "channel" examples over channels.
        groups: divides D.
        eps: epsilon in [0, 1].
        correction: c, what the divisor of the covariance is short of the number of observations.
        permutation: (..., D) order of the channels in which they are grouped; undone afterwards.
        weight: (..., S) >= 0, of the examples in the covariance (as ``aweights`` of ``torch.cov``; on the channel axis
            only whether it is 0 counts). A row of weight 0 may hold anything, and comes out as 0.
        on_singular: where the covariance cannot be inverted, "raise", or "shrink" it by 0.001 to its mean variance.

    Returns:
        (..., S, D), at least float32.

    Raises:
        ValueError, TypeError: settings that do not fit, or with "raise" what cannot be whitened.
    """
    settings = Settings(kind, axis, groups, eps, correction, on_singular).check()
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x is {_described(x)}, expected a floating tensor of shape (..., S, D)")
    if weight is not None and weight.shape != x.shape[:-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[:-1])}")
    return whiten_blocks(x, settings, permutation=permutation, weight=weight)


def _described(x: object) -> str:
    return f"of shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def whiten_blocks(
    x: Tensor, settings: Settings, *, permutation: Tensor | None = None, weight: Tensor | None = None, name: str = "x"
) -> Tensor:
    """:func:`whiten` of blocks (..., S, D) by settings that were checked; ``name`` is what errors call ``x``."""
    s, d = x.shape[-2:]
    groups, over_channels = settings.groups, settings.axis == "channel"
    if d % groups:
        raise ValueError(f"{name} has {d} channels, expected a multiple of groups = {groups}")
    width = d // groups
    kept = None if weight is None else weight > 0
    with without_autocast(x):
        x = at_least_float32(x)
        if kept is not None:
            x = torch.where(kept[..., None], x, 0)
        x = x - (x.mean(-1, keepdim=True) if over_channels else _mean(x, weight))
        if permutation is not None:
            x = x.gather(-1, permutation[..., None, :].expand(x.shape))
        v = x.unflatten(-1, (groups, width)).movedim(-2, -3)
        v = v if over_channels else v.mT  # (..., groups, P, M)
        of_observations = None if weight is None or over_channels else weight[..., None, :]
        sigma = covariance(v, of_observations, settings.correction)
        rank: Tensor | int = (width if over_channels else s) - (0 if over_channels and groups > 1 else 1)
        present: Tensor | int = sigma.shape[-1]  # variables; a rank is short of the observations by their common mean
        if kept is not None:
            there = kept if over_channels else kept.any(-1, keepdim=True).expand(*kept.shape[:-1], width)
            sigma, present = _with_absent(sigma, there[..., None, :]), there.sum(-1, keepdim=True)
            rank = rank if over_channels else (kept.sum(-1, keepdim=True) - 1).clamp_min(0)
        z = unmix(v, sigma, settings, deficient=settings.eps == 0 and rank < present, size=(s, d), name=name)
        z = (z if over_channels else z.mT).movedim(-3, -2).flatten(-2)
        if permutation is not None:
            z = z.gather(-1, permutation.argsort(-1)[..., None, :].expand(z.shape))
    return z if kept is None else torch.where(kept[..., None], z, 0)


def _mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """(..., 1, D) mean over examples."""
    if weight is None:
        return x.mean(-2, keepdim=True)
    mass = weight.sum(-1)[..., None, None]
    return (weight[..., None] * x).sum(-2, keepdim=True) / torch.where(mass > 0, mass, 1)


def covariance(v: Tensor, weight: Tensor | None, correction: float) -> Tensor:
    """(..., P, P) of centred variables ``v`` (..., P, M), with weights (..., M) of the observations or without."""
    if weight is None:
        return v @ v.mT / max(v.shape[-1] - correction, 1)
    weight = weight.to(v.dtype)
    mass = weight.sum(-1)
    divisor = mass - correction * weight.square().sum(-1) / torch.where(mass > 0, mass, 1)
    scaled = v * (weight / torch.where(divisor > 0, divisor, 1)[..., None])[..., None, :]
    return scaled @ v.mT


def _with_absent(sigma: Tensor, there: Tensor) -> Tensor:
    """Covariance whose absent variables, all zeros, get a variance of their own: that of the others on average."""
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    variance = torch.where(trace > 0, trace / there.sum(-1, keepdim=True).clamp_min(1), 1).detach()
    return sigma + torch.diag_embed(torch.where(there, 0, variance))


def unmix(
    v: Tensor, sigma: Tensor, settings: Settings, *, deficient: Tensor | bool, size: tuple[int, int], name: str
) -> Tensor:
    """W v of variables (..., P, M) with covariance ``sigma`` (..., P, P); ``deficient`` says where it lacks rank."""
    if deficient is True and settings.on_singular == "raise":
        raise ValueError(_complaint(name, settings, *size))
    if settings.eps:
        sigma = (1 - settings.eps) * sigma + settings.eps * _identity(sigma)
    factorise = _symmetric if settings.kind == "zca" else _triangular
    singular, apply = factorise(sigma)
    singular = singular | deficient
    if settings.on_singular == "raise":
        _refuse(singular, _complaint(name, settings, *size))
    else:
        trace = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        towards = torch.where(trace > 0, trace, 1) * _identity(sigma)
        sigma = torch.where(singular[..., None, None], torch.lerp(sigma, towards, SHRINKAGE), sigma)
        _, apply = factorise(sigma)
    return apply(v)


def _identity(sigma: Tensor) -> Tensor:
    return torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)


def _triangular(sigma: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Where ``sigma`` is singular to its precision, and L^{-1} as a function."""
    lower, info = torch.linalg.cholesky_ex(sigma)
    with torch.no_grad():
        pivots, variances = lower.diagonal(dim1=-2, dim2=-1).square(), sigma.diagonal(dim1=-2, dim2=-1)
        lost = (pivots <= sigma.shape[-1] * torch.finfo(sigma.dtype).eps * variances).any(-1)
        singular = sigma.isfinite().all(-1).all(-1) & ((info != 0) | lost)
    return singular, lambda v: torch.linalg.solve_triangular(lower, v, upper=False)


def _symmetric(sigma: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Where ``sigma`` is singular to its precision, and its inverse square root as a function."""
    with torch.no_grad():
        finite = sigma.isfinite().all(-1).all(-1)
        values, u = torch.linalg.eigh(torch.where(finite[..., None, None], sigma, _identity(sigma)))
        singular = values[..., 0] <= sigma.shape[-1] * torch.finfo(sigma.dtype).eps * values[..., -1]
        roots = values.clamp_min(torch.finfo(sigma.dtype).tiny).sqrt()
        sums = roots[..., :, None] + roots[..., None, :]
    of_axes, one = u.mT @ sigma @ u, _identity(sigma)
    w = torch.diag_embed(1 / roots)
    for _ in range(2):  # one step for the first derivative, one for the second
        w = w - (w @ of_axes @ w - one) / sums
    return singular, lambda v: u @ (w @ (u.mT @ v))


def _refuse(singular: Tensor, complaint: str) -> None:
    """ValueError where anything is singular; asynchronous where the host cannot know."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(singular):
        return  # inside vmap or grad transforms
    if not readable(singular):
        torch._assert_async(~singular.any(), complaint)
    elif singular.any():
        raise ValueError(complaint)


def _complaint(name: str, settings: Settings, s: int, d: int) -> str:
    rule = "S - 1 >= D" if settings.axis == "batch" else "S <= D - 1"
    return (
        f"{name} holds blocks of S = {s} examples with D = {d // settings.groups} features"
        + (" a group" if settings.groups > 1 else "")
        + f", and with eps = {settings.eps} their covariance cannot be inverted: expected {rule} and none that depends "
        'on others, eps > 0, or on_singular="shrink"'
    )


class Whitening(PreciseBuffers):
    """Whitens a batch of features, and keeps running statistics for evaluation, as batch normalisation does.

    Args:
        num_features: D.
        kind: "cholesky" or "zca".
        eps: epsilon in [0, 1].
        momentum: in [0, 1], the share of a new batch in the running statistics.
        track_running_stats: without, the batch's own statistics are used in eval mode too.
        on_singular: "raise" or "shrink", see :func:`whiten`.
        sync: statistics of all ranks, once a process group exists.

    Buffers: running_mean (D,) and running_covariance (D, D), with N - 1 and before epsilon; they change in training
    mode only, not inside ``second_pass()`` and not with a batch that is not finite.

    Source: Ermolov et al., Whitening for Self-Supervised Representation Learning, 2021, and the released code.
    """

    running_mean: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        num_features: int,
        kind: str = "cholesky",
        eps: float = 0.0,
        momentum: float = 0.01,
        track_running_stats: bool = True,
        on_singular: str = "raise",
        sync: bool = True,
    ) -> None:
        super().__init__()
        check_number("num_features", num_features, 1)
        check_number("momentum", momentum, 0, 1)
        self.settings = Settings(kind=kind, eps=eps, on_singular=on_singular).check()
        self.num_features = num_features
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.sync = sync
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_covariance", torch.eye(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, D) to whitened ones, at least float32."""
        check_embeddings("x", x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, {self.num_features})")
        with without_autocast(x):
            x = at_least_float32(x)
            statistics: tuple[Tensor, Tensor, bool | Tensor]
            if self.track_running_stats and not self.training:
                statistics = self.running_mean.to(x), self.running_covariance.to(x), False
            else:
                statistics = self._statistics(x)
            mean, sigma, deficient = statistics
            size = (len(x), self.num_features)
            return unmix((x - mean).mT, sigma, self.settings, deficient=deficient, size=size, name="x").mT

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, bool | Tensor]:
        """Mean and covariance of the batch over all ranks, and whether it is too small for its width."""
        if not (self.sync and world_size() > 1):
            mean, count = x.mean(0), len(x)
            sigma = covariance((x - mean).mT, None, 1)
            deficient: bool | Tensor = self.settings.eps == 0 and count - 1 < x.shape[1]
        else:
            total = all_reduce_sum(x.new_tensor(len(x)))
            mean = all_reduce_sum(x.sum(0)) / total.clamp_min(1)
            sigma = all_reduce_sum((x - mean).mT @ (x - mean)) / (total - 1).clamp_min(1)
            deficient = (total - 1 < x.shape[1]) & (self.settings.eps == 0)
        if self.track_running_stats and self.training and not in_second_pass():
            self._follow(mean.detach(), sigma.detach())
        return mean, sigma, deficient

    @torch.no_grad()
    def _follow(self, mean: Tensor, sigma: Tensor) -> None:
        finite = sigma.isfinite().all()
        for running, new in ((self.running_mean, mean), (self.running_covariance, sigma)):
            moved = torch.lerp(running, new.to(running), self.momentum)
            running.copy_(torch.where(finite, moved, running))

    def extra_repr(self) -> str:
        """Width and settings."""
        return f"{self.num_features}, kind={self.settings.kind!r}, eps={self.settings.eps}, momentum={self.momentum}"
