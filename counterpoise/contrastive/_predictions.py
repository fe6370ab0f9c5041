"""What BYOL and SimSiam share: predictions from views beside targets of other views, the latter without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from counterpoise._core import at_least_float32, check_per_row, reduce_losses, without_autocast, world_size
from counterpoise.contrastive._teacher import as_keys, meeting, student_and_teacher


def prediction_distances(
    z: Tensor, other: Tensor | None, weight: Tensor | None, mask: Tensor | None, *, normalize: bool
) -> tuple[Tensor, bool]:
    """(V, N) mean distance of each prediction to the targets that it meets, and whether views meet both ways.

    The distance is 2 - 2 cos, or without ``normalize`` the mean over features of the squared difference.
    """
    predictions, targets, both_ways = student_and_teacher(z, other)
    check_per_row("weight", weight, predictions[0])
    check_per_row("mask", mask, predictions[0], dtype=torch.bool)
    p, t = at_least_float32(predictions), as_keys(targets, mask, normalize=normalize)
    if mask is not None:
        p = torch.where(mask[None, :, None], p, 0)
    meets = meeting(p, t, both_ways).to(p.dtype)
    share = meets / meets.sum(1, keepdim=True)  # (V, L)
    with without_autocast(p):
        if normalize:
            return 2 - 2 * (unit(p, dim=-1) * torch.einsum("vl,lnd->vnd", share, t)).sum(-1), both_ways
        apart = torch.stack([(p - target).square().mean(-1) for target in t], dim=1)  # (V, L, N)
        return (share[..., None] * apart).sum(1), both_ways


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
