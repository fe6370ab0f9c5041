"""A small encoder and decoder for classes of pixels, whose encoder can be asked for its features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d


class SmallUNet(nn.Module):
    """Encoder and decoder with skips: blocks of two convolutions, halved by 2x2 maxima, doubled by nearest neighbours.

    Maxima over 2x2 commute with flips, so features of a flipped image can be flipped back exactly onto those of the
    image, up to what convolutions make of mirrored content.

    Args:
        in_channels: of the images (N, in_channels, H, W), H and W multiples of ``2 ** levels``.
        num_classes: C.
        width: channels at full size; doubled at every level.
        levels: how often the encoder halves, 1 to 4.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 16, levels: int = 2) -> None:
        super().__init__()
        if not 1 <= levels <= 4:
            raise ValueError(f"levels is {levels}, expected 1 to 4")
        widths = [width * 2**k for k in range(levels + 1)]
        self.down = nn.ModuleList([_block(a, b) for a, b in pairwise([in_channels, *widths])])
        self.up = nn.ModuleList([_block(a + b, a) for a, b in reversed(list(pairwise(widths)))])
        self.head = nn.Conv2d(width, num_classes, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images (N, in_channels, H, W) to features of every level, the deepest (N, F, H / 2^levels, ...) last."""
        side = 2 ** len(self.up)
        if x.shape[-2] % side or x.shape[-1] % side:
            raise ValueError(f"images have {x.shape[-2]} x {x.shape[-1]} pixels, expected multiples of {side}")
        features = [self.down[0](x)]
        for block in self.down[1:]:
            features.append(block(max_pool2d(features[-1], 2)))
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """What :meth:`encode` gave, to logits (N, C, H, W)."""
        x = features[-1]
        for block, skip in zip(self.up, reversed(features[:-1]), strict=True):
            x = block(torch.cat([interpolate(x, scale_factor=2), skip], dim=1))
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits (N, C, H, W)."""
        return self.decode(self.encode(x))


def _block(a: int, b: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for i, o in ((a, b), (b, b)):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers)
