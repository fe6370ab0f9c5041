"""What a classifier is worth: scalars, one row a class, the bands head, medium and tail, the confusion matrix.

Everything is computed from stored logits, on the CPU, and leaves as plain JSON types: what is undefined is None.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from counterpoise._core import check_number, check_per_row, check_within

BANDS = ("head", "medium", "tail")
CALIBRATION_BINS = 15
MAX_CONFUSION_CLASSES = 1000  # beyond it the matrix would be most of metrics.json

_LARGEST_CONFIDENCE = 1 - 2**-24  # the largest float32 below one: torchmetrics gives 1.0 itself a bin of its own


@dataclass(frozen=True)
class Evaluation:
    """What :func:`classification_metrics` returns; every value is a plain JSON type, never NaN.

    Attributes:
        scalars: accuracy, balanced_accuracy, head_accuracy, medium_accuracy, tail_accuracy, macro_f1,
            expected_calibration_error (all in [0, 1]) and nll (>= 0, nats); None where undefined.
        per_class: lists of length C: recall, precision, f1 (None where undefined), train_count, test_count, band.
        confusion: (C, C) counts, rows true, columns predicted; None without predictions or beyond 1000 classes.
        bands: {"rule": "thresholds" | "terciles", "many", "few", "note"}.
        class_names: C names.
        notes: what a reader of the numbers must know.
    """

    scalars: dict[str, float | None]
    per_class: dict[str, list[Any]]
    confusion: list[list[int]] | None
    bands: dict[str, Any]
    class_names: list[str]
    notes: list[str]

    @property
    def details(self) -> dict[str, Any]:
        """What metrics.json holds beside the scalars."""
        return {"bands": self.bands, "per_class": self.per_class, "confusion": self.confusion}

    def as_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries and lists, ready for ``json.dump(..., allow_nan=False)``."""
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """What a recipe's ``evaluate`` returns where it is no plain classification; plain JSON types, never NaN.

    Attributes:
        scalars: by name; None where undefined.
        details: further entries of metrics.json, which the sections of the recipe's report read.
        notes: what a reader of the numbers must know.
    """

    scalars: dict[str, float | None]
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def classification_metrics(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int],
    *,
    many: int = 100,
    few: int = 20,
    class_names: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluates the arg-max classifier and the softmax of ``logits``.

    A class without an evaluated example has no recall and no F1 and is left out of every mean over classes; a class
    never predicted has no precision. Balanced accuracy is the mean recall, a band's accuracy the mean recall of its
    classes. If a row of logits holds NaN or +inf, or nothing but -inf, there is no prediction and no metric at all.

    Args:
        logits: (N, C), any floating type and device; -inf is a masked class.
        target: (N,) class indices in [0, C - 1].
        class_counts: (C,) training examples a class.
        many, few: head has more than ``many`` training examples, tail fewer than ``few``, medium the rest. If that
            leaves a band empty, the bands are thirds of the classes by training count.
        class_names: (C,), default "0", "1", ...

    Raises:
        ValueError: shapes that do not fit, a target out of range, or ``few`` above ``many``.

    Source: 15 equal-width bins, l1: Guo et al., On Calibration of Modern Neural Networks, 2017, eq. 3. Bands: Liu et
    al., Large-Scale Long-Tailed Recognition in an Open World, 2019.
    """
    _check_inputs(logits, target, class_counts, many, few, class_names)
    names = [str(name) for name in (class_names if class_names is not None else range(len(class_counts)))]
    z, labels = logits.detach().cpu().double(), target.detach().cpu().long()
    band, rule = assign_bands(class_counts, many=many, few=few)
    counts = {
        "train_count": [int(n) for n in class_counts],
        "test_count": torch.bincount(labels, minlength=len(names)).tolist(),
        "band": band,
    }
    notes = [rule["note"]] if rule["rule"] == "terciles" else []
    problem = _why_no_prediction(z)
    if problem:
        rates: dict[str, list[float | None]] = {key: [None] * len(names) for key in ("recall", "precision", "f1")}
        return Evaluation(_no_scalars(), rates | counts, None, rule, names, [*notes, problem])

    matrix = multiclass_confusion_matrix(z.argmax(1), labels, num_classes=len(names), validate_args=False)
    rates = _per_class_rates(matrix)
    scalars = _scalars(z, labels, rates, band)
    notes += _notes(scalars, counts["test_count"], names)
    confusion = matrix.tolist() if len(names) <= MAX_CONFUSION_CLASSES else None
    return Evaluation(scalars, rates | counts, confusion, rule, names, notes)


def assign_bands(class_counts: Sequence[int], *, many: int = 100, few: int = 20) -> tuple[list[str], dict[str, Any]]:
    """Band of each of C classes by its training count, and the rule that was used, with a note in words.

    Thirds keep classes of equal count together, so a band can still be empty: with one class there is only "medium",
    with two of different counts "head" and "tail".
    """
    counts = [int(n) for n in class_counts]
    by_threshold = ["head" if n > many else "tail" if n < few else "medium" for n in counts]
    limits = {"head": f"more than {many}", "medium": f"{few} to {many}", "tail": f"fewer than {few}"}
    empty = [limits[band] for band in BANDS if band not in by_threshold]
    if not empty:
        note = "; ".join(f"{band}: {limits[band]} training examples" for band in BANDS)
        return by_threshold, {"rule": "thresholds", "many": many, "few": few, "note": note}
    note = (
        f"no class has {' or '.join(empty)} training examples, so head, medium and tail are thirds of the classes by "
        "training count, equal counts together"
    )
    return _thirds(counts), {"rule": "terciles", "many": many, "few": few, "note": note}


def reliability(logits: Tensor, target: Tensor, bins: int = CALIBRATION_BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence of the arg-max in equal-width bins over [0, 1]: the data of a reliability diagram.

    Args:
        logits: (N, C); target: (N,) class indices; bins: B >= 1.

    Returns:
        Three (B,) tensors: mean confidence and accuracy in the bin (float64, NaN in an empty bin), examples (int64).
    """
    confidence, prediction = _probabilities(logits.detach().cpu().double()).max(1)
    edges = torch.linspace(0, 1, bins + 1)
    index = torch.bucketize(confidence.float(), edges, right=True) - 1
    count = torch.bincount(index, minlength=bins)
    correct = (prediction == target.detach().cpu()).double()
    return (
        torch.bincount(index, weights=confidence, minlength=bins) / count,
        torch.bincount(index, weights=correct, minlength=bins) / count,
        count,
    )


def _check_inputs(
    logits: Tensor,
    target: Tensor,
    class_counts: Sequence[int],
    many: int,
    few: int,
    class_names: Sequence[str] | None,
) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and dtype {logits.dtype}, expected a floating (N, C) tensor"
        )
    check_per_row("target", target, logits)
    classes = logits.shape[1]
    if len(class_counts) != classes or not classes:
        raise ValueError(f"class_counts has length {len(class_counts)}, expected {classes}, one for each logit")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names has length {len(class_names)}, expected {classes}, one for each logit")
    check_number("few", few, 0, many)
    check_within("target", target.cpu(), 0, classes - 1, what="class indices")


def _thirds(counts: list[int]) -> list[str]:
    """Band of each class by the middle of its rank among equals, from the largest class down."""
    ascending, bands = sorted(counts), []
    for n in counts:
        fewer, at_most = bisect_left(ascending, n), bisect_right(ascending, n)
        rank = len(counts) - (fewer + at_most) / 2
        bands.append(BANDS[int(3 * rank / len(counts))])
    return bands


def _why_no_prediction(z: Tensor) -> str | None:
    if not len(z):
        return "there is no example to evaluate: no metric was computed"
    undefined = int(torch.softmax(z, 1).isnan().any(1).sum())
    if undefined:
        return f"{undefined} of {len(z)} rows of logits hold NaN or +inf, or only -inf: no metric was computed"
    return None


def _no_scalars() -> dict[str, float | None]:
    bands = [f"{band}_accuracy" for band in BANDS]
    return dict.fromkeys(["accuracy", "balanced_accuracy", *bands, "macro_f1", "expected_calibration_error", "nll"])


def _per_class_rates(matrix: Tensor) -> dict[str, list[float | None]]:
    """Recall, precision and F1 from the confusion matrix; 0 / 0 is undefined, where torchmetrics says 0 or 1."""
    hits, support, predicted = matrix.diagonal().double(), matrix.sum(1), matrix.sum(0)
    f1 = torch.where(support > 0, 2 * hits / (support + predicted), torch.nan)
    rates = {"recall": hits / support, "precision": hits / predicted, "f1": f1}
    return {key: [_finite(value) for value in values.tolist()] for key, values in rates.items()}


def _scalars(z: Tensor, labels: Tensor, rates: dict[str, list[float | None]], band: list[str]) -> dict[str, Any]:
    recall = rates["recall"]
    error = multiclass_calibration_error(
        _probabilities(z), labels, num_classes=z.shape[1], n_bins=CALIBRATION_BINS, norm="l1", validate_args=False
    )
    return _no_scalars() | {
        "accuracy": float((z.argmax(1) == labels).double().mean()),
        "balanced_accuracy": _mean(recall),
        **{f"{b}_accuracy": _mean([r for r, of in zip(recall, band, strict=True) if of == b]) for b in BANDS},
        "macro_f1": _mean(rates["f1"]),
        "expected_calibration_error": _finite(float(error)),
        "nll": _finite(float(cross_entropy(z, labels))),
    }


def _probabilities(z: Tensor) -> Tensor:
    return torch.softmax(z, 1).clamp(max=_LARGEST_CONFIDENCE)


def _notes(scalars: dict[str, float | None], test_count: list[int], names: list[str]) -> list[str]:
    notes = []
    absent = [name for name, n in zip(names, test_count, strict=True) if not n]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        listed = ", ".join(repr(name) for name in absent[:5])
        notes.append(f"no evaluated example of class {listed}{more}: left out of the means over classes")
    if scalars["nll"] is None:
        notes.append("nll is infinite: the true class of some example has a logit of -inf")
    if len(names) > MAX_CONFUSION_CLASSES:
        notes.append(f"the confusion matrix of {len(names)} classes is not stored")
    return notes


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["BANDS", "Evaluation", "Scores", "assign_bands", "classification_metrics", "reliability"]
