"""Rows split over ranks: two and three processes, uneven and empty ones, find what one process finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import counterpoise.ot._inputs as inputs
from counterpoise.ot import OTResult, SquaredEuclidean, partial_sinkhorn, sinkhorn, unbalanced_sinkhorn
from tests.ot.problems import transport
from tests.pool import Pool

SPLITS = {"two": (5, 4), "two, one empty": (9, 0), "even": (3, 3, 3), "uneven": (1, 6, 2), "one empty": (4, 0, 5)}
INF = float("inf")
PENALTY = [0.3, INF, 2.0, 0.7, 1.0]
TIGHT: dict[str, Any] = {"epsilon": 0.1, "tolerance": 1e-12}
SOLVERS: dict[str, Any] = {
    "sinkhorn": (sinkhorn, {}),
    "small epsilon": (sinkhorn, {"epsilon": 2e-3, "tolerance": 1e-8, "max_iterations": 20_000, "scaling": 0.25}),
    "unbalanced": (unbalanced_sinkhorn, {"penalty_a": 0.5, "penalty_b": PENALTY, "reference": "ones"}),
    "semi-relaxed": (unbalanced_sinkhorn, {"penalty_a": INF, "penalty_b": 3.0}),
    "partial": (partial_sinkhorn, {"mass": 0.7}),
}


def solve(name: str, cost: Any, a: Tensor | None, b: Tensor | None, sync: bool, gradient: str) -> OTResult:
    solver, options = SOLVERS[name]
    return solver(cost, a, b, **{**TIGHT, **options}, gradient=gradient, sync=sync)


def loss_of(result: OTResult, gradient: str, probe: Tensor) -> Tensor:
    """A function of the value, which is everybody's, or of this rank's rows of the plan."""
    return result.value.square() if gradient == "envelope" else (result.plan * probe).square().sum()


def on_rank(
    rank: int, name: str, gradient: str, sizes: tuple[int, ...], zeros: bool, uniform: bool
) -> dict[str, Tensor]:
    """This rank's part of the result, and of the gradients as DDP would add them up."""
    cost, a, b = (x.requires_grad_() for x in transport(9, 5, zeros=zeros))
    probe = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank]) if sizes else slice(None)
    result = solve(name, cost[rows], None if uniform else a[rows], b, bool(sizes), gradient)
    loss = loss_of(result, gradient, probe[rows])
    grads = (
        torch.autograd.grad(loss, (cost, a, b), materialize_grads=True, allow_unused=True) if gradient != "none" else []
    )
    found = {name: getattr(result, name).detach() for name in ("plan", "f", "g", "value", "marginal_error")}
    return {**found, "iterations": torch.tensor(result.iterations), **{f"grad {i}": g for i, g in enumerate(grads)}}


def compare(parts: list[dict[str, Tensor]], alone: dict[str, Tensor], gradient: str) -> None:
    """Rows put together, what is everybody's, and the gradients: the mean over ranks, of the mean loss."""
    ranks = len(parts)
    for name in ("plan", "f"):
        assert_close(torch.cat([part[name] for part in parts]), alone[name], atol=1e-9, rtol=1e-6)
    for part in parts:
        for name in ("g", "value", "marginal_error", "iterations"):
            assert_close(part[name], alone[name], atol=1e-9, rtol=1e-6)
    losses = 1 if gradient == "envelope" else ranks  # the mean of equal losses, or of parts of their sum
    for name in [name for name in alone if name.startswith("grad")]:
        mean = sum(part[name] for part in parts) / ranks
        assert_close(mean * losses, alone[name], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("zeros", [False, True])
def test_ranks_are_one(pools: dict[int, Pool], name: str, sizes: tuple[int, ...], zeros: bool) -> None:
    case = (name, "none")
    parts = pools[len(sizes)].run(on_rank, *case, sizes, zeros, False)
    compare(parts, on_rank(0, *case, (), zeros, False), "none")


def test_uniform_masses_are_those_of_all_rows(ranks: Pool) -> None:
    case = ("sinkhorn", "none")
    compare(ranks.run(on_rank, *case, (1, 6, 2), False, True), on_rank(0, *case, (), False, True), "none")


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        ("sinkhorn", "envelope"),
        ("sinkhorn", "implicit"),
        ("sinkhorn", "unroll"),
        ("unbalanced", "envelope"),
        ("unbalanced", "implicit"),
        ("unbalanced", "unroll"),
        ("semi-relaxed", "implicit"),
        ("partial", "envelope"),
        ("partial", "unroll"),
    ],
)
@pytest.mark.parametrize("split", ["two", "two, one empty", "uneven", "one empty"])
def test_gradients_of_ranks_are_those_of_one(pools: dict[int, Pool], name: str, gradient: str, split: str) -> None:
    case, sizes = (name, gradient), SPLITS[split]
    parts = pools[len(sizes)].run(on_rank, *case, sizes, False, False)
    compare(parts, on_rank(0, *case, (), False, False), gradient)


def test_implicit_gradients_beside_masses_of_zero(pair: Pool) -> None:
    case = ("sinkhorn", "implicit")
    compare(pair.run(on_rank, *case, (5, 4), True, False), on_rank(0, *case, (), True, False), "implicit")


# Points


def points_on_rank(rank: int, sizes: tuple[int, ...]) -> list[Tensor]:
    inputs.FORMED = -1  # this process's, and put back below
    try:
        generator = torch.Generator().manual_seed(2)
        x, y = (torch.randn(n, 2, generator=generator, dtype=torch.float64, requires_grad=True) for n in (9, 5))
        start = sum(sizes[:rank])
        rows = slice(start, start + sizes[rank]) if sizes else slice(None)
        result = sinkhorn(SquaredEuclidean(x[rows], y), **TIGHT, gradient="envelope", sync=bool(sizes))
        assert result.plan is None
        return [result.g, result.value.detach(), *torch.autograd.grad(result.value, (x, y))]
    finally:
        inputs.FORMED = 2**24


def test_points_of_three_ranks_are_those_of_one(ranks: Pool) -> None:
    parts, alone = ranks.run(points_on_rank, (4, 0, 5)), points_on_rank(0, ())
    for part in parts:
        assert_close(part[:2], alone[:2])
    for i in (2, 3):
        assert_close(sum(part[i] for part in parts) / 3, alone[i])


# Refused by every rank, so that none waits for another


def refused_on_rank(rank: int) -> str:
    cost = torch.zeros(2, 3)
    if rank == 1:
        cost[0, 0] = torch.nan
    try:
        sinkhorn(cost, epsilon=0.1, sync=True)
    except ValueError as error:
        return str(error)
    return ""


def test_what_one_rank_cannot_solve_all_ranks_refuse(ranks: Pool) -> None:
    messages = ranks.run(refused_on_rank)
    assert all(message.startswith("cost holds NaN") for message in messages)
