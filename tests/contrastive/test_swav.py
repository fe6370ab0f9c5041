"""SwAV: swapped predictions by loops, codes that are held fixed, banks, views without codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from counterpoise.contrastive import SwAVLoss, swav_loss
from counterpoise.memory import MemoryBank
from counterpoise.ot import balanced_assignment
from tests.pool import Pool

N, D, K = 8, 4, 3


def views(count: int = 2, n: int = N) -> Tensor:
    return torch.randn(count, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def prototypes(seed: int = 9) -> Tensor:
    return torch.randn(K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bank_of(keys: Tensor, size: int | None = None) -> MemoryBank:
    bank = MemoryBank(size or len(keys), D, dtype=keys.dtype)
    bank.enqueue(keys)
    return bank


def scores_of(z: Tensor) -> Tensor:
    return normalize(z, dim=-1) @ normalize(prototypes(), dim=1).T


def by_loops(z: Tensor, code_views: int, temperature: float = 0.1) -> Tensor:
    """Mean over views with codes of the mean over the other views of the cross-entropy."""
    s, total = scores_of(z), []
    for v in range(code_views):
        codes = balanced_assignment(s[v])
        others = [cross_entropy(s[w] / temperature, codes) for w in range(len(z)) if w != v]
        total.append(torch.stack(others).mean())
    return torch.stack(total).mean()


@pytest.mark.parametrize(("count", "code_views"), [(2, 2), (2, 1), (4, 2), (3, 3)])
def test_it_is_the_mean_over_codes_and_the_views_that_predict_them(count: int, code_views: int) -> None:
    z = views(count)
    assert_close(swav_loss(z, prototypes=prototypes(), code_views=code_views), by_loops(z, code_views))


def test_two_views_swap_their_codes() -> None:
    rows = swav_loss(views(), prototypes=prototypes(), reduction="none").unflatten(0, (2, N))
    s = scores_of(views())
    assert_close(rows[1], cross_entropy(s[1] / 0.1, balanced_assignment(s[0]), reduction="none"))
    assert_close(rows[0], cross_entropy(s[0] / 0.1, balanced_assignment(s[1]), reduction="none"))


def test_the_mean_of_rows_is_the_loss_with_small_crops_too() -> None:
    rows = swav_loss(views(5), prototypes=prototypes(), reduction="none")
    assert rows.shape == (5 * N,)
    assert_close(swav_loss(views(5), prototypes=prototypes()), rows.mean())


def test_it_is_symmetric_in_two_views_and_in_the_prototypes() -> None:
    first, second = views()
    loss = swav_loss(first, second, prototypes=prototypes())
    assert_close(swav_loss(second, first, prototypes=prototypes()), loss)
    assert_close(swav_loss(first, second, prototypes=prototypes().flip(0)), loss)


def test_lengths_of_embeddings_and_prototypes_do_not_matter() -> None:
    loss = swav_loss(views(), prototypes=prototypes())
    assert_close(swav_loss(7 * views(), prototypes=0.1 * prototypes()), loss)
    assert swav_loss(7 * views(), prototypes=prototypes(), normalize=False) != loss


def test_collapsed_embeddings_have_uniform_codes_and_cost_more_than_clusters() -> None:
    axes = torch.eye(D, dtype=torch.float64)[:K]
    clusters, point = axes.repeat(2, 1), axes[:1].repeat(2 * K, 1)
    apart, collapsed = (swav_loss(z, z, prototypes=axes).item() for z in (clusters, point))
    assert apart < 0.01
    assert_close(collapsed, 10 * (K - 1) / K, rtol=1e-3, atol=0)  # -mean over k of s_k / tau, and s = (1, 0, 0)


def test_codes_are_held_fixed() -> None:
    z = views().requires_grad_()
    ours = torch.autograd.grad(swav_loss(z, prototypes=prototypes()), z)[0]
    s, codes = scores_of(z), [balanced_assignment(x) for x in scores_of(views())]
    by_hand = cross_entropy(s[1] / 0.1, codes[0]) + cross_entropy(s[0] / 0.1, codes[1])
    assert_close(ours, torch.autograd.grad(by_hand / 2, z)[0])


def test_the_gradient_reaches_the_prototypes_unless_they_are_frozen() -> None:
    loss = SwAVLoss(D, K)
    loss(views()).backward()
    assert loss.prototypes.grad is not None
    assert loss.prototypes.grad.norm() > 0
    loss.prototypes.grad = None
    loss.prototypes.requires_grad_(False)
    loss(views().requires_grad_()).backward()
    assert loss.prototypes.grad is None


def test_prototypes_start_as_unit_vectors_drawn_by_the_seed() -> None:
    start = SwAVLoss(D, 20).prototypes
    assert_close(start.norm(dim=1), torch.ones(20))
    assert torch.equal(start, SwAVLoss(D, 20).prototypes)
    assert not torch.equal(start, SwAVLoss(D, 20, seed=1).prototypes)


def test_prototypes_stay_in_float32_in_a_half_module() -> None:
    assert SwAVLoss(D, K).half().prototypes.dtype == torch.float32


# Masks, banks, ranks


def test_a_masked_example_is_as_good_as_absent() -> None:
    z, mask = views(3), torch.arange(N) % 3 > 0
    expected = swav_loss(z[:, mask], prototypes=prototypes())
    z[:, ~mask] = torch.nan
    assert_close(swav_loss(z, prototypes=prototypes(), mask=mask), expected)


def test_a_bank_is_assigned_with_the_batch_of_each_view() -> None:
    z, keys = views(), views(3)[2]
    s, of_bank = scores_of(z), scores_of(keys)
    codes = [balanced_assignment(torch.cat([s[v], of_bank]))[:N] for v in (0, 1)]
    expected = (cross_entropy(s[1] / 0.1, codes[0]) + cross_entropy(s[0] / 0.1, codes[1])) / 2
    assert_close(swav_loss(z, prototypes=prototypes(), bank=bank_of(keys)), expected)
    assert expected != swav_loss(z, prototypes=prototypes())


def test_slots_never_filled_do_not_count() -> None:
    z, keys = views(), views(3)[2]
    full, partly = (swav_loss(z, prototypes=prototypes(), bank=bank_of(keys, size)) for size in (N, 50))
    assert_close(partly, full)
    assert_close(swav_loss(z, prototypes=prototypes(), bank=MemoryBank(6, D)), swav_loss(z, prototypes=prototypes()))


def share(rank: int, split: tuple[int, ...]) -> tuple[float, Tensor]:
    rows = slice(sum(split[:rank]), sum(split[: rank + 1]))
    loss, bank = SwAVLoss(D, K), bank_of(views(3)[2], 10)
    value = loss(views(3)[:, rows], bank=bank, mask=(torch.arange(N) != 3)[rows])
    value.backward()
    assert loss.prototypes.grad is not None
    return value.item(), loss.prototypes.grad


def test_several_ranks_count_a_bank_once_and_agree_on_the_prototypes(ranks: Pool) -> None:
    value, gradient = share(0, (N,))
    found = ranks.run(share, (5, 0, 3))
    assert sum(v for v, _ in found) / 3 == pytest.approx(value, rel=1e-6)
    assert_close(sum(grad for _, grad in found) / 3, gradient)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loss: loss(views()[0]), r"z holds 1 views, expected at least two"),
        (lambda loss: loss(views()[..., :3]), r"prototypes has width 4, expected 3, that of z"),
        (lambda loss: loss(views(), bank=MemoryBank(4, 3)), r"bank has width 3, expected 4, that of z"),
        (lambda loss: loss(views(), labels=torch.arange(N)), r"SwAVLoss got labels, expected views only"),
        (lambda _: SwAVLoss(D, normalize=False)(views(), bank=MemoryBank(4, D)), r"normalize is False, expected True"),
        (lambda _: SwAVLoss(D, temperature=0.0), r"temperature is 0.0, expected a number in \(0, inf\]"),
        (lambda _: SwAVLoss(D, num_prototypes=1), r"num_prototypes is 1, expected a number in \[2"),
        (lambda _: SwAVLoss(D, code_views=0), r"code_views is 0, expected a number in \[1"),
    ],
    ids=["one view", "width", "bank", "labels", "lengths", "temperature", "prototypes", "code_views"],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(SwAVLoss(D, K))
