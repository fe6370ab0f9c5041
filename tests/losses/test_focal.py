"""Focal losses: the printed formula, its limits, and finite values where the textbook form has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.testing import assert_close

from counterpoise.losses import (
    SigmoidFocalLoss,
    SigmoidFocalStarLoss,
    SoftmaxFocalLoss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
)

GAMMAS = [0.0, 0.25, 0.5, 1.0, 2.0, 3.7]
DTYPES = [torch.float32, torch.float64]


def entries(*, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Logits (6, 3) and labels in {0, 1}, or in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64, generator=generator) * 3
    labels = torch.rand(6, 3, dtype=torch.float64, generator=generator)
    return logits, labels if soft else labels.round()


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits (6, 4, *shape) and class indices (6, *shape)."""
    logits = torch.randn(6, 4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    return logits, torch.arange(6 * math.prod(shape)).reshape(6, *shape) % 4


def elementwise(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return sigmoid_focal_loss(logits, target, inner="none", reduction="none", **options)


# Sigmoid: values


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_every_entry_is_the_textbook_formula(soft: bool, gamma: float, alpha: float | None) -> None:
    logits, labels = entries(soft=soft)
    ours = elementwise(logits, labels, gamma=gamma, alpha=alpha)
    for z, t, loss in zip(logits.flatten().tolist(), labels.flatten().tolist(), ours.flatten(), strict=True):
        p = 1 / (1 + math.exp(-z))
        p_t = p * t + (1 - p) * (1 - t)
        alpha_t = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
        expected = -alpha_t * (1 - p_t) ** gamma * (t * math.log(p) + (1 - t) * math.log(1 - p))
        assert math.isclose(loss.item(), expected, rel_tol=1e-10)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_gamma_zero_is_binary_cross_entropy(soft: bool) -> None:
    logits, labels = entries(soft=soft)
    assert_close(sigmoid_focal_loss(logits, labels, gamma=0.0), binary_cross_entropy_with_logits(logits, labels))


def test_it_falls_with_gamma_from_binary_cross_entropy() -> None:
    values = [elementwise(*entries(soft=True), gamma=gamma) for gamma in GAMMAS]
    assert all((a > b).all() for a, b in pairwise(values))


def test_alpha_multiplies_positives() -> None:
    logits, labels = entries()
    off = elementwise(logits, labels)
    assert_close(elementwise(logits, labels, alpha=0.25), torch.where(labels == 1, 0.25, 0.75) * off)


@pytest.mark.parametrize(("alpha", "silenced"), [(0.0, 1), (1.0, 0)])
def test_alpha_at_its_ends_silences_one_kind(alpha: float, silenced: int) -> None:
    logits, labels = entries()
    logits.requires_grad_()
    losses = elementwise(logits, labels, alpha=alpha)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    for x in (losses, gradient):
        assert (x[labels == silenced] == 0).all()
        assert (x[labels != silenced] != 0).all()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_swapping_positives_and_negatives_mirrors_it(soft: bool) -> None:
    logits, labels = entries(soft=soft)
    assert_close(elementwise(logits, labels, alpha=0.3), elementwise(-logits, 1 - labels, alpha=0.7))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_an_undecided_entry_costs_two_to_the_minus_gamma_log_two(gamma: float) -> None:
    expected = [0.25 * 2**-gamma * math.log(2), 0.75 * 2**-gamma * math.log(2)]
    ours = elementwise(torch.zeros(2).double(), torch.tensor([1, 0]), gamma=gamma, alpha=0.25)
    assert_close(ours.tolist(), expected)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_an_entry_that_is_all_wrong_is_pulled_with_force_one(gamma: float) -> None:
    logits = torch.tensor([-40.0, 40.0], dtype=torch.float64, requires_grad=True)
    elementwise(logits, torch.tensor([1, 0]), gamma=gamma).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad.tolist(), [-1.0, 1.0], rtol=1e-12, atol=0)


# Sigmoid: saturation


def closed_form_gradient(z: float, t: int, gamma: float) -> float:
    """s (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1), s = 2 t - 1."""
    u = z if t else -z
    p_t, one_minus = 1 / (1 + math.exp(-u)), 1 / (1 + math.exp(u))
    log_p_t = -math.log1p(math.exp(-u)) if u > 0 else u - math.log1p(math.exp(u))
    return (1 if t else -1) * one_minus**gamma * (gamma * p_t * log_p_t - one_minus)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_entries_have_the_closed_form_value_and_gradient(dtype: torch.dtype, gamma: float) -> None:
    """The textbook form has NaN gradients here for gamma in (0, 1)."""
    points = [(z, t) for z in (-200.0, -50.0, -20.0, 0.5, 20.0, 50.0, 200.0) for t in (0, 1)]
    logits = torch.tensor([z for z, _ in points], dtype=dtype, requires_grad=True)
    losses = elementwise(logits, torch.tensor([t for _, t in points]), gamma=gamma)
    losses.sum().backward()
    assert logits.grad is not None
    rtol = 1e-4 if dtype == torch.float32 else 1e-10  # exp(gamma * 200) magnifies the rounding of its argument
    tiny = 1e-37 if dtype == torch.float32 else 1e-300
    for (z, t), loss, gradient in zip(points, losses.tolist(), logits.grad.tolist(), strict=True):
        u = z if t else -z
        ce = math.log1p(math.exp(-u)) if u > 0 else -u + math.log1p(math.exp(u))
        assert math.isclose(loss, (1 + math.exp(u)) ** -gamma * ce, rel_tol=rtol, abs_tol=tiny)
        assert math.isclose(gradient, closed_form_gradient(z, t, gamma), rel_tol=rtol, abs_tol=tiny)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("label", [0.0, 1e-6, 0.3, 1.0])
def test_soft_labels_stay_finite_at_any_logit(label: float, gamma: float) -> None:
    logits = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], requires_grad=True)
    losses = elementwise(logits, torch.full((5,), label), gamma=gamma)
    (first,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logits)
    for x in (losses, first, second):
        assert x.isfinite().all()


# Sigmoid: what the mean divides by


def test_normalizer_positives_divides_the_sum_by_the_positives_that_count() -> None:
    logits, labels = entries()
    mask = torch.rand(6, 3, generator=torch.Generator().manual_seed(5)) > 0.3
    total = elementwise(logits, labels)[mask].sum()
    positives = labels[mask].sum()
    assert 1 < positives < labels.sum()
    ours = sigmoid_focal_loss(logits, labels, mask=mask, inner="sum", normalizer="positives")
    assert_close(ours, total / positives)


@pytest.mark.parametrize("label", [0.0, 0.01])
def test_with_less_than_one_positive_the_sum_is_divided_by_one(label: float) -> None:
    logits = entries()[0]
    labels = torch.full_like(logits, label)
    ours = sigmoid_focal_loss(logits, labels, inner="sum", normalizer="positives")
    assert_close(ours, elementwise(logits, labels).sum())


# Focal*


def star(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return sigmoid_focal_star_loss(logits, target, inner="none", reduction="none", **options)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_every_entry_of_focal_star_is_the_printed_formula(soft: bool, gamma: float, beta: float) -> None:
    logits, labels = entries(soft=soft)
    ours = star(logits, labels, gamma=gamma, beta=beta, alpha=0.25)
    for z, t, loss in zip(logits.flatten().tolist(), labels.flatten().tolist(), ours.flatten(), strict=True):
        expected = math.log1p(math.exp(-gamma * (2 * t - 1) * z - beta)) / gamma * (0.25 * t + 0.75 * (1 - t))
        assert math.isclose(loss.item(), expected, rel_tol=1e-10)


def test_focal_star_at_one_is_binary_cross_entropy() -> None:
    logits, labels = entries()
    assert_close(sigmoid_focal_star_loss(logits, labels, gamma=1.0), binary_cross_entropy_with_logits(logits, labels))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_an_entry_that_is_all_wrong_is_pulled_by_focal_star_with_force_one(gamma: float) -> None:
    logits = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = star(logits, torch.tensor([1, 0]), gamma=gamma)
    assert_close(losses.tolist(), [1e4, 1e4])
    assert torch.autograd.grad(losses.sum(), logits)[0].tolist() == [-1.0, 1.0]


# Softmax: values


def one_by_one(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """(1 - p_y)^gamma * -log p_y of each row."""
    p = logits.softmax(1)[torch.arange(len(target)), target]
    return (1 - p) ** gamma * -p.log()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_row_is_the_printed_formula(gamma: float) -> None:
    logits, target = rows()
    ours = softmax_focal_loss(logits, target, gamma=gamma, reduction="none")
    assert_close(ours, one_by_one(logits, target, gamma))


def test_gamma_zero_is_cross_entropy() -> None:
    assert_close(softmax_focal_loss(*rows(), gamma=0.0), cross_entropy(*rows()))


def test_softmax_focal_falls_with_gamma() -> None:
    values = [softmax_focal_loss(*rows(), gamma=gamma, reduction="none") for gamma in GAMMAS]
    assert all((a > b).all() for a, b in pairwise(values))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_two_classes_with_logits_0_and_z_are_the_sigmoid_form(gamma: float) -> None:
    logits, labels = (x.flatten() for x in entries())
    pair = torch.stack([torch.zeros_like(logits), logits], dim=1)
    assert_close(
        softmax_focal_loss(pair, labels.long(), gamma=gamma, reduction="none"),
        elementwise(logits, labels, gamma=gamma),
    )


def distributions() -> Tensor:
    """Target probabilities (6, 4), some of them 0 or 1."""
    t = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(1)
    t[0] = torch.tensor([0.0, 0.3, 0.0, 0.7])
    t[1] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    return t


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_of_probabilities_every_row_is_the_printed_formula(alpha: float | None, gamma: float) -> None:
    logits, t = rows()[0], distributions()
    p = logits.softmax(1)
    a = 1.0 if alpha is None else t @ torch.tensor([1 - alpha, alpha, alpha, alpha], dtype=torch.float64)
    expected = a * (1 - (t * p).sum(1)) ** gamma * -(t * p.log()).sum(1)
    assert_close(softmax_focal_loss(logits, t, gamma=gamma, alpha=alpha, reduction="none"), expected)


def test_gamma_zero_of_probabilities_is_their_cross_entropy() -> None:
    logits, t = rows()[0], distributions()
    assert_close(softmax_focal_loss(logits, t, gamma=0.0), cross_entropy(logits, t))
    ours = softmax_focal_loss(logits, t, gamma=0.0, label_smoothing=0.2)
    assert_close(ours, cross_entropy(logits, t, label_smoothing=0.2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_hot_probabilities_are_class_indices(gamma: float) -> None:
    logits, target = rows()
    for options in ({}, {"alpha": 0.25}, {"label_smoothing": 0.1}, {"normalizer": "positives"}):
        ours = softmax_focal_loss(logits, one_hot(target, 4).double(), gamma=gamma, **options)  # type: ignore[arg-type]
        assert_close(ours, softmax_focal_loss(logits, target, gamma=gamma, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_two_classes_with_soft_labels_are_the_sigmoid_form(alpha: float | None, gamma: float) -> None:
    logits, labels = (x.flatten() for x in entries(soft=True))
    pair, t = torch.stack([torch.zeros_like(logits), logits], dim=1), torch.stack([1 - labels, labels], dim=1)
    assert_close(
        softmax_focal_loss(pair, t, gamma=gamma, alpha=alpha, reduction="none"),
        elementwise(logits, labels, gamma=gamma, alpha=alpha),
    )


def test_a_smoothed_label_is_smoothed_first() -> None:
    logits, target = rows()
    smoothed = one_hot(target, 4).double() * 0.9 + 0.025
    ours = softmax_focal_loss(logits, target, label_smoothing=0.1)
    assert_close(ours, softmax_focal_loss(logits, smoothed), rtol=1e-12, atol=0)


def test_smoothing_leaves_masked_classes_out() -> None:
    logits, target = rows()
    masked = logits.clone()
    masked[:, 3] = -torch.inf
    ours = softmax_focal_loss(masked, target % 3, label_smoothing=0.1)
    assert_close(ours, softmax_focal_loss(logits[:, :3], target % 3, label_smoothing=0.1))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_are_finite_at_saturation(dtype: torch.dtype, gamma: float) -> None:
    logits = torch.tensor([[200.0, -200, 0], [-200, 200, 0], [1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=dtype)
    for t in ([1.0, 0, 0], [0.9, 0.1, 0], [0.5, 0.25, 0.25]):
        z = logits.clone().requires_grad_()
        losses = softmax_focal_loss(z, torch.tensor([t] * 4, dtype=dtype), gamma=gamma, reduction="none")
        (first,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z)
        for x in (losses, first, second):
            assert x.isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_derivatives_at_probabilities_agree_with_finite_differences(gamma: float) -> None:
    logits, t = rows()[0].requires_grad_(), distributions()

    def loss(z: Tensor) -> Tensor:
        return softmax_focal_loss(z, t, gamma=gamma, reduction="none")

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_rows_of_probabilities_that_are_masked_may_hold_nan() -> None:
    logits, t = rows()[0], distributions()
    mask = torch.tensor([True, False, True, True, True, False])
    expected = softmax_focal_loss(logits[mask], t[mask])
    logits[~mask], t[~mask] = torch.nan, torch.nan
    assert_close(softmax_focal_loss(logits, t, mask=mask), expected)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_gradient_is_the_closed_form(gamma: float) -> None:
    logits, target = rows()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(softmax_focal_loss(logits, target, gamma=gamma, reduction="sum"), logits)
    p = logits.detach().softmax(1)
    p_y = p.gather(1, target[:, None])
    factor = -((1 - p_y) ** gamma) + gamma * (1 - p_y) ** (gamma - 1) * p_y * p_y.log()
    assert_close(gradient, factor * (one_hot(target, 4) - p))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_focal_is_finite_at_saturation(dtype: torch.dtype, gamma: float) -> None:
    logits = torch.tensor([[200.0, -200, 0], [-200, 200, 0], [1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=dtype)
    logits.requires_grad_()
    losses = softmax_focal_loss(logits, torch.zeros(4, dtype=torch.int64), gamma=gamma, reduction="none")
    losses.sum().backward()
    assert_close(losses, torch.tensor([0, 400, 0, 2e4], dtype=dtype))
    assert logits.grad is not None
    assert_close(logits.grad[1], torch.tensor([-1, 1, 0], dtype=dtype))
    assert logits.grad[0].abs().max() < 1e-20
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_target_whose_rivals_are_all_masked_costs_nothing(gamma: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf], [0.0, 1.0, -torch.inf]], requires_grad=True)
    losses = softmax_focal_loss(logits, torch.tensor([1, 1]), gamma=gamma, reduction="none")
    losses.sum().backward()
    assert losses[0] == 0
    assert losses[1] > 0
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0, 0.0]
    assert logits.grad[1, 2] == 0


def test_dense_pixels_equal_rows() -> None:
    logits, target = rows(2, 3)
    pixels = softmax_focal_loss(logits, target, inner="none", reduction="none")
    flat = softmax_focal_loss(logits.movedim(1, -1).reshape(-1, 4), target.flatten(), reduction="none")
    assert_close(pixels.flatten(), flat)


# Softmax: weights and what the mean divides by


def test_alpha_weighs_class_zero_against_the_others() -> None:
    logits, target = rows()
    off = softmax_focal_loss(logits, target, reduction="none")
    ours = softmax_focal_loss(logits, target, alpha=0.25, reduction="none")
    assert_close(ours, torch.where(target == 0, 0.75, 0.25) * off)


def test_class_weight_multiplies_the_loss_and_leaves_the_probability_alone() -> None:
    logits, target = rows()
    w = torch.tensor([0.1, 1, 2, 5], dtype=torch.float64)
    ours = softmax_focal_loss(logits, target, class_weight=w, reduction="none")
    assert_close(ours, w[target] * one_by_one(logits, target, 2.0))


def test_alpha_and_class_weight_together_are_refused() -> None:
    message = "alpha and class_weight were both given, expected one of them: they would multiply"
    with pytest.raises(ValueError, match=message):
        softmax_focal_loss(*rows(), alpha=0.25, class_weight=torch.ones(4))
    with pytest.raises(ValueError, match=message):
        SoftmaxFocalLoss(alpha=0.25, class_weight=[1.0] * 4)(*rows())


def test_positives_of_the_softmax_form_are_the_counted_entries_off_the_background() -> None:
    logits, target = rows(5)
    target[2] = 0
    target[:, 3] = -100
    ours = softmax_focal_loss(logits, target, alpha=0.25, inner="sum", normalizer="positives")
    total = softmax_focal_loss(logits, target, alpha=0.25, inner="none", reduction="sum")
    assert_close(ours, total / (target > 0).sum())


def test_a_batch_of_background_alone_is_divided_by_one() -> None:
    logits = rows()[0]
    target = torch.zeros(6, dtype=torch.int64)
    ours = softmax_focal_loss(logits, target, normalizer="positives")
    assert_close(ours, softmax_focal_loss(logits, target, reduction="sum"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SigmoidFocalLoss(gamma=-1.0), ValueError, r"gamma is -1.0, expected a number in \[0, inf\]"),
        (lambda: SigmoidFocalStarLoss(gamma=0.0), ValueError, r"gamma is 0.0, expected a number in \(0, inf\]"),
        (lambda: SigmoidFocalLoss(alpha=2.0), ValueError, r"alpha is 2.0, expected a number in \[0, 1\]"),
        (
            lambda: sigmoid_focal_loss(entries()[0], entries()[1] + 1),
            ValueError,
            r"target holds .*, expected labels in",
        ),
        (lambda: softmax_focal_loss(rows()[0], rows()[0]), ValueError, r"target holds .*, expected probabilities in"),
        (lambda: SoftmaxFocalLoss(label_smoothing=-1), ValueError, r"label_smoothing is -1, expected a number in"),
        (lambda: softmax_focal_loss(rows()[0][:, :1], rows()[1]), ValueError, r"expected at least two classes"),
    ],
    ids=["gamma", "star", "alpha", "label", "probabilities", "smoothing", "one class"],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
