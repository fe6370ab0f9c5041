"""Evaluation against scikit-learn, by hand where nobody else computes it, and on the degenerate cases."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)
from torch import Tensor

from counterpoise.recipes.evaluation import Evaluation, assign_bands, classification_metrics, reliability

LONG_TAIL = [500, 300, 150, 60, 25, 10, 3]


def draw(classes: int, rows: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (N, C) that favour the target, every class present."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(rows) % classes
    logits = torch.randn(rows, classes, generator=generator) * 2
    logits[torch.arange(rows), target] += 1.5
    return logits, target


def as_json(evaluation: Evaluation) -> dict:
    return json.loads(json.dumps(evaluation.as_dict(), allow_nan=False))


def test_perfect_predictions() -> None:
    target = torch.arange(7).repeat(3)
    result = classification_metrics(torch.eye(7)[target] * 1e4, target, LONG_TAIL)
    ones = ("accuracy", "balanced_accuracy", "head_accuracy", "medium_accuracy", "tail_accuracy", "macro_f1")
    assert [result.scalars[name] for name in ones] == [1.0] * 6
    assert result.scalars["nll"] == 0
    assert result.scalars["expected_calibration_error"] == pytest.approx(0, abs=1e-6)
    assert result.confusion == (3 * torch.eye(7, dtype=torch.long)).tolist()
    assert result.notes == []


@pytest.mark.parametrize("classes", [2, 7])
def test_agrees_with_scikit_learn(classes: int) -> None:
    logits, target = draw(classes)
    result = classification_metrics(logits, target, LONG_TAIL[:classes])
    predicted = logits.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(target, predicted)
    assert result.scalars["accuracy"] == pytest.approx(accuracy_score(target, predicted))
    assert result.scalars["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(target, predicted))
    assert result.scalars["macro_f1"] == pytest.approx(f1_score(target, predicted, average="macro"))
    probabilities = torch.softmax(logits.double(), 1)
    assert result.scalars["nll"] == pytest.approx(log_loss(target, probabilities))
    assert result.confusion == confusion_matrix(target, predicted).tolist()
    for key, expected in {"precision": precision, "recall": recall, "f1": f1, "test_count": support}.items():
        assert result.per_class[key] == pytest.approx(expected.tolist())


def test_calibration_error_by_hand() -> None:
    # Confidences 0.8 (right), 0.8 (wrong), 0.6 (right), 1 - 1e-9 (wrong), 0.95 (right). The last two share a bin.
    confidence = torch.tensor([0.79, 0.79, 0.6, 1 - 1e-9, 0.95], dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    target = torch.tensor([0, 1, 0, 1, 0])
    result = classification_metrics(logits, target, [10, 10])
    by_hand = (2 * abs(0.5 - 0.79) + abs(1 - 0.6) + 2 * abs(0.5 - 0.975)) / 5
    assert result.scalars["expected_calibration_error"] == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_reliability_adds_up_to_the_calibration_error(scale: float) -> None:
    logits, target = draw(7)
    confidence, accuracy, count = reliability(scale * logits, target)
    error = ((confidence - accuracy).abs() * count).nansum() / count.sum()
    reported = classification_metrics(scale * logits, target, LONG_TAIL).scalars["expected_calibration_error"]
    assert reported == pytest.approx(float(error), abs=1e-6)
    assert int(count.sum()) == len(target)


def test_bands_by_thresholds_include_their_ends_in_the_middle() -> None:
    bands, rule = assign_bands([101, 100, 20, 19])
    assert bands == ["head", "medium", "medium", "tail"]
    assert (rule["rule"], rule["many"], rule["few"]) == ("thresholds", 100, 20)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([90, 80, 70, 60, 50, 40, 30, 25, 22, 21], ["head"] * 3 + ["medium"] * 4 + ["tail"] * 3),
        ([21, 90, 50], ["tail", "head", "medium"]),
        ([500, 500, 50, 50], ["head", "head", "tail", "tail"]),
        ([50, 50, 50], ["medium"] * 3),
        ([500, 3], ["head", "tail"]),
        ([7], ["medium"]),
    ],
)
def test_bands_by_thirds_keep_equal_counts_together(counts: list[int], expected: list[str]) -> None:
    bands, rule = assign_bands(counts)
    assert bands == expected
    assert rule["rule"] == "terciles"
    assert "thirds of the classes" in str(rule["note"])


def test_band_accuracy_is_the_mean_recall_of_its_classes() -> None:
    logits, target = draw(7)
    result = classification_metrics(logits, target, LONG_TAIL)
    recall = np.array(result.per_class["recall"])
    assert result.scalars["head_accuracy"] == pytest.approx(recall[:3].mean())
    assert result.scalars["medium_accuracy"] == pytest.approx(recall[3:5].mean())
    assert result.scalars["tail_accuracy"] == pytest.approx(recall[5:].mean())


def test_the_fallback_is_said() -> None:
    result = classification_metrics(*draw(3), [30, 20, 5])
    assert result.bands["rule"] == "terciles"
    assert result.notes == [result.bands["note"]]
    assert "more than 100" in result.bands["note"]


def test_class_without_examples_is_left_out_of_the_means() -> None:
    logits, target = draw(7)
    kept = target != 6
    result = classification_metrics(logits[kept], target[kept], LONG_TAIL, class_names=[*"abcdef", "g & co"])
    recall = result.per_class["recall"]
    assert recall[6] is None
    assert result.per_class["f1"][6] is None
    assert result.per_class["precision"][6] == 0  # predicted, always wrongly
    assert result.scalars["balanced_accuracy"] == pytest.approx(np.mean(recall[:6]))
    assert result.scalars["tail_accuracy"] == recall[5]
    assert any("'g & co'" in note for note in result.notes)
    as_json(result)


def test_class_never_predicted_has_no_precision() -> None:
    result = classification_metrics(torch.tensor([[2.0, 0], [1, 0]]), torch.tensor([0, 1]), [5, 5])
    assert result.per_class["precision"] == [0.5, None]
    assert result.per_class["f1"] == pytest.approx([2 / 3, 0])


def test_two_classes_and_one() -> None:
    two = classification_metrics(*draw(2), [500, 3])
    assert two.scalars["medium_accuracy"] is None
    assert two.scalars["tail_accuracy"] == two.per_class["recall"][1]
    one = as_json(classification_metrics(torch.randn(5, 1), torch.zeros(5, dtype=torch.long), [5]))
    assert one["scalars"]["accuracy"] == one["scalars"]["medium_accuracy"] == 1
    assert one["scalars"]["head_accuracy"] is one["scalars"]["tail_accuracy"] is None
    assert one["confusion"] == [[5]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_metric(bad: float) -> None:
    logits, target = draw(7)
    logits[3, 2] = bad
    result = as_json(classification_metrics(logits, target, LONG_TAIL))
    assert set(result["scalars"].values()) == {None}
    assert result["confusion"] is None
    assert "1 of 400 rows" in result["notes"][-1]


def test_no_example_at_all() -> None:
    result = as_json(classification_metrics(torch.empty(0, 3), torch.empty(0, dtype=torch.long), [200, 50, 5]))
    assert set(result["scalars"].values()) == {None}
    assert result["per_class"]["test_count"] == [0, 0, 0]


def test_masked_class() -> None:
    logits, target = draw(7)
    logits[:, 6] = -torch.inf
    result = as_json(classification_metrics(logits, target, LONG_TAIL))
    assert result["scalars"]["nll"] is None
    assert result["per_class"]["recall"][6] == 0
    assert any("nll is infinite" in note for note in result["notes"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_floating_type(dtype: torch.dtype) -> None:
    logits, target = draw(7)
    as_json(classification_metrics(logits.to(dtype).requires_grad_(), target.to(torch.int32), LONG_TAIL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.tensor([0, 3])}, r"target holds 3, expected class indices in \[0, 2\]"),
        ({"target": torch.tensor([0])}, r"target has shape \(1,\), expected \(2,\)"),
        ({"logits": torch.zeros(2)}, r"logits has shape \(2,\)"),
        ({"class_counts": [1, 2]}, "class_counts has length 2, expected 3"),
        ({"class_names": ["a"]}, "class_names has length 1, expected 3"),
        ({"few": 200}, "few is 200"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3), "target": torch.tensor([0, 1]), "class_counts": [5, 5, 5]} | change
    with pytest.raises(ValueError, match=message):
        classification_metrics(**arguments)
