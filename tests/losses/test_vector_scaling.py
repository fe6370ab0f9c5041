"""Vector scaling by class and by group: the printed formulas, and the losses that they are at their limits."""

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
    GroupVectorScalingLoss,
    VectorScalingLoss,
    adjusted_cross_entropy,
    class_scaling,
    group_scaling,
    group_vector_scaling_loss,
    logit_adjusted_loss,
    scaled_margin_loss,
    vector_scaling_loss,
)

COUNTS = [100, 20, 7, 2]
GROUP_COUNTS = [50, 30, 6]
GROUP = torch.tensor([0, 1, 2, 0, 1, 2])


def rows(classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits (6, classes) and class indices (6,)."""
    logits = torch.randn(6, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    return logits, torch.arange(6) % classes


# By class


@pytest.mark.parametrize(("gamma", "tau"), [(0.3, 1.0), (0.2, 1.2), (0.0, 2.0), (1.0, 0.0)])
def test_every_row_is_the_printed_formula(gamma: float, tau: float) -> None:
    logits, target = rows()
    ours = vector_scaling_loss(logits, target, class_counts=COUNTS, gamma=gamma, tau=tau, reduction="none")
    for z, y, loss in zip(logits.tolist(), target.tolist(), ours, strict=True):
        adjusted = [x / (100 / n) ** gamma + tau * math.log(n / 129) for x, n in zip(z, COUNTS, strict=True)]
        expected = math.log(sum(math.exp(x) for x in adjusted)) - adjusted[y]
        assert math.isclose(loss.item(), expected, rel_tol=1e-10)


def test_gamma_zero_is_logit_adjustment() -> None:
    for tau in (0.5, 1.0, 1.5):
        ours = vector_scaling_loss(*rows(), class_counts=COUNTS, gamma=0.0, tau=tau)
        assert_close(ours, logit_adjusted_loss(*rows(), class_counts=COUNTS, tau=tau, epsilon=0.0))


def test_tau_zero_is_class_dependent_temperatures() -> None:
    logits, target = rows()
    temperature = (100 / torch.tensor(COUNTS, dtype=torch.float64)) ** 0.3
    ours = vector_scaling_loss(logits, target, class_counts=COUNTS, tau=0.0)
    assert_close(ours, cross_entropy(logits / temperature, target))


def test_both_zero_is_cross_entropy() -> None:
    assert_close(vector_scaling_loss(*rows(), class_counts=COUNTS, gamma=0.0, tau=0.0), cross_entropy(*rows()))


def test_equal_counts_are_cross_entropy() -> None:
    assert_close(vector_scaling_loss(*rows(), class_counts=[9] * 4, gamma=0.7, tau=1.3), cross_entropy(*rows()))


def test_only_ratios_of_counts_matter() -> None:
    ours = vector_scaling_loss(*rows(), class_counts=COUNTS)
    assert_close(vector_scaling_loss(*rows(), class_counts=[10 * n for n in COUNTS]), ours)


def test_rare_classes_are_divided_by_more_and_shifted_further() -> None:
    delta, iota = class_scaling(COUNTS, 0.3, 1.0)
    assert delta[0] == 1
    assert (delta.diff() > 0).all()
    assert (iota.diff() < 0).all()
    assert_close(iota.exp().sum().item(), 1.0)


def test_it_is_the_adjusted_cross_entropy_of_its_two_vectors() -> None:
    logits, target = rows()
    delta, iota = class_scaling(COUNTS, 0.3, 1.0)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    by_hand = adjusted_cross_entropy(logits, target, multiplicative=1 / delta, additive=iota, class_weight=w)
    assert_close(vector_scaling_loss(logits, target, class_counts=COUNTS, class_weight=w), by_hand)


def test_the_module_follows_the_prior_that_a_sampler_makes() -> None:
    loss = VectorScalingLoss(COUNTS)
    assert_close(loss(*rows()), vector_scaling_loss(*rows(), class_counts=COUNTS))
    loss.statistics.set_prior(torch.full((4,), 0.25))
    assert_close(loss(*rows()), cross_entropy(*rows()))


def test_a_class_without_examples_borrows_the_smallest_prior() -> None:
    ours = VectorScalingLoss([100, 20, 2, 0], zero_count="ignore")(*rows())
    delta, iota = class_scaling([100, 20, 2], 0.3, 1.0)
    delta, iota = torch.cat([delta, delta[-1:]]), torch.cat([iota, iota[-1:]])
    assert_close(ours, cross_entropy(rows()[0] / delta + iota, rows()[1]))


def test_probabilities_as_targets() -> None:
    logits, target = rows()
    one_hot = torch.nn.functional.one_hot(target, 4).double()
    assert_close(
        vector_scaling_loss(logits, one_hot, class_counts=COUNTS),
        vector_scaling_loss(logits, target, class_counts=COUNTS),
    )


# By group


def by_group(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return group_vector_scaling_loss(logits, target, GROUP, group_counts=GROUP_COUNTS, **options)


@pytest.mark.parametrize(("gamma", "tau"), [(0.3, 1.0), (0.0, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("classes", [2, 4])
def test_every_row_must_win_by_the_margin_of_its_group(classes: int, gamma: float, tau: float) -> None:
    logits, target = rows(classes)
    ours = by_group(logits, target, gamma=gamma, tau=tau, reduction="none")
    for z, y, g, loss in zip(logits.tolist(), target.tolist(), GROUP.tolist(), ours, strict=True):
        delta, iota = (GROUP_COUNTS[g] / 50) ** gamma, tau * math.log(50 / GROUP_COUNTS[g])
        others = sum(math.exp(delta * (x - z[y])) for c, x in enumerate(z) if c != y)
        assert math.isclose(loss.item(), math.log1p(math.exp(iota) * others), rel_tol=1e-10)


def test_two_classes_are_the_binary_margin_form() -> None:
    logits, y = rows(2)
    delta, iota = group_scaling(GROUP_COUNTS, 0.3, 1.0)
    u = logits[:, 1] - logits[:, 0]
    expected = torch.nn.functional.softplus(-(2 * y - 1) * delta[GROUP] * u + iota[GROUP])
    assert_close(by_group(logits, y, reduction="none"), expected)


def test_the_additive_part_does_not_cancel() -> None:
    """In the released code it does: both logits of a row are shifted alike."""
    without = by_group(*rows(2), tau=0.0, reduction="none")
    with_margin = by_group(*rows(2), tau=1.0, reduction="none")
    largest = GROUP == 0
    assert_close(with_margin[largest], without[largest])
    assert (with_margin[~largest] > without[~largest]).all()


def test_groups_of_one_size_are_cross_entropy() -> None:
    ours = group_vector_scaling_loss(*rows(), GROUP, group_counts=[5, 5, 5], gamma=0.7, tau=2.0)
    assert_close(ours, cross_entropy(*rows()))
    assert_close(by_group(*rows(), gamma=0.0, tau=0.0), cross_entropy(*rows()))


def test_the_label_as_group_is_the_label_imbalanced_binary_form() -> None:
    logits, y = rows(2)
    delta, iota = torch.tensor([1.0, 0.4]).double(), torch.tensor([-0.3, 1.2]).double()
    ours = scaled_margin_loss(logits, y, y, multiplicative=delta, additive=iota, reduction="none")
    u = logits[:, 1] - logits[:, 0]
    assert_close(ours[y == 1], torch.log1p(torch.exp(-0.4 * u + 1.2))[y == 1])
    assert_close(ours[y == 0], torch.log1p(torch.exp(u - 0.3))[y == 0])


def test_pixels_take_the_group_of_their_image() -> None:
    logits, target = torch.randn(6, 4, 2, 3, dtype=torch.float64), torch.arange(36).reshape(6, 2, 3) % 4
    pixels = by_group(logits, target, inner="none", reduction="none")
    for i in range(2):
        for j in range(3):
            assert_close(pixels[:, i, j], by_group(logits[:, :, i, j], target[:, i, j], reduction="none"))
    target[0] = -100
    assert by_group(logits, target, reduction="none")[0] == 0


def test_extreme_logits_stay_finite() -> None:
    for scale in (200.0, 1e4):
        z = (rows()[0].float() * scale).requires_grad_()
        loss = by_group(z, rows()[1]) + vector_scaling_loss(z, rows()[1], class_counts=COUNTS)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_float16_is_computed_in_float32() -> None:
    logits, target = rows()
    half = logits.half()
    assert_close(by_group(half, target), by_group(half.float(), target))
    ours = vector_scaling_loss(half, target, class_counts=COUNTS)
    assert_close(ours, vector_scaling_loss(half.float(), target, class_counts=COUNTS))


def test_derivatives_agree_with_finite_differences() -> None:
    logits, target = rows()
    logits.requires_grad_()
    for loss in (by_group, lambda z, y: vector_scaling_loss(z, y, class_counts=COUNTS)):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, target), logits)
        assert torch.autograd.gradgradcheck(lambda z, loss=loss: loss(z, target), logits)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VectorScalingLoss(COUNTS, gamma=-1.0), ValueError, r"gamma is -1.0, expected a number in \[0, inf\]"),
        (lambda: VectorScalingLoss(COUNTS, tau="1"), TypeError, r"tau is '1' \(str\), expected a number"),  # type: ignore[arg-type]
        (lambda: VectorScalingLoss([5, 2])(*rows()), ValueError, r"multiplicative has shape \(2,\), expected \(4,\)"),
        (lambda: GroupVectorScalingLoss([5, 0]), ValueError, r"group_counts is \[5.0, 0.0\], expected .* >= 1"),
        (lambda: GroupVectorScalingLoss([5, 2])(*rows(), GROUP), ValueError, r"group holds 2, expected group indices"),
        (lambda: GroupVectorScalingLoss([5, 2])(*rows(), GROUP[:3]), ValueError, r"group has shape \(3,\), expected"),
        (lambda: by_group(rows()[0], rows()[0]), TypeError, r"expected class indices of an integer type"),
        (
            lambda: scaled_margin_loss(*rows(), GROUP, multiplicative=torch.ones(3), additive=torch.ones(2)),
            ValueError,
            r"additive has shape \(2,\), expected that of multiplicative",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
