"""Binary cross-entropy: torch's value and derivatives, its weights, and what it is a case of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from counterpoise import kernels
from counterpoise.losses import BinaryCrossEntropyLoss, asymmetric_loss, binary_cross_entropy_loss, sigmoid_focal_loss

PATHS = pytest.mark.parametrize("path", [nullcontext, kernels.disabled], ids=["fused", "plain"])
LABELS = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def entries(*shape: int, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and labels in {0, 1}, or in [0, 1], both ends included."""
    shape = shape or (6, 3)
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(shape, dtype=torch.float64, generator=generator)
    labels = 1.5 * torch.rand(shape, dtype=torch.float64, generator=generator) - 0.25
    return logits, labels.clamp(0, 1) if soft else labels.round()


def along(weight: Tensor, logits: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (logits.ndim - 2))


def value_and_grad(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@PATHS
@LABELS
@pytest.mark.parametrize("shape", [(6, 3), (4, 700), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("weights", [(), ("class_weight",), ("pos_weight",), ("class_weight", "pos_weight")], ids=str)
def test_it_is_torchs(weights: tuple[str, ...], shape: tuple[int, ...], soft: bool, path: Callable[[], Any]) -> None:
    logits, labels = entries(*shape, soft=soft)
    given = {name: torch.linspace(0, 3 + i, shape[1], dtype=torch.float64) for i, name in enumerate(weights)}
    theirs = {{"class_weight": "weight"}.get(name, name): along(x, logits) for name, x in given.items()}
    for reduction in ("mean", "sum", "none"):
        inner = "mean" if reduction == "mean" else "sum" if reduction == "sum" else "none"
        with path():
            ours = value_and_grad(
                lambda z, i=inner, r=reduction: binary_cross_entropy_loss(z, labels, inner=i, reduction=r, **given),
                logits,
            )
        wanted = value_and_grad(
            lambda z, r=reduction: binary_cross_entropy_with_logits(z, labels, reduction=r, **theirs), logits
        )
        for a, b in zip(ours, wanted, strict=True):
            assert_close(a, b, rtol=1e-12, atol=1e-14)


@PATHS
@LABELS
def test_it_is_the_focal_and_the_asymmetric_loss_without_focusing(soft: bool, path: Callable[[], Any]) -> None:
    logits, labels = entries(40, 30, soft=soft)
    options = {"weight": torch.linspace(0.5, 2, 40, dtype=torch.float64), "mask": logits > -3, "reduction": "none"}
    with path():
        ours = binary_cross_entropy_loss(logits, labels, **options)
        assert torch.equal(ours, sigmoid_focal_loss(logits, labels, gamma=0.0, **options))
        assert_close(ours, asymmetric_loss(logits, labels, gamma_neg=0.0, gamma_pos=0.0, margin=0.0, **options))


@PATHS
def test_weights_of_ones_are_none(path: Callable[[], Any]) -> None:
    logits, labels = entries()
    ones = torch.ones(3)
    with path():
        expected = binary_cross_entropy_loss(logits, labels)
        assert_close(binary_cross_entropy_loss(logits, labels, class_weight=ones), expected, rtol=1e-14, atol=0)
        assert_close(binary_cross_entropy_loss(logits, labels, pos_weight=ones), expected, rtol=1e-14, atol=0)


@PATHS
@LABELS
def test_a_positive_weight_is_so_many_copies_of_the_positive_part(soft: bool, path: Callable[[], Any]) -> None:
    logits, labels = entries(soft=soft)
    with path():
        ours = binary_cross_entropy_loss(logits, labels, pos_weight=torch.full((3,), 4.0), inner="sum", reduction="sum")
        once = binary_cross_entropy_loss(logits, labels, inner="sum", reduction="sum")
        of_one = labels * binary_cross_entropy_loss(logits, torch.ones_like(labels), inner="none", reduction="none")
    assert_close(ours, once + 3 * of_one.sum())


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_values_and_derivatives_are_finite_at_saturation(
    label: float, dtype: torch.dtype, path: Callable[[], Any]
) -> None:
    logits = torch.tensor([-1e4, -200, -20, 0, 20, 200, 1e4], dtype=dtype).requires_grad_()
    with path():
        losses = binary_cross_entropy_loss(logits, torch.full((7,), label, dtype=dtype), reduction="none")
        (first,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), logits)
    for x in (losses, first, second):
        assert x.isfinite().all()
    assert_close(first.detach(), logits.detach().sigmoid() - label)


@PATHS
def test_an_easy_entry_keeps_its_digits(path: Callable[[], Any]) -> None:
    """1 - p rounds to 1, so that its logarithm would be 0."""
    logits = torch.tensor([30.0, -30.0])
    with path():
        losses = binary_cross_entropy_loss(logits, torch.tensor([1.0, 0.0]), reduction="none")
    assert_close(losses.double(), torch.full((2,), 30.0, dtype=torch.float64).neg().exp(), rtol=1e-6, atol=0)


@PATHS
def test_masked_entries_and_classes_count_nowhere(path: Callable[[], Any]) -> None:
    logits, labels = entries(6, 4)
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = True
    weights = {"class_weight": torch.tensor([1.0, 2, 3, 4]), "pos_weight": torch.tensor([1.0, 0.5, 2, 3])}
    kept = torch.where(mask, logits, torch.nan), torch.where(mask, labels, 7)
    alone = binary_cross_entropy_with_logits(
        logits, labels, weight=weights["class_weight"], pos_weight=weights["pos_weight"], reduction="none"
    )
    with path():
        ours = binary_cross_entropy_loss(*kept, mask=mask, reduction="none", **weights)
        gone = binary_cross_entropy_loss(
            torch.where(mask, logits, -torch.inf), labels * mask, reduction="none", **weights
        )
    assert_close(ours, (alone * mask).sum(1) / mask.sum(1))
    assert_close(gone, ours)


@pytest.mark.parametrize("options", [{}, {"pos_weight": torch.tensor([2.0, 0.5, 1.0])}])
@LABELS
def test_derivatives_agree_with_finite_differences(soft: bool, options: dict[str, Tensor]) -> None:
    logits, labels = entries(soft=soft)

    def loss(z: Tensor) -> Tensor:
        return binary_cross_entropy_loss(z, labels, class_weight=torch.tensor([1.0, 3, 0.2]), **options)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logits)


def test_the_module_keeps_its_weights_as_buffers() -> None:
    logits, labels = entries()
    loss = BinaryCrossEntropyLoss([1.0, 2.0, 3.0], pos_weight=[1.0, 5.0, 0.5], inner="sum")
    assert set(loss.state_dict()) == {"class_weight", "pos_weight"}
    weights = {"class_weight": torch.tensor([1.0, 2, 3]), "pos_weight": torch.tensor([1.0, 5, 0.5])}
    assert_close(loss(logits, labels), binary_cross_entropy_loss(logits, labels, inner="sum", **weights))
    loss.set_class_weight([1.0, 1.0, 1.0])
    del weights["class_weight"]
    assert_close(loss(logits, labels), binary_cross_entropy_loss(logits, labels, inner="sum", **weights))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_cross_entropy_loss(*entries(), class_weight=torch.ones(5)), r"class_weight has shape \(5,\)"),
        (lambda: binary_cross_entropy_loss(*entries(), pos_weight=torch.ones(5)), r"pos_weight has shape \(5,\)"),
        (lambda: binary_cross_entropy_loss(*entries(6), pos_weight=torch.ones(6)), r"expected logits of shape \(N, C"),
        (lambda: asymmetric_loss(*entries(6), class_weight=torch.ones(6)), r"expected logits of shape \(N, C"),
        (lambda: binary_cross_entropy_loss(torch.zeros(2), torch.tensor([0.0, 1.5])), "labels"),
        (lambda: binary_cross_entropy_loss(torch.zeros(2), torch.zeros(3)), "target has shape"),
    ],
    ids=["class weight", "positive weight", "no classes", "no classes, asymmetric", "label", "shape"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
