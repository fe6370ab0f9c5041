"""C1 and C2: per-example first; weight, mask, reduction and normaliser mean the same everywhere."""

from __future__ import annotations

import inspect

import pytest
import torch

from counterpoise._core import No
from tests.contracts.parts import OBJECTIVES, PARTS, batch_of, build, function_of, ids, value, views

PER_ROW = [p for p in OBJECTIVES if p.spec.per_row]
per_row = pytest.mark.parametrize("part", PER_ROW, ids=ids(PER_ROW))
objectives = pytest.mark.parametrize("part", OBJECTIVES, ids=ids(OBJECTIVES))


def test_every_room_is_discovered() -> None:
    assert {p.spec.task for p in PARTS} >= {"multiclass", "multilabel", "two_view", "reweighter", "sampler"}


@pytest.mark.parametrize("part", PARTS, ids=ids(PARTS))
def test_each_exemption_has_a_reason(part: type) -> None:
    for name, reason in part.spec.exemptions.items():
        assert len(reason.split()) > 3, f"{part.__name__} is exempt from {name} without a real reason"
    assert len(part.spec.source) > 8


@objectives
def test_function_and_module_have_the_same_defaults(part: type) -> None:
    of_function = inspect.signature(function_of(part)).parameters
    of_module = inspect.signature(part.__init__).parameters
    shared = [n for n in of_module if n in of_function and n not in ("self", *part.spec.needs)]
    assert shared
    for name in shared:
        assert of_module[name].default == of_function[name].default, name


@per_row
def test_none_gives_one_value_a_row(part: type) -> None:
    batch = batch_of(part.spec.task)
    losses = value(build(part, reduction="none"), batch)
    assert losses.shape == (len(batch.inputs[0]) * views(part, batch),)


@per_row
def test_mean_and_sum_are_those_of_none(part: type) -> None:
    batch = batch_of(part.spec.task)
    losses = value(build(part, reduction="none"), batch)
    torch.testing.assert_close(value(build(part, reduction="sum"), batch), losses.sum())
    torch.testing.assert_close(value(build(part), batch), losses.mean())


@per_row
def test_normalizer_says_what_the_mean_divides_by(part: type) -> None:
    batch = batch_of(part.spec.task)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    total = value(build(part, reduction="sum"), batch, weight=weight)
    v = views(part, batch)
    torch.testing.assert_close(value(build(part, normalizer=7), batch, weight=weight), total / 7)
    torch.testing.assert_close(value(build(part), batch, weight=weight), total / (6 * v))
    if part.__name__ != "ClassBalancedLoss":  # its class weights are part of the sum of weights
        of_weight = value(build(part, normalizer="weight"), batch, weight=weight)
        torch.testing.assert_close(of_weight, total / (weight.sum() * v))


@per_row
def test_weight_multiplies_rows(part: type) -> None:
    if not part.spec.weight_linear:
        assert isinstance(part.spec.weight_linear, No)
        return
    batch = batch_of(part.spec.task)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    plain = value(build(part, reduction="none"), batch)
    weighted = value(build(part, reduction="none"), batch, weight=weight)
    torch.testing.assert_close(weighted, plain * weight.repeat(views(part, batch)))


@per_row
def test_weight_zero_takes_the_gradient_to_exactly_zero(part: type) -> None:
    batch = batch_of(part.spec.task)
    value(build(part), batch, weight=torch.zeros(6, dtype=torch.float64)).backward()
    for leaf in batch.leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@objectives
def test_mask_equals_leaving_rows_out_even_where_they_hold_nan(part: type) -> None:
    mask = torch.tensor([True, True, False, True, False, True])
    batch = batch_of(part.spec.task)
    for leaf in batch.leaves:
        leaf.data[~mask] = torch.nan
    masked = value(build(part), batch, mask=mask)
    kept = batch.rows(mask)
    alone = value(build(part), kept)
    torch.testing.assert_close(masked, alone)
    masked.backward()
    alone.backward()
    for leaf, other in zip(batch.leaves, kept.leaves, strict=True):
        torch.testing.assert_close(leaf.grad[mask], other.grad)
        assert torch.equal(leaf.grad[~mask], torch.zeros_like(leaf.grad[~mask]))


@objectives
@pytest.mark.parametrize("empty", ["all masked", "no rows"])
def test_an_empty_reduction_is_a_connected_zero(part: type, empty: str) -> None:
    if empty == "no rows":
        batch, options = batch_of(part.spec.task).rows(slice(0, 0)), {}
    else:
        batch, options = batch_of(part.spec.task), {"mask": torch.zeros(6, dtype=torch.bool)}
    total = value(build(part), batch, **options)
    assert total.item() == 0
    total.backward()
    for leaf in batch.leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@objectives
def test_the_order_of_rows_does_not_matter(part: type) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    batch = batch_of(part.spec.task)
    torch.testing.assert_close(value(build(part), batch.rows(order)), value(build(part), batch))
    if part.spec.per_row:
        losses = value(build(part, reduction="none"), batch).unflatten(0, (-1, 6))
        permuted = value(build(part, reduction="none"), batch.rows(order)).unflatten(0, (-1, 6))
        torch.testing.assert_close(permuted, losses[:, order])


@pytest.mark.parametrize("part", [p for p in OBJECTIVES if p.spec.task in ("multiclass", "multilabel")])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integer_and_boolean_targets_are_accepted(part: type, dtype: torch.dtype) -> None:
    logits, target = batch_of(part.spec.task).inputs
    target = target.clamp_max(1)
    torch.testing.assert_close(build(part)(logits, target.to(dtype)), build(part)(logits, target))
