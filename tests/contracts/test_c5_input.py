"""C5: bad input is refused in one sentence that names the argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.contracts.parts import OBJECTIVES, REWEIGHTERS, SAMPLERS, batch_of, build, ids, value

objectives = pytest.mark.parametrize("part", OBJECTIVES, ids=ids(OBJECTIVES))
SUPERVISED = [p for p in OBJECTIVES if p.spec.task in ("multiclass", "multilabel")]
supervised = pytest.mark.parametrize("part", SUPERVISED, ids=ids(SUPERVISED))


def refusal(call: Callable[[], object], *, naming: str) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(naming), text
    assert "\n" not in text
    return text


@objectives
@pytest.mark.parametrize("name", ["weight", "mask"])
def test_weight_and_mask_of_another_length(part: type, name: str) -> None:
    batch = batch_of(part.spec.task)
    wrong = torch.ones(7, dtype=torch.bool if name == "mask" else torch.float64)
    assert "(7,)" in refusal(lambda: value(build(part), batch, **{name: wrong}), naming=name)


@objectives
def test_a_mask_that_is_not_boolean(part: type) -> None:
    batch = batch_of(part.spec.task)
    assert "bool" in refusal(lambda: value(build(part), batch, mask=torch.ones(6)), naming="mask")


@objectives
def test_settings_out_of_range(part: type) -> None:
    if part.spec.per_row:
        assert "'mean'" in refusal(lambda: build(part, reduction="avg"), naming="reduction")
        refusal(lambda: build(part, normalizer="rows"), naming="normalizer")
        refusal(lambda: build(part, normalizer=0), naming="normalizer")
    if "class_counts" in part.spec.needs:
        assert "class 1" in refusal(lambda: part(class_counts=[5, 0, 2]), naming="class_counts")
        refusal(lambda: part(class_counts=[5, -1]), naming="class_counts")


@supervised
def test_a_target_of_another_shape(part: type) -> None:
    logits, target = batch_of(part.spec.task).inputs
    text = refusal(lambda: build(part)(logits, target[:-1]), naming="target")
    assert str(tuple(target[:-1].shape)) in text
    assert "expected" in text


@supervised
def test_a_label_out_of_range_is_shown(part: type) -> None:
    logits, target = batch_of(part.spec.task).inputs
    wrong = target.clone()
    wrong.view(-1)[0] = 9
    assert "9" in refusal(lambda: build(part)(logits, wrong), naming="target")


@supervised
def test_integer_logits(part: type) -> None:
    logits, target = batch_of(part.spec.task).inputs
    assert "int64" in refusal(lambda: build(part)(logits.long(), target), naming="logits")


@pytest.mark.parametrize("part", [p for p in OBJECTIVES if "_view" in p.spec.task or p.spec.task == "paired"])
def test_views_that_do_not_fit(part: type) -> None:
    batch = batch_of(part.spec.task)
    z, other = batch.inputs
    assert "(6, 4)" in refusal(lambda: build(part)(z, other[:, :4], **batch.options), naming="other")
    refusal(lambda: build(part)(z[0], other[0], **batch.options), naming="z")
    refusal(lambda: build(part)(z.long(), other.long(), **batch.options), naming="z")


@pytest.mark.parametrize("part", REWEIGHTERS, ids=ids(REWEIGHTERS))
def test_groups_that_do_not_fit(part: type) -> None:
    losses = torch.rand(6)
    refusal(lambda: build(part)(losses[None], group=torch.zeros(1, dtype=torch.int64)), naming="losses")
    if "group_counts" in part.spec.needs:
        refusal(lambda: build(part)(losses, group=torch.zeros(5, dtype=torch.int64)), naming="group")
        assert "7" in refusal(lambda: build(part)(losses, group=torch.full((6,), 7)), naming="group")


@pytest.mark.parametrize("part", SAMPLERS, ids=ids(SAMPLERS))
def test_samplers_refuse_no_samples(part: type) -> None:
    epochs = {"num_epochs": 3} if "num_epochs" in part.spec.needs else {}
    given = part.spec.needs[0]  # targets, scores or indices
    with pytest.raises(ValueError, match=rf"{given}|num_samples"):
        part(**{given: torch.tensor([], dtype=torch.int64)}, **epochs)
