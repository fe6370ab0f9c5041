"""A loss of one's own: with ``reduction``, so that reweighters compose with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class OrdinalLoss(nn.Module):
    """Cross-entropy plus ``distance_weight`` times the expected distance between the ring guessed and the true one."""

    def __init__(self, num_classes: int, distance_weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.distance_weight = distance_weight
        self.reduction = reduction
        self.register_buffer("rings", torch.arange(num_classes))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        distance = (self.rings - target[:, None]).abs()
        expected = (logits.softmax(dim=1) * distance).sum(dim=1)
        losses = cross_entropy(logits, target, reduction="none") + self.distance_weight * expected
        return losses if self.reduction == "none" else losses.mean()
