"""Several random views of each example, batched; the draws are a function of (seed, epoch, index, view) alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from counterpoise._core import check_number, mix_seeds, normal_by_index, uniform_by_index
from counterpoise.recipes.data.datamodule import seeded


class Views(nn.Module):
    """Random resized crops, flips, rotations, contrast, brightness, blur and noise of images; noise and gaps of tables.

    What the images of a batch see differs from image to image, and is drawn for the batch at once.

    Args:
        num_views: V >= 1.
        crop: (smallest, largest) share of the area that a crop keeps, in (0, 1]; the aspect ratio lies in [3/4, 4/3].
        flip: mirror half of the images left to right.
        rotation: degrees; angles lie in [-rotation, rotation].
        contrast: contrasts lie in [1 - contrast, 1 + contrast]; in [0, 1).
        brightness: what is added lies in [-brightness, brightness]; >= 0, in units of the input.
        blur: share of the images that a 3 x 3 mean smooths; in [0, 1].
        noise: standard deviation of what is added to each entry, >= 0.
        drop: share of the entries of a table that are set to zero (the mean, of standardised columns); in [0, 1).
        seed: >= 0.

    Source: the crops, flips and jitters are those of Chen et al., A Simple Framework for Contrastive Learning of Visual
    Representations, 2020, appendix A, without its hues.
    """

    def __init__(
        self,
        num_views: int = 2,
        crop: Sequence[float] = (0.4, 1.0),
        flip: bool = False,
        rotation: float = 0.0,
        contrast: float = 0.4,
        brightness: float = 0.2,
        blur: float = 0.0,
        noise: float = 0.0,
        drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("num_views", num_views, 1)
        low, high = (crop[0], crop[-1]) if len(crop) == 2 else (math.nan, math.nan)
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop is {list(crop)}, expected (smallest, largest) share of the area in (0, 1]")
        for name, value, high_end in (
            *(("rotation", rotation, 180), ("contrast", contrast, 0.999), ("brightness", brightness, math.inf)),
            *(("blur", blur, 1), ("noise", noise, math.inf), ("drop", drop, 0.999), ("seed", seed, math.inf)),
        ):
            check_number(name, value, 0, high_end)
        self.num_views, self.crop, self.flip, self.rotation = num_views, (float(low), float(high)), flip, rotation
        self.contrast, self.brightness, self.blur, self.noise, self.drop = contrast, brightness, blur, noise, drop
        self.seed = seed

    def forward(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Inputs (N, C, H, W) or (N, d) of the examples ``index`` (N,) to views (V, N, ...)."""
        one = self._image if x.ndim == 4 else self._table
        return torch.stack([one(x, index, epoch, view) for view in range(self.num_views)])

    def _image(self, x: Tensor, index: Tensor, epoch: int, view: int) -> Tensor:
        u = uniform_by_index(index, 9, self.seed, epoch, view).to(device=x.device, dtype=x.dtype)
        x = grid_sample(x, affine_grid(self._maps(u), list(x.shape), align_corners=False), align_corners=False)
        if self.blur > 0:
            smooth = avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            x = torch.where((u[:, 6] < self.blur)[:, None, None, None], smooth, x)
        scale, shift = (2 * u[:, 7:9] - 1)[..., None, None, None].unbind(1)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * (1 + self.contrast * scale) + mean + self.brightness * shift
        return self._noisy(x, index, epoch, view)

    def _maps(self, u: Tensor) -> Tensor:
        """(N, 2, 3) affine maps from the view's coordinates to the image's, in [-1, 1]."""
        low, high = self.crop
        area = low + (high - low) * u[:, 0]
        widest = (-area.log()).clamp(max=math.log(4 / 3))  # neither side leaves the image
        ratio = torch.exp(widest * (2 * u[:, 1] - 1))
        width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
        x, y = (2 * u[:, 2] - 1) * (1 - width), (2 * u[:, 3] - 1) * (1 - height)
        angle = math.radians(self.rotation) * (2 * u[:, 4] - 1)
        mirror = torch.where(u[:, 5] < 0.5, -1.0, 1.0).to(u) if self.flip else torch.ones_like(angle)
        cos, sin = angle.cos(), angle.sin()
        first = torch.stack([width * cos * mirror, -height * sin, x], dim=1)
        second = torch.stack([width * sin * mirror, height * cos, y], dim=1)
        return torch.stack([first, second], dim=1)

    def _table(self, x: Tensor, index: Tensor, epoch: int, view: int) -> Tensor:
        x = self._noisy(x, index, epoch, view)
        if self.drop == 0:
            return x
        u = uniform_by_index(index, x[0].numel(), self.seed, epoch, view, 1).to(x.device)
        return torch.where((u < self.drop).view_as(x), 0, x)

    def _noisy(self, x: Tensor, index: Tensor, epoch: int, view: int) -> Tensor:
        if self.noise == 0:
            return x
        normal = normal_by_index(index, x[0].numel(), self.seed, epoch, view, 2).to(x)
        return x + self.noise * normal.view_as(x)


class TransformViews(nn.Module):
    """Views by any transform of one input, such as those of ``torchvision.transforms.v2``; an example at a time.

    Slower than :class:`Views`; every draw of torch, numpy and Python is seeded by (seed, epoch, index, view).

    Args:
        transform: an input (...) to a view (...), all of one shape.
        num_views: V >= 1.
        seed: >= 0.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor], num_views: int = 2, seed: int = 0) -> None:
        super().__init__()
        if not callable(transform):
            raise TypeError(f"transform is a {type(transform).__name__}, expected a function of one input")
        check_number("num_views", num_views, 1)
        self.transform, self.num_views, self.seed = transform, num_views, seed

    def forward(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Inputs (N, ...) of the examples ``index`` (N,) to views (V, N, ...)."""
        return torch.stack(
            [torch.stack([self._view(a, i, epoch, v) for a, i in self._rows(x, index)]) for v in range(self.num_views)]
        )

    @staticmethod
    def _rows(x: Tensor, index: Tensor) -> Any:
        return zip(x, index.tolist(), strict=True)

    def _view(self, x: Tensor, index: int, epoch: int, view: int) -> Tensor:
        with seeded(mix_seeds(self.seed, epoch, index, view)):
            return self.transform(x)


__all__ = ["TransformViews", "Views"]
