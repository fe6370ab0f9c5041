"""Group DRO: the published update by hand, what leaves its state alone, and the greedy variant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import GroupDRO, second_pass

COUNTS = [60, 30, 10]
GROUPS = torch.tensor([0, 0, 1, 2, 0, 2])


def q_of(dro: GroupDRO) -> list[float]:
    return dro.group_weights.tolist()


def losses_of(*group_losses: float, groups: Tensor = GROUPS) -> Tensor:
    """One value a group, given to each of its examples."""
    return torch.tensor(group_losses, dtype=torch.float64)[groups]


def ascended(q: list[float], a: list[float], eta: float) -> list[float]:
    raw = [x * math.exp(eta * y) for x, y in zip(q, a, strict=True)]
    return [x / sum(raw) for x in raw]


# The update


def test_it_starts_uniform() -> None:
    assert_close(q_of(GroupDRO(COUNTS)), [1 / 3] * 3)


def test_several_steps_are_the_published_algorithm() -> None:
    dro = GroupDRO(COUNTS, step_size=0.3)
    generator = torch.Generator().manual_seed(0)
    q = [1 / 3] * 3
    for _ in range(5):
        losses = torch.rand(6, dtype=torch.float64, generator=generator) * 3
        means = [losses[g == GROUPS].mean().item() for g in range(3)]
        q = ascended(q, means, 0.3)
        weights = dro(losses, group=GROUPS)
        assert_close(q_of(dro), q)
        assert_close(weights.tolist(), [q[g] / (g == GROUPS).sum().item() for g in GROUPS.tolist()])
        assert_close((weights * losses).sum().item(), sum(a * b for a, b in zip(q, means, strict=True)))


@pytest.mark.parametrize("absent", ["freeze", "renormalize"])
def test_equal_group_losses_keep_q(absent: str) -> None:
    dro = GroupDRO(COUNTS, step_size=1.0, absent=absent)
    dro(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    before = q_of(dro)
    dro(losses_of(5.0, 5.0, 5.0), group=GROUPS)
    assert_close(q_of(dro), before)


def test_step_size_zero_keeps_q() -> None:
    dro = GroupDRO(COUNTS, step_size=0.0)
    dro(losses_of(1.0, 20.0, 300.0), group=GROUPS)
    assert_close(q_of(dro), [1 / 3] * 3)


def test_one_group_is_empirical_risk_minimisation() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    weights = GroupDRO([3])(losses, group=torch.zeros(3, dtype=torch.int64))
    assert_close((weights * losses).sum(), losses.mean())


def test_the_log_ratio_of_two_groups_is_eta_times_the_sum_of_differences() -> None:
    dro = GroupDRO(COUNTS, step_size=0.7)
    total = 0.0
    for step in range(10):
        a = [math.sin(step), math.cos(2 * step), 0.1 * step]
        total += a[0] - a[2]
        dro(losses_of(*a), group=GROUPS)
    assert_close((dro.log_q[0] - dro.log_q[2]).item(), 0.7 * total)


def test_the_worst_group_takes_all_in_the_long_run() -> None:
    dro = GroupDRO(COUNTS, step_size=0.5)
    for _ in range(100):
        dro(losses_of(1.0, 2.0, 1.5), group=GROUPS)
    assert q_of(dro)[1] > 0.999999


def test_weights_sum_to_one_when_every_group_is_there() -> None:
    dro = GroupDRO(COUNTS, step_size=0.5)
    assert_close(dro(losses_of(1.0, 2.0, 3.0), group=GROUPS).sum().item(), 1.0)


def test_weights_are_of_the_losses_type_and_carry_no_gradient() -> None:
    losses = torch.rand(6, requires_grad=True)
    weights = GroupDRO(COUNTS)(losses, group=GROUPS)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad


def test_permuting_the_batch_permutes_the_weights() -> None:
    losses = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 5, 1, 0, 4, 2])
    straight = GroupDRO(COUNTS)(losses, group=GROUPS)
    assert_close(GroupDRO(COUNTS)(losses[order], group=GROUPS[order]), straight[order])


# Absent groups


def test_freeze_leaves_an_absent_group_its_weight() -> None:
    """The present groups share the mass they had, in proportion to q exp(eta L)."""
    dro = GroupDRO(COUNTS, step_size=1.0)
    dro(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    before = q_of(dro)
    present = torch.tensor([0, 1, 1])
    dro(losses_of(4.0, 1.0, 0.0, groups=present), group=present)
    raw = [before[0] * math.exp(4.0), before[1] * math.exp(1.0)]
    expected = [x / sum(raw) * (before[0] + before[1]) for x in raw]
    assert_close(q_of(dro), [*expected, before[2]])


def test_freeze_does_not_move_a_group_that_is_alone_in_the_batch() -> None:
    dro = GroupDRO(COUNTS, step_size=1.0)
    dro(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    before = q_of(dro)
    dro(torch.tensor([9.0, 9.0]), group=torch.tensor([1, 1]))
    assert_close(q_of(dro), before)


def test_renormalize_lets_an_absent_group_lose_weight_as_released() -> None:
    dro = GroupDRO(COUNTS, step_size=1.0, absent="renormalize")
    present = torch.tensor([0, 1, 1])
    dro(losses_of(0.5, 1.0, 0.0, groups=present), group=present)
    assert_close(q_of(dro), ascended([1 / 3] * 3, [0.5, 1.0, 0.0], 1.0))


def test_without_the_absent_group_the_weights_sum_to_the_mass_of_the_others() -> None:
    dro = GroupDRO(COUNTS)
    weights = dro(torch.tensor([1.0, 2.0]), group=torch.tensor([0, 1]))
    assert_close(weights.sum().item(), 2 / 3)


# Adjustments


def test_the_adjustment_adds_c_over_the_root_of_the_count() -> None:
    dro = GroupDRO(COUNTS, step_size=0.4, adjustment=2.0)
    dro(losses_of(1.0, 1.0, 1.0), group=GROUPS)
    assert_close(q_of(dro), ascended([1 / 3] * 3, [1 + 2 / math.sqrt(n) for n in COUNTS], 0.4))


def test_one_zero_among_the_adjustments_leaves_the_others_on() -> None:
    """The released code drops all of them then."""
    dro = GroupDRO(COUNTS, step_size=0.4, adjustment=[0.0, 1.0, 3.0])
    dro(losses_of(1.0, 1.0, 1.0), group=GROUPS)
    a = [c / math.sqrt(n) for c, n in zip([0.0, 1.0, 3.0], COUNTS, strict=True)]
    assert_close(q_of(dro), ascended([1 / 3] * 3, a, 0.4))


def test_normalize_loss_divides_by_the_sum_over_groups() -> None:
    dro = GroupDRO(COUNTS, step_size=2.0, normalize_loss=True)
    dro(losses_of(1.0, 3.0, 6.0), group=GROUPS)
    assert_close(q_of(dro), ascended([1 / 3] * 3, [0.1, 0.3, 0.6], 2.0))


def test_normalize_loss_survives_losses_that_are_all_zero() -> None:
    dro = GroupDRO(COUNTS, normalize_loss=True)
    dro(torch.zeros(6), group=GROUPS)
    assert_close(q_of(dro), [1 / 3] * 3)


# State


def test_a_group_comes_back_after_losses_that_would_underflow() -> None:
    dro = GroupDRO(COUNTS, step_size=1.0)
    dro(losses_of(1e6, 0.0, 0.0), group=GROUPS)
    assert q_of(dro) == [1.0, 0.0, 0.0]
    dro(losses_of(0.0, 1e6 + 1, 0.0), group=GROUPS)
    assert_close(q_of(dro), ascended([1.0, 1.0, 0.0], [0.0, 1.0, 0.0], 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_move_nothing(value: float) -> None:
    dro = GroupDRO(COUNTS, step_size=1.0)
    dro(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    before = {name: buffer.clone() for name, buffer in dro.state_dict().items()}
    weights = dro(losses_of(1.0, value, 3.0), group=GROUPS)
    assert weights.isfinite().all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in dro.state_dict().items())


def quietly(dro: GroupDRO) -> None:
    dro.eval()
    dro(losses_of(5.0, 2.0, 3.0), group=GROUPS)


def again(dro: GroupDRO) -> None:
    with second_pass():
        dro(losses_of(5.0, 2.0, 3.0), group=GROUPS)


@pytest.mark.parametrize("call", [quietly, again], ids=["eval", "second pass"])
@pytest.mark.parametrize("greedy_alpha", [None, 0.3])
def test_evaluation_and_the_second_pass_move_nothing(
    call: Callable[[GroupDRO], None], greedy_alpha: float | None
) -> None:
    dro = GroupDRO(COUNTS, step_size=1.0, greedy_alpha=greedy_alpha)
    dro(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    before = {name: buffer.clone() for name, buffer in dro.state_dict().items()}
    call(dro)
    assert all(torch.equal(buffer, before[name]) for name, buffer in dro.state_dict().items())


def test_the_second_pass_uses_the_weights_of_the_first() -> None:
    dro = GroupDRO(COUNTS, step_size=1.0)
    first = dro(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    with second_pass():
        assert torch.equal(dro(losses_of(9.0, 0.0, 0.0), group=GROUPS), first)


def test_casting_a_model_leaves_the_duals_their_precision() -> None:
    dro = GroupDRO(COUNTS, step_size=1e-4)
    dro(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    before = dro.log_q.clone()
    assert torch.equal(dro.to(torch.bfloat16).log_q, before)


def test_a_loaded_state_goes_on_as_the_saved_one() -> None:
    saved, loaded = GroupDRO(COUNTS, step_size=1.0), GroupDRO(COUNTS, step_size=1.0)
    saved(losses_of(1.0, 2.0, 3.0), group=GROUPS)
    loaded.load_state_dict(saved.state_dict())
    for dro in (saved, loaded):
        dro(losses_of(3.0, 1.0, 2.0), group=GROUPS)
    assert all(torch.equal(buffer, saved.state_dict()[name]) for name, buffer in loaded.state_dict().items())


def test_the_moving_average_copies_the_first_value_of_a_group_and_skips_absent_ones() -> None:
    dro = GroupDRO(COUNTS, ema=0.25)
    dro(torch.tensor([4.0, 8.0]), group=torch.tensor([0, 1]))
    assert dro.ema_loss.tolist() == [4.0, 8.0, 0.0]
    dro(torch.tensor([0.0, 6.0]), group=torch.tensor([0, 2]))
    assert dro.ema_loss.tolist() == [3.0, 8.0, 6.0]
    assert dro.seen.tolist() == [True, True, True]


# Greedy


def greedy(alpha: float, **options: Any) -> GroupDRO:
    """Fractions 0.6, 0.3, 0.1; the averages say that group 2 is worst, then group 0."""
    dro = GroupDRO(COUNTS, greedy_alpha=alpha, **options)
    dro(losses_of(2.0, 1.0, 3.0), group=GROUPS)
    return dro


def test_greedy_weights_fill_the_worst_groups_up_to_the_fraction() -> None:
    """Group 2 fits whole into 0.2 of the data; group 0 takes what is left."""
    assert_close(q_of(greedy(0.2)), [0.5, 0.0, 0.5])


def test_greedy_weights_of_a_small_fraction_are_on_the_worst_group_alone() -> None:
    assert_close(q_of(greedy(0.05)), [0.0, 0.0, 1.0])


def test_greedy_weights_of_all_data_are_the_fractions() -> None:
    assert_close(q_of(greedy(1.0)), [0.6, 0.3, 0.1])


def test_minimum_variance_weight_mixes_greedy_weights_with_the_fractions() -> None:
    assert_close(q_of(greedy(0.2, min_variance_weight=0.25)), [0.75 * 0.5 + 0.15, 0.075, 0.75 * 0.5 + 0.025])
    assert_close(q_of(greedy(0.2, min_variance_weight=1.0)), [0.6, 0.3, 0.1])


def test_the_adjustment_takes_part_in_the_greedy_order() -> None:
    dro = GroupDRO([100, 100], greedy_alpha=0.5, adjustment=[0.0, 20.0])
    dro(torch.tensor([2.0, 1.0]), group=torch.tensor([0, 1]))
    assert_close(q_of(dro), [0.0, 1.0])


# Batches


def test_classes_may_be_the_groups() -> None:
    by_target, by_group = GroupDRO(COUNTS, step_size=1.0, by="target"), GroupDRO(COUNTS, step_size=1.0)
    losses = losses_of(1.0, 2.0, 3.0)
    weights = by_target(losses, target=GROUPS, group=torch.zeros(6, dtype=torch.int64))
    assert_close(weights, by_group(losses, group=GROUPS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupDRO(COUNTS)(torch.ones(2)), r'GroupDRO got no group: give the batch one, or say by="target"'),
        (lambda: GroupDRO([2, 2], by="target")(torch.ones(2)), r"GroupDRO got no target"),
        (lambda: GroupDRO(COUNTS)(torch.ones(2), group=torch.tensor([0, 3])), r"group holds 3, expected group indices"),
        (lambda: GroupDRO(COUNTS)(torch.ones(2, 2), group=GROUPS), r"losses has shape \(2, 2\), expected \(N,\)"),
        (lambda: GroupDRO(COUNTS)(torch.ones(2), group=GROUPS), r"group has shape \(6,\), expected \(2,\)"),
        (lambda: GroupDRO([3, -1]), r"group_counts is \[3, -1\], expected \(G,\) numbers >= 0"),
        (lambda: GroupDRO([3, 0], adjustment=1.0), r"adjustment is 1.0, expected >= 0, and 0 for a group without"),
        (lambda: GroupDRO(COUNTS, absent="drop"), r"absent is 'drop', expected one of"),
        (lambda: GroupDRO(COUNTS, greedy_alpha=0.0), r"greedy_alpha is 0.0, expected a number in \(0, 1\]"),
        (lambda: GroupDRO(COUNTS, step_size=-1.0), r"step_size is -1.0, expected a number in \[0, inf\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
