r"""Sinkhorn: entropic optimal transport between two marginals of equal total mass.

.. math:: \min_{P \ge 0}\ \langle P, C \rangle + \epsilon\, \mathrm{KL}(P \,\|\, a b^\top) \quad \text{s.t.}\quad
          P 1 = a,\ P^\top 1 = b, \qquad P_{ij} = a_i\, b_j\, e^{(f_i + g_j - C_{ij}) / \epsilon}

.. math:: f_i \leftarrow -\epsilon \log \sum_j b_j\, e^{(g_j - C_{ij}) / \epsilon}, \qquad
          g_j \leftarrow -\epsilon \log \sum_i a_i\, e^{(f_i - C_{ij}) / \epsilon}

with KL(P | Q) = sum P log(P / Q) - P + Q. At the optimum the value is <a, f> + <b, g> (for total mass 1); the common
convention with the entropy, <P, C> + epsilon sum P (log P - 1), has the same plan and is ``value_entropy``. Of (f + c,
g - c), which give the same plan, the one with mean zero of f is returned.

Iterations are products of a kernel and a vector, with potentials absorbed where it would overflow, and go to the log
domain only where they must. On the way to a tolerance they are accelerated: near-ties of costs take thousands of plain
ones. Where the spread of the costs is above 500 epsilon, epsilon comes down from it by halves.

Other libraries: POT's plain solver returns the last iterate before a NaN, with a warning, and its log-domain solver
takes ten to thirty times as long an iteration; geomloss has no tolerance.

Source: Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, 2013; values and gradients as in Peyré
and Cuturi, Computational Optimal Transport, 2019, section 4.
"""

from __future__ import annotations

from torch import Tensor

from counterpoise.ot._assemble import transport
from counterpoise.ot._inputs import as_cost, as_marginal, check_formed, check_settings, with_equal_totals
from counterpoise.ot._kernels import Problem
from counterpoise.ot._sides import Ranks, Side
from counterpoise.ot.costs import PointCost
from counterpoise.ot.result import OTResult, warn_unless_converged


def sinkhorn(
    cost: Tensor | PointCost,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    gradient: str = "none",
    scaling: float | str | None = "auto",
    sync: bool = False,
) -> OTResult:
    """Entropic transport; the problem is at the top of this file.

    Args:
        cost: (..., N, K), a batch of problems; inf forbids a pair. Or points, see :class:`PointCost`. float64 stays,
            all else is computed in float32.
        a: (N,) or (..., N) masses >= 0 of the rows; None = uniform with total 1. Rows of no mass have a plan of 0.
        b: (K,) or (..., K), of the columns, with the total of ``a``.
        epsilon: strength > 0 of the entropy, in units of the cost.
        max_iterations: at most so many, those at a larger epsilon included.
        tolerance: of the error of the row marginals, in L1 relative to the total mass, looked at every ten iterations;
            columns are exact. No less than rounding allows (1e-6 in float32). 0 runs max_iterations plain ones, without
            a warning.
        gradient: "none"; "envelope" of the value: plan, f and g; "implicit" of the plan as well, by one linear system
            of the smaller side, right at convergence only; "unroll" of everything, through all iterations.
        scaling: factor in (0, 1) by which epsilon comes down from the spread of the costs; "auto", or None: not at all.
        sync: rows are split over ranks, and ``cost``, ``a`` are this rank's (a rank may have none). Plan and f are
            local, all else is that of all rows.

    Returns:
        OTResult; of a batch, value and marginal_error have one entry each.

    Raises:
        ValueError, TypeError: shapes, types or settings that do not fit, negative masses, totals that differ, a row or
            column with mass but no finite cost.
    """
    check_settings(epsilon, max_iterations, tolerance, gradient, scaling)
    cost, ranks = as_cost(cost), Ranks(sync)
    check_formed(cost, gradient)
    a, b = as_marginal("a", a, cost, 0, ranks), as_marginal("b", b, cost, 1, ranks)
    b = with_equal_totals(a, b, ranks)

    settings = (epsilon, max_iterations, tolerance)
    result = balanced(cost, a, b, ranks, *settings, gradient=gradient, scaling=scaling)
    implicit_at = result.marginal_error if gradient == "implicit" else None
    warn_unless_converged("sinkhorn", result.converged, tolerance, max_iterations, implicit_at=implicit_at)
    return result


def balanced(
    cost: Tensor | PointCost,
    a: Tensor,
    b: Tensor,
    ranks: Ranks,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    *,
    gradient: str,
    scaling: float | str | None,
) -> OTResult:
    """The result for inputs that are checked, without a warning."""

    def problem_of(cost: Tensor | PointCost, a: Tensor, b: Tensor) -> Problem:
        return Problem(cost, Side(a, a, epsilon), Side(b, b, epsilon), ranks, total=b.detach().sum(-1))

    return transport(
        problem_of,
        cost,
        a,
        b,
        max_iterations=max_iterations,
        tolerance=tolerance,
        gradient=gradient,
        scaling=scaling,
        centred=True,
    )
