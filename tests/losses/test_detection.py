"""RetinaNet's classification loss: what it sums, what it divides by, and how its last layer starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.losses import (
    RetinaNetClassificationLoss,
    initialize_classification_layer,
    retinanet_classification_loss,
    sigmoid_focal_loss,
    sigmoid_prior_bias,
    softmax_prior_bias,
)
from tests.pool import Pool

LABELS = torch.tensor([[-1, 0, 2, -2, 1], [-1, -1, -2, -2, -1], [2, -1, -1, -1, -1]])


def anchors() -> Tensor:
    """Logits (3, 5, 3) of three images with 3, 0 and 1 foreground anchors."""
    return torch.randn(3, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def image_sums(logits: Tensor) -> list[float]:
    """The focal loss over the anchors of each image that count."""
    sums = []
    for z, y in zip(logits, LABELS, strict=True):
        labels = torch.stack([y == k for k in range(3)], dim=1)[y != -2]
        sums.append(sigmoid_focal_loss(z[y != -2], labels, alpha=0.25, inner="sum", reduction="sum").item())
    return sums


def ema_loss(**options: Any) -> RetinaNetClassificationLoss:
    return RetinaNetClassificationLoss(ema_momentum=0.9, **options)


def test_each_image_is_divided_by_its_own_foreground_at_least_one() -> None:
    logits = anchors()
    a, b, c = image_sums(logits)
    assert_close(retinanet_classification_loss(logits, LABELS, reduction="none").tolist(), [a / 3, b, c])
    assert_close(retinanet_classification_loss(logits, LABELS).item(), (a / 3 + b + c) / 3)


def test_the_papers_form_divides_the_batch_by_its_foreground() -> None:
    logits = anchors()
    ours = retinanet_classification_loss(logits, LABELS, per_image=False, normalizer="positives")
    assert_close(ours.item(), sum(image_sums(logits)) / 4)


def test_a_batch_without_foreground_still_learns_from_its_background() -> None:
    logits = anchors().requires_grad_()
    background = torch.full((3, 5), -1)
    for options in ({}, {"per_image": False, "normalizer": "positives"}):
        loss = retinanet_classification_loss(logits, background, **options)  # type: ignore[arg-type]
        total = sigmoid_focal_loss(logits, torch.zeros(3, 5, 3), alpha=0.25, inner="sum", reduction="sum")
        assert_close(loss, total / (1 if options else 3))
        assert (torch.autograd.grad(loss, logits)[0] > 0).all()


def test_anchors_between_the_thresholds_get_no_gradient_and_may_hold_nan() -> None:
    logits = anchors()
    logits[LABELS == -2] = torch.nan
    logits.requires_grad_()
    loss = retinanet_classification_loss(logits, LABELS)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert (gradient[LABELS == -2] == 0).all()
    assert (gradient[LABELS != -2] != 0).all()


def test_a_mask_of_anchors_is_as_the_label_minus_two() -> None:
    logits = anchors()
    relabelled = torch.where(LABELS == -2, -1, LABELS)
    ours = retinanet_classification_loss(logits, relabelled, mask=LABELS != -2)
    assert_close(ours, retinanet_classification_loss(logits, LABELS))


def test_an_image_of_which_no_anchor_counts_is_left_out_of_the_mean() -> None:
    labels = LABELS.clone()
    labels[1] = -2
    ours = retinanet_classification_loss(anchors(), labels)
    assert_close(ours, retinanet_classification_loss(anchors()[[0, 2]], labels[[0, 2]]))


def test_float16_is_computed_in_float32() -> None:
    half = anchors().half()
    assert_close(retinanet_classification_loss(half, LABELS), retinanet_classification_loss(half.float(), LABELS))


def test_derivatives_agree_with_finite_differences() -> None:
    logits = anchors().requires_grad_()
    for gamma in (0.5, 2.0):
        assert torch.autograd.gradcheck(lambda z, g=gamma: retinanet_classification_loss(z, LABELS, gamma=g), logits)
        assert torch.autograd.gradgradcheck(
            lambda z, g=gamma: retinanet_classification_loss(z, LABELS, gamma=g), logits
        )


# The moving average


def test_the_moving_average_divides_the_batch_and_includes_it() -> None:
    logits, loss = anchors(), ema_loss()
    assert_close(loss(logits, LABELS).item(), sum(image_sums(logits)) / (0.9 * 100 + 0.1 * 4))
    assert_close(loss(logits, LABELS).item(), sum(image_sums(logits)) / (0.9 * 90.4 + 0.1 * 4))


def test_a_batch_without_foreground_counts_one_in_the_average() -> None:
    loss = ema_loss(ema_start=50)
    loss(anchors(), torch.full((3, 5), -1))
    assert_close(loss.ema_foreground.item(), 0.9 * 50 + 0.1)


def test_masked_foreground_stays_out_of_the_average() -> None:
    loss = ema_loss()
    loss(anchors(), LABELS, mask=torch.tensor([True, True, False]))
    assert_close(loss.ema_foreground.item(), 0.9 * 100 + 0.1 * 3)


def test_the_average_moves_in_training_alone() -> None:
    loss = ema_loss()
    loss.eval()(anchors(), LABELS)
    loss.train()
    with second_pass():
        loss(anchors(), LABELS)
    loss(anchors() * torch.nan, LABELS)
    assert loss.ema_foreground.item() == 100
    loss(anchors(), LABELS)
    assert loss.ema_foreground.item() != 100


def test_the_average_travels_in_checkpoints_and_keeps_its_precision() -> None:
    loss, restored = ema_loss(), ema_loss()
    loss(anchors(), LABELS)
    restored.load_state_dict(loss.half().state_dict())
    assert torch.equal(restored(anchors(), LABELS), loss(anchors(), LABELS))


def test_the_average_traces_into_one_graph() -> None:
    loss, plain = ema_loss(), ema_loss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(anchors(), LABELS), plain(anchors(), LABELS))
    assert_close(loss.ema_foreground, plain.ema_foreground)


def averaged_steps(rank: int, split: tuple[int, ...]) -> list[Any]:
    """Two steps on this rank's images: loss, gradient of all images' logits, average."""
    images = slice(sum(split[:rank]), sum(split[: rank + 1]))
    loss, found = ema_loss(), []
    for _ in range(2):
        logits = anchors().requires_grad_()
        value = loss(logits[images], LABELS[images])
        found += [value.item(), torch.autograd.grad(value, logits)[0], loss.ema_foreground.item()]
    return found


@pytest.mark.parametrize("split", [(1, 1, 1), (2, 0, 1)])
def test_several_ranks_move_one_average(split: tuple[int, ...], ranks: Pool) -> None:
    one = averaged_steps(0, (3,))
    per_rank = zip(*ranks.run(averaged_steps, split), strict=True)
    for i, (got, expected) in enumerate(zip(per_rank, one, strict=True)):
        if i % 3 == 2:
            assert list(got) == [expected] * 3
        else:
            assert_close(sum(got) / 3, expected)


# The start


@pytest.mark.parametrize("prior", [0.01, 1e-4, 0.5])
def test_a_sigmoid_starts_at_the_prior(prior: float) -> None:
    assert_close(torch.tensor(sigmoid_prior_bias(prior), dtype=torch.float64).sigmoid().item(), prior)


@pytest.mark.parametrize("prior", [0.01, 1e-4, 0.5])
def test_the_foreground_of_a_softmax_starts_at_the_prior(prior: float) -> None:
    p = softmax_prior_bias(20, prior).softmax(0)
    assert_close(p[0].item(), 1 - prior)
    assert_close(p[1:].tolist(), [prior / 20] * 20)


def test_without_the_bias_the_first_loss_of_many_background_anchors_is_far_larger() -> None:
    background = torch.full((1, 1000), -1)
    values = []
    for start in (0.0, sigmoid_prior_bias()):
        values.append(retinanet_classification_loss(torch.full((1, 1000, 10), start), background).item())
    assert values[0] > 1e4 * values[1]


@pytest.mark.parametrize("softmax", [False, True])
def test_a_layer_starts_with_small_weights_and_the_bias_of_the_prior(softmax: bool) -> None:
    layer = nn.Conv2d(32, 9, 3)
    initialize_classification_layer(layer, softmax=softmax)
    assert layer.bias is not None
    expected = softmax_prior_bias(8) if softmax else torch.full((9,), sigmoid_prior_bias())
    assert_close(layer.bias.detach(), expected.float())
    assert 0.008 < layer.weight.std() < 0.012


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: retinanet_classification_loss(anchors()[0], LABELS),
            ValueError,
            r"logits has shape \(5, 3\), expected \(B, A, K\)",
        ),
        (
            lambda: retinanet_classification_loss(anchors(), LABELS[:, :2]),
            ValueError,
            r"target has shape \(3, 2\), expected \(3, 5\)",
        ),
        (lambda: retinanet_classification_loss(anchors(), LABELS - 1), ValueError, r"target holds -3, expected class"),
        (lambda: retinanet_classification_loss(anchors(), LABELS * 2), ValueError, r"target holds"),
        (lambda: retinanet_classification_loss(anchors(), LABELS.float()), TypeError, r"target has dtype"),
        (lambda: ema_loss(ema_start=0), ValueError, r"ema_start is 0, expected a number in \(0, inf\]"),
        (lambda: sigmoid_prior_bias(0.0), ValueError, r"prior is 0.0, expected a number in \(0, 1\]"),
        (lambda: sigmoid_prior_bias(1), ValueError, r"prior is 1, expected a probability in \(0, 1\)"),
        (lambda: softmax_prior_bias(0), ValueError, r"num_classes is 0, expected"),
        (
            lambda: initialize_classification_layer(nn.Linear(2, 2, bias=False)),
            ValueError,
            r"layer is Linear.*, expected one with a weight and a bias",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
