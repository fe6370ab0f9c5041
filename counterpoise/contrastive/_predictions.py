"""What BYOL and SimSiam share: predictions from views beside targets of other views, the latter without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import at_least_float32, check_per_row, reduce_losses, without_autocast, world_size
from counterpoise.contrastive._teacher import as_keys, meeting, student_and_teacher

SHORTEST = 1e-12  # no prediction is divided by less


def prediction_distances(
    z: Tensor, other: Tensor | None, weight: Tensor | None, mask: Tensor | None, *, normalize: bool
) -> tuple[Tensor, bool]:
    """(V, N) mean distance of each prediction to the targets that it meets, and whether views meet both ways.

    The distance is 2 - 2 cos, or without ``normalize`` the mean over features of the squared difference.
    """
    predictions, targets, both_ways = student_and_teacher(z, other)
    check_per_row("weight", weight, predictions[0])
    check_per_row("mask", mask, predictions[0], dtype=torch.bool)
    p = at_least_float32(predictions)
    if mask is not None:
        p = torch.where(mask[None, :, None], p, 0)
    with without_autocast(p):
        if normalize:
            return 2 - 2 * _mean_cosines(p, targets, mask, both_ways=both_ways), both_ways
        t = as_keys(targets, mask, normalize=False)
        apart = torch.stack([(p - target).square().mean(-1) for target in t], dim=1)  # (V, L, N)
        return (_shares(p, t, both_ways)[..., None] * apart).sum(1), both_ways


def _mean_cosines(p: Tensor, targets: Tensor, mask: Tensor | None, *, both_ways: bool) -> Tensor:
    """(V, N) mean cosine of each prediction and the targets that it meets.

    Predictions are divided by their lengths behind the product: no normalised copy of them is kept for the backward
    pass.
    """
    if both_ways and len(p) == len(targets) == 2:  # by far the most common: each meets the other
        met = as_keys(targets.flip(0), mask)
    else:
        t = as_keys(targets, mask)
        met = torch.einsum("vl,lnd->vnd", _shares(p, t, both_ways), t)
    return torch.linalg.vecdot(p, met) / torch.linalg.vector_norm(p, dim=-1).clamp_min(SHORTEST)


def _shares(predictions: Tensor, targets: Tensor, both_ways: bool) -> Tensor:
    """(V, L) share of each target in the mean over those that a view meets."""
    meets = meeting(predictions, targets, both_ways).to(predictions.dtype)
    return meets / meets.sum(1, keepdim=True)


def reduce_predictions(
    rows: Tensor, weight: Tensor | None, mask: Tensor | None, *, reduction: str, normalizer: str | float, sync: bool
) -> Tensor:
    """Values (V, N) to what the caller asked for; weight and mask of an example are those of all its rows."""
    return reduce_losses(
        rows.flatten(),
        counted=None if mask is None else mask.repeat(len(rows)),
        weight=None if weight is None else weight.repeat(len(rows)),
        reduction=reduction,
        normalizer=normalizer,
        sync=sync and world_size() > 1,
    )
