"""What an attacked classifier is worth: accuracies over examples, classes and radii; and pictures of attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WORST_SHARE = 0.3  # of the classes, rounded up
PICTURES = 6


def robustness_metrics(
    hits: Tensor, target: Tensor, num_classes: int, radii: Sequence[float], radius: float
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Scalars and details of what was classified correctly at every radius.

    The worst 30 percent are that share of the classes, rounded up, with the smallest robust accuracy; classes without
    an example are left out.

    Args:
        hits: (N, R) bool, correct within a ball of ``radii[r]``.
        target: (N,) class indices in [0, num_classes - 1].
        num_classes: C.
        radii: R of them, ``radius`` and 0 among them.
        radius: the one that "robust" means.
    """
    total = target.bincount(minlength=num_classes)
    of_class = torch.zeros(num_classes, len(radii), dtype=torch.float64).index_add_(0, target, hits.double())
    rates = of_class / total[:, None]
    at = list(radii).index(radius)
    clean, robust = rates[:, 0], rates[:, at]
    present = robust[total > 0].sort().values
    worst = present[: math.ceil(WORST_SHARE * len(present))]
    scalars = {
        "robust_accuracy": _number(hits[:, at].double().mean()),
        "robust_balanced_accuracy": _number(present.mean()),
        "worst_class_robust_accuracy": _number(present[0]) if len(present) else None,
        "worst_30_percent_robust_accuracy": _number(worst.mean()),
    }
    per_class = {"clean": [_number(x) for x in clean], "robust": [_number(x) for x in robust]}
    curve = {"radius": list(radii), "accuracy": [_number(x) for x in hits.double().mean(0)]}
    return scalars, {"per_class": per_class, "curve": curve}


def input_bounds(input_range: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest input, (C,) or (1,); infinite where the range is not known.

    Raises:
        ValueError: other than two bounds, or a lower one that is not below the upper one.
    """
    if input_range is None:
        return torch.tensor([-torch.inf]), torch.tensor([torch.inf])
    if len(input_range) != 2:
        raise ValueError(
            f"input_range has {len(input_range)} entries, expected two: the smallest and the largest input"
        )
    low, high = (torch.as_tensor(bound, dtype=torch.float32).reshape(-1) for bound in input_range)
    if low.shape != high.shape or not bool((low < high).all()):
        raise ValueError(f"input_range is {list(input_range)}, expected the first entry below the second")
    return low, high


def pictures_of(
    x: Tensor, attacked: Tensor, target: Tensor, low: Tensor, high: Tensor, *, none: bool = False
) -> tuple[Tensor, Tensor]:
    """The first images of a few classes before and after the attack, (P, 2, channels, H, W) in [0, 1], and their rows.

    Inputs that are no images give no pictures, nor does ``none``.
    """
    if none or x.ndim != 4 or x.shape[1] not in (1, 3):
        return x.new_zeros(0, 2, *x.shape[1:]), torch.zeros(0, dtype=torch.long, device=x.device)
    first = [int(torch.where(target == label)[0][0]) for label in target.unique()[:PICTURES]]
    rows = torch.tensor(first, device=x.device)
    pairs = torch.stack([x[rows], attacked[rows]], 1)
    if not bool(high.isfinite().all()):
        low, high = pairs.amin().reshape(1), pairs.amax().reshape(1)
    low, high = low[:, None, None], high[:, None, None]
    return ((pairs - low) / (high - low).clamp_min(1e-12)).float(), rows


def _number(x: Tensor) -> float | None:
    return float(x) if bool(x.isfinite()) else None


__all__ = ["input_bounds", "pictures_of", "robustness_metrics"]
