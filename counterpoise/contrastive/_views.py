"""Views as rows: what every two-view objective does first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from counterpoise._core import at_least_float32, check_embeddings, check_per_row
from counterpoise.contrastive._unit import unit
from counterpoise.distributed import gather_rows, rank, rows_per_rank


class Rows(NamedTuple):
    """V views of N examples as V*N rows, view-major."""

    z: Tensor
    """(V*N, d)"""
    ids: Tensor
    """(V*N, 2): row and label, unique over all ranks"""
    counted: Tensor | None
    """(V*N,) bool"""
    weight: Tensor | None
    """(V*N,)"""
    itself: Tensor
    """(V*N,) the row's index among the rows of all ranks, as :func:`all_ranks` orders them"""


def list_views(z: Tensor, other: Tensor | None) -> tuple[Tensor, ...]:
    """The views (N, d) of :func:`stack_views`, which are not copied."""
    if z.ndim == 3 and other is None:
        return z.unbind(0)
    check_embeddings("z", z)
    if other is None:
        return (z,)
    check_embeddings("other", other, like=z)
    return z, other


def stack_views(z: Tensor, other: Tensor | None) -> Tensor:
    """(V, N, d) from one view (N, d), two, or several; raises ValueError for shapes that do not fit."""
    return z if z.ndim == 3 and other is None else torch.stack(list_views(z, other))


def as_rows(
    views: Tensor, labels: Tensor | None, weight: Tensor | None, mask: Tensor | None, *, normalize: bool, sync: bool
) -> Rows:
    """Rows of ``views`` (V, N, d) with ids, mask and weight of their example; what is masked becomes zero.

    Labels (N,) say which examples are positives of one another; without them each example is its own label.
    """
    v, n, _ = views.shape
    check_per_row("labels", labels, views[0])
    if labels is not None and labels.is_floating_point():
        raise TypeError(f"labels has dtype {labels.dtype}, expected class indices of an integer type")
    check_per_row("weight", weight, views[0])
    check_per_row("mask", mask, views[0], dtype=torch.bool)
    z = at_least_float32(views)
    if mask is not None:
        z = torch.where(mask[None, :, None], z, 0)
    if normalize:
        z = unit(z, dim=-1)
    offset = sum(rows_per_rank(views[0])[: rank()]) if sync else 0
    example = torch.arange(n, device=z.device) + offset
    itself = torch.arange(v * n, device=z.device) + offset * v
    row = (example[None, :] * v + torch.arange(v, device=z.device)[:, None]).flatten()
    label = (example if labels is None else labels.long()).repeat(v)
    return Rows(
        z.flatten(0, 1),
        torch.stack([row, label], dim=1),
        None if mask is None else mask.repeat(v),
        None if weight is None else weight.repeat(v),
        itself,
    )


def other_views(itself: Tensor, v: int) -> Tensor:
    """(V*N, V-1) indices of the same example's other views, from those of the rows (V*N,)."""
    of_view = itself.reshape(v, -1)
    return torch.stack([torch.cat([of_view[:u], of_view[u + 1 :]]) for u in range(v)]).transpose(1, 2).flatten(0, 1)


def all_ranks(rows: Rows, *, sync: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys with gradient, their ids, and log weights (-inf = masked out) of the rows of all ranks."""
    masked = None if rows.counted is None else torch.where(rows.counted, 0.0, -torch.inf)
    if not sync:
        return rows.z, rows.ids, masked
    masked = (
        rows.z.new_zeros(len(rows.z)) if masked is None else masked.to(rows.z.dtype)
    )  # on every rank, masked or not
    return gather_rows(rows.z), gather_rows(rows.ids), gather_rows(masked.detach())
