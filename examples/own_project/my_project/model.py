"""A model of one's own; ``num_classes`` is filled in from the data, because the parameter has that name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RingNet(nn.Module):
    """Points (N, 2) to logits (N, num_classes), by way of the radius."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.cat([x, x.norm(dim=1, keepdim=True)], dim=1))
