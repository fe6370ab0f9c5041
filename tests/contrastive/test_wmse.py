"""W-MSE and CW-RGP: the printed sum over blocks and pairs, what the loss does not see, blocks over several ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss
from torch.testing import assert_close

from counterpoise._core import second_pass
from counterpoise.contrastive import CWRGPLoss, WMSELoss, cw_rgp_loss, whiten, wmse_loss
from counterpoise.memory import MemoryBank
from tests.pool import Pool

N, D = 12, 4


def views(count: int = 2, n: int = N, width: int = D) -> Tensor:
    g = torch.Generator().manual_seed(count)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=g)
    shared = torch.randn(n, width, dtype=torch.float64, generator=g)
    return (shared + 0.5 * torch.randn(count, n, width, dtype=torch.float64, generator=g)) @ mixing


def shuffles(count: int, n: int = N) -> Tensor:
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in range(count)])


def by_loops(z: Tensor, blocks: list[Tensor], *, normalize: bool) -> Tensor:
    """Mean over pairs of views and examples, every block of every view whitened by itself."""
    total = []
    for block in blocks:
        white = [whiten(view[block]) for view in z]
        for a, b in combinations(white, 2):
            total.append(2 - 2 * cosine_similarity(a, b).mean() if normalize else mse_loss(a, b))
    return torch.stack(total).mean()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_it_is_the_mean_over_blocks_and_pairs_of_views(normalize: bool, count: int) -> None:
    z, orders = views(count), shuffles(2)
    blocks = [block for order in orders for block in order.split(6)]
    ours = wmse_loss(z, block_size=6, permutations=orders, normalize=normalize)
    assert_close(ours, by_loops(z, blocks, normalize=normalize))


def test_blocks_are_the_examples_as_they_come_in_the_first_iteration() -> None:
    expected = by_loops(views(), [torch.arange(6), torch.arange(6, 12)], normalize=True)
    assert_close(wmse_loss(views(), block_size=6), expected)


def test_further_iterations_take_other_blocks_and_the_same_ones_every_time() -> None:
    once = wmse_loss(views(), block_size=6)
    several = wmse_loss(views(), block_size=6, iterations=3)
    assert several != once
    assert torch.equal(wmse_loss(views(), block_size=6, iterations=3), several)


def test_one_block_has_one_partition() -> None:
    assert torch.equal(wmse_loss(views(), iterations=4), wmse_loss(views()))


def test_one_block_without_normalising_is_two_less_twice_the_mean_product() -> None:
    """Both whitened views have the same energy, (N - 1) D."""
    first, second = views()
    product = (whiten(first) * whiten(second)).sum()
    assert_close(wmse_loss(first, second, normalize=False), 2 * (N - 1) / N - 2 / (N * D) * product)


def test_scale_gives_the_value_of_the_paper() -> None:
    first, second = views()
    apart = (whiten(first) - whiten(second)).square().sum(1).mean()
    assert_close(wmse_loss(first, second, normalize=False, scale=D), apart)


def test_identical_views_cost_nothing() -> None:
    z = views()[0]
    assert_close(wmse_loss(z, z), torch.tensor(0.0, dtype=torch.float64), atol=1e-14, rtol=0)


def test_opposite_views_cost_the_most() -> None:
    z = views()[0]
    assert_close(wmse_loss(z, -z).item(), 4.0)


def test_it_does_not_see_a_triangular_mixing_of_a_view() -> None:
    first, second = views()
    lower = torch.eye(D, dtype=torch.float64) + torch.ones(D, D, dtype=torch.float64).tril(-1)
    assert_close(wmse_loss(7 * first @ lower.T + 2, second, block_size=6), wmse_loss(first, second, block_size=6))


def test_a_rotation_of_a_view_is_seen() -> None:
    first, second = views()
    assert wmse_loss(first.flip(1), second) != wmse_loss(first, second)


def test_the_gradient_reaches_both_views() -> None:
    z = views().requires_grad_()
    wmse_loss(z).backward()
    assert z.grad is not None
    assert (z.grad.norm(dim=(1, 2)) > 0).all()


def test_a_view_whose_features_collapse_is_refused() -> None:
    z = views()
    z[0] = 1.0
    with pytest.raises(ValueError, match="none that depends on others"):
        wmse_loss(z)
    assert wmse_loss(z, on_singular="shrink").isfinite()


def test_a_masked_example_is_as_good_as_absent() -> None:
    z, mask = views(), torch.arange(N) % 4 > 0
    expected = wmse_loss(z[:, mask])
    z[:, ~mask] = torch.nan
    assert_close(wmse_loss(z, mask=mask), expected)


def test_a_mask_leaves_examples_out_of_their_blocks() -> None:
    z, mask = views(2, 16), torch.ones(16, dtype=torch.bool)
    mask[[2, 9, 11]] = False
    blocks = [torch.arange(8)[mask[:8]], torch.arange(8, 16)[mask[8:]]]
    parts = [by_loops(z, [block], normalize=True) * len(block) for block in blocks]
    assert_close(wmse_loss(z, block_size=8, mask=mask), sum(parts) / 13)


def test_a_block_of_which_nothing_counts_has_no_part() -> None:
    z, mask = views(), torch.arange(N) < 6
    assert_close(wmse_loss(z, block_size=6, mask=mask), wmse_loss(z[:, :6]))


def test_only_ratios_of_weights_matter() -> None:
    weight = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(wmse_loss(views(), weight=9 * weight), wmse_loss(views(), weight=weight))
    assert_close(wmse_loss(views(), weight=torch.full((N,), 3.0)), wmse_loss(views()))


def test_weights_are_those_of_covariances_and_of_the_mean() -> None:
    weight = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = whiten(views(), weight=weight.expand(2, N))
    rows = 2 - 2 * cosine_similarity(a, b)
    assert_close(wmse_loss(views(), weight=weight), (weight * rows).sum() / weight.sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: WMSELoss()(views(2, 4)),
            r"z holds blocks of S = 4 examples with D = 4 features, and with eps = 0.0 their covariance cannot be",
        ),
        (lambda: WMSELoss(block_size=5)(views()), r"z holds N = 12 examples, expected a multiple of block_size = 5"),
        (lambda: WMSELoss()(views()[0]), r"z holds 1 views, expected at least two"),
        (
            lambda: WMSELoss(block_size=6)(views(), permutations=shuffles(2)[0]),
            r"permutations has shape \(12,\), expected \(iterations, 12\)",
        ),
        (lambda: WMSELoss(block_size=6)(views(), permutations=shuffles(1) + 1), r"permutations holds 12, expected"),
        (lambda: WMSELoss(block_size=1), r"block_size is 1, expected a number in \[2"),
        (lambda: WMSELoss(iterations=0), r"iterations is 0, expected a number in \[1"),
        (lambda: WMSELoss(kind="pca"), r"kind is 'pca', expected one of"),
        (lambda: WMSELoss(on_singular="ignore"), r"on_singular is 'ignore', expected one of \['raise', 'shrink'\]"),
        (lambda: WMSELoss()(views(), labels=torch.arange(N)), r"WMSELoss got labels, expected views only"),
        (lambda: CWRGPLoss()(views(), bank=MemoryBank(4, D)), r"CWRGPLoss got a bank, expected views only"),
        (lambda: CWRGPLoss(groups=3)(views()), r"z has 4 channels, expected a multiple of groups = 3"),
        (lambda: CWRGPLoss(groups=1)(views()), r"S = 12 examples with D = 4 features, .* expected S <= D - 1"),
        (
            lambda: cw_rgp_loss(views(), groups=1, channel_permutations=torch.arange(3)),
            r"channel_permutations has shape \(3,\), expected \(D,\)",
        ),
    ],
    ids=[
        *("few", "blocks", "one view", "shape", "index", "block_size", "iterations", "kind", "singular", "labels"),
        *("bank", "groups", "many", "channels"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def wmse_share(rank: int, split: tuple[int, ...]) -> tuple[float, Tensor]:
    z = views()[:, sum(split[:rank]) : sum(split[: rank + 1])].clone().requires_grad_()
    loss = wmse_loss(z, block_size=6, iterations=2)
    loss.backward()
    return loss.item(), z.grad


def test_blocks_are_those_of_the_batch_of_all_ranks(ranks: Pool) -> None:
    """Blocks of 6 from ranks of 7, 0 and 5; gradients are divided by the number of ranks, as DDP does."""
    loss, gradient = wmse_share(0, (N,))
    found = ranks.run(wmse_share, (7, 0, 5))
    assert sum(value for value, _ in found) / 3 == pytest.approx(loss, rel=1e-12)
    assert_close(torch.cat([grad for _, grad in found], dim=1) / 3, gradient)


# CW-RGP


def test_cholesky_on_the_batch_in_one_group_is_wmse() -> None:
    ours = cw_rgp_loss(views(), groups=1, kind="cholesky", axis="batch", block_size=6)
    assert_close(ours, wmse_loss(views(), block_size=6))


def test_it_is_the_distance_of_channel_whitened_views() -> None:
    z = views(2, 3, 16)
    a, b = whiten(z, kind="zca", axis="channel", groups=2)
    assert_close(cw_rgp_loss(z, groups=2), 2 - 2 * cosine_similarity(a, b).mean())


def test_channel_permutations_are_those_of_iterations_views_and_blocks() -> None:
    z, orders = views(2, 6, 16), shuffles(2, 6)
    channels = torch.rand(2, 2, 2, 16, generator=torch.Generator().manual_seed(0)).argsort(-1)
    found = []
    for t, order in enumerate(orders):
        for b, block in enumerate(order.split(3)):
            first, second = (
                whiten(z[v, block], kind="zca", axis="channel", groups=2, permutation=channels[t, v, b]) for v in (0, 1)
            )
            found.append(2 - 2 * cosine_similarity(first, second).mean())
    ours = cw_rgp_loss(z, groups=2, block_size=3, permutations=orders, channel_permutations=channels)
    assert_close(ours, torch.stack(found).mean())


def test_one_order_for_all_is_the_order_for_each() -> None:
    z, order = views(2, 6, 16), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for channels in (order, order.expand(2, 1, 16), order.expand(1, 2, 2, 16)):
        ours = cw_rgp_loss(z, groups=2, block_size=3, channel_permutations=channels)
        assert_close(ours, cw_rgp_loss(z, groups=2, block_size=3, channel_permutations=order))


def test_the_module_draws_new_groups_in_every_training_step() -> None:
    loss, z = CWRGPLoss(groups=2, block_size=3), views(2, 6, 16)
    values = [loss(z).item() for _ in range(4)]
    assert len(set(values)) == 4
    assert int(loss.steps) == 4
    again = CWRGPLoss(groups=2, block_size=3)
    assert [again(z).item() for _ in range(4)] == values
    assert CWRGPLoss(groups=2, block_size=3, seed=1)(z).item() != values[0]


def test_a_resumed_module_goes_on_with_its_draws() -> None:
    loss, z = CWRGPLoss(groups=2, block_size=3), views(2, 6, 16)
    loss(z)
    resumed = CWRGPLoss(groups=2, block_size=3)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(z), loss(z))


def test_steps_are_those_of_training_with_a_finite_loss() -> None:
    loss, z = CWRGPLoss(groups=2, block_size=3), views(2, 6, 16)
    first = loss.eval()(z)
    loss.train()
    with second_pass():
        assert torch.equal(loss(z), first)
    loss(z * torch.nan)
    assert int(loss.steps) == 0


def test_without_shuffle_groups_are_runs_of_channels() -> None:
    z = views(2, 3, 16)
    assert_close(CWRGPLoss(groups=2, shuffle=False)(z), cw_rgp_loss(z, groups=2))


def cw_rgp_share(rank: int, split: tuple[int, ...]) -> tuple[float, Tensor]:
    z = views(2, N, 16)[:, sum(split[:rank]) : sum(split[: rank + 1])].clone().requires_grad_()
    loss = CWRGPLoss(groups=2, block_size=3, iterations=2)(z)
    loss.backward()
    return loss.item(), z.grad


def test_groups_and_blocks_over_ranks_are_those_of_one_process(ranks: Pool) -> None:
    loss, gradient = cw_rgp_share(0, (N,))
    found = ranks.run(cw_rgp_share, (7, 0, 5))
    assert sum(value for value, _ in found) / 3 == pytest.approx(loss, rel=1e-12)
    assert_close(torch.cat([grad for _, grad in found], dim=1) / 3, gradient)
