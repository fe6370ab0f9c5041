"""Banks: where keys go, what they refuse to write, and how they survive a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.memory import IndexBank, MemoryBank


def angles(*degrees: float) -> Tensor:
    """Unit vectors of the plane, recognisable after they were stored."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def bank_of(size: int, **options: Any) -> MemoryBank:
    return MemoryBank(size, 2, dtype=torch.float64, **options)


def degrees(bank: MemoryBank) -> list[float | None]:
    """The angle in each slot, None where nothing is."""
    stored = torch.rad2deg(torch.atan2(bank.keys[:, 1], bank.keys[:, 0])).round().tolist()
    return [angle if valid else None for angle, valid in zip(stored, bank.valid.tolist(), strict=True)]


# First in, first out


def test_it_starts_empty() -> None:
    bank = bank_of(3)
    assert degrees(bank) == [None] * 3
    assert bank.labels.tolist() == [-1] * 3


def test_it_fills_from_the_first_slot() -> None:
    bank = bank_of(4)
    bank.enqueue(angles(10, 20))
    assert degrees(bank) == [10, 20, None, None]
    bank.enqueue(angles(30))
    assert degrees(bank) == [10, 20, 30, None]


def test_a_batch_wraps_around_the_end_over_the_oldest() -> None:
    bank = bank_of(4)
    bank.enqueue(angles(10, 20, 30))
    bank.enqueue(angles(40, 50, 60))
    assert degrees(bank) == [50, 60, 30, 40]
    bank.enqueue(angles(70))
    assert degrees(bank) == [50, 60, 70, 40]


def test_a_batch_that_ends_with_the_bank_starts_over_at_the_first_slot() -> None:
    bank = bank_of(4)
    bank.enqueue(angles(10, 20, 30, 40))
    assert int(bank.pointer) == 0
    bank.enqueue(angles(50))
    assert degrees(bank) == [50, 20, 30, 40]


@pytest.mark.parametrize("already", [0, 1, 2])
def test_of_more_keys_than_slots_the_last_remain(already: int) -> None:
    """As if they had come one at a time."""
    at_once, singly = bank_of(3), bank_of(3)
    for bank in (at_once, singly):
        bank.enqueue(angles(*[5.0] * already))
    keys = angles(10, 20, 30, 40, 50, 60, 70)
    at_once.enqueue(keys, torch.arange(7))
    for i, key in enumerate(keys):
        singly.enqueue(key[None], torch.tensor([i]))
    assert degrees(at_once) == degrees(singly)
    assert sorted(degrees(at_once)) == [50, 60, 70]
    assert torch.equal(at_once.labels, singly.labels)
    assert torch.equal(at_once.pointer, singly.pointer)


def test_many_batches_leave_the_latest_keys() -> None:
    bank = bank_of(5)
    written: list[float] = []
    for batch in range(9):
        new = [float(10 * batch + k) for k in range(1 + batch % 4)]
        bank.enqueue(angles(*new))
        written += new
    assert sorted(degrees(bank)) == sorted(written[-5:])


def test_drop_leaves_out_what_does_not_fit_before_the_end() -> None:
    bank = bank_of(4, overflow="drop")
    bank.enqueue(angles(10, 20, 30))
    bank.enqueue(angles(40, 50, 60))
    assert degrees(bank) == [10, 20, 30, 40]
    assert int(bank.pointer) == 0
    bank.enqueue(angles(70))
    assert degrees(bank) == [70, 20, 30, 40]


def test_drop_keeps_the_first_of_more_keys_than_slots() -> None:
    bank = bank_of(2, overflow="drop")
    bank.enqueue(angles(10, 20, 30))
    assert degrees(bank) == [10, 20]


def test_no_keys_change_nothing() -> None:
    bank = bank_of(3)
    bank.enqueue(angles(10))
    bank.enqueue(torch.zeros(0, 2, dtype=torch.float64))
    assert degrees(bank) == [10, None, None]
    assert int(bank.pointer) == 1


def test_labels_lie_beside_their_keys() -> None:
    bank = bank_of(3)
    bank.enqueue(angles(10, 20), torch.tensor([7, 8]))
    assert bank.labels.tolist() == [7, 8, -1]
    bank.enqueue(angles(30, 40), torch.tensor([9, 6]))
    assert bank.labels.tolist() == [6, 8, 9]


def test_keys_without_labels_forget_the_label_of_the_slot() -> None:
    bank = bank_of(2)
    bank.enqueue(angles(10, 20), torch.tensor([7, 8]))
    bank.enqueue(angles(30))
    assert bank.labels.tolist() == [-1, 8]


def test_keys_are_stored_with_unit_length() -> None:
    bank = bank_of(2)
    bank.enqueue(angles(10, 20) * torch.tensor([[100.0], [0.01]]))
    assert_close(bank.keys, angles(10, 20))


def test_keys_are_stored_in_the_type_of_the_bank_and_without_a_graph() -> None:
    bank = MemoryBank(2, 2)
    bank.enqueue(angles(10).requires_grad_())
    assert bank.keys.dtype == torch.float32
    assert not bank.keys.requires_grad


# What is not written


def state(bank: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in bank.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_nothing_is_written_in_eval_mode() -> None:
    bank = bank_of(3)
    bank.enqueue(angles(10))
    before = state(bank)
    bank.eval().enqueue(angles(20))
    assert same(state(bank), before)
    bank.train().enqueue(angles(20))
    assert degrees(bank) == [10, 20, None]


def test_nothing_is_written_in_a_second_pass() -> None:
    bank = bank_of(3)
    with second_pass():
        bank.enqueue(angles(20))
    assert same(state(bank), state(bank_of(3)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_with_a_key_that_is_not_finite_is_not_written(value: float) -> None:
    bank, keys = bank_of(3), angles(10, 20)
    keys[1, 0] = value
    bank.enqueue(keys)
    assert same(state(bank), state(bank_of(3)))


# State and start


def test_a_loaded_bank_goes_on_where_the_saved_one_was() -> None:
    saved, loaded = bank_of(3), bank_of(3)
    saved.enqueue(angles(10, 20), torch.tensor([1, 2]))
    loaded.load_state_dict(saved.state_dict())
    assert int(loaded.pointer) == int(loaded.filled) == 2
    for bank in (saved, loaded):
        bank.enqueue(angles(30, 40))
    assert same(state(loaded), state(saved))
    assert degrees(loaded) == [40, 20, 30]


def test_casting_a_model_leaves_the_keys_their_precision() -> None:
    bank = bank_of(2)
    bank.enqueue(angles(10))
    assert_close(bank.half().keys[:1], angles(10))


def test_a_random_start_is_full_of_unit_vectors() -> None:
    bank = MemoryBank(50, 8, init="random")
    assert bank.valid.all()
    assert_close(bank.keys.norm(dim=1), torch.ones(50))
    assert bank.keys.std(0).min() > 0.1
    assert (bank.labels == -1).all()


def test_a_random_start_is_reproduced_by_its_generator() -> None:
    first, second, third = (
        MemoryBank(5, 8, init="random", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.keys, second.keys)
    assert not torch.equal(first.keys, third.keys)


def test_random_keys_are_overwritten_first_to_last() -> None:
    bank = bank_of(3, init="random")
    random = normalize(bank.keys.clone(), dim=1)
    bank.enqueue(angles(10))
    assert_close(bank.keys, torch.cat([angles(10), random[1:]]))
    assert bank.valid.all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bank_of(3).enqueue(torch.zeros(4, 5)), r"keys has shape \(4, 5\), expected \(N, 2\)"),
        (
            lambda: bank_of(3).enqueue(torch.zeros(2)),
            r"keys has shape \(2,\) and dtype torch.float32, expected a floating",
        ),
        (lambda: bank_of(3).enqueue(angles(1, 2), torch.zeros(3)), r"labels has shape \(3,\), expected \(2,\)"),
        (lambda: MemoryBank(0, 2), r"size is 0, expected a number in \[1, inf\]"),
        (lambda: MemoryBank(2, 2, init="zeros"), r"init is 'zeros', expected one of \['empty', 'random'\]"),
        (lambda: MemoryBank(2, 2, overflow="wrp"), r"overflow is 'wrp', .* did you mean 'wrap'\?"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_does_not_fit_is_refused_in_eval_mode_too() -> None:
    with pytest.raises(ValueError, match=r"keys has shape"):
        bank_of(3).eval().enqueue(torch.zeros(4, 5))


# A slot for each example


def index_bank_of(size: int, **options: Any) -> IndexBank:
    return IndexBank(size, 2, dtype=torch.float64, **options)


def slots(bank: IndexBank) -> list[float | None]:
    """The angle in each slot, None where nothing is."""
    stored = torch.rad2deg(torch.atan2(bank.keys[:, 1], bank.keys[:, 0])).round().tolist()
    return [angle if filled else None for angle, filled in zip(stored, bank.filled.tolist(), strict=True)]


def test_an_index_bank_writes_to_the_slot_of_the_example() -> None:
    bank = index_bank_of(4)
    assert slots(bank) == [None] * 4
    bank.write(torch.tensor([2, 0]), angles(10, 20))
    assert slots(bank) == [20, None, 10, None]
    bank.write(torch.tensor([2]), angles(30))
    assert slots(bank) == [20, None, 30, None]


def test_an_index_bank_reads_copies_and_zeros_where_nothing_is() -> None:
    bank = index_bank_of(4)
    bank.write(torch.tensor([2, 0]), angles(10, 20))
    rows = bank.read(torch.tensor([0, 1, 2, 2]))
    assert_close(rows, torch.cat([angles(20), torch.zeros(1, 2), angles(10, 10)]))
    rows.zero_()
    assert slots(bank) == [20, None, 10, None]


@pytest.mark.parametrize("index", [[3, 1, 3, 3, 1], [0, 0, 0, 0, 0]])
def test_of_a_repeated_index_the_last_row_counts(index: list[int]) -> None:
    at_once, singly, rows = index_bank_of(4), index_bank_of(4), angles(10, 20, 30, 40, 50)
    at_once.write(torch.tensor(index), rows)
    for i, row in zip(index, rows, strict=True):
        singly.write(torch.tensor([i]), row[None])
    assert slots(at_once) == slots(singly)


def test_with_momentum_a_slot_follows_on_the_sphere() -> None:
    bank = index_bank_of(2, momentum=0.5)
    bank.write(torch.tensor([0]), 7 * angles(10))
    assert slots(bank) == [10, None]
    bank.write(torch.tensor([0, 1]), angles(50, 80))
    assert slots(bank) == [30, 80]
    assert_close(bank.keys.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_with_momentum_one_a_slot_keeps_what_it_got_first() -> None:
    bank = index_bank_of(2, momentum=1.0)
    bank.write(torch.tensor([0]), angles(10))
    bank.write(torch.tensor([0]), angles(50))
    assert slots(bank) == [10, None]


def test_a_random_start_of_an_index_bank_is_full_and_reproduced_by_its_generator() -> None:
    first, second = (IndexBank(5, 8, init="random", generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.filled.all()
    assert torch.equal(first.keys, second.keys)
    assert_close(first.keys.norm(dim=1), torch.ones(5))


def test_an_index_bank_is_not_written_in_eval_in_a_second_pass_or_with_rows_not_finite() -> None:
    bank = index_bank_of(3)
    bank.write(torch.tensor([1]), angles(10))
    before, rows = state(bank), angles(20, 30)
    bank.eval().write(torch.tensor([0, 1]), rows)
    with second_pass():
        bank.train().write(torch.tensor([0, 1]), rows)
    for value in (torch.nan, torch.inf):
        rows[1, 0] = value
        bank.write(torch.tensor([0, 1]), rows)
    assert same(state(bank), before)


def test_a_loaded_index_bank_goes_on_where_the_saved_one_was() -> None:
    saved, loaded = index_bank_of(3, momentum=0.5), index_bank_of(3, momentum=0.5)
    saved.write(torch.tensor([1, 2]), angles(10, 20))
    loaded.load_state_dict(saved.state_dict())
    for bank in (saved, loaded):
        bank.write(torch.tensor([1, 0]), angles(50, 30))
    assert same(state(loaded), state(saved))
    assert slots(loaded) == [30, 30, 20]


def test_casting_a_model_leaves_an_index_bank_its_precision() -> None:
    bank = index_bank_of(2)
    bank.write(torch.tensor([0]), angles(10))
    assert_close(bank.half().keys[:1], angles(10))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b.write(torch.tensor([3]), angles(1)), ValueError, r"index holds 3, expected indices .* \[0, 2\]"),
        (lambda b: b.write(torch.tensor([-1]), angles(1)), ValueError, r"index holds -1, expected indices"),
        (lambda b: b.read(torch.tensor([3])), ValueError, r"index holds 3, expected indices of examples"),
        (lambda b: b.read(torch.tensor([0.5])), TypeError, r"index has dtype torch.float32, expected an integer"),
        (lambda b: b.read(3), TypeError, r"index is a int, expected a tensor of shape \(N,\)"),
        (lambda b: b.read(torch.tensor([[0]])), ValueError, r"index has shape \(1, 1\), expected \(N,\)"),
        (lambda b: b.write(torch.tensor([0, 1]), angles(1)), ValueError, r"index has shape \(2,\), expected \(1,\)"),
        (
            lambda b: b.write(torch.tensor([0]), torch.zeros(1, 3)),
            ValueError,
            r"rows has shape \(1, 3\), expected \(N, 2",
        ),
        (lambda b: IndexBank(0, 2), ValueError, r"num_examples is 0, expected a number"),
        (lambda b: IndexBank(3, 2, momentum=1.5), ValueError, r"momentum is 1.5, expected a number in \[0, 1\]"),
        (lambda b: IndexBank(3, 2, init="zeros"), ValueError, r"init is 'zeros', expected one of"),
    ],
)
def test_what_does_not_fit_an_index_bank_is_refused(
    call: Callable[[IndexBank], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(index_bank_of(3).eval())
