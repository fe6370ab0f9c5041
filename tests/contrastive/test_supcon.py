"""Supervised contrast: a double loop as the reference, NT-Xent as its limit, given positives, banks, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from counterpoise.contrastive import MemoryBank, SupConLoss, ntxent_loss, supcon_loss
from tests.pool import Pool

LABELS = torch.tensor([2, 0, 2, 1, 0, 2])


def views(count: int = 2, n: int = 6, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return normalize(torch.randn(count, n, width, dtype=torch.float64, generator=generator), dim=-1)


def by_loops(
    z: Tensor, positives: list[set[int]], temperature: float, form: str = "out", anchors: int | None = None
) -> list[float]:
    """One value a row of ``z`` (R, d); positives[i] are rows; a row without such costs 0."""
    losses = []
    for i in range(len(z) if anchors is None else anchors):
        s = {a: float(z[i] @ z[a]) / temperature for a in range(len(z)) if a != i}
        log_sum = math.log(sum(math.exp(x) for x in s.values()))
        log_probs = [s[a] - log_sum for a in sorted(positives[i])]
        if not log_probs:
            losses.append(0.0)
        elif form == "out":
            losses.append(-sum(log_probs) / len(log_probs))
        else:
            losses.append(-math.log(sum(math.exp(x) for x in log_probs) / len(log_probs)))
    return losses


def of_labels(labels: list[int]) -> list[set[int]]:
    return [{j for j, b in enumerate(labels) if b == a and j != i} for i, a in enumerate(labels)]


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_row_is_the_printed_formula(count: int, form: str) -> None:
    z = views(count)
    expected = by_loops(z.flatten(0, 1), of_labels(LABELS.tolist() * count), 0.3, form)
    ours = supcon_loss(z, labels=LABELS, temperature=0.3, form=form, reduction="none")
    assert_close(ours.tolist(), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_without_labels_it_is_nt_xent(count: int) -> None:
    z = views(count)
    assert_close(supcon_loss(z, temperature=0.2, reduction="none"), ntxent_loss(z, temperature=0.2, reduction="none"))


def test_the_mean_inside_the_logarithm_is_never_larger() -> None:
    outside, inside = (supcon_loss(views(), labels=LABELS, form=f, reduction="none") for f in ("out", "in"))
    assert (inside <= outside).all()
    assert (inside < outside).any()


def test_both_forms_are_one_with_one_positive_a_row() -> None:
    assert_close(supcon_loss(views(), form="in"), supcon_loss(views(), form="out"))


@pytest.mark.parametrize("form", ["out", "in"])
def test_equal_rows_of_one_class_cost_the_log_of_the_number_of_candidates(form: str) -> None:
    z = torch.ones(2, 5, 3, dtype=torch.float64)
    loss = supcon_loss(z, labels=torch.zeros(5, dtype=torch.int64), form=form)
    assert math.isclose(loss.item(), math.log(9), rel_tol=1e-12)


def test_a_batch_of_one_class_still_spreads_its_rows_evenly() -> None:
    labels = torch.zeros(6, dtype=torch.int64)
    assert supcon_loss(views(), labels=labels) > math.log(11)


def test_classes_collapsed_to_a_simplex_cost_least() -> None:
    corners = torch.eye(3, dtype=torch.float64) - 1 / 3
    simplex = corners[LABELS]
    least = supcon_loss(simplex, simplex, labels=LABELS, temperature=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = simplex + 0.3 * torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
        assert supcon_loss(moved, labels=LABELS, temperature=0.5) > least


def test_the_base_temperature_is_a_factor() -> None:
    plain = supcon_loss(views(), labels=LABELS, temperature=0.1)
    assert_close(supcon_loss(views(), labels=LABELS, temperature=0.1, base_temperature=0.07), plain / 0.7)
    assert_close(supcon_loss(views(), labels=LABELS, temperature=0.1, base_temperature=0.1), plain)


@pytest.mark.parametrize("form", ["out", "in"])
def test_anchors_may_be_the_first_view_alone(form: str) -> None:
    every = supcon_loss(views(), labels=LABELS, form=form, reduction="none")
    first = supcon_loss(views(), labels=LABELS, form=form, contrast_mode="one", reduction="none")
    assert_close(first, every[:6])
    assert_close(supcon_loss(views(), contrast_mode="one"), supcon_loss(views(), reduction="none")[:6].mean())


def test_rows_without_a_positive_are_left_out_unless_the_mean_is_over_all() -> None:
    z, labels = views(1)[0], torch.tensor([0, 0, 1, 2, 3, 4])
    rows = supcon_loss(z, labels=labels, reduction="none")
    assert (rows[2:] == 0).all()
    assert_close(supcon_loss(z, labels=labels), rows.sum() / 2)
    assert_close(supcon_loss(z, labels=labels, reduction_over="all"), rows.sum() / 6)


@pytest.mark.parametrize("form", ["out", "in"])
def test_a_batch_without_any_positive_gives_a_zero_connected_to_the_graph(form: str) -> None:
    z = views(1)[0].requires_grad_()
    loss = supcon_loss(z, labels=torch.arange(6), form=form)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("form", ["out", "in"])
def test_a_masked_example_is_neither_anchor_nor_key(form: str) -> None:
    mask = torch.tensor([True, False, True, True, True, False])
    z = views()
    dropped = supcon_loss(z[:, mask], labels=LABELS[mask], form=form, reduction="none")
    z[:, ~mask] = torch.nan
    rows = supcon_loss(z, labels=LABELS, mask=mask, form=form, reduction="none")
    assert_close(rows[mask.repeat(2)], dropped)
    assert (rows[~mask.repeat(2)] == 0).all()


# Positives that are given


@pytest.mark.parametrize("form", ["out", "in"])
def test_labels_are_one_matrix_of_positives(form: str) -> None:
    matrix = LABELS[:, None] == LABELS
    given = supcon_loss(views(), positives=matrix, form=form, reduction="none")
    assert_close(given, supcon_loss(views(), labels=LABELS, form=form, reduction="none"))


def test_positives_need_not_be_symmetric_nor_hold_an_examples_own_views() -> None:
    matrix = torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < 0.4
    rows = [{j for j in range(12) if matrix[i % 6, j % 6] and j != i} for i in range(12)]
    ours = supcon_loss(views(), positives=matrix, temperature=0.3, reduction="none")
    assert_close(ours.tolist(), by_loops(views().flatten(0, 1), rows, 0.3))


def test_weighted_positives_are_normalised_row_by_row() -> None:
    weights = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours = supcon_loss(views(), positives=weights, temperature=0.3, reduction="none")
    assert_close(supcon_loss(views(), positives=7 * weights, temperature=0.3, reduction="none"), ours)
    z, w = views().flatten(0, 1), weights.repeat(2, 2).fill_diagonal_(0)
    s = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
    assert_close(ours, -(w * s.log_softmax(1).fill_diagonal_(0)).sum(1) / w.sum(1))


# Banks


def bank_of(keys: Tensor, labels: Tensor | None, size: int = 9) -> MemoryBank:
    bank = MemoryBank(size, keys.shape[1], dtype=keys.dtype)
    bank.enqueue(keys, labels)
    return bank


@pytest.mark.parametrize("form", ["out", "in"])
def test_keys_of_a_bank_are_candidates_and_by_label_positives(form: str) -> None:
    keys, key_labels = views(3)[2], torch.tensor([0, 2, 2, 7, 1, 2])
    every = torch.cat([views().flatten(0, 1), keys])
    expected = by_loops(every, of_labels(LABELS.tolist() * 2 + key_labels.tolist()), 0.3, form, anchors=12)
    bank = bank_of(keys, key_labels)
    ours = supcon_loss(views(), labels=LABELS, bank=bank, temperature=0.3, form=form, reduction="none")
    assert_close(ours.tolist(), expected)


def test_keys_of_a_bank_are_negatives_to_examples_without_labels_or_with_given_positives() -> None:
    keys = views(3)[2]
    every = torch.cat([views().flatten(0, 1), keys])
    expected = by_loops(every, of_labels([*range(6)] * 2 + [*range(10, 16)]), 0.3, anchors=12)
    bank = bank_of(keys, torch.arange(6))
    assert_close(supcon_loss(views(), bank=bank, temperature=0.3, reduction="none").tolist(), expected)
    given = supcon_loss(views(), positives=torch.eye(6, dtype=torch.bool), bank=bank, temperature=0.3, reduction="none")
    assert_close(given.tolist(), expected)


def test_an_empty_bank_changes_nothing() -> None:
    empty = MemoryBank(4, 4)
    assert_close(supcon_loss(views(), labels=LABELS, bank=empty), supcon_loss(views(), labels=LABELS))


# Several ranks


def one_rank(rank: int, split: tuple[int, ...], option: str, form: str) -> float:
    z, labels = views(2, n=9), torch.tensor([0, 1, 1, 2, 0, 0, 3, 2, 1])
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    options: dict[str, Any] = {
        "labels": {"labels": labels[rows]},
        "bank": {"labels": labels[rows], "bank": bank_of(views(3)[2], LABELS)},
        "positives": {"positives": (labels[:, None] == labels)[rows]},
        "one": {"labels": labels[rows], "contrast_mode": "one"},
    }[option]
    return supcon_loss(z[:, rows], form=form, **options).item()


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("option", ["labels", "bank", "positives", "one"])
def test_ranks_equal_one_process(option: str, form: str, ranks: Pool) -> None:
    found = ranks.run(one_rank, (4, 3, 2), option, form)
    assert sum(found) / 3 == pytest.approx(one_rank(0, (9,), option, form), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: supcon_loss(views(), form="mean"), r"form is 'mean', expected one of \['out', 'in'\]"),
        (lambda: SupConLoss(contrast_mode="two"), r"contrast_mode is 'two', expected one of"),
        (lambda: SupConLoss(temperature=0.0), r"temperature is 0.0, expected a number in \(0, inf\]"),
        (lambda: SupConLoss(base_temperature=-1.0), r"base_temperature is -1.0, expected a number in \(0, inf\]"),
        (lambda: supcon_loss(views(), labels=LABELS, positives=torch.eye(6)), r"positives came together with labels"),
        (lambda: supcon_loss(views(), positives=torch.eye(12)), r"positives has shape \(12, 12\), expected \(6, 6\)"),
        (lambda: supcon_loss(views(), bank=MemoryBank(5, 3)), r"bank of width 3 got views \(2, 6, 4\)"),
        (lambda: supcon_loss(views(), bank=MemoryBank(5, 4), normalize=False), r"normalize is False, expected True"),
    ],
    ids=["form", "contrast_mode", "temperature", "base", "both", "positives", "width", "normalize"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_weighted_positives_have_no_inner_form() -> None:
    with pytest.raises(TypeError, match=r"positives has dtype torch.float32, expected torch.bool with form"):
        supcon_loss(views(), positives=torch.eye(6), form="in")
