"""CLIP, ConVIRT and the image-tabular loss: cross-entropies as the reference, labels, the learned scale, limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from counterpoise.contrastive import (
    CLIPLoss,
    ConVIRTLoss,
    ImageTabularCLIPLoss,
    MemoryBank,
    clip_loss,
    convirt_loss,
    image_tabular_clip_loss,
)
from tests.pool import Pool

N = 6
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def pairs(n: int = N, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    first, second = torch.randn(2, n, width, dtype=torch.float64, generator=generator)
    return first, second


def directions(z: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropies of the rows and of the columns of the table of similarities, (N,) each."""
    s = normalize(z, dim=1) @ normalize(other, dim=1).T / temperature
    each = torch.arange(len(z))
    return cross_entropy(s, each, reduction="none"), cross_entropy(s.T, each, reduction="none")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_it_is_the_cross_entropies_of_rows_and_columns(share: float) -> None:
    rows, columns = directions(*pairs(), 0.2)
    ours = clip_loss(*pairs(), temperature=0.2, direction_weight=share, reduction="none")
    assert_close(ours, share * rows + (1 - share) * columns)
    assert_close(clip_loss(*pairs(), temperature=0.2, direction_weight=share), ours.mean())


def test_swapping_modalities_and_directions_leaves_the_loss() -> None:
    z, other = pairs()
    assert_close(clip_loss(other, z, direction_weight=0.7), clip_loss(z, other, direction_weight=0.3))


def test_rows_of_one_modality_are_no_negatives_of_each_other() -> None:
    z, other = torch.eye(2, N, dtype=torch.float64), torch.eye(2, N, dtype=torch.float64)
    apart = clip_loss(z, other, temperature=1.0)
    assert math.isclose(apart.item(), math.log(1 + math.exp(-1)), rel_tol=1e-12)


def test_unrelated_equal_embeddings_cost_the_log_of_the_batch() -> None:
    ones = torch.ones(N, 3, dtype=torch.float64)
    assert math.isclose(clip_loss(ones, ones).item(), math.log(N), rel_tol=1e-12)


def test_one_pair_costs_nothing() -> None:
    assert clip_loss(*pairs(1)).item() == 0


def test_convirt_at_one_half_is_clip() -> None:
    assert_close(convirt_loss(*pairs(), direction_weight=0.5), clip_loss(*pairs(), temperature=0.1))


def test_convirt_gives_the_images_three_quarters() -> None:
    rows, columns = directions(*pairs(), 0.1)
    assert_close(ConVIRTLoss()(*pairs()), (0.75 * rows + 0.25 * columns).mean())


def test_image_tabular_without_labels_is_clip() -> None:
    for legacy in (False, True):
        ours = ImageTabularCLIPLoss(legacy=legacy)(*pairs())
        assert_close(ours, clip_loss(*pairs(), temperature=0.1))


# Labels


def labelled(s: Tensor, labels: Tensor) -> Tensor:
    """Mean over the columns of the row's class of the negative log-probabilities, (N,)."""
    same = labels[:, None] == labels
    return -(same * s.log_softmax(1)).sum(1) / same.sum(1)


def test_all_examples_of_the_class_are_positives_in_the_other_modality() -> None:
    z, other = pairs()
    s = normalize(z, dim=1) @ normalize(other, dim=1).T / 0.1
    expected = 0.3 * labelled(s, LABELS) + 0.7 * labelled(s.T, LABELS)
    options: dict[str, Any] = {"labels": LABELS, "temperature": 0.1, "direction_weight": 0.3, "reduction": "none"}
    assert_close(clip_loss(z, other, **options), expected)
    assert_close(image_tabular_clip_loss(z, other, **options), expected)


def test_labels_that_are_all_different_or_unknown_equal_none() -> None:
    for labels in (torch.tensor([7, 3, 9, 1, 0, 4]), torch.full((N,), -1)):
        assert_close(clip_loss(*pairs(), labels=labels), clip_loss(*pairs()))


def test_the_released_image_tabular_loss_is_the_direction_of_the_images_alone() -> None:
    z, other = pairs()
    s = normalize(z, dim=1) @ normalize(other, dim=1).T / 0.1
    same = LABELS[:, None] == LABELS
    denominators = (s.exp().sum(1) + 1e-6).log()
    rows = -(same * (s - denominators[:, None])).sum(1) / same.sum(1)
    columns = -(same * (s.T - denominators[None])).sum(1) / same.sum(1)  # the rows' denominators once more
    for share in (0.0, 0.4, 1.0):
        ours = image_tabular_clip_loss(z, other, labels=LABELS, direction_weight=share, legacy=True)
        assert_close(ours, (share * rows + (1 - share) * columns).mean())
    assert image_tabular_clip_loss(z, other, labels=LABELS) != ours


@pytest.mark.parametrize("loss", [clip_loss, convirt_loss, image_tabular_clip_loss])
def test_a_masked_pair_is_neither_anchor_nor_key(loss: Callable[..., Tensor]) -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    z, other = pairs()
    dropped = loss(z[mask], other[mask], reduction="none")
    z[~mask], other[~mask] = torch.nan, torch.nan
    rows = loss(z, other, mask=mask, reduction="none")
    assert_close(rows[mask], dropped)
    assert (rows[~mask] == 0).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_masked_pair_has_no_part_where_there_are_labels(legacy: bool) -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    z, other = pairs()
    dropped = image_tabular_clip_loss(z[mask], other[mask], labels=LABELS[mask], legacy=legacy)
    assert_close(image_tabular_clip_loss(z, other, labels=LABELS, mask=mask, legacy=legacy), dropped)


# The learned scale


def test_the_scale_starts_at_one_over_the_temperature_and_learns() -> None:
    loss = CLIPLoss()
    assert_close(loss.logit_scale.item(), math.log(1 / 0.07))
    assert loss.temperature == pytest.approx(0.07)
    loss(*pairs()).backward()
    scale = torch.tensor(1 / 0.07, dtype=torch.float64, requires_grad=True)
    (of_scale,) = torch.autograd.grad(clip_loss(*pairs(), temperature=1 / scale), scale)
    assert_close(loss.logit_scale.grad.item(), (of_scale * scale).item(), rtol=1e-5, atol=0)  # d/dt of exp(t)


def test_the_scale_never_exceeds_its_bound() -> None:
    loss = CLIPLoss(max_scale=20.0)
    loss.logit_scale.data.fill_(9.0)
    assert_close(loss(*pairs()), clip_loss(*pairs(), temperature=1 / 20))
    assert loss.temperature == 1 / 20


def test_beyond_its_bound_the_scale_gets_only_gradients_that_lead_back() -> None:
    matching, opposed = (pairs()[0], pairs()[0]), (pairs()[0], -pairs()[0])
    for views, within, beyond in ((matching, -1, 0), (opposed, 1, 1)):  # signs: descent would go up, or down
        for start, sign in ((2.0, within), (9.0, beyond)):
            loss = CLIPLoss(max_scale=20.0)
            loss.logit_scale.data.fill_(start)
            loss(*views).backward()
            assert loss.logit_scale.grad.sign() == sign


def test_a_fixed_temperature_stays() -> None:
    loss = CLIPLoss(temperature=0.5, learn_temperature=False)
    z, other = pairs()
    loss(z.requires_grad_(), other).backward()
    assert loss.logit_scale.grad is None
    assert_close(loss(z, other), clip_loss(z, other, temperature=0.5), rtol=1e-6, atol=0)


def test_the_scale_is_named_for_no_weight_decay_and_keeps_its_precision() -> None:
    loss = CLIPLoss()
    assert [name for name, _ in loss.named_parameters()] == list(loss.no_weight_decay)
    before = copy.deepcopy(loss.state_dict())
    assert torch.equal(loss.half().state_dict()["logit_scale"], before["logit_scale"])
    assert loss.logit_scale.dtype == torch.float32


# Several ranks


def one_rank(rank: int, split: tuple[int, ...], kind: str) -> float:
    z, other = pairs(9)
    labels = torch.arange(9) % 4
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    options = {"clip": {}, "labels": {"labels": labels[rows]}, "legacy": {"labels": labels[rows], "legacy": True}}
    return image_tabular_clip_loss(z[rows], other[rows], **options[kind]).item()


@pytest.mark.parametrize("kind", ["clip", "labels", "legacy"])
def test_ranks_equal_one_process(kind: str, ranks: Pool) -> None:
    found = ranks.run(one_rank, (4, 3, 2), kind)
    assert sum(found) / 3 == pytest.approx(one_rank(0, (9,), kind), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_loss(pairs()[0]), r"other is None, expected the second modality's embeddings \(6, 4\)"),
        (lambda: clip_loss(pairs()[0], pairs(5)[1]), r"other has shape \(5, 4\), expected \(6, 4\)"),
        (lambda: clip_loss(*pairs(), temperature=0.0), r"temperature is 0.0, expected a number in \(0, inf\]"),
        (lambda: clip_loss(*pairs(), direction_weight=1.5), r"direction_weight is 1.5, expected a number in \[0, 1\]"),
        (lambda: CLIPLoss(temperature=0.001), r"max_scale is 100.0, expected a number in"),
        (lambda: CLIPLoss()(*pairs(), bank=MemoryBank(4, 4)), r"CLIPLoss got a bank, expected two modalities only"),
        (lambda: ConVIRTLoss()(*pairs(), labels=LABELS), r"ConVIRTLoss got labels, expected two modalities only"),
        (lambda: ImageTabularCLIPLoss()(*pairs(), bank=MemoryBank(4, 4)), r"ImageTabularCLIPLoss got a bank"),
        (lambda: ImageTabularCLIPLoss(direction_weight=-0.1), r"direction_weight is -0.1, expected a number in"),
    ],
    ids=["one", "shapes", "temperature", "share", "bound", "bank", "labels", "tabular bank", "tabular share"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
