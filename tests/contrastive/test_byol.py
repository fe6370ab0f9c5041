"""BYOL and SimSiam: cosines by hand, which view meets which, and that targets are held fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss
from torch.testing import assert_close

from counterpoise.contrastive import BYOLLoss, SimSiamLoss, byol_loss, simsiam_loss
from counterpoise.memory import MemoryBank

N, D = 5, 4


def embeddings(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(p: Tensor, t: Tensor) -> Tensor:
    return cosine_similarity(p, t, dim=-1)


P, T = embeddings(seed=1), embeddings(seed=2)


def test_one_direction_is_two_less_twice_the_cosine() -> None:
    assert_close(byol_loss(P[0], T[1], reduction="none"), 2 - 2 * cosine(P[0], T[1]))
    assert_close(simsiam_loss(P[0], T[1], reduction="none"), -cosine(P[0], T[1]))


def test_both_directions_of_byol_are_a_sum() -> None:
    assert_close(byol_loss(P, T), byol_loss(P[0], T[1]) + byol_loss(P[1], T[0]))


def test_both_directions_of_simsiam_are_a_mean() -> None:
    assert_close(simsiam_loss(P, T), (simsiam_loss(P[0], T[1]) + simsiam_loss(P[1], T[0])) / 2)


def test_a_direction_of_byol_is_two_and_twice_simsiam_and_both_are_four_and_four_times() -> None:
    assert_close(byol_loss(P[0], T[1]), 2 + 2 * simsiam_loss(P[0], T[1]))
    assert_close(byol_loss(P, T), 4 + 4 * simsiam_loss(P, T))


def test_a_row_is_a_prediction_in_view_major_order() -> None:
    rows = byol_loss(P, T, reduction="none").unflatten(0, (2, N))
    assert_close(rows, 4 - 4 * torch.stack([cosine(P[0], T[1]), cosine(P[1], T[0])]))


def test_several_views_are_the_mean_over_pairs_of_both_directions() -> None:
    p, t = embeddings(3, seed=3), embeddings(3, seed=4)
    pairs = [byol_loss(p[a], t[b]) + byol_loss(p[b], t[a]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert_close(byol_loss(p, t), torch.stack(pairs).mean())


def test_small_crops_meet_all_targets_and_large_ones_those_of_others() -> None:
    p = embeddings(4, seed=3)
    rows = simsiam_loss(p, T, reduction="none").unflatten(0, (4, N))
    assert_close(rows[0], -cosine(p[0], T[1]))
    assert_close(rows[3], -(cosine(p[3], T[0]) + cosine(p[3], T[1])) / 2)


def test_without_normalising_a_row_is_the_mean_squared_difference() -> None:
    assert_close(byol_loss(P[0], T[1], normalize=False), mse_loss(P[0], T[1]))
    assert_close(byol_loss(P, T, normalize=False), mse_loss(P[0], T[1]) + mse_loss(P[1], T[0]))


def test_lengths_do_not_matter_when_it_normalises() -> None:
    for loss in (byol_loss, simsiam_loss):
        assert_close(loss(100 * P, 0.01 * T), loss(P, T))


def test_the_bounds_are_reached() -> None:
    both = torch.stack([P[0], P[0]])
    assert_close([byol_loss(both, both).item(), byol_loss(both, -both).item()], [0.0, 8.0], atol=1e-12, rtol=0)
    assert_close([simsiam_loss(both, both).item(), simsiam_loss(both, -both).item()], [-1.0, 1.0])


@pytest.mark.parametrize("loss", [byol_loss, simsiam_loss])
def test_targets_are_held_fixed(loss: Callable[..., Tensor]) -> None:
    p, t = P.clone().requires_grad_(), T.clone().requires_grad_()
    loss(p, t).backward()
    assert t.grad is None
    assert p.grad is not None
    assert (p.grad.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("loss", [byol_loss, simsiam_loss])
def test_a_masked_example_is_as_good_as_absent(loss: Callable[..., Tensor]) -> None:
    mask = torch.tensor([True, False, True, True, False])
    p, t = P.clone(), T.clone()
    p[:, ~mask] = t[:, ~mask] = torch.nan
    assert_close(loss(p, t, mask=mask), loss(P[:, mask], T[:, mask]))


@pytest.mark.parametrize("loss", [byol_loss, simsiam_loss])
def test_a_weight_multiplies_the_rows_of_all_views(loss: Callable[..., Tensor]) -> None:
    weight = torch.tensor([1.0, 0.0, 3.0, 0.5, 2.0])
    rows = loss(P, T, reduction="none")
    assert_close(loss(P, T, weight=weight, reduction="none"), rows * weight.repeat(2))
    ours = loss(P, T, weight=weight, normalizer="weight")
    assert_close(ours, (rows * weight.repeat(2)).sum() / (2 * weight.sum()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loss: loss(P[0]), r"other is None, expected"),
        (lambda loss: loss(P[0], T[1, :3]), r"other has shape \(3, 4\), expected \(5, 4\)"),
        (lambda loss: loss(P, T[:1]), r"other holds 1 view"),
        (lambda loss: loss(P, T, labels=torch.arange(N)), r"got labels, expected predictions and"),
        (lambda loss: loss(P, T, bank=MemoryBank(4, D)), r"got a bank, expected predictions and"),
    ],
    ids=["no targets", "shape", "one view", "labels", "bank"],
)
@pytest.mark.parametrize("part", [BYOLLoss, SimSiamLoss])
def test_what_does_not_fit_is_refused(part: type, call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(part())
