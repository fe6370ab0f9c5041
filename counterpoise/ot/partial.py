r"""Partial Sinkhorn: a given mass moves, from no more than a to no more than b.

.. math:: \min_{P \ge 0}\ \langle P, C \rangle + \epsilon \sum_{ij} P_{ij} (\log P_{ij} - 1) \quad \text{s.t.}\quad
          P 1 \le a,\ P^\top 1 \le b,\ 1^\top P\, 1 = m, \qquad
          P_{ij} = e^{(f_i + g_j - C_{ij}) / \epsilon}

.. math:: f_i \leftarrow \min\Big(\lambda,\ \epsilon \log \frac{a_i}{R_i}\Big), \quad
          R_i = \sum_j e^{(g_j - C_{ij}) / \epsilon}, \qquad
          \lambda:\ \sum_i \min\big(e^{\lambda / \epsilon} R_i,\ a_i\big) = m

and g likewise, with a ceiling mu of its own. Dykstra's projections onto the three constraints, whose corrections are of
rank one in logarithms: f - lambda, g - mu and lambda + mu. So vectors are kept, not three N x K matrices. Each side is
projected together with the mass, instead of the mass for itself: the ceiling is the root of a concave, piecewise linear
function. Where m is nearly all of the mass, tens of iterations do then what takes thousands one constraint at a time.

Other libraries: POT keeps the matrices, multiplies by diagonal N x N ones, and by default always runs 1000 iterations.

Source: Benamou et al., Iterative Bregman Projections for Regularized Transportation Problems, 2015, section 5; the
ceilings are derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_number
from counterpoise.ot._assemble import transport
from counterpoise.ot._inputs import as_cost, as_marginal, check_formed, check_settings
from counterpoise.ot._kernels import Problem
from counterpoise.ot._sides import Ceiling, Ranks, Side
from counterpoise.ot.costs import PointCost
from counterpoise.ot.result import OTResult, warn_unless_converged


def partial_sinkhorn(
    cost: Tensor | PointCost,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    mass: float,
    epsilon: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    gradient: str = "none",
    scaling: float | str | None = "auto",
    sync: bool = False,
) -> OTResult:
    """Entropic transport of a part of the mass; the problem is at the top of this file.

    Args:
        cost: (..., N, K), or points; as in :func:`sinkhorn`.
        a: (N,) or (..., N) most mass of each row, >= 0; None = uniform with total 1.
        b: (K,) or (..., K), of each column; totals may differ.
        mass: m > 0, at most either total.
        epsilon: strength > 0 of the entropy.
        max_iterations: at most so many.
        tolerance: of the mass that another iteration would move, relative to ``mass``; 0 runs max_iterations.
        gradient: "none", "envelope" of the value, or "unroll".
        scaling: of epsilon; as in :func:`sinkhorn`.
        sync: rows are split over ranks.

    Returns:
        OTResult; its f and g include lambda and mu.

    Raises:
        ValueError, TypeError: shapes, types or settings that do not fit, negative masses, a mass that is too large.
    """
    check_settings(epsilon, max_iterations, tolerance, gradient, scaling, ("none", "envelope", "unroll"))
    cost, ranks = as_cost(cost), Ranks(sync)
    check_formed(cost, gradient)
    a, b = as_marginal("a", a, cost, 0, ranks), as_marginal("b", b, cost, 1, ranks)
    check_number("mass", mass, 0, open_low=True)
    most = torch.minimum(ranks.sum(a.detach().sum(-1, keepdim=True)), b.detach().sum(-1, keepdim=True))
    if mass > float(most.min()) * (1 + 1e-6):
        raise ValueError(f"mass is {mass}, expected at most the total of a and of b, {float(most.min()):.6g}")

    def problem_of(cost: Tensor | PointCost, a: Tensor, b: Tensor) -> Problem:
        amount = most.clamp_max(mass)
        rows, columns = (
            Side(x, (x > 0).to(x.dtype), epsilon, ceiling=Ceiling(amount, torch.full_like(amount, -torch.inf)))
            for x in (a, b)
        )
        return Problem(cost, rows, columns, ranks, amount[..., 0], product=False)

    result = transport(
        problem_of,
        cost,
        a,
        b,
        max_iterations=max_iterations,
        tolerance=tolerance,
        gradient=gradient,
        scaling=scaling,
    )
    warn_unless_converged("partial_sinkhorn", result.converged, tolerance, max_iterations)
    return result
