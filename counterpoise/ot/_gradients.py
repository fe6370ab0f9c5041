r"""Gradients of a solved transport problem, without a graph of its iterations.

Envelope: at the optimum the potentials' own change does not count, so that

.. math:: \frac{\partial\,\mathrm{value}}{\partial C} = P, \qquad
          \frac{\partial\,\mathrm{value}}{\partial a} = f, \qquad
          \frac{\partial\,\mathrm{value}}{\partial b} = g \quad \text{(balanced; up to constants)}

Implicit: with the upstream gradient R of the plan and r = (P o R) 1, c = (P o R)^T 1, the marginals' equations give

.. math:: \begin{pmatrix} s_a \circ A & P \\ P^\top & s_b \circ D \end{pmatrix} \begin{pmatrix} x \\ y \end{pmatrix}
          = \begin{pmatrix} r \\ c \end{pmatrix}, \qquad A = \mathrm{diag}(P 1),\ D = \mathrm{diag}(P^\top 1)

.. math:: \frac{\partial L}{\partial C} = \frac{P \circ (x 1^\top + 1 y^\top - R)}{\epsilon}, \qquad
          \frac{\partial L}{\partial a} = t_a \circ x \circ \frac{P 1}{a}, \qquad
          \frac{\partial L}{\partial b} = t_b \circ y \circ \frac{P^\top 1}{b}

s = 1 + epsilon / rho for penalties rho (1 where exact); t = s for the reference "product", 1 for "ones". The rows are
eliminated, (D - P^T A^-1 P) y = c - P^T A^-1 r, or the columns where they are more. That matrix is singular along 1 in
the balanced case, and along every block that the plan falls into; a pseudo-inverse picks the smallest solution, and
what it leaves out is a gauge. With rows over ranks the system of the columns is what is reduced.

Source: envelope: Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, 2019;
implicit: Luise et al., Differential Properties of Sinkhorn Approximation for Learning with Wasserstein Distance, 2018;
with penalties it is derived here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from counterpoise.distributed import sum_over_ranks, world_size
from counterpoise.ot._kernels import times
from counterpoise.ot.costs import PointCost, tiles
from counterpoise.ot.result import Parts

Gradients = tuple[Tensor | None, ...]


class EnvelopeValue(torch.autograd.Function):
    """The value, whose gradients are the plan and, for the marginals, ``da`` and ``db``."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, value: Tensor, plan: Tensor, da: Tensor, db: Tensor, sync: bool
    ) -> Tensor:
        ctx.save_for_backward(plan, da, db)
        ctx.sync = sync
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Gradients:  # type: ignore[override]
        plan, da, db = ctx.saved_tensors
        upstream, share = upstream_of(grad[0], ctx.sync)
        of_cost = upstream[..., None] * plan if ctx.needs_input_grad[0] else None
        return of_cost, upstream * da, upstream * share * db, *[None] * 5


class EnvelopeValueOfPoints(torch.autograd.Function):
    """The value of a cost between points, whose gradient is formed in tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        value: Tensor,
        parts: Parts,
        f: Tensor,
        g: Tensor,
        da: Tensor,
        db: Tensor,
        sync: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, y, f, g, da, db)
        ctx.parts, ctx.sync = parts, sync
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Gradients:  # type: ignore[override]
        x, y, f, g, da, db = ctx.saved_tensors
        upstream, share = upstream_of(grad[0], ctx.sync)
        dx, dy = points_gradient(x, y, ctx.parts, f, g)
        of_points = upstream[..., None] * dx, upstream[..., None] * dy
        return *of_points, upstream * da, upstream * share * db, *[None] * 7


def upstream_of(grad: Tensor, sync: bool) -> tuple[Tensor, float]:
    """(..., 1) gradient that arrived, on all ranks together, and the share of it for what every rank holds."""
    return (sum_over_ranks(grad) if sync else grad)[..., None], 1 / world_size() if sync else 1.0


def points_gradient(x: Tensor, y: Tensor, parts: Parts, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """sum_ij P_ij dC_ij / dx and / dy, a tile of rows at a time."""
    cost: PointCost = parts.cost  # type: ignore[assignment]
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    for start, stop in tiles(cost):
        plan = parts.plan_rows(f, g, start, stop)
        with torch.enable_grad():
            part, others = x[..., start:stop, :].detach().requires_grad_(), y.detach().requires_grad_()
            linear = (cost.pairwise(part, others) * plan).sum()
        of_part, of_others = torch.autograd.grad(linear, (part, others))
        dx[..., start:stop, :] = of_part
        dy += of_others
    return dx, dy


class ImplicitPlan(torch.autograd.Function):
    """The plan at convergence, whose gradient is that of the solution."""

    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        plan: Tensor,
        slack_a: Tensor | None,
        slack_b: Tensor | None,
        product: bool,
        epsilon: float,
        sync: bool,
    ) -> Tensor:
        ctx.save_for_backward(a, b, plan, slack_a, slack_b)
        ctx.product, ctx.epsilon, ctx.sync = product, epsilon, sync
        return plan.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Gradients:  # type: ignore[override]
        a, b, plan, slack_a, slack_b = ctx.saved_tensors
        reduce = sum_over_ranks if ctx.sync else (lambda x: x)
        pr = plan * grad[0]
        r, c = pr.sum(-1), reduce(pr.sum(-2))
        row_mass, column_mass = plan.sum(-1), reduce(plan.sum(-2))
        top = row_mass if slack_a is None else slack_a * row_mass
        bottom = column_mass if slack_b is None else slack_b * column_mass
        if ctx.sync or plan.shape[-2] >= plan.shape[-1]:
            x, y = eliminate(plan, top, bottom, r, c, reduce)
        else:
            y, x = eliminate(plan.mT, bottom, top, c, r, reduce)
        of_cost = (plan * (x[..., :, None] + y[..., None, :]) - pr) / ctx.epsilon
        of_a, of_b = x * row_mass / torch.where(a > 0, a, 1), y * column_mass / torch.where(b > 0, b, 1)
        if ctx.product:
            of_a = of_a if slack_a is None else slack_a * of_a
            of_b = of_b if slack_b is None else slack_b * of_b
        return of_cost, of_a, of_b / (world_size() if ctx.sync else 1), *[None] * 6


def eliminate(p: Tensor, top: Tensor, bottom: Tensor, r: Tensor, c: Tensor, reduce: Any) -> tuple[Tensor, Tensor]:
    """x and y of diag(top) x + P y = r, P^T x + diag(bottom) y = c; rows without mass have x = 0.

    What is left of the columns after the subtraction is known to its rounding: eigenvalues below that are zeros.
    """
    inverse = torch.where(top > 0, 1 / torch.where(top > 0, top, 1), 0)
    schur = torch.diag_embed(bottom) - reduce(p.mT @ (inverse[..., None] * p))
    right = c - reduce(times(p.mT, inverse * r))
    rounding = bottom.shape[-1] * torch.finfo(bottom.dtype).eps * bottom.amax(-1)
    y = times(torch.linalg.pinv(schur, atol=rounding, rtol=rounding.new_zeros(()), hermitian=True), right)
    return inverse * (r - times(p, y)), y
