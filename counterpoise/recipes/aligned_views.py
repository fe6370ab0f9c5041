"""Two augmented views of an image whose flips can be undone, on pixels, labels and features alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterpoise._core import check_choice, check_number, normal_by_index, uniform_by_index

FLIPS = {"none": (), "horizontal": (-1,), "vertical": (-2,), "both": (-1, -2)}


class AlignedViews(nn.Module):
    """Flips, contrast, brightness and noise; the draws are a function of (seed, epoch, index) alone.

    Args:
        flip: "none", "horizontal", "vertical" or "both": each in half of the views.
        contrast: contrasts lie in [1 - contrast, 1 + contrast]; in [0, 1).
        brightness: what is added lies in [-brightness, brightness]; >= 0, in units of the input.
        noise: standard deviation of what is added to each pixel, >= 0.
        seed: >= 0.
    """

    def __init__(
        self,
        flip: str = "horizontal",
        contrast: float = 0.2,
        brightness: float = 0.1,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("flip", flip, FLIPS)
        check_number("contrast", contrast, 0, 0.999)
        check_number("brightness", brightness, 0)
        check_number("noise", noise, 0)
        self.flip, self.contrast, self.brightness, self.noise, self.seed = flip, contrast, brightness, noise, seed

    def forward(self, x: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) of the examples ``index`` (N,) to both views (2N, C, H, W), and what was flipped (2N, 2).

        The first N rows are the first views.
        """
        views = []
        flipped = []
        for view in (0, 1):
            u = uniform_by_index(index, 4, self.seed, epoch, view).to(x.device)
            flips = u[:, :2] < 0.5
            scale, shift = (2 * u[:, 2:] - 1).to(x.dtype)[..., None, None, None].unbind(1)
            seen = flipped_back(x, flips, self.flip) * (1 + self.contrast * scale) + self.brightness * shift
            if self.noise > 0:
                normal = normal_by_index(index, x[0].numel(), self.seed, epoch, 2 + view).to(x)
                seen = seen + self.noise * normal.view_as(x)
            views.append(seen)
            flipped.append(flips)
        return torch.cat(views), torch.cat(flipped)

    def undo(self, x: Tensor, flips: Tensor) -> Tensor:
        """Maps (M, ..., H, W) of views to where the image had them; doing it twice changes nothing."""
        return flipped_back(x, flips, self.flip)


def flipped_back(x: Tensor, flips: Tensor, flip: str) -> Tensor:
    """``x`` (M, ..., H, W) mirrored along the width where ``flips[:, 0]``, along the height where ``flips[:, 1]``."""
    for column, dimension in ((0, -1), (1, -2)):
        if dimension in FLIPS[flip]:
            chosen = flips[:, column].reshape(-1, *(1,) * (x.ndim - 1))
            x = torch.where(chosen, x.flip(dimension), x)
    return x
