"""What the distributionally robust reweighters share: losses in float64, and the losses of all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from counterpoise._core import at_least_float32
from counterpoise.distributed import gather_rows, row_offset


def check_losses(losses: Tensor) -> None:
    """Raises unless losses are one a row."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses is a {type(losses).__name__}, expected a tensor of shape (N,)")
    if losses.ndim != 1:
        raise ValueError(f"losses has shape {tuple(losses.shape)}, expected (N,), one a row")


def in_float64(losses: Tensor) -> Tensor:
    """(N,) detached, in float64; float32 where the device has no float64 (MPS)."""
    check_losses(losses)
    return losses.detach().to(torch.float32 if losses.device.type == "mps" else torch.float64)


def like_losses(weights: Tensor, losses: Tensor) -> Tensor:
    """Weights in the type of the losses, float32 at least."""
    return weights.to(at_least_float32(losses.detach()).dtype)


def on_all_ranks(losses: Tensor, weights_of: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """This rank's share (N,) of the weights of the losses of all ranks.

    Args:
        losses: (N,) of this rank.
        weights_of: (losses of all ranks, rows of all ranks, ...) to their weights.
        rows: (N,) more facts a row, gathered as the losses are.
    """
    everyone = gather_rows(in_float64(losses))
    told = [gather_rows(x) for x in rows]
    start = row_offset(losses)
    return like_losses(weights_of(everyone, *told)[start : start + len(losses)], losses)


def from_weights(losses: Tensor, weights: Tensor, value: Tensor | float) -> Tensor:
    """0-d ``value``, whose gradient with respect to the losses is ``weights`` (Danskin's theorem)."""
    v = at_least_float32(losses)
    moved = (weights.to(v.dtype) * (v - v.detach())).sum()
    return moved + torch.as_tensor(value, device=v.device).to(v.dtype)
