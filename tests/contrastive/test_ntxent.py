"""NT-Xent and its queue form: a double loop as the reference, limits, masks, labels, banks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from counterpoise.contrastive import NTXentLoss, ntxent_loss
from counterpoise.memory import MemoryBank
from tests.pool import Pool


def views(count: int = 2, n: int = 5, width: int = 4) -> Tensor:
    return torch.randn(count, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def bank_of(keys: Tensor, *, size: int | None = None, labels: Tensor | None = None) -> MemoryBank:
    bank = MemoryBank(size or len(keys), keys.shape[1], dtype=keys.dtype)
    bank.enqueue(keys, labels)
    return bank


def by_loops(z: Tensor, labels: list[int], temperature: float) -> list[float | None]:
    """One value a row of ``z`` (R, d): rows of the same label attract; None for a row without such."""
    z = normalize(z, dim=1)
    losses: list[float | None] = []
    for i in range(len(z)):
        s = {a: float(z[i] @ z[a]) / temperature for a in range(len(z)) if a != i}
        log_sum = math.log(sum(math.exp(x) for x in s.values()))
        log_probs = [s[a] - log_sum for a in s if labels[a] == labels[i]]
        losses.append(-sum(log_probs) / len(log_probs) if log_probs else None)
    return losses


def test_two_views_are_the_double_loop() -> None:
    first, second = views()
    expected = by_loops(torch.cat([first, second]), [*range(5), *range(5)], 0.3)
    assert_close(ntxent_loss(first, second, temperature=0.3, reduction="none").tolist(), expected)


def test_several_views_are_the_double_loop_in_view_major_order() -> None:
    z = views(3)
    expected = by_loops(z.flatten(0, 1), [*range(5)] * 3, 0.3)
    assert_close(ntxent_loss(z, temperature=0.3, reduction="none").tolist(), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_labels_are_the_double_loop(count: int) -> None:
    z, labels = views(count), torch.tensor([3, 1, 3, 1, 3])
    expected = by_loops(z.flatten(0, 1), labels.tolist() * count, 0.5)
    given = z[0] if count == 1 else z
    assert_close(ntxent_loss(given, labels=labels, reduction="none").tolist(), expected)


def test_the_mean_is_over_rows() -> None:
    rows = ntxent_loss(*views(), reduction="none")
    assert rows.shape == (10,)
    assert_close(ntxent_loss(*views()), rows.mean())


def test_two_views_given_apart_or_stacked_are_the_same() -> None:
    assert torch.equal(ntxent_loss(*views()), ntxent_loss(views()))


def test_labels_that_are_all_different_equal_none() -> None:
    labels = torch.tensor([40, 7, 11, 5, 23])
    assert_close(ntxent_loss(*views(), labels=labels), ntxent_loss(*views()))


def test_it_is_symmetric_in_the_two_views() -> None:
    first, second = views()
    assert_close(ntxent_loss(first, second), ntxent_loss(second, first))


@pytest.mark.parametrize("temperature", [0.05, 0.5, 5.0])
def test_it_is_never_negative_with_one_positive_a_row(temperature: float) -> None:
    """-log of a probability: the positive is among the candidates."""
    assert (ntxent_loss(*views(), temperature=temperature, reduction="none") > 0).all()


def test_one_example_costs_nothing() -> None:
    first, second = views(n=1)
    assert ntxent_loss(first, second).item() == 0


def test_identical_views_far_from_all_others_cost_little() -> None:
    z = torch.eye(4, dtype=torch.float64)
    assert_close(ntxent_loss(z, z, temperature=0.1).item(), math.log1p(6 * math.exp(-10)))


def test_lengths_do_not_matter_when_it_normalises() -> None:
    first, second = views()
    assert_close(ntxent_loss(100 * first, 0.01 * second), ntxent_loss(first, second))


def test_without_normalising_the_rows_are_taken_as_they_are() -> None:
    first, second = views()
    assert_close(
        ntxent_loss(normalize(first, dim=1), normalize(second, dim=1), normalize=False), ntxent_loss(first, second)
    )
    assert ntxent_loss(first, second, normalize=False) != ntxent_loss(first, second)


# Rows that do not count


def test_a_masked_example_is_neither_anchor_nor_key() -> None:
    first, second = views()
    mask = torch.tensor([True, False, True, True, False])
    rows = ntxent_loss(first, second, mask=mask, reduction="none")
    dropped = ntxent_loss(first[mask], second[mask], reduction="none")
    assert_close(rows[mask.repeat(2)], dropped)
    assert (rows[~mask.repeat(2)] == 0).all()
    assert_close(ntxent_loss(first, second, mask=mask), dropped.mean())


def test_rows_without_a_positive_are_left_out_of_the_mean() -> None:
    z, labels = views(1)[0], torch.tensor([0, 0, 1, 0, 2])
    rows = ntxent_loss(z, labels=labels, reduction="none")
    assert (rows[[2, 4]] == 0).all()
    assert_close(ntxent_loss(z, labels=labels), rows.sum() / 3)


def test_reduction_over_all_keeps_rows_without_a_positive_as_zeros() -> None:
    z, labels = views(1)[0], torch.tensor([0, 0, 1, 0, 2])
    rows = ntxent_loss(z, labels=labels, reduction="none")
    assert_close(ntxent_loss(z, labels=labels, reduction_over="all"), rows.sum() / 5)


def test_a_batch_without_any_positive_gives_a_zero_connected_to_the_graph() -> None:
    z = views(1)[0].requires_grad_()
    loss = ntxent_loss(z)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


# Banks


def test_a_bank_makes_it_cross_entropy_with_the_positive_as_class_zero() -> None:
    first, second, keys = (normalize(z, dim=1) for z in views(3))
    logits = torch.cat([(first * second).sum(1, keepdim=True), first @ keys.T], dim=1) / 0.07
    ours = ntxent_loss(first, second, bank=bank_of(keys), temperature=0.07, reduction="none")
    assert_close(ours, cross_entropy(logits, torch.zeros(5, dtype=torch.int64), reduction="none"))


def test_other_rows_of_the_batch_are_no_negatives_beside_a_bank() -> None:
    first, second, keys = views(3)
    whole = ntxent_loss(first, second, bank=bank_of(keys), reduction="none")
    alone = ntxent_loss(first[:1], second[:1], bank=bank_of(keys), reduction="none")
    assert_close(whole[:1], alone)


def test_slots_never_filled_do_not_count() -> None:
    first, second, keys = views(3)
    assert_close(
        ntxent_loss(first, second, bank=bank_of(keys, size=64)), ntxent_loss(first, second, bank=bank_of(keys))
    )


def test_an_empty_bank_gives_a_zero_connected_to_the_graph() -> None:
    first, second = views()
    first.requires_grad_()
    loss = ntxent_loss(first, second, bank=MemoryBank(8, 4))
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert first.grad is not None
    assert first.grad.abs().max() < 1e-15


def test_the_labels_of_a_bank_say_nothing_to_examples_without_labels() -> None:
    """Row 3 of the batch and class 3 of the bank are different things."""
    first, second, keys = views(3)
    labelled = bank_of(keys, labels=torch.arange(5))
    assert_close(ntxent_loss(first, second, bank=labelled), ntxent_loss(first, second, bank=bank_of(keys)))


def test_keys_of_the_same_label_in_the_bank_are_positives() -> None:
    first, second, keys = (normalize(z, dim=1) for z in views(3))
    labels, bank_labels = torch.tensor([0, 1, 2, 3, 4]), [0, 0, 7, 1, 9]
    ours = ntxent_loss(
        first, second, labels=labels, bank=bank_of(keys, labels=torch.tensor(bank_labels)), reduction="none"
    )
    for i in range(5):
        s = [float(first[i] @ second[i]) / 0.5] + [float(first[i] @ k) / 0.5 for k in keys]
        log_sum = math.log(sum(math.exp(x) for x in s))
        positives = [s[0]] + [x for x, label in zip(s[1:], bank_labels, strict=True) if label == i]
        assert math.isclose(ours[i].item(), log_sum - sum(positives) / len(positives))


def test_a_masked_example_has_no_part_in_a_bank_loss() -> None:
    first, second, keys = views(3)
    mask = torch.tensor([True, True, False, True, True])
    for labels in (torch.arange(5), torch.tensor([0, 1, 0, 1, 0])):
        ours = ntxent_loss(first, second, labels=labels, bank=bank_of(keys), mask=mask)
        dropped = ntxent_loss(first[mask], second[mask], labels=labels[mask], bank=bank_of(keys))
        assert_close(ours, dropped)


def test_the_objective_only_reads_the_bank() -> None:
    first, second, keys = views(3)
    bank = bank_of(keys, size=8)
    before = {name: buffer.clone() for name, buffer in bank.state_dict().items()}
    NTXentLoss()(first, second, bank=bank)
    assert all(torch.equal(buffer, before[name]) for name, buffer in bank.state_dict().items())


def test_a_gradient_reaches_the_positive_key_beside_a_bank() -> None:
    first, second, keys = views(3)
    second.requires_grad_()
    ntxent_loss(first, second, bank=bank_of(keys)).backward()
    assert second.grad is not None
    assert second.grad.norm() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntxent_loss(views(1)[0], bank=MemoryBank(8, 4)), r"expected two views of its width"),
        (lambda: ntxent_loss(*views(), bank=MemoryBank(8, 3)), r"bank of width 3 got views \(2, 5, 4\)"),
        (lambda: ntxent_loss(views()[0], views()[1, :3]), r"other has shape \(3, 4\), expected \(5, 4\)"),
        (lambda: ntxent_loss(*views(), temperature=0.0), r"temperature is 0.0, expected a number in \(0, inf\]"),
        (lambda: ntxent_loss(*views(), reduction_over="any"), r"reduction_over is 'any', expected one of"),
        (lambda: ntxent_loss(*views(), labels=torch.arange(10)), r"labels has shape \(10,\), expected \(5,\)"),
    ],
    ids=["bank without view", "width", "shapes", "temperature", "reduction_over", "labels"],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_nan_embeddings_are_never_a_loss_of_zero() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    a[0] = torch.nan
    assert ntxent_loss(a, b).isnan()
    bank = MemoryBank(5, 3, init="random")
    assert ntxent_loss(a, b, bank=bank, reduction="none").isnan().tolist() == [True, False, False, False]


def test_a_bank_of_unit_vectors_needs_normalised_views() -> None:
    with pytest.raises(ValueError, match="normalize is False"):
        ntxent_loss(torch.randn(4, 3), torch.randn(4, 3), bank=MemoryBank(5, 3), normalize=False)


def one_rank_masks(rank: int) -> float:
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    return ntxent_loss(z, z + 0.1, mask=torch.ones(4, dtype=torch.bool) if rank == 0 else None).item()


def test_a_mask_on_one_rank_alone_does_not_hang(ranks: Pool) -> None:
    assert len(set(ranks.run(one_rank_masks))) == 3


def labelled_against_bank(rank: int, split: tuple[int, ...]) -> float:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9, 3, generator=g, dtype=torch.float64)
    labels, bank = torch.arange(9) % 2, MemoryBank(6, 3, dtype=torch.float64)
    bank.enqueue(torch.randn(6, 3, generator=g, dtype=torch.float64), torch.arange(6) % 2)
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    return ntxent_loss(a[rows], b[rows], labels=labels[rows], bank=bank).item()


def test_labels_and_a_bank_over_ranks_equal_one_process(ranks: Pool) -> None:
    values = ranks.run(labelled_against_bank, (4, 3, 2))
    assert sum(values) / 3 == pytest.approx(labelled_against_bank(0, (9,)), rel=1e-9)
