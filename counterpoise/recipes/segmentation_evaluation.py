"""What a classifier of pixels is worth: IoU and Dice of the foreground classes, on dense and sparse images apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from counterpoise.recipes.evaluation import Scores


class PixelConfusion(Metric):
    """(C, C) counts of pixels, rows true, columns predicted, over all batches and ranks.

    Args:
        num_classes: C.
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Class indices (N, H, W); a negative target does not count."""
        self.counts += pixel_confusion(predicted, target, len(self.counts))

    def compute(self) -> Tensor:
        """(C, C)."""
        return self.counts


def pixel_confusion(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(C, C) counts of the pixels with a target >= 0."""
    counted = target >= 0
    pairs = target[counted].long() * num_classes + predicted[counted].long()
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def overlap(confusion: Tensor) -> tuple[Tensor, Tensor]:
    r"""(C,) intersection over union :math:`t / (t + f_+ + f_-)` and Dice :math:`2t / (2t + f_+ + f_-)`.

    NaN for a class that neither is there nor is predicted. Counts are summed over images before they are divided.
    """
    hits, true, predicted = confusion.diagonal().double(), confusion.sum(1), confusion.sum(0)
    return hits / (true + predicted - hits), 2 * hits / (true + predicted)


def foreground_share(target: Tensor) -> Tensor:
    """(N,) share of the counted pixels (>= 0) of (N, H, W) that are not background, class 0."""
    return (target > 0).flatten(1).sum(1).double() / (target >= 0).flatten(1).sum(1).clamp(min=1)


def segmentation_metrics(
    predicted: Tensor, target: Tensor, *, class_names: Sequence[str], sparse_below: float = 0.12
) -> Scores:
    """Scores of predicted classes of pixels.

    Args:
        predicted, target: (N, H, W) class indices, 0 the background; a negative target does not count.
        class_names: (C,).
        sparse_below: an image whose share of foreground is at most this is sparse, the others dense.

    Returns:
        mean_iou and mean_dice over foreground classes; the same of dense and of sparse images; sparse_false_alarms, the
        share of background in sparse images that is taken for foreground; pixel_accuracy.
    """
    predicted, target = predicted.cpu(), target.cpu()
    sparse = foreground_share(target) <= sparse_below
    scalars: dict[str, float | None] = {}
    for prefix, rows in (("", torch.ones_like(sparse)), ("dense_", ~sparse), ("sparse_", sparse)):
        iou, dice = overlap(pixel_confusion(predicted[rows], target[rows], len(class_names)))
        scalars |= {f"{prefix}mean_iou": _mean(iou[1:]), f"{prefix}mean_dice": _mean(dice[1:])}
    background = (target == 0) & sparse[:, None, None]
    scalars["sparse_false_alarms"] = _mean((predicted > 0)[background].double())
    whole = pixel_confusion(predicted, target, len(class_names))
    scalars["pixel_accuracy"] = _mean((predicted == target)[target >= 0].double())
    iou, dice = overlap(whole)
    per_class = {"iou": _listed(iou), "dice": _listed(dice), "test_pixels": whole.sum(1).tolist()}
    density = {"sparse": int(sparse.sum()), "dense": int((~sparse).sum()), "sparse_below": sparse_below}
    notes = [
        f"No evaluated image is {kind} (foreground {rule} {100 * sparse_below:g} % of the pixels)."
        for kind, rule in (("sparse", "at most"), ("dense", "above"))
        if not density[kind]
    ]
    details: dict[str, Any] = {"per_class": per_class, "density": density}
    return Scores(scalars, details, notes)


def _mean(values: Tensor) -> float | None:
    defined = values[~values.isnan()]
    return float(defined.mean()) if len(defined) else None


def _listed(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


__all__ = ["PixelConfusion", "foreground_share", "overlap", "pixel_confusion", "segmentation_metrics"]
