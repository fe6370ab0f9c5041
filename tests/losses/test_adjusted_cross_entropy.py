"""The adjusted cross-entropy: torch's where torch has it, else the printed formula; settings have names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from counterpoise.losses import (
    CrossEntropyLoss,
    LogitAdjustedLoss,
    adjusted_cross_entropy,
    balanced_softmax_loss,
    class_balanced_loss,
    cross_entropy_loss,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

CLASSES = 4
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
COUNTS = [100, 30, 8, 2]


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits (8, 4, *shape) and class indices (8, *shape) in which every class occurs."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, CLASSES, *shape, dtype=torch.float64, generator=generator) * 3
    target = torch.arange(8 * math.prod(shape)).reshape(8, *shape) % CLASSES
    return logits, target


def probabilities() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(8, CLASSES, dtype=torch.float64, generator=generator).softmax(1)


def by_hand(
    logits: Tensor, target: Tensor, *, iota: Tensor, d: Tensor, m: Tensor, s: float, w: Tensor, smoothing: float
) -> Tensor:
    """The formula at the top of the file, entry by entry; target (N, C) probabilities."""
    losses = []
    for z, t in zip(logits.tolist(), target.tolist(), strict=True):
        a = [s * (z[c] * float(d[c]) + float(iota[c]) - float(m[c]) * t[c]) for c in range(CLASSES)]
        log_sum = math.log(sum(math.exp(x) for x in a))
        smoothed = [t[c] * (1 - smoothing) + smoothing / CLASSES for c in range(CLASSES)]
        losses.append(-sum(float(w[c]) * smoothed[c] * (a[c] - log_sum) for c in range(CLASSES)))
    return torch.tensor(losses, dtype=torch.float64)


# Equal to torch


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_per_example_values_equal_torch(soft: bool, weight: Tensor | None, smoothing: float) -> None:
    logits, target = rows()
    target = probabilities() if soft else target
    ours = cross_entropy_loss(logits, target, class_weight=weight, label_smoothing=smoothing, reduction="none")
    assert_close(ours, cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction="none"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_normalizer_weight_is_the_mean_of_torch_for_indices(smoothing: float) -> None:
    logits, target = rows()
    ours = cross_entropy_loss(logits, target, class_weight=WEIGHT, label_smoothing=smoothing, normalizer="weight")
    assert_close(ours, cross_entropy(logits, target, WEIGHT, label_smoothing=smoothing))


def test_normalizer_count_is_the_mean_of_torch_for_probabilities() -> None:
    logits, target = rows()[0], probabilities()
    assert_close(cross_entropy_loss(logits, target, class_weight=WEIGHT), cross_entropy(logits, target, WEIGHT))


def test_a_batch_of_one_class_keeps_its_weight_unless_divided_by_it() -> None:
    logits, target = rows()[0], torch.full((8,), 3)
    plain = cross_entropy_loss(logits, target)
    assert_close(cross_entropy_loss(logits, target, class_weight=WEIGHT), 3 * plain)
    assert_close(cross_entropy_loss(logits, target, class_weight=WEIGHT, normalizer="weight"), plain)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dense_pixels_equal_torch_with_ignore_index(smoothing: float, weight: Tensor | None) -> None:
    logits, target = rows(3, 2)
    target[0, 0, 0] = target[4, 2, 1] = 255
    target[5] = 255
    options = {"ignore_index": 255, "label_smoothing": smoothing}
    entries = adjusted_cross_entropy(logits, target, class_weight=weight, inner="none", reduction="none", **options)
    assert_close(entries, cross_entropy(logits, target, weight, reduction="none", **options))
    pixel_mean = adjusted_cross_entropy(
        logits, target, class_weight=weight, inner="none", normalizer="weight", **options
    )
    assert_close(pixel_mean, cross_entropy(logits, target, weight, **options))


def test_dense_rows_are_means_over_the_pixels_that_count() -> None:
    logits, target = rows(3)
    target[0, :2] = -100
    target[1] = -100
    losses = cross_entropy_loss(logits, target, reduction="none")
    pixels = cross_entropy(logits, target, reduction="none")
    assert_close(losses[0], pixels[0, 2])
    assert losses[1] == 0
    assert_close(losses[2:], pixels[2:].mean(1))
    assert_close(cross_entropy_loss(logits, target), losses.sum() / 7)


def test_a_dense_row_carries_the_mean_class_weight_of_the_pixels_that_count() -> None:
    logits, target = rows(3)
    target[0, :2] = target[3, 1] = -100
    counted, w = target != -100, WEIGHT[target.clamp_min(0)]
    pixels = cross_entropy(logits, target, WEIGHT, reduction="none")
    values = sum(pixels[i][counted[i]].mean() for i in range(8))
    weights = sum(w[i][counted[i]].mean() for i in range(8))
    assert_close(cross_entropy_loss(logits, target, class_weight=WEIGHT, normalizer="weight"), values / weights)


def test_a_mask_and_an_ignored_target_say_the_same() -> None:
    logits, target = rows(3)
    mask = torch.rand(8, 3, generator=torch.Generator().manual_seed(3)) > 0.4
    assert_close(
        cross_entropy_loss(logits, target, mask=mask), cross_entropy_loss(logits, target.masked_fill(~mask, -100))
    )


# Masked classes


def test_smoothing_goes_to_the_classes_that_are_not_masked() -> None:
    logits, target = rows()
    target = target.clamp_max(2)
    masked = logits.clone()
    masked[:, 3] = -torch.inf
    ours = cross_entropy_loss(masked, target, label_smoothing=0.3, reduction="none")
    assert_close(ours, cross_entropy(logits[:, :3], target, label_smoothing=0.3, reduction="none"))


def test_a_masked_class_gets_no_gradient() -> None:
    logits, target = rows()
    logits[:, 3] = -torch.inf
    logits.requires_grad_()
    cross_entropy_loss(logits, target.clamp_max(2), label_smoothing=0.3, class_weight=WEIGHT).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 3] == 0).all()
    assert (logits.grad[:, :3] != 0).all()


def test_probability_zero_of_a_masked_class_costs_nothing() -> None:
    logits, target = rows()[0], probabilities()
    logits[:, 0], target[:, 0] = -torch.inf, 0
    target = target / target.sum(1, keepdim=True)
    assert_close(cross_entropy_loss(logits, target), cross_entropy(logits[:, 1:], target[:, 1:]))


# The formula


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_all_adjustments_together_are_the_printed_formula(soft: bool) -> None:
    logits, index = rows()
    one_hot = torch.nn.functional.one_hot(index, CLASSES).double()
    target = probabilities() if soft else one_hot
    iota, d, m = (torch.tensor(v, dtype=torch.float64) for v in ([0.1, -1, 2, 0], [1, 0.5, 2, 1.5], [0, 0.2, 0.4, 1]))
    ours = adjusted_cross_entropy(
        logits,
        target if soft else index,
        additive=iota,
        multiplicative=d,
        margin=m,
        scale=1.7,
        class_weight=WEIGHT,
        label_smoothing=0.2,
        reduction="none",
    )
    assert_close(ours, by_hand(logits, target, iota=iota, d=d, m=m, s=1.7, w=WEIGHT, smoothing=0.2))


def test_pairwise_form_of_menon() -> None:
    """-log softmax(z + a)_y = log(1 + sum over c != y of exp(a_c - a_y + z_c - z_y))."""
    logits, target = rows()
    a = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64)
    losses = adjusted_cross_entropy(logits, target, additive=a, reduction="none")
    for z, y, loss in zip(logits, target, losses, strict=True):
        pairs = sum(torch.exp(a[c] - a[y] + z[c] - z[y]) for c in range(CLASSES) if c != y)
        assert_close(loss, torch.log(1 + pairs))


def test_one_hot_probabilities_equal_indices_with_every_adjustment() -> None:
    logits, target = rows()
    one_hot = torch.nn.functional.one_hot(target, CLASSES).double()
    options = {"additive": WEIGHT.log(), "multiplicative": WEIGHT, "margin": WEIGHT, "scale": 2.0}
    assert_close(
        adjusted_cross_entropy(logits, target, class_weight=WEIGHT, **options),
        adjusted_cross_entropy(logits, one_hot, class_weight=WEIGHT, **options),
    )


def test_a_constant_added_to_every_class_changes_nothing() -> None:
    logits, target = rows()
    a = WEIGHT.log()
    assert_close(
        adjusted_cross_entropy(logits, target, additive=a), adjusted_cross_entropy(logits, target, additive=a + 5)
    )


def test_a_margin_on_the_target_only_raises_the_loss() -> None:
    logits, target = rows()
    without = adjusted_cross_entropy(logits, target, reduction="none")
    assert (adjusted_cross_entropy(logits, target, margin=WEIGHT, reduction="none") > without).all()


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        (cross_entropy_loss, {}),
        (lambda z, y: logit_adjusted_loss(z, y, class_counts=COUNTS, tau=1.3), {"additive": "1.3 log prior"}),
        (lambda z, y: balanced_softmax_loss(z, y, class_counts=COUNTS), {"additive": "log n"}),
        (lambda z, y: ldam_loss(z, y, class_counts=COUNTS), {"margin": "ldam", "scale": 30.0}),
        (lambda z, y: class_balanced_loss(z, y, class_counts=COUNTS, beta=0.99), {"class_weight": "effective"}),
    ],
    ids=["cross_entropy", "logit_adjusted", "balanced_softmax", "ldam", "class_balanced"],
)
def test_a_named_loss_is_a_setting_of_the_one_formula(named: Callable[..., Tensor], settings: dict[str, Any]) -> None:
    n = torch.tensor(COUNTS, dtype=torch.float64)
    vectors = {
        "1.3 log prior": 1.3 * (n / n.sum()).log(),
        "log n": n.log(),
        "ldam": ldam_margins(COUNTS),
        "effective": effective_number_weights(COUNTS, 0.99),
    }
    options = {name: vectors.get(value, value) for name, value in settings.items()}
    logits, target = rows()
    logits = logits.tanh()
    assert_close(named(logits, target), adjusted_cross_entropy(logits, target, **options), rtol=1e-9, atol=0)


# Modules and errors


def test_set_class_weight_replaces_the_weights_of_a_loss() -> None:
    logits, target = rows()
    loss = CrossEntropyLoss([1.0, 1.0, 1.0, 1.0])
    loss.set_class_weight(WEIGHT)
    assert_close(loss(logits, target), cross_entropy_loss(logits, target, class_weight=WEIGHT))
    loss.set_class_weight(None)
    assert_close(loss(logits, target), cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, r"scale is 0.0, expected a number in \(0, inf\]"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1.5, expected a number in \[0, 1\]"),
        ({"margin": torch.ones(3)}, r"margin has shape \(3,\), expected \(4,\), one entry a class"),
        ({"class_weight": torch.ones(1)}, r"class_weight has shape \(1,\), expected \(4,\)"),
        ({"inner": "median"}, r"inner is 'median', expected one of \['mean', 'sum', 'none'\]"),
    ],
)
def test_settings_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adjusted_cross_entropy(*rows(), **options)


def test_a_class_index_out_of_range_is_named() -> None:
    logits, target = rows()
    target[3] = 7
    with pytest.raises(ValueError, match=r"target holds 7, expected class indices in \[0, 3\]"):
        cross_entropy_loss(logits, target)


def test_probabilities_of_the_wrong_shape_are_told_from_indices() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.float64, expected class indices \(8,\) of an integer type, or"):
        cross_entropy_loss(rows()[0], torch.zeros(8, dtype=torch.float64))


def test_ignored_rows_may_hold_anything() -> None:
    z = torch.tensor([[-torch.inf, torch.nan], [0.0, 2.0]], requires_grad=True)
    for loss in (cross_entropy_loss, softmax_focal_loss):
        z.grad = None
        value = loss(z, torch.tensor([-100, 1]))
        value.backward()
        assert value.isfinite()
        assert z.grad.isfinite().all()


def test_class_weights_of_one_change_nothing_for_any_inner_and_normaliser() -> None:
    z, t = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    for inner in ("mean", "sum", "none"):
        for normalizer in ("count", "weight"):
            options = {"inner": inner, "normalizer": normalizer}
            plain = cross_entropy_loss(z, t, **options)
            torch.testing.assert_close(cross_entropy_loss(z, t, class_weight=torch.ones(3), **options), plain)


def test_buffers_are_not_the_callers_tensors() -> None:
    weights, counts = torch.tensor([1.0, 2.0]), torch.tensor([5, 2])
    CrossEntropyLoss(weights).load_state_dict({"class_weight": torch.tensor([9.0, 9.0])})
    other = LogitAdjustedLoss(torch.tensor([10, 4]))
    LogitAdjustedLoss(counts).load_state_dict(other.state_dict())
    assert weights.tolist() == [1.0, 2.0]
    assert counts.tolist() == [5, 2]


@pytest.mark.parametrize("name", ["target", "weight", "mask"])
def test_all_inputs_are_on_one_device(name: str) -> None:
    given = {"target": torch.zeros(4).long(), "weight": torch.ones(4), "mask": torch.ones(4).bool()}
    for loss, z in ((cross_entropy_loss, torch.zeros(4, 3)), (sigmoid_focal_loss, torch.zeros(4))):
        options = {**given, name: given[name].to("meta")}
        with pytest.raises(ValueError, match=rf"{name} is on meta, expected cpu"):
            loss(z, **options)
