"""A table about grey images: where their ink lies, how it spreads, how symmetric it is, how many holes it has.

What is measured says much of what an image looks like and nothing of its class by name: a table to pair images with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ATTRIBUTES = (
    *("ink", "contrast", "filled", "edges"),
    *("centre_x", "centre_y", "spread_x", "spread_y", "tilt", "skew_x", "skew_y"),
    *("width", "height", "aspect", "mirror_x", "mirror_y"),
    *("parts", "holes"),
)
AT_ONCE = 4096  # images measured together


def image_attributes(images: Tensor) -> Tensor:
    """Measures of images, a column for each name in ``ATTRIBUTES``.

    Args:
        images: (N, 1, H, W) in [0, 1], bright on dark.

    Returns:
        (N, 18) float64. ink, contrast: mean and standard deviation of pixels; filled: share brighter than half of the
        brightest; edges: mean step between neighbours; centre, spread, tilt, skew: moments of the ink, x to the right
        and y downwards in [-1, 1]; width, height, aspect: of the filled pixels' box, aspect the logarithm of their
        ratio; mirror: correlation with the mirrored image; parts, holes: connected regions of filled pixels, and of
        others that do not touch the border. A black image has zeros.

    Raises:
        ValueError: another shape.
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, 1, H, W)")
    return torch.cat([_measured(part.double()[:, 0]) for part in images.split(AT_ONCE)])


def _measured(x: Tensor) -> Tensor:
    """(N, 18) of images (N, H, W) in float64."""
    filled = (x > x.amax((1, 2), keepdim=True) / 2) & (x > 0)
    steps = x.diff(dim=1).abs().mean((1, 2)) + x.diff(dim=2).abs().mean((1, 2))
    pixels = [x.mean((1, 2)), x.std((1, 2), correction=0), filled.double().mean((1, 2)), steps]
    wide, high = (filled.any(dim).double() for dim in (1, 2))
    box = [_extent(wide), _extent(high)]
    aspect = (box[0].clamp_min(1e-9) / box[1].clamp_min(1e-9)).log()
    mirrored = [_correlation(x, x.flip(2)), _correlation(x, x.flip(1))]
    return torch.stack([*pixels, *_moments(x), *box, aspect, *mirrored, *_regions(filled)], dim=1)


def _moments(x: Tensor) -> list[Tensor]:
    """Centre, spread, tilt and skew of the ink."""
    weight = x / x.sum((1, 2), keepdim=True).clamp_min(1e-12)
    across, down = (torch.linspace(-1, 1, n, dtype=x.dtype) for n in (x.shape[2], x.shape[1]))
    along = weight.sum(1), weight.sum(2)
    centre = [(w * axis).sum(1) for w, axis in zip(along, (across, down), strict=True)]
    away = [axis - c[:, None] for axis, c in zip((across, down), centre, strict=True)]
    spread = [(w * a.square()).sum(1).sqrt() for w, a in zip(along, away, strict=True)]
    both = torch.einsum("nij,ni,nj->n", weight, away[1], away[0])
    tilt = both / (spread[0] * spread[1]).clamp_min(1e-9)
    skew = [(w * a**3).sum(1) / s.clamp_min(1e-6) ** 3 for w, a, s in zip(along, away, spread, strict=True)]
    return [*centre, *spread, tilt, *skew]


def _extent(seen: Tensor) -> Tensor:
    """(N,) share of a side (N, n) from the first place that is seen to the last."""
    n = seen.shape[1]
    places = torch.arange(n, dtype=seen.dtype)
    first = torch.where(seen > 0, places, n).amin(1)
    last = torch.where(seen > 0, places, -1).amax(1)
    return (last - first + 1).clamp_min(0) / n


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x - x.mean((1, 2), keepdim=True) for x in (a, b))
    return (a * b).sum((1, 2)) / (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt().clamp_min(1e-12)


def _regions(filled: Tensor) -> list[Tensor]:
    """Parts and holes of each image; diagonal neighbours join the filled pixels, and not the others."""
    from scipy.ndimage import label

    images, corners = filled.numpy(), [[1, 1, 1]] * 3
    parts = [label(image, corners)[1] for image in images]
    return [torch.tensor(parts, dtype=torch.float64), torch.tensor([_holes(im, label) for im in ~images]).double()]


def _holes(empty: object, label: Callable[..., tuple[Tensor, int]]) -> int:
    """Regions of the empty pixels that do not touch the border."""
    regions, count = label(empty)
    border = {int(r) for side in (regions[0], regions[-1], regions[:, 0], regions[:, -1]) for r in set(side.tolist())}
    return count - len(border - {0})
