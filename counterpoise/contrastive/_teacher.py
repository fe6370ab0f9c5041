"""Views of a student beside those of its teacher: which of them meet, and the teacher's as keys without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import at_least_float32, check_embeddings
from counterpoise.contrastive._unit import unit


def student_and_teacher(z: Tensor, other: Tensor | None, *, every: str = "query") -> tuple[Tensor, Tensor, bool]:
    """Queries (V, N, d), keys (L, N, d) without a gradient, and whether view u of both is the same view.

    Args:
        z: (N, d), or (V, N, d) several views.
        other: (N, d), keys of another view, which all of ``z`` meets; or (L, N, d), keys of views 0, 1, .. of the same
            examples, each of which all views but its own meet.
        every: "query" or "key", of which each must meet one.

    Raises:
        ValueError, TypeError: shapes that do not fit, no keys, or a view that meets none.
    """
    if not isinstance(z, Tensor) or z.ndim != 3:
        check_embeddings("z", z)
    elif not z.is_floating_point():
        raise ValueError(f"z has dtype {z.dtype}, expected a floating (V, N, d) tensor")
    if other is None:
        raise ValueError("other is None, expected the embeddings of a momentum encoder")
    queries, example = (z[None], z) if z.ndim == 2 else (z, z[0])
    if z.ndim == 2 or other.ndim != 3:
        check_embeddings("other", other, like=example)
        return queries, other.detach()[None], False
    if other.shape[1:] != z.shape[1:] or not other.is_floating_point():
        expected = "(V, {}, {})".format(*z.shape[1:])
        raise ValueError(f"other has shape {tuple(other.shape)}, dtype {other.dtype}, expected floating {expected}")
    fewest, name = (len(other), "other") if every == "query" else (len(z), "z")
    if fewest < 2:
        raise ValueError(f"{name} holds {fewest} view, expected two or more: a view does not meet its own")
    return queries, other.detach(), True


def meeting(queries: Tensor, keys: Tensor, same_views: bool) -> Tensor:
    """(V, L) bool: which view of ``queries`` (V, ..) meets which of ``keys`` (L, ..)."""
    v, u = (torch.arange(len(x), device=x.device) for x in (queries, keys))
    return (v[:, None] != u) | (not same_views)


def as_keys(other: Tensor, mask: Tensor | None, *, normalize: bool = True) -> Tensor:
    """``other`` (L, N, d) in float32 at least, what ``mask`` (N,) leaves out as zeros, of unit length on request."""
    k = at_least_float32(other)
    if mask is not None:
        k = torch.where(mask[None, :, None], k, 0)
    return unit(k, dim=-1) if normalize else k
