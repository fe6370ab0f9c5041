"""The long-tail family: logit adjustment, balanced softmax, LDAM, class-balanced, and the statistics they share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from decimal import Decimal, getcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.testing import assert_close

from counterpoise.losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    ClassStatistics,
    CosineLinear,
    LDAMLoss,
    LogitAdjustedLoss,
    balanced_softmax_loss,
    class_balanced_loss,
    cross_entropy_loss,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    post_hoc_logit_adjustment,
)
from counterpoise.losses.logit_adjusted import prior_adjustment

COUNTS = [500, 120, 30, 4]
CLASSES = len(COUNTS)
EMPTY = [500, 0, 30, 4]
PRIOR = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
PRIOR_BASED = [LogitAdjustedLoss, BalancedSoftmaxLoss, LDAMLoss]
FAMILY = [*PRIOR_BASED, ClassBalancedLoss]


def rows(seed: int = 0, n: int = 12) -> tuple[Tensor, Tensor]:
    """Cosine-sized logits (n, 4) and class indices in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, CLASSES, dtype=torch.float64, generator=generator) * 2 - 1, torch.arange(n) % CLASSES


# Logit adjustment and balanced softmax


def test_tau_zero_is_cross_entropy() -> None:
    assert_close(logit_adjusted_loss(*rows(), class_counts=COUNTS, tau=0.0), cross_entropy(*rows()))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_equal_counts_make_logit_adjustment_cross_entropy(tau: float) -> None:
    assert_close(logit_adjusted_loss(*rows(), class_counts=[7] * CLASSES, tau=tau), cross_entropy(*rows()))


def test_equal_counts_make_balanced_softmax_cross_entropy() -> None:
    assert_close(balanced_softmax_loss(*rows(), class_counts=[7] * CLASSES), cross_entropy(*rows()))


def test_tau_one_without_epsilon_equals_balanced_softmax() -> None:
    adjusted = logit_adjusted_loss(*rows(), class_counts=COUNTS, epsilon=0.0, reduction="none")
    assert_close(adjusted, balanced_softmax_loss(*rows(), class_counts=COUNTS, reduction="none"), rtol=0, atol=1e-14)


def test_tau_one_equals_balanced_softmax_up_to_the_released_epsilon() -> None:
    """log(prior + 1e-12) is off by 1e-12 / prior, here at most 1e-12 / 0.015."""
    counts = [500, 120, 30, 10]
    adjusted = logit_adjusted_loss(*rows(), class_counts=counts, reduction="none")
    assert_close(adjusted, balanced_softmax_loss(*rows(), class_counts=counts, reduction="none"), rtol=0, atol=1e-10)


def test_balanced_softmax_is_cross_entropy_of_logits_plus_log_counts() -> None:
    logits, target = rows()
    expected = cross_entropy(logits + torch.tensor(COUNTS).double().log(), target)
    assert_close(balanced_softmax_loss(logits, target, class_counts=COUNTS), expected)


@pytest.mark.parametrize("loss", [logit_adjusted_loss, balanced_softmax_loss, ldam_loss])
def test_only_ratios_of_counts_matter(loss: Callable[..., Any]) -> None:
    tenfold = [10 * n for n in COUNTS]
    assert_close(loss(*rows(), class_counts=COUNTS), loss(*rows(), class_counts=tenfold))


@pytest.mark.parametrize("loss", [logit_adjusted_loss, balanced_softmax_loss, ldam_loss, class_balanced_loss])
def test_gradient_rows_sum_to_zero(loss: Callable[..., Any]) -> None:
    """A softmax does not see a constant added to all logits of a row."""
    logits, target = rows()
    logits.requires_grad_()
    loss(logits, target, class_counts=COUNTS, reduction="sum").backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 1
    assert_close(logits.grad.sum(1), torch.zeros(len(logits), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_logits_that_solve_it_solve_cross_entropy_once_the_prior_is_added(tau: float) -> None:
    logits, target = rows()
    logits.requires_grad_()
    moved = (logits.detach() + tau * PRIOR.log()).requires_grad_()
    value = logit_adjusted_loss(logits, target, class_counts=COUNTS, tau=tau, epsilon=0.0)
    plain = cross_entropy(moved, target)
    assert_close(value, plain)
    assert_close(torch.autograd.grad(value, logits), torch.autograd.grad(plain, moved))


def test_minimum_over_a_bias_is_the_balanced_classifier() -> None:
    """Without features cross-entropy learns the log prior, logit adjustment learns nothing: all logits equal."""
    target = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    logits = bias.expand(len(target), -1)
    (gradient,) = torch.autograd.grad(logit_adjusted_loss(logits, target, class_counts=COUNTS, epsilon=0.0), bias)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_post_hoc_correction_of_a_bayes_model_is_the_balanced_rule() -> None:
    """Logits log P(y) P(x | y) predict the likelier class; less the prior, the class with the larger P(x | y)."""
    likelihood = torch.rand(200, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    bayes = (likelihood * PRIOR).log()
    assert bayes.argmax(1).bincount(minlength=CLASSES)[-1] == 0  # the rarest class is never predicted
    corrected = post_hoc_logit_adjustment(bayes, class_counts=COUNTS)
    assert torch.equal(corrected.argmax(1), likelihood.argmax(1))


def test_post_hoc_correction_undoes_the_adjustment_of_training() -> None:
    logits, target = rows()
    corrected = post_hoc_logit_adjustment(logits, class_counts=COUNTS, tau=1.5)
    assert_close(logit_adjusted_loss(corrected, target, class_counts=COUNTS, tau=1.5), cross_entropy(logits, target))


def test_post_hoc_correction_of_dense_logits_is_per_pixel() -> None:
    logits = torch.randn(2, CLASSES, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    corrected = post_hoc_logit_adjustment(logits, class_counts=COUNTS)
    assert_close(corrected[1, :, 2, 0], logits[1, :, 2, 0] - PRIOR.log())


def test_epsilon_stands_outside_the_power() -> None:
    assert_close(prior_adjustment(COUNTS, 2.0, 0.1), (PRIOR**2 + 0.1).log())


# LDAM


def test_ldam_without_margin_and_scale_is_cross_entropy() -> None:
    assert_close(ldam_loss(*rows(), class_counts=COUNTS, max_margin=0.0, scale=1.0), cross_entropy(*rows()))


def test_ldam_is_cross_entropy_of_scaled_cosines_less_the_margin() -> None:
    cosines, target = rows()
    shifted = cosines.clone()
    for i, y in enumerate(target.tolist()):
        shifted[i, y] -= 0.5 * (COUNTS[y] / min(COUNTS)) ** -0.25
    assert_close(ldam_loss(cosines, target, class_counts=COUNTS), cross_entropy(30 * shifted, target))


def test_the_rarest_class_has_the_largest_margin() -> None:
    margins = ldam_margins(COUNTS, 0.3)
    assert_close(margins[-1].item(), 0.3)
    assert (margins.diff() > 0).all()  # the counts fall


def test_margins_fall_with_the_fourth_root_of_the_count() -> None:
    assert_close(ldam_margins([16, 1], 0.5), torch.tensor([0.25, 0.5], dtype=torch.float64))


def test_margins_are_scale_free() -> None:
    assert_close(ldam_margins(COUNTS), ldam_margins([1000 * n for n in COUNTS]))


def test_equal_counts_give_every_class_the_full_margin() -> None:
    assert_close(ldam_margins([9, 9, 9], 0.4), torch.full((3,), 0.4, dtype=torch.float64))


def test_ldam_grows_with_the_margin() -> None:
    values = [ldam_loss(*rows(), class_counts=COUNTS, max_margin=m) for m in (0.0, 0.1, 0.3, 0.5)]
    assert values == sorted(values)


def test_ldam_warns_once_of_logits_that_are_not_cosines() -> None:
    loss = LDAMLoss(COUNTS)
    logits, target = rows()
    with pytest.warns(UserWarning, match=r"LDAMLoss got logits of up to .*, expected cosines in \[-1, 1\]"):
        loss(logits * 20, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(logits * 20, target)


def test_ldam_is_silent_on_cosines_and_masked_classes() -> None:
    logits, target = rows()
    logits[:, 3] = -torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LDAMLoss(COUNTS)(logits, target.clamp_max(2))


def test_cosine_linear_gives_cosines() -> None:
    head = CosineLinear(5, 3).double()
    features = torch.randn(7, 5, dtype=torch.float64) * 10
    cosines = head(features)
    assert cosines.abs().max() <= 1 + 1e-12
    for i, k in ((0, 0), (6, 2)):
        expected = features[i] @ head.weight[k] / (features[i].norm() * head.weight[k].norm())
        assert_close(cosines[i, k], expected)


def test_cosine_linear_starts_with_unit_class_vectors_and_ignores_their_length() -> None:
    head, features = CosineLinear(5, 3).double(), torch.randn(7, 5, dtype=torch.float64)
    assert_close(CosineLinear(5, 3).weight.norm(dim=1), torch.ones(3))
    before = head(features)
    head.weight.data.mul_(7)
    assert_close(head(features), before)


# Class-balanced


@pytest.mark.parametrize("base", ["softmax", "sigmoid"])
def test_beta_zero_weighs_every_class_the_same(base: str) -> None:
    logits, target = rows()
    bce = binary_cross_entropy_with_logits(logits, one_hot(target).double(), reduction="none").sum(1).mean()
    expected = cross_entropy(logits, target) if base == "softmax" else bce
    assert_close(class_balanced_loss(logits, target, class_counts=COUNTS, beta=0.0, base=base), expected)


def test_class_balanced_is_weighted_cross_entropy() -> None:
    w = effective_number_weights(COUNTS, 0.99)
    expected = cross_entropy_loss(*rows(), class_weight=w)
    assert_close(class_balanced_loss(*rows(), class_counts=COUNTS, beta=0.99), expected)


def test_focal_base_with_gamma_zero_is_the_sigmoid_base() -> None:
    options = {"class_counts": COUNTS, "beta": 0.99}
    assert_close(
        class_balanced_loss(*rows(), base="focal", gamma=0.0, **options),
        class_balanced_loss(*rows(), base="sigmoid", **options),
    )


def test_focal_base_is_the_sum_over_classes_of_the_printed_formula() -> None:
    logits, target = rows()
    expected = []
    for z, y in zip(logits, target.tolist(), strict=True):
        p_t = [p if c == y else 1 - p for c, p in enumerate(z.sigmoid())]
        expected.append(effective_number_weights(COUNTS, 0.9)[y] * sum(-((1 - p) ** 1.5) * p.log() for p in p_t))
    ours = class_balanced_loss(logits, target, class_counts=COUNTS, beta=0.9, base="focal", gamma=1.5, reduction="none")
    assert_close(ours, torch.stack(expected))


def test_beta_zero_gives_weights_of_one() -> None:
    assert effective_number_weights(COUNTS, 0.0).tolist() == [1.0] * CLASSES


def test_beta_near_zero_tends_to_one_for_every_class() -> None:
    for beta in (1e-10, 1e-20, 1e-300):
        assert_close(effective_number_weights(COUNTS, beta).tolist(), [1.0] * CLASSES, rtol=0, atol=2 * beta)


def test_beta_one_is_inverse_frequency() -> None:
    inverse = [Fraction(1, n) for n in COUNTS]
    expected = [float(CLASSES * x / sum(inverse)) for x in inverse]
    assert_close(effective_number_weights(COUNTS, 1.0).tolist(), expected, rtol=1e-14, atol=0)


def test_beta_near_one_tends_to_inverse_frequency() -> None:
    limit = effective_number_weights(COUNTS, 1.0)
    gaps = [(effective_number_weights(COUNTS, 1 - d) - limit).abs().max().item() for d in (1e-4, 1e-6, 1e-8, 1e-10)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-7


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.9999, 1.0])
def test_weights_sum_to_the_number_of_classes_seen(beta: float) -> None:
    assert_close(effective_number_weights(COUNTS, beta).sum().item(), 4.0)
    assert_close(effective_number_weights(EMPTY, beta).sum().item(), 3.0)


@pytest.mark.parametrize("beta", ["0.9", "0.9999", "0.999999", "0.999999999"])
def test_weights_keep_their_digits_near_one(beta: str) -> None:
    """Against 50 decimal digits, at the double that beta stands for."""
    getcontext().prec = 50
    counts = [1, 2, 1000, 10**7]
    exact = Decimal(float(beta))
    raw = [(1 - exact) / (1 - exact**n) for n in counts]
    expected = [float(len(counts) * w / sum(raw)) for w in raw]
    assert_close(effective_number_weights(counts, float(beta)).tolist(), expected, rtol=1e-13, atol=0)


# Class statistics


@pytest.mark.parametrize("loss", FAMILY)
def test_an_empty_class_is_refused_by_name(loss: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"class_counts has no example of class 1, 3: drop the class, or pass zero_"):
        loss([5, 0, 3, 0])


@pytest.mark.parametrize("policy", ["ignore", "smooth"])
@pytest.mark.parametrize("loss", FAMILY)
def test_an_empty_class_leaves_value_and_gradient_finite(loss: Callable[..., Any], policy: str) -> None:
    logits, target = rows()
    logits.requires_grad_()
    value = loss(EMPTY, zero_count=policy)(logits, target)
    value.backward()
    assert value.isfinite()
    assert value > 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_ignore_lets_an_empty_class_borrow_the_smallest_prior() -> None:
    statistics = ClassStatistics(EMPTY, "ignore")
    assert_close(statistics.prior, torch.tensor(EMPTY).double() / sum(EMPTY))
    assert statistics.prior[1] == 0
    assert statistics.seen_prior()[1] == statistics.prior[3]
    assert ldam_margins(statistics)[1] == ldam_margins(statistics).max()


def test_ignore_gives_an_empty_class_weight_zero() -> None:
    logits, target = rows()
    losses = ClassBalancedLoss(EMPTY, zero_count="ignore", reduction="none")(logits, target)
    assert (losses[target == 1] == 0).all()
    assert (losses[target != 1] > 0).all()


def test_smooth_adds_one_to_every_count() -> None:
    smoothed = [n + 1 for n in EMPTY]
    assert_close(ClassStatistics(EMPTY, "smooth").prior, ClassStatistics(smoothed).prior)
    assert ClassStatistics(EMPTY, "smooth").counts.tolist() == EMPTY
    for loss in FAMILY:
        assert_close(loss(EMPTY, zero_count="smooth")(*rows()), loss(smoothed)(*rows()))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, -1], r"class_counts holds -1, expected numbers >= 0"),
        ([0, 0], r"class_counts sums to 0, expected at least one example"),
        ([1.5, 2.0], r"class_counts holds fractions, expected whole numbers of examples"),
        ([[1, 2]], r"class_counts has shape \(1, 2\), expected \(C,\) with C >= 1"),
        ([], r"class_counts has shape \(0,\), expected \(C,\) with C >= 1"),
    ],
)
def test_counts_that_are_none_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassStatistics(counts)


def test_an_unknown_policy_is_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"zero_count is 'smoth', .* did you mean 'smooth'\?"):
        ClassStatistics(COUNTS, "smoth")


@pytest.mark.parametrize("loss", PRIOR_BASED)
def test_set_prior_makes_it_the_loss_of_other_counts(loss: Callable[..., Any]) -> None:
    other = [10, 40, 30, 20]
    told = loss(COUNTS)
    told.statistics.set_prior(torch.tensor(other) / 100)
    assert_close(told(*rows()), loss(other)(*rows()), rtol=1e-6, atol=1e-7)  # the prior was given in float32


@pytest.mark.parametrize("loss", [LogitAdjustedLoss, BalancedSoftmaxLoss])
def test_a_uniform_sampled_prior_makes_the_adjustment_a_no_op(loss: Callable[..., Any]) -> None:
    balanced = loss(COUNTS)
    balanced.statistics.set_prior(torch.full((CLASSES,), 1 / CLASSES))
    assert_close(balanced(*rows()), cross_entropy(*rows()))


def test_class_weights_follow_the_counts_and_not_the_prior() -> None:
    told = ClassBalancedLoss(COUNTS)
    told.statistics.set_prior(torch.full((CLASSES,), 1 / CLASSES))
    assert_close(told(*rows()), ClassBalancedLoss(COUNTS)(*rows()))


@pytest.mark.parametrize("prior", [[0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0], [0.5, 0.5], [torch.nan, 1, 0, 0]])
def test_a_prior_that_is_no_distribution_is_refused(prior: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^prior "):
        ClassStatistics(COUNTS).set_prior(torch.tensor(prior))


@pytest.mark.parametrize("loss", PRIOR_BASED)
def test_state_dict_carries_counts_and_prior(loss: Callable[..., Any]) -> None:
    saved = loss(COUNTS)
    saved.statistics.set_prior(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    loaded = loss([1] * CLASSES)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.statistics.counts.tolist() == COUNTS
    assert_close(loaded(*rows()), saved(*rows()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", FAMILY)
def test_casting_a_model_leaves_the_prior_its_precision(loss: Callable[..., Any], dtype: torch.dtype) -> None:
    original, cast = loss(COUNTS), nn.Sequential(nn.Linear(2, 2), loss(COUNTS)).to(dtype)
    assert cast[0].weight.dtype == dtype
    assert cast[1].statistics.prior.dtype == torch.float64
    assert torch.equal(cast[1].statistics.prior, original.statistics.prior)
    assert cast[1].statistics.counts.dtype == torch.int64


def test_class_weights_keep_their_precision_too() -> None:
    weights = effective_number_weights(COUNTS)
    assert torch.equal(LDAMLoss(COUNTS, class_weight=weights).half().class_weight, weights)


@pytest.mark.parametrize("loss", FAMILY)
def test_permuting_classes_together_with_counts_changes_nothing(loss: Callable[..., Any]) -> None:
    logits, target = rows()
    order = torch.tensor([2, 0, 3, 1])
    renamed = order.argsort()[target]
    permuted = loss([COUNTS[c] for c in order], reduction="none")(logits[:, order], renamed)
    assert_close(permuted, loss(COUNTS, reduction="none")(logits, target))


@pytest.mark.parametrize("loss", [logit_adjusted_loss, balanced_softmax_loss, ldam_loss, class_balanced_loss])
def test_counts_of_another_number_of_classes_are_refused(loss: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"has shape \(5,\), expected \(4,\), one entry a class"):
        loss(*rows(), class_counts=[1, 2, 3, 4, 5])
