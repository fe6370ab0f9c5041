"""Fused against plain: one input, both paths, value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from counterpoise import kernels

compiled = pytest.mark.skipif(
    kernels.cpu_capability() == "none", reason="the CPU kernels are not compiled here: counterpoise-doctor says why"
)


def value_and_grad(
    loss: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of ``x`` and its gradient, for a random upstream gradient (the same for the same shape)."""
    leaf = x.detach().requires_grad_() if not x.requires_grad else x
    out = loss(leaf)
    if upstream is None:
        upstream = torch.rand(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.5
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(out))
    return out.detach(), grad


def assert_exact(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Float64: value and gradient agree with the plain form to 1e-10 of the largest."""
    fused = value_and_grad(loss, x.double())
    with kernels.disabled():
        plain = value_and_grad(loss, x.double())
    for ours, theirs in zip(fused, plain, strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * max(scale, 1e-300))


def assert_accurate(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Float32: the error against float64 is at most twice that of the plain form, or 2e-6 of the largest value."""
    x = x.float()
    fused = value_and_grad(loss, x)
    with kernels.disabled():
        plain, exact = value_and_grad(loss, x), value_and_grad(loss, x.double())
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        if not true.numel():
            continue
        error, allowed = (ours - true).abs().max(), 2 * (theirs - true).abs().max()
        assert error <= torch.maximum(allowed, 2e-6 * true.abs().max()), f"error {error}, allowed {allowed}"


def assert_within_two_ulp(loss: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> None:
    """Narrow types: the gradient is float32's on the same numbers, rounded, within two units in the last place."""
    narrow = x.to(dtype)
    _, ours = value_and_grad(loss, narrow)
    with kernels.disabled():
        _, true = value_and_grad(loss, narrow.float())
    if not true.numel():
        return
    ulp = torch.finfo(dtype).eps * true.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ours.dtype == dtype
    assert ((ours.float() - true.to(dtype).float()).abs() <= 2 * ulp + 2e-6 * true.abs().max()).all()
