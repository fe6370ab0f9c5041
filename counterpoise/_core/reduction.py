"""The one reduction: entries to rows (``inner``), rows to a scalar (``reduction``), and what the mean divides by."""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core.checks import check_choice, check_number
from counterpoise._core.ranks import sum_over_ranks, world_size

REDUCTIONS = ("none", "mean", "sum")
NORMALIZERS = ("count", "weight", "positives")
INNERS = ("mean", "sum", "none")


def check_reduction(reduction: str, normalizer: str | float) -> None:
    """Raises unless both are known; ``normalizer`` may also be a positive number."""
    if type(reduction) is str and reduction in REDUCTIONS and type(normalizer) is str and normalizer in NORMALIZERS:
        return
    check_choice("reduction", reduction, REDUCTIONS)
    if isinstance(normalizer, str):
        check_choice("normalizer", normalizer, NORMALIZERS)
    else:
        check_number("normalizer", normalizer, 0, open_low=True)


def combine_inner(losses: Tensor, counted: Tensor | None, inner: str) -> tuple[Tensor, Tensor | None]:
    """Entry losses (N, ...) to row losses (N,).

    Args:
        losses: (N, ...) per entry.
        counted: (N, ...) bool, True = counts; None = all count.
        inner: "mean" over the row's counted entries, "sum" over them, or "none" (nothing is combined).

    Returns:
        row losses (N,) and which rows hold a counted entry (N,), or both inputs unchanged for (N,) or "none".
    """
    check_choice("inner", inner, INNERS)
    if losses.ndim == 1 or inner == "none":
        return losses, counted
    entries = losses.flatten(1)
    if counted is None:
        return (entries.sum(1) / max(entries.shape[1], 1) if inner == "mean" else entries.sum(1)), None
    counts = counted.flatten(1).sum(1)
    rows = torch.where(counted.flatten(1), entries, 0).sum(1)
    return (rows / counts.clamp_min(1) if inner == "mean" else rows), counts > 0


def reduce_losses(
    losses: Tensor,
    *,
    counted: Tensor | None = None,
    weight: Tensor | None = None,
    carried_weight: Tensor | None = None,
    positives: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Row losses to what the caller asked for.

    Args:
        losses: (N,), or (N, ...) where entries were not combined.
        counted: bool of the same shape, True = counts; what does not count is zero in "none" and left out of the mean.
        weight: (N,), multiplies the losses.
        carried_weight: weights already inside ``losses`` (class weights), of their shape; read by normalizer="weight".
        positives: 0-d count, for normalizer="positives"; None = rows that count.
        reduction: "none", "mean" or "sum".
        normalizer: what "mean" divides by: "count" (rows that count), "weight" (sum of all weights), "positives",
            or a positive number.
        sync: the denominator is summed over all ranks and the local value is world_size * local sum / denominator, so
            that the mean over ranks is what one process would get.

    Returns:
        a tensor of the shape of ``losses`` for "none", else 0-d; where nothing counts, a zero connected to the graph.
    """
    check_reduction(reduction, normalizer)
    if weight is not None:
        weight = weight.to(losses.dtype).reshape(-1, *[1] * (losses.ndim - 1))
        weight = weight if counted is None else torch.where(counted, weight, 0)
    weighted = losses if weight is None else losses * weight
    if counted is not None:
        weighted = torch.where(counted, weighted, 0)
    if reduction == "none":
        return weighted
    total = weighted.sum() * (world_size() if sync else 1)
    if reduction == "sum":
        return total
    if not isinstance(normalizer, str):
        return total / normalizer
    if counted is None and normalizer == "count" and not sync:
        return total / max(losses.numel(), 1)
    divisor = _divisor(normalizer, losses, counted, weight, carried_weight, positives)
    if sync:
        divisor = sum_over_ranks(divisor)
    if normalizer == "positives":
        divisor = divisor.clamp_min(1)  # soft labels may sum to less than one positive
    return total / torch.where(divisor != 0, divisor, 1)  # nothing counts, or no positive: divide by one


def _divisor(
    normalizer: str,
    losses: Tensor,
    counted: Tensor | None,
    weight: Tensor | None,
    carried_weight: Tensor | None,
    positives: Tensor | None,
) -> Tensor:
    if normalizer == "positives" and positives is not None:
        return positives.detach().to(losses.dtype)
    ones = torch.ones_like(losses, requires_grad=False)
    if normalizer == "weight":
        ones = ones if weight is None else ones * weight
        ones = ones if carried_weight is None else ones * carried_weight
    if counted is not None:
        ones = torch.where(counted, ones, 0)
    return ones.sum().detach()
