"""From a problem to a result: solving it, its value, and the gradient that was asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from counterpoise._core import without_autocast
from counterpoise.ot._gradients import EnvelopeValue, EnvelopeValueOfPoints, ImplicitPlan
from counterpoise.ot._iterations import plan_of, solve
from counterpoise.ot._kernels import Problem
from counterpoise.ot._sides import Ranks, Side
from counterpoise.ot._unrolled import unroll, unrolled_plan
from counterpoise.ot.costs import PointCost
from counterpoise.ot.result import OTResult, Parts


def transport(
    problem_of: Callable[[Tensor | PointCost, Tensor, Tensor], Problem],
    cost: Tensor | PointCost,
    a: Tensor,
    b: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
    gradient: str,
    scaling: float | str | None,
    centred: bool = False,
) -> OTResult:
    """Solves what ``problem_of`` makes of the cost and the marginals; ``centred`` makes the mean of f zero."""
    with without_autocast(a):
        if gradient == "unroll":
            return unrolled(problem_of(cost, a, b), max_iterations, tolerance, centred)
        with torch.no_grad():
            problem = problem_of(cost.detach() if isinstance(cost, Tensor) else cost, a.detach(), b.detach())
            found = solve(problem, max_iterations, tolerance, scaling)
            f, g = centre(found.f, found.g, problem.ranks) if centred else (found.f, found.g)
            value = dual_value(problem, f, g, found.mass)
            plan = plan_of(problem, found) if isinstance(cost, Tensor) else None
        parts = parts_of(problem)
        if gradient in ("envelope", "implicit"):
            value = with_envelope(problem, cost, a, b, value, plan, f, g, parts)
        if gradient == "implicit" and plan is not None:
            plan = with_implicit(problem, cost, a, b, plan)
    entropy = entropy_value(problem, a, b, value) if centred else None
    return OTResult(plan, f, g, value, found.error, found.iterations, found.converged, entropy, parts)


def unrolled(problem: Problem, max_iterations: int, tolerance: float, centred: bool) -> OTResult:
    """The result of the iterations that autograd sees."""
    f, g, error, iterations, converged = unroll(problem, max_iterations, tolerance)
    plan = unrolled_plan(problem, f, g)
    value = dual_value(problem, f, g, problem.ranks.sum(plan.sum((-2, -1))))
    f, g = centre(f, g, problem.ranks) if centred else (f, g)
    entropy = entropy_value(problem, problem.rows.mass, problem.columns.mass, value) if centred else None
    return OTResult(plan, f, g, value, error, iterations, converged, entropy, parts_of(problem))


def parts_of(problem: Problem) -> Parts:
    """What the plan is made of beside the potentials."""
    return Parts(problem.cost, problem.rows.reference, problem.columns.reference, problem.epsilon)


def centre(f: Tensor, g: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The potentials of the same plan for which the mean of f, over the rows of all ranks, is zero."""
    count = ranks.sum(f.new_tensor(f.shape[-1]))
    mean = ranks.sum(f.sum(-1))[..., None] / count
    return f - mean, g + mean


def dual_value(problem: Problem, f: Tensor, g: Tensor, mass: Tensor) -> Tensor:
    """sum a gain(f) + sum b gain(g) - epsilon (|P| - |a||b|), the last for the product; (...)."""
    rows, columns, total_of = problem.rows, problem.columns, problem.ranks.sum
    value = total_of(gained(rows, f)) + gained(columns, g) - problem.epsilon * mass
    if problem.product:
        value = value + problem.epsilon * total_of(rows.mass.sum(-1)) * columns.mass.sum(-1)
    for side in (rows, columns):
        if side.ceiling is not None:
            value = value + side.ceiling.value[..., 0] * problem.total
    return value


def gained(side: Side, potential: Tensor) -> Tensor:
    """Sum of mass times gain, (...)."""
    some = side.mass > 0
    return torch.where(some, side.mass * side.gain(torch.where(some, potential, 0)), 0).sum(-1)


def entropy_value(problem: Problem, a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    """<P, C> + epsilon sum P (log P - 1) of a balanced problem, from the value with KL(P | a b^T)."""
    total_of = problem.ranks.sum
    entropies = -total_of(torch.special.entr(a).sum(-1)) - torch.special.entr(b).sum(-1)
    return value + problem.epsilon * (entropies - total_of(a.sum(-1)) * b.sum(-1))


def with_envelope(
    problem: Problem,
    cost: Tensor | PointCost,
    a: Tensor,
    b: Tensor,
    value: Tensor,
    plan: Tensor | None,
    f: Tensor,
    g: Tensor,
    parts: Parts,
) -> Tensor:
    """The value with its gradient."""
    rows, columns, epsilon, sync = problem.rows, problem.columns, problem.epsilon, problem.ranks.several
    da, db = rows.gain(f), columns.gain(g)
    if problem.product:
        da = da + epsilon * (columns.mass.sum(-1, keepdim=True) - rows.share(f))
        db = db + epsilon * (problem.ranks.sum(rows.mass.sum(-1, keepdim=True)) - columns.share(g))
    if isinstance(cost, Tensor):
        return EnvelopeValue.apply(cost, a, b, value, plan, da, db, sync)
    return EnvelopeValueOfPoints.apply(*cost.points, a, b, value, parts, f, g, da, db, sync)


def with_implicit(problem: Problem, cost: Tensor | PointCost, a: Tensor, b: Tensor, plan: Tensor) -> Tensor:
    """The plan with its gradient."""
    slacks = [None if side.damping is None else 1 / side.damping for side in (problem.rows, problem.columns)]
    return ImplicitPlan.apply(cost, a, b, plan, *slacks, problem.product, problem.epsilon, problem.ranks.several)
