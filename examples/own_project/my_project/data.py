"""Points on three rings, one class a ring: a plain torch ``Dataset`` that knows nothing of counterpoise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Rings(Dataset[tuple[Tensor, int]]):
    """(x, y): a point (2,) near the ring of radius y + 1, and the ring's number y in 0, 1, 2."""

    def __init__(self, num_examples: int, noise: float = 0.2, seed: int = 0) -> None:
        draws = torch.Generator().manual_seed(seed)
        angle = 2 * math.pi * torch.rand(num_examples, generator=draws)
        self.ring = torch.arange(num_examples) % 3
        radius = self.ring + 1 + noise * torch.randn(num_examples, generator=draws)
        self.points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

    def __len__(self) -> int:
        return len(self.ring)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.points[index], int(self.ring[index])
