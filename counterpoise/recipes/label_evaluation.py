"""What a classifier with several labels an example is worth: exact average precision, F1, numbers of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

from counterpoise.recipes.evaluation import BANDS, Scores, assign_bands


class LabelAveragePrecision(Metric):
    """Average precision of each label over all batches and ranks, see :func:`label_precisions`.

    The same examples read by every rank change nothing.
    """

    logits: list[Tensor]
    target: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Logits and labels (N, C)."""
        self.logits.append(logits.detach())
        self.target.append(target)

    def compute(self) -> Tensor:
        """(C,) average precisions, NaN where undefined."""
        return label_precisions(dim_zero_cat(self.logits), dim_zero_cat(self.target))


def label_precisions(logits: Tensor, target: Tensor) -> Tensor:
    r"""(C,) float64 average precision of each label: exact, ties as one threshold; NaN for a label without positives.

    .. math:: \mathrm{AP} = \sum_n (R_n - R_{n-1}) P_n

    over the distinct scores, highest first, without interpolation. If any logit of a label is NaN, so is its AP.

    Args:
        logits: (N, C); target: (N, C) of 0 and 1.
    """
    if not len(logits):
        return torch.full((logits.shape[1],), torch.nan, dtype=torch.float64)
    z, labels = logits.detach().cpu(), target.detach().cpu().long()
    # Places in the order instead of probabilities, which in float32 tie where a network is sure.
    places = [z[:, c].unique(return_inverse=True)[1] for c in range(z.shape[1])]
    scores = (torch.stack(places, dim=1) + 1).double() / (len(z) + 1)
    known = (labels.sum(0) > 0) & ~z.isnan().any(0)
    found = torch.full((z.shape[1],), torch.nan, dtype=torch.float64)
    for c in torch.where(known)[0].tolist():
        one = multilabel_average_precision(
            scores[:, c : c + 1], labels[:, c : c + 1], num_labels=1, average="none", validate_args=False
        )
        found[c] = one.double().squeeze()
    return found


def label_metrics(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int],
    *,
    many: int = 100,
    few: int = 20,
    class_names: Sequence[str] | None = None,
) -> Scores:
    """Scalars and per-label values of predictions with a label wherever its probability is above a half.

    A label without evaluated positives has no average precision and no F1 and is left out of the means over labels.

    Args:
        logits: (N, C); target: (N, C) of 0 and 1.
        class_counts: (C,) training positives of each label.
        many, few: labels with more, or fewer, training positives are head, or tail, as
            :func:`~counterpoise.recipes.evaluation.assign_bands` says.
        class_names: (C,), default "0", "1", ...

    Returns:
        mean_average_precision, head_, medium_ and tail_average_precision, macro_f1, micro_f1; in the details bands,
        per_class, and labels_per_example, which counts examples by their number of true and of predicted labels.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.ndim != 2 or target.shape != logits.shape:
        raise ValueError(f"target has shape {tuple(target.shape)}, logits {tuple(logits.shape)}, expected one (N, C)")
    if len(class_counts) != logits.shape[1]:
        raise ValueError(f"class_counts has length {len(class_counts)}, expected {logits.shape[1]}, one for each label")
    names = [str(name) for name in (class_names if class_names is not None else range(len(class_counts)))]
    labels, predicted = target.detach().cpu() > 0, logits.detach().cpu() > 0
    band, rule = assign_bands(class_counts, many=many, few=few)
    precision = label_precisions(logits, target)
    hits, true, claimed = ((labels & predicted).sum(0), labels.sum(0), predicted.sum(0))
    f1 = torch.where(true > 0, 2 * hits / (true + claimed).double(), torch.nan)
    of_band = {b: precision[torch.tensor([x == b for x in band])] for b in BANDS}
    claims = int(true.sum() + claimed.sum())
    scalars = {
        "mean_average_precision": _mean(precision),
        **{f"{b}_average_precision": _mean(values) for b, values in of_band.items()},
        "macro_f1": _mean(f1),
        "micro_f1": 2 * int(hits.sum()) / claims if claims else None,
    }
    per_class = {
        "average_precision": _listed(precision),
        "f1": _listed(f1),
        "train_count": [int(n) for n in class_counts],
        "test_count": true.tolist(),
        "band": band,
    }
    width = len(names) + 1
    of_examples = {
        "true": labels.sum(1).bincount(minlength=width).tolist(),
        "predicted": predicted.sum(1).bincount(minlength=width).tolist(),
    }
    details = {"bands": rule, "per_class": per_class, "labels_per_example": of_examples}
    return Scores(scalars, details, _notes(rule, precision, true, names))


def _notes(rule: dict[str, Any], precision: Tensor, true: Tensor, names: list[str]) -> list[str]:
    notes = [rule["note"]] if rule["rule"] == "terciles" else []
    broken = [name for name, ap, n in zip(names, precision.tolist(), true.tolist(), strict=True) if n and ap != ap]
    if broken:
        notes.append(f"the logits of {', '.join(map(repr, broken[:5]))} hold NaN: no average precision")
    return notes


def _mean(values: Tensor) -> float | None:
    defined = values[~values.isnan()]
    return float(defined.mean()) if len(defined) else None


def _listed(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


__all__ = ["LabelAveragePrecision", "label_metrics", "label_precisions"]
