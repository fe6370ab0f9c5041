"""How losses, batch weights and a reweighter become one scalar."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from counterpoise.losses import cross_entropy_loss
from counterpoise.samplers import GroupDRO, composition, reweighted_loss

LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
W = torch.tensor([0.1, 0.2, 0.3, 0.6], dtype=torch.float64)
S = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
MASK = torch.tensor([True, False, True, True])


class Told:
    """Hands out the first of its weights, and keeps what it was shown."""

    def __init__(self, normalization: str) -> None:
        self.normalization = normalization
        self.seen: dict[str, Any] = {}

    def __call__(self, losses: Tensor, **fields: Tensor | None) -> Tensor:
        self.seen = {"losses": losses, **fields}
        return W[: len(losses)]


def divisor(normalization: str, w: Tensor, s: Tensor) -> Tensor:
    return {"mean_one": torch.tensor(len(w)), "sum_one": torch.tensor(1), "raw": (w * s).sum()}[normalization]


NORMALIZATIONS = ["mean_one", "sum_one", "raw"]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_each_normalisation_has_its_divisor(normalization: str) -> None:
    expected = (W * LOSSES).sum() / divisor(normalization, W, torch.ones(4))
    assert_close(reweighted_loss(LOSSES, Told(normalization)), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_batch_weights_multiply_the_reweighters(normalization: str) -> None:
    expected = (W * S * LOSSES).sum() / divisor(normalization, W, S)
    assert_close(reweighted_loss(LOSSES, Told(normalization), weight=S), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_masked_rows_are_left_out_of_sum_and_divisor(normalization: str) -> None:
    w = W[:3]  # one for each row that is shown
    expected = (w * S[MASK] * LOSSES[MASK]).sum() / divisor(normalization, w, S[MASK])
    assert_close(reweighted_loss(LOSSES, Told(normalization), weight=S, mask=MASK), expected)


def test_a_raw_reweighter_of_ones_with_batch_weights_is_their_weighted_mean() -> None:
    class Ones:
        normalization = "raw"

        def __call__(self, losses: Tensor, **_: Tensor | None) -> Tensor:
            return torch.ones_like(losses)

    assert_close(reweighted_loss(LOSSES, Ones(), weight=S), (S * LOSSES).sum() / S.sum())


def test_without_a_reweighter_it_is_the_losss_own_mean() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 2, 1, 1])
    rows = cross_entropy_loss(logits, target, reduction="none")
    assert_close(reweighted_loss(rows), cross_entropy(logits, target))
    assert_close(reweighted_loss(rows, weight=S, mask=MASK), cross_entropy_loss(logits, target, weight=S, mask=MASK))


def test_the_reweighter_sees_detached_losses_and_its_fields() -> None:
    told = Told("raw")
    group, index, features = torch.arange(4), torch.arange(4) + 10, torch.rand(4, 2)
    reweighted_loss(LOSSES.clone().requires_grad_(), told, group=group, index=index, features=features)
    assert not told.seen["losses"].requires_grad
    assert torch.equal(told.seen["losses"], LOSSES)
    assert torch.equal(told.seen["group"], group)
    assert torch.equal(told.seen["index"], index)
    assert torch.equal(told.seen["features"], features)
    assert told.seen["target"] is None


def test_masked_rows_are_hidden_from_the_reweighter() -> None:
    told = Told("raw")
    reweighted_loss(LOSSES, told, mask=MASK, group=torch.arange(4), target=torch.arange(4) * 2)
    assert told.seen["losses"].tolist() == [1.0, 4.0, 8.0]
    assert told.seen["group"].tolist() == [0, 2, 3]
    assert told.seen["target"].tolist() == [0, 4, 6]


def test_the_batch_weights_stay_unknown_to_the_reweighter() -> None:
    told = Told("raw")
    reweighted_loss(LOSSES, told, weight=100 * S)
    assert torch.equal(told.seen["losses"], LOSSES)


def test_the_gradient_of_a_loss_is_its_weight_over_the_divisor() -> None:
    losses = LOSSES.clone().requires_grad_()
    reweighted_loss(losses, Told("raw"), weight=S).backward()
    assert losses.grad is not None
    assert_close(losses.grad, W * S / (W * S).sum())


def test_a_masked_row_may_hold_anything() -> None:
    losses = torch.where(MASK, LOSSES, torch.nan).requires_grad_()
    loss = reweighted_loss(losses, Told("raw"), mask=MASK)
    loss.backward()
    assert_close(loss, reweighted_loss(LOSSES, Told("raw"), mask=MASK))
    assert losses.grad is not None
    assert losses.grad.isfinite().all()
    assert losses.grad[1] == 0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nothing_that_counts_gives_a_zero_connected_to_the_graph(normalization: str) -> None:
    losses = LOSSES.clone().requires_grad_()
    loss = reweighted_loss(losses, Told(normalization), mask=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert losses.grad is not None
    assert (losses.grad == 0).all()


def test_group_dro_composes_to_the_sum_of_q_times_group_means() -> None:
    dro = GroupDRO([10, 10], step_size=1.0)
    group = torch.tensor([0, 1, 1, 0])
    loss = reweighted_loss(LOSSES, dro, group=group)
    q = dro.group_weights
    assert_close(loss, q[0] * LOSSES[group == 0].mean() + q[1] * LOSSES[group == 1].mean())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_mean_over_ranks_is_what_one_process_gives(normalization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks hold one and three of the rows; the sums over ranks are played back to each."""

    class Share(Told):
        def __init__(self, w: Tensor) -> None:
            super().__init__(normalization)
            self.w = w

        def __call__(self, losses: Tensor, **_: Tensor | None) -> Tensor:
            return self.w

    whole = reweighted_loss(LOSSES, Share(W), weight=S)
    total = divisor(normalization, W, S).double()
    monkeypatch.setattr(composition, "world_size", lambda: 2)
    monkeypatch.setattr(composition, "sum_over_ranks", lambda _: total)
    parts = [reweighted_loss(LOSSES[own], Share(W[own]), weight=S[own]) for own in (slice(0, 1), slice(1, 4))]
    assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("losses", [torch.tensor(1.0), torch.ones(2, 2)], ids=["0-d", "matrix"])
def test_losses_that_are_not_one_a_row_are_refused(losses: Tensor) -> None:
    with pytest.raises(ValueError, match=r'losses has shape .*, expected \(N,\): use reduction="none"'):
        reweighted_loss(losses)


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"normalization is 'sum-one', .* did you mean 'sum_one'\?"):
        reweighted_loss(LOSSES, Told("sum-one"))


def test_a_weight_or_mask_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        reweighted_loss(LOSSES, weight=S[:3])
    with pytest.raises(TypeError, match=r"mask has dtype torch.int64, expected torch.bool"):
        reweighted_loss(LOSSES, mask=MASK.long())
