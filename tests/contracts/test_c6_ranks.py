"""C6: ranks on a split batch give the loss, the averaged gradients and the state of one process on all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterpoise._core import world_size
from counterpoise.samplers import reweighted_loss
from tests.contracts.parts import OBJECTIVES, REWEIGHTERS, Batch, batch_of, build, ids
from tests.pool import Pool

N = 12
SPLITS = {
    "two": (6, 6),
    "two, uneven": (5, 7),
    "three": (4, 4, 4),
    "three, uneven": (5, 1, 6),
    "an empty rank": (7, 0, 5),
}
EXACT = [p for p in OBJECTIVES if p.spec.distributed != "single_process"]


def share(rank: int, split: tuple[int, ...]) -> slice:
    start = sum(split[:rank])
    return slice(start, start + split[rank])


def linear() -> Tensor:
    """A parameter in front of the part, whose averaged gradient is what DDP would give."""
    g = torch.Generator().manual_seed(5)
    return torch.randn(6, 6, generator=g, dtype=torch.float64).requires_grad_()


def through(parameter: Tensor, batch: Batch) -> list[Tensor]:
    leaves = [x.detach() @ parameter[: x.shape[1], : x.shape[1]] for x in batch.leaves]
    return [*leaves, *batch.inputs[batch.differentiable :]]


def averaged(x: Tensor) -> Tensor:
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def step(rank: int, part: type, settings: dict[str, Any], options: dict[str, Tensor], split: tuple[int, ...]) -> Any:
    """Mean over ranks of the loss, and of the parameter's gradient; on one process, all of the batch."""
    rows = share(rank, split)
    batch = batch_of(part.spec.task, n=N).rows(rows)
    parameter = linear()
    loss = build(part, sync=True, **settings)(
        *through(parameter, batch), **batch.options, **{name: x[rows] for name, x in options.items()}
    )
    loss.backward()
    return averaged(loss), averaged(parameter.grad)


def compare(pools: dict[int, Pool], function: Any, *arguments: Any, split: tuple[int, ...]) -> None:
    expected = function(0, *arguments, (N,))
    for got in pools[len(split)].run(function, *arguments, split):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("part", EXACT, ids=ids(EXACT))
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.filterwarnings("ignore:LDAMLoss got logits")
def test_ranks_equal_one_process(part: type, split: tuple[int, ...], pools: dict[int, Pool]) -> None:
    compare(pools, step, part, {}, {}, split=split)


@pytest.mark.parametrize("part", EXACT, ids=ids(EXACT))
@pytest.mark.filterwarnings("ignore:LDAMLoss got logits")
def test_ranks_equal_one_process_with_weights_masks_and_normalisers(part: type, pools: dict[int, Pool]) -> None:
    g = torch.Generator().manual_seed(1)
    options = {"weight": torch.rand(N, generator=g, dtype=torch.float64), "mask": torch.rand(N, generator=g) < 0.6}
    every = [{"normalizer": "count"}, {"normalizer": "weight"}, {"normalizer": "positives"}, {"reduction": "sum"}]
    for settings in every if part.spec.per_row else [{}]:
        compare(pools, step, part, settings, options, split=SPLITS["three, uneven"])


def reweighted_steps(rank: int, part: type, split: tuple[int, ...]) -> Any:
    """Three steps of a reweighter on losses through a parameter: losses, gradients, and the state after them."""
    rows, parameter, reweighter = share(rank, split), linear(), build(part)
    found = []
    for seed in range(3):
        batch = batch_of("reweighter", n=N, seed=seed).rows(rows)
        losses = (batch.inputs[0][:, None] * parameter[0]).sum(1).square()
        loss = reweighted_loss(losses, reweighter, **batch.options)
        loss.backward()
        found += [averaged(loss), averaged(parameter.grad)]
    return [*found, *[averaged(x.double()) for x in reweighter.state_dict().values()]]


@pytest.mark.parametrize("part", REWEIGHTERS, ids=ids(REWEIGHTERS))
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_reweighters_equal_one_process(part: type, split: tuple[int, ...], pools: dict[int, Pool]) -> None:
    compare(pools, reweighted_steps, part, split=split)


def plain_mean(rank: int, split: tuple[int, ...]) -> Any:
    """One step of the composition without a reweighter."""
    rows, parameter = share(rank, split), linear()
    batch = batch_of("reweighter", n=N).rows(rows)
    losses = (batch.inputs[0][:, None] * parameter[0]).sum(1).square()
    weight, mask = torch.arange(N, dtype=torch.float64), torch.arange(N) % 3 > 0
    loss = reweighted_loss(losses, weight=weight[rows], mask=mask[rows])
    loss.backward()
    return averaged(loss), averaged(parameter.grad)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_composition_without_a_reweighter_equals_one_process(split: tuple[int, ...], pools: dict[int, Pool]) -> None:
    compare(pools, plain_mean, split=split)
