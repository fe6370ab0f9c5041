"""C4: float32 at least, float64 stays, and finite values and gradients at every extreme."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.contracts.parts import CLASSES, OBJECTIVES, Batch, batch_of, build, ids, value

objectives = pytest.mark.parametrize("part", OBJECTIVES, ids=ids(OBJECTIVES))
SUPERVISED = [p for p in OBJECTIVES if p.spec.task in ("multiclass", "multilabel")]
supervised = pytest.mark.parametrize("part", SUPERVISED, ids=ids(SUPERVISED))


def backward_is_finite(loss: Tensor, batch: Batch) -> None:
    assert loss.isfinite().all()
    loss.sum().backward()
    for leaf in batch.leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@objectives
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(part: type, dtype: torch.dtype) -> None:
    batch = batch_of(part.spec.task, dtype=dtype)
    loss = value(build(part), batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, value(build(part), batch.mapped(Tensor.float)))
    backward_is_finite(loss, batch)


@objectives
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(part: type, dtype: torch.dtype) -> None:
    batch = batch_of(part.spec.task, dtype=torch.float32)
    plain = value(build(part), batch)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(value(build(part), batch), plain, rtol=1e-6, atol=1e-6)
        half = batch.mapped(lambda x: x.to(dtype))
        loss = value(build(part), half)
    assert loss.dtype == torch.float32
    backward_is_finite(loss, half)


@objectives
def test_float64_in_gives_float64_out(part: type) -> None:
    assert value(build(part), batch_of(part.spec.task)).dtype == torch.float64


@objectives
@pytest.mark.parametrize("scale", [0.0, 1e-8, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:LDAMLoss got logits")
def test_extremes_stay_finite(part: type, scale: float, dtype: torch.dtype) -> None:
    batch = batch_of(part.spec.task, dtype=dtype).mapped(lambda x: x * scale)
    backward_is_finite(value(build(part), batch), batch)


@supervised
@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.filterwarnings("ignore:LDAMLoss got logits")
def test_one_class_batches_and_single_rows_stay_finite(part: type, logit: float) -> None:
    for n in (1, 4):
        batch = batch_of(part.spec.task, n=n)
        batch.inputs[1].zero_()
        batch.leaves[0].data[:, 0] = logit
        backward_is_finite(value(build(part), batch), batch)


@supervised
def test_minus_infinity_masks_a_class(part: type) -> None:
    batch = batch_of(part.spec.task)
    batch.inputs[1] = batch.inputs[1].clamp_max(CLASSES - 2 if part.spec.task == "multiclass" else 1)
    if part.spec.task == "multilabel":
        batch.inputs[1][:, -1] = 0
    batch.leaves[0].data[:, -1] = -torch.inf
    loss = value(build(part), batch)
    backward_is_finite(loss, batch)
    assert torch.equal(batch.leaves[0].grad[:, -1], torch.zeros(6, dtype=torch.float64))


@objectives
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:LDAMLoss got logits")
def test_nan_and_plus_infinity_are_never_silently_repaired(part: type, poison: float) -> None:
    batch = batch_of(part.spec.task)
    if part.spec.task == "multilabel":
        batch.inputs[1][2] = 0  # a label of 0 against +inf costs infinitely much
    batch.leaves[0].data[2] = poison
    assert not value(build(part), batch).isfinite()
