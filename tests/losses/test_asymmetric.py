"""Asymmetric losses: the printed formula, its limits, and finite derivatives where the textbook form has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.testing import assert_close

from counterpoise.losses import (
    AsymmetricLoss,
    AsymmetricSingleLabelLoss,
    asymmetric_loss,
    asymmetric_single_label_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

GAMMAS = [0.0, 0.25, 0.5, 1.0, 4.0]
DTYPES = [torch.float32, torch.float64]
LOGITS = (-1e4, -200.0, -50.0, -20.0, -3.0, 0.0, 3.0, 20.0, 50.0, 200.0, 1e4)


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
    return asymmetric_loss(logits, target, inner="none", reduction="none", **options)


def derivatives(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives of an element-wise function."""
    at = at.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at)
    return first.detach(), second


# Many labels: values


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("eps", [None, 1e-8, 0.2])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.3])
@pytest.mark.parametrize(("gamma_neg", "gamma_pos"), [(4.0, 0.0), (4.0, 1.0), (0.5, 2.0), (0.0, 0.0)])
def test_every_entry_is_the_printed_formula(
    gamma_neg: float, gamma_pos: float, margin: float, eps: float | None, soft: bool
) -> None:
    logits, labels = entries(soft=soft)
    ours = elementwise(logits, labels, gamma_neg=gamma_neg, gamma_pos=gamma_pos, margin=margin, eps=eps)
    bound = eps or 0.0
    for z, t, loss in zip(logits.flatten().tolist(), labels.flatten().tolist(), ours.flatten(), strict=True):
        p = 1 / (1 + math.exp(-z))
        not_p_m = min(1 - p + margin, 1)
        base = t * math.log(max(p, bound)) + (1 - t) * math.log(max(not_p_m, bound))
        factor = (1 - p * t - not_p_m * (1 - t)) ** (gamma_pos * t + gamma_neg * (1 - t))
        assert math.isclose(loss.item(), -base * factor, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_equal_gammas_without_margin_are_the_focal_loss(gamma: float, soft: bool) -> None:
    logits, labels = entries(soft=soft)
    ours = elementwise(logits, labels, gamma_neg=gamma, gamma_pos=gamma, margin=0.0)
    assert_close(ours, sigmoid_focal_loss(logits, labels, gamma=gamma, inner="none", reduction="none"))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_no_gammas_and_no_margin_are_binary_cross_entropy(soft: bool) -> None:
    logits, labels = entries(soft=soft)
    ours = asymmetric_loss(logits, labels, gamma_neg=0.0, margin=0.0)
    assert_close(ours, binary_cross_entropy_with_logits(logits, labels))


def test_negatives_up_to_the_margin_cost_and_pull_exactly_nothing() -> None:
    logits = torch.tensor([-1e4, -50.0, -10.0, -3.0], dtype=torch.float64)  # sigmoid(-3) = 0.047
    for gamma in GAMMAS:

        def loss(z: Tensor, gamma: float = gamma) -> Tensor:
            return elementwise(z, torch.zeros(4), gamma_neg=gamma)

        for x in (loss(logits), *derivatives(loss, logits)):
            assert x.tolist() == [0.0] * 4
        assert loss(logits + 0.5)[-1] > 0


@pytest.mark.parametrize("margin", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_negative_costs_at_most_its_bound_and_is_let_go_beyond(gamma: float, margin: float) -> None:
    bound = -((1 - margin) ** gamma) * math.log(margin)
    logits = torch.linspace(-10, 60, 400, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return elementwise(z, torch.zeros_like(z), gamma_neg=gamma, margin=margin)

    losses = loss(logits)
    assert all(a <= b + 1e-15 for a, b in pairwise(losses.tolist()))
    assert math.isclose(losses[-1].item(), bound, rel_tol=1e-12)
    assert derivatives(loss, logits)[0][-1] < 1e-20


def test_the_bound_of_the_default_is_2_44() -> None:
    assert round(elementwise(torch.tensor([100.0]), torch.zeros(1)).item(), 2) == 2.44


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_the_gradient_of_a_negative_is_the_closed_form(gamma: float, detach: bool) -> None:
    logits, m = torch.linspace(-2.5, 8, 20, dtype=torch.float64), 0.05

    def loss(z: Tensor) -> Tensor:
        return elementwise(z, torch.zeros_like(z), gamma_neg=gamma, margin=m, detach_weight=detach)

    p = logits.sigmoid()
    p_m = p - m
    inner = 1 / (1 - p_m) - (0 if detach else gamma * torch.log1p(-p_m) / p_m)
    assert_close(derivatives(loss, logits)[0], p * (1 - p) * p_m**gamma * inner)


def test_detaching_the_weight_changes_the_gradient_and_not_the_value() -> None:
    logits, labels = entries()
    values, gradients = [], []
    for detach in (False, True):
        z = logits.clone().requires_grad_()
        loss = asymmetric_loss(z, labels, gamma_pos=1.0, detach_weight=detach)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, z)[0])
    assert values[0] == values[1]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_the_released_clamp_takes_the_gradient_of_hard_positives_and_the_exact_form_keeps_it() -> None:
    z = torch.tensor([-30.0], dtype=torch.float64)
    clamped = elementwise(z, torch.ones(1), eps=1e-8)
    assert_close(clamped.item(), -math.log(1e-8))
    assert derivatives(lambda x: elementwise(x, torch.ones(1), eps=1e-8), z)[0].item() == 0
    assert_close(derivatives(lambda x: elementwise(x, torch.ones(1)), z)[0].item(), -1.0)


def test_the_preset_is_the_authors_script() -> None:
    logits, labels = entries()
    ours = AsymmetricLoss.coco_recipe()(logits, labels)
    assert_close(ours, elementwise(logits, labels).sum())


# Many labels: saturation


@pytest.mark.parametrize("label", [0.0, 1e-6, 0.3, 1.0])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("eps", [None, 1e-8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_two_derivatives_are_finite_at_any_logit(
    dtype: torch.dtype, eps: float | None, margin: float, gamma: float, label: float
) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype)
    target = torch.full_like(logits, label)

    def loss(z: Tensor) -> Tensor:
        return elementwise(z, target, gamma_neg=gamma, gamma_pos=gamma, margin=margin, eps=eps)

    for x in (loss(logits), *derivatives(loss, logits)):
        assert x.isfinite().all()


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_just_above_the_margin_derivatives_are_finite(gamma: float) -> None:
    """Where the power's own derivative is infinite."""
    edge = math.log(0.05 / 0.95)
    steps = torch.tensor([-1e-6, -1e-7, -1e-8, 0, 1e-8, 1e-7, 1e-6], dtype=torch.float64)
    for dtype in DTYPES:
        logits = (edge + steps).to(dtype)
        first, second = derivatives(lambda z: elementwise(z, torch.zeros(7), gamma_neg=gamma), logits)
        assert first.isfinite().all()
        assert second.isfinite().all()
        assert first.abs().max() < 1e-3


def test_float32_agrees_with_float64() -> None:
    logits = torch.linspace(-30, 30, 241)
    for label in (0.0, 0.4, 1.0):
        target = torch.full_like(logits, label)

        def loss(z: Tensor, target: Tensor = target) -> Tensor:
            return elementwise(z, target, gamma_pos=1.0)

        assert_close(loss(logits), loss(logits.double()).float(), rtol=2e-5, atol=1e-6)
        first, exact = derivatives(loss, logits)[0], derivatives(loss, logits.double())[0]
        assert_close(first, exact.float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("gammas", [(4.0, 0.0), (0.5, 0.5), (1.0, 2.0)])
def test_derivatives_agree_with_finite_differences(gammas: tuple[float, float], soft: bool) -> None:
    logits, labels = entries(soft=soft)
    logits.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return elementwise(z, labels, gamma_neg=gammas[0], gamma_pos=gammas[1])

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_float16_is_computed_in_float32() -> None:
    logits = torch.tensor([-60000.0, -20.0, 0.0, 20.0, 60000.0], dtype=torch.float16)
    for label in (0, 1):
        target = torch.full((5,), label)
        assert_close(elementwise(logits, target), elementwise(logits.float(), target))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-8}, {"margin": 0.0, "eps": 1e-8}])
def test_bounded_forms_do_not_hide_what_is_not_finite(options: dict[str, float], poison: float) -> None:
    losses = elementwise(torch.tensor([0.0, poison]), torch.zeros(2), **options)
    assert losses[0].isfinite()
    assert losses[1].isnan()


def test_class_weight_multiplies_the_entries_of_a_class() -> None:
    logits, labels = entries()
    w = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    assert_close(elementwise(logits, labels, class_weight=w), elementwise(logits, labels) * w)
    assert_close(AsymmetricLoss(class_weight=[0.0, 1.0, 5.0])(logits, labels), (elementwise(logits, labels) * w).mean())


def test_normalizer_positives_divides_the_sum_by_the_positives() -> None:
    logits, labels = entries()
    ours = asymmetric_loss(logits, labels, inner="sum", normalizer="positives")
    assert_close(ours, elementwise(logits, labels).sum() / labels.sum())


# One label


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("gamma_neg", "gamma_pos"), [(4.0, 0.0), (0.5, 2.0), (0.0, 0.0)])
def test_every_row_is_the_printed_sum(gamma_neg: float, gamma_pos: float, smoothing: float) -> None:
    logits, target = rows()
    settings = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "label_smoothing": smoothing}
    ours = asymmetric_single_label_loss(logits, target, reduction="none", **settings)
    p = logits.softmax(1).tolist()
    for i, y in enumerate(target.tolist()):
        expected = 0.0
        for c in range(4):
            s = (1 - smoothing) * (c == y) + smoothing / 4
            w = (1 - p[i][y]) ** gamma_pos if c == y else p[i][c] ** gamma_neg
            expected -= s * w * math.log(p[i][c])
        assert math.isclose(ours[i].item(), expected, rel_tol=1e-10)


@pytest.mark.parametrize("gamma_neg", GAMMAS)
def test_without_smoothing_it_is_cross_entropy_whatever_gamma_neg(gamma_neg: float) -> None:
    ours = asymmetric_single_label_loss(*rows(), gamma_neg=gamma_neg, label_smoothing=0.0)
    assert_close(ours, cross_entropy(*rows()))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_without_smoothing_gamma_pos_is_softmax_focal(gamma: float) -> None:
    ours = asymmetric_single_label_loss(*rows(), gamma_pos=gamma, label_smoothing=0.0)
    assert_close(ours, softmax_focal_loss(*rows(), gamma=gamma))


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_without_gammas_it_is_smoothed_cross_entropy(smoothing: float) -> None:
    ours = asymmetric_single_label_loss(*rows(), gamma_neg=0.0, label_smoothing=smoothing)
    assert_close(ours, cross_entropy(*rows(), label_smoothing=smoothing), rtol=1e-12, atol=0)


def test_detaching_the_weights_of_one_label_keeps_the_value() -> None:
    values, gradients = [], []
    for detach in (False, True):
        z = rows()[0].requires_grad_()
        loss = asymmetric_single_label_loss(z, rows()[1], gamma_pos=1.0, detach_weight=detach)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, z)[0])
    assert values[0] == values[1]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_label_is_finite_at_saturation(dtype: torch.dtype, gamma: float) -> None:
    logits = torch.tensor([[200.0, -200, 0], [-200, 200, 0], [1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=dtype)

    def loss(z: Tensor) -> Tensor:
        target = torch.zeros(4, dtype=torch.int64)
        return asymmetric_single_label_loss(z, target, gamma_neg=gamma, gamma_pos=gamma, reduction="none")

    for x in (loss(logits), *derivatives(loss, logits)):
        assert x.isfinite().all()


@pytest.mark.parametrize("gammas", [(4.0, 0.0), (0.5, 0.5), (1.0, 2.0)])
def test_derivatives_of_one_label_agree_with_finite_differences(gammas: tuple[float, float]) -> None:
    logits, target = rows()
    logits.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return asymmetric_single_label_loss(z, target, gamma_neg=gammas[0], gamma_pos=gammas[1], reduction="none")

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_a_masked_class_is_as_if_it_were_not_there() -> None:
    logits, target = rows()
    target = target % 3
    masked = logits.clone()
    masked[:, 3] = -torch.inf
    ours = asymmetric_single_label_loss(masked, target, gamma_pos=1.0)
    assert_close(ours, asymmetric_single_label_loss(logits[:, :3], target, gamma_pos=1.0))


def test_pixels_are_rows_and_ignored_pixels_are_left_out() -> None:
    logits, target = rows(2, 3)
    pixels = asymmetric_single_label_loss(logits, target, inner="none", reduction="none")
    flat = asymmetric_single_label_loss(logits.movedim(1, -1).reshape(-1, 4), target.flatten(), reduction="none")
    assert_close(pixels.flatten(), flat)
    target[:, 0] = -100
    kept = asymmetric_single_label_loss(logits[:, :, 1:], target[:, 1:], reduction="none")
    assert_close(asymmetric_single_label_loss(logits, target, reduction="none"), kept)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AsymmetricLoss(gamma_neg=-1.0), ValueError, r"gamma_neg is -1.0, expected a number in \[0, inf\]"),
        (lambda: AsymmetricLoss(margin=1), ValueError, r"margin is 1, expected a number in \[0, 1\)"),
        (lambda: AsymmetricLoss(eps=0.0), ValueError, r"eps is 0.0, expected a number in \(0, 1\]"),
        (lambda: asymmetric_loss(*entries(), class_weight=torch.ones(5)), ValueError, r"class_weight has shape \(5,\)"),
        (lambda: AsymmetricSingleLabelLoss(label_smoothing=2.0), ValueError, r"label_smoothing is 2.0, expected"),
        (
            lambda: asymmetric_single_label_loss(rows()[0], rows()[0]),
            TypeError,
            r"expected class indices of an integer type",
        ),
        (
            lambda: asymmetric_single_label_loss(rows()[0][:, :1], rows()[1]),
            ValueError,
            r"expected at least two classes",
        ),
    ],
    ids=["gamma", "margin", "eps", "class weight", "smoothing", "probabilities", "one class"],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
