"""AdaWAC: the closed form of its weights, that they never die, and what leaves them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import AdaWAC, adawac_loss, second_pass
from tests.pool import Pool

INDEX = torch.tensor([3, 0, 4])


def pair(*gaps: float) -> tuple[Tensor, Tensor]:
    """Supervised and consistency losses with these differences."""
    consistency = torch.full((len(gaps),), 0.5, dtype=torch.float64)
    return consistency + torch.tensor(gaps, dtype=torch.float64), consistency


def step(weigher: AdaWAC, *gaps: float, index: Tensor = INDEX) -> Tensor:
    supervised, consistency = pair(*gaps)
    return weigher(supervised, consistency=consistency, index=index)


def test_it_starts_at_one_half() -> None:
    assert AdaWAC(6).eval()(torch.rand(3), index=INDEX).tolist() == [0.5] * 3


def test_the_weight_is_the_sigmoid_of_eta_times_the_sum_of_differences() -> None:
    weigher = AdaWAC(6, step_size=0.7)
    first, second = [0.3, -1.0, 2.0], [-0.2, 0.4, 0.1]
    assert_close(step(weigher, *first), (0.7 * torch.tensor(first, dtype=torch.float64)).sigmoid())
    total = torch.tensor(first, dtype=torch.float64) + torch.tensor(second, dtype=torch.float64)
    assert_close(step(weigher, *second), (0.7 * total).sigmoid())
    assert weigher.logits[[1, 2, 5]].tolist() == [0.0] * 3


def test_one_step_is_entropic_mirror_ascent() -> None:
    """Both shares times the exponential of eta times their own loss, normalised."""
    weigher = AdaWAC(6, step_size=1.3)
    step(weigher, 0.4, -0.3, 1.0)
    before = weigher.logits[INDEX].sigmoid()
    supervised, consistency = pair(0.9, 0.2, -2.0)
    up, rest = before * (1.3 * supervised).exp(), (1 - before) * (1.3 * consistency).exp()
    assert_close(weigher(supervised, consistency=consistency, index=INDEX), up / (up + rest))


def test_equal_losses_keep_one_half() -> None:
    weigher = AdaWAC(6, step_size=8.0)
    assert step(weigher, 0.0, 0.0, 0.0).tolist() == [0.5] * 3


def test_the_order_of_visits_does_not_matter() -> None:
    visits = [(torch.tensor([i % 5, (2 * i + 1) % 5]), (0.1 * i, 1.0 - 0.3 * i)) for i in range(12)]
    there, back = AdaWAC(5), AdaWAC(5)
    for weigher, order in ((there, visits), (back, visits[::-1])):
        for index, gaps in order:
            step(weigher, *gaps, index=index)
    assert_close(there.logits, back.logits)


def test_an_example_that_is_twice_in_a_batch_moves_twice() -> None:
    weigher = AdaWAC(6)
    weights = step(weigher, 0.25, 0.5, -1.0, index=torch.tensor([2, 2, 1]))
    assert weigher.logits.tolist() == [0.0, -1.0, 0.75, 0.0, 0.0, 0.0]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_are_shares_even_after_extreme_steps(dtype: torch.dtype) -> None:
    weigher = AdaWAC(6, step_size=8.0)
    for scale in (1e4, -3e4, 1.0):
        weights = weigher(torch.tensor([scale, -scale, 0.0], dtype=dtype), index=INDEX)
        assert ((weights >= 0) & (weights <= 1)).all()


def test_a_weight_never_dies() -> None:
    """At eta = 8 a stored float32 weight is exactly zero behind 20 visits, and stays so."""
    weigher, stored = AdaWAC(1, step_size=8.0), torch.tensor(0.5)
    index = torch.tensor([0])
    for gap in [-1.0] * 20 + [1.0] * 25:
        weight = step(weigher, gap, index=index)
        up = stored * torch.exp(torch.tensor(8 * gap))
        stored = up / (up + 1 - stored)
    assert stored == 0
    assert_close(weight, torch.tensor([1.0], dtype=torch.float64))
    assert weigher.logits.item() == 40.0


def test_without_consistency_losses_they_are_zero() -> None:
    supervised = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    alone, zero = AdaWAC(6), AdaWAC(6)
    assert torch.equal(
        alone(supervised, index=INDEX), zero(supervised, consistency=torch.zeros_like(supervised), index=INDEX)
    )


# The combined loss


def test_the_loss_is_the_mean_of_both_halves() -> None:
    supervised, consistency = pair(1.0, -0.25, 0.5)
    weights = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    halves = [0.5, 0.25, 0.25 * 1.0 + 0.75 * 0.5]
    assert_close(adawac_loss(supervised, consistency, weights).item(), sum(halves) / 3)


def test_its_gradients_are_the_shares_and_none_reaches_the_weights() -> None:
    supervised, consistency = (x.requires_grad_() for x in pair(1.0, -0.25, 0.5))
    weights = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64, requires_grad=True)
    adawac_loss(supervised, consistency, weights).backward()
    assert_close(supervised.grad, weights.detach() / 3)
    assert_close(consistency.grad, (1 - weights.detach()) / 3)
    assert weights.grad is None


def test_no_rows_give_a_connected_zero() -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss = adawac_loss(empty, empty, torch.zeros(0))
    assert loss.item() == 0
    loss.backward()


# State


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["supervised", "consistency"])
def test_losses_that_are_not_finite_move_nothing(value: float, where: str) -> None:
    weigher = AdaWAC(6)
    step(weigher, 0.3, 0.2, 0.1)
    before = weigher.logits.clone()
    losses = dict(zip(("supervised", "consistency"), pair(1.0, 1.0, 1.0), strict=True))
    losses[where][1] = value
    weigher(losses["supervised"], consistency=losses["consistency"], index=INDEX)
    assert torch.equal(weigher.logits, before)


def test_the_second_pass_uses_the_weights_of_the_first() -> None:
    weigher = AdaWAC(6)
    first = step(weigher, 0.3, 0.2, 0.1)
    with second_pass():
        assert torch.equal(step(weigher, 9.0, 9.0, 9.0), first)


def test_the_logits_travel_in_a_checkpoint_and_keep_their_precision() -> None:
    weigher, other = AdaWAC(6), AdaWAC(6)
    step(weigher, 1e-9, 0.2, -0.1)
    other.load_state_dict(weigher.half().state_dict())
    assert other.logits.dtype == torch.float64
    assert torch.equal(step(other, 0.1, 0.1, 0.1), step(weigher, 0.1, 0.1, 0.1))


@pytest.mark.parametrize("index", [torch.tensor([0, 1, 6]), torch.tensor([0, -1, 2])])
def test_indices_outside_the_training_set_are_refused(index: Tensor) -> None:
    with pytest.raises(ValueError, match="index holds"):
        AdaWAC(6)(torch.rand(3), index=index)


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(ValueError, match="AdaWAC got no index"):
        AdaWAC(6)(torch.rand(3))
    with pytest.raises(ValueError, match=r"consistency has shape \(2,\), expected \(3,\)"):
        AdaWAC(6)(torch.rand(3), index=INDEX, consistency=torch.rand(2))
    with pytest.raises(ValueError, match="num_examples"):
        AdaWAC(0)


def visits(rank: int, split: tuple[int, ...], poisoned: int | None) -> Any:
    """The table after two steps, of rows shared between ranks; the first example is everywhere."""
    start = sum(split[:rank])
    rows = slice(start, start + split[rank])
    weigher = AdaWAC(6, step_size=2.0)
    index = torch.tensor([0, 3, 0, 2, 5, 0])
    for seed in range(2):
        losses = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if seed == 1 and poisoned is not None:
            losses[0, poisoned] = torch.nan
        weigher(losses[0, rows], consistency=losses[1, rows], index=index[rows])
    return weigher.logits


@pytest.mark.parametrize("split", [(2, 2, 2), (5, 1, 0)], ids=["even", "an empty rank"])
@pytest.mark.parametrize("poisoned", [None, 5])
def test_every_rank_holds_the_table_of_one_process(split: tuple[int, ...], poisoned: int | None, ranks: Pool) -> None:
    expected = visits(0, (6,), poisoned)
    for table in ranks.run(visits, split, poisoned):
        assert_close(table, expected, rtol=1e-12, atol=1e-12)
