"""Rows of unit length, as :func:`torch.nn.functional.normalize` gives them, whose gradient takes two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise.kernels._library import differentiable, runs_on, wants_plain

SHORTEST = 1e-12  # of torch: what is shorter is divided by this


def unit(x: Tensor, dim: int) -> Tensor:
    """``x`` over its length along ``dim``; what has none stays zero."""
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled() and runs_on(x)):
        return normalize(x, dim=dim)
    return _Unit.apply(x, dim)


class _Unit(torch.autograd.Function):
    """z = x / max(|x|, eps), hence dx = (dz - z (z . dz)) / |x|, or dz / eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        z = x / length.clamp_min(SHORTEST)
        ctx.dim = dim
        ctx.save_for_backward(x, z, length)
        return z

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, length = ctx.saved_tensors
        if wants_plain(upstream):
            return differentiable(lambda x: normalize(x, dim=ctx.dim), x, upstream), None
        along = torch.where(length < SHORTEST, 0, (z * upstream).sum(ctx.dim, keepdim=True))
        return torch.addcmul(upstream, z, along, value=-1).div_(length.clamp_min(SHORTEST)), None
