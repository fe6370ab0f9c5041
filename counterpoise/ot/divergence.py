r"""Sinkhorn divergence: entropic transport without its bias, a distance between clouds of weighted points.

.. math:: S_\epsilon(a, b) = \mathrm{OT}_\epsilon(a, b) - \tfrac{1}{2} \mathrm{OT}_\epsilon(a, a)
          - \tfrac{1}{2} \mathrm{OT}_\epsilon(b, b), \qquad C(x, y) = |x - y|^p / p, \quad \epsilon = \mathrm{blur}^p

OT is the value of :func:`sinkhorn`. S is not negative, and 0 for equal clouds only. With gradients of the value at
fixed potentials, a point is moved by the difference of two barycentric projections. The symmetric terms have one
potential,

.. math:: f \leftarrow \tfrac{1}{2} (f + T f), \qquad
          (T f)_i = -\epsilon \log \sum_j a_j\, e^{(f_j - C_{ij}) / \epsilon}

which takes a handful of iterations; since C_ii = 0, its kernel never needs anything absorbed.

Other libraries: POT's empirical_sinkhorn_divergence compares linear costs <P, C>, which is something else; geomloss has
the same definition and no tolerance.

Source: Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, 2019, eq. 3 and
section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_choice, without_autocast
from counterpoise.ot._assemble import dual_value, parts_of, with_envelope
from counterpoise.ot._inputs import as_cost, as_marginal, check_settings, with_equal_totals
from counterpoise.ot._iterations import beyond_mass
from counterpoise.ot._kernels import DenseKernel, Problem
from counterpoise.ot._sides import Ranks, Side
from counterpoise.ot.costs import Euclidean, PointCost, SquaredEuclidean
from counterpoise.ot.result import warn_unless_converged
from counterpoise.ot.sinkhorn import balanced


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    p: int = 2,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Tensor:
    """The divergence of two clouds; the formula is at the top of this file.

    Args:
        x: (..., N, d) floating points.
        y: (..., K, d).
        a: (N,) or (..., N) masses >= 0 of x; None = uniform with total 1.
        b: (K,) or (..., K) of y, with the total of ``a``.
        epsilon: strength > 0 of the entropy, in units of the cost: blur^p.
        p: 2 for |x - y|^2 / 2, or 1 for |x - y|.
        max_iterations: of each of the three problems.
        tolerance: of each marginal error, as in :func:`sinkhorn`.

    Returns:
        (...), at least float32, with gradients to points and masses. Clouds of more than 2^24 pairs are taken in tiles.

    Raises:
        ValueError, TypeError: as :func:`sinkhorn`, or a ``p`` that is neither 1 nor 2.
    """
    check_choice("p", p, (1, 2))
    check_settings(epsilon, max_iterations, tolerance, "envelope", None)
    with without_autocast(x):
        across = as_cost(between(x, y, p))
        a, b = (as_marginal(name, m, across, i, Ranks(sync=False)) for i, (name, m) in enumerate((("a", a), ("b", b))))
        b = with_equal_totals(a, b, Ranks(sync=False))
        found = balanced(
            across, a, b, Ranks(sync=False), epsilon, max_iterations, tolerance, gradient="envelope", scaling="auto"
        )
        of_x, x_converged = within(x, a, p, epsilon, max_iterations, tolerance)
        of_y, y_converged = within(y, b, p, epsilon, max_iterations, tolerance)
    converged = found.converged and x_converged and y_converged
    warn_unless_converged("sinkhorn_divergence", converged, tolerance, max_iterations)
    return found.value - (of_x + of_y) / 2


def between(x: Tensor, y: Tensor, p: int) -> PointCost:
    """|x - y|^p / p."""
    return SquaredEuclidean(x, y, scale=0.5) if p == 2 else Euclidean(x, y)


def within(x: Tensor, a: Tensor, p: int, epsilon: float, max_iterations: int, tolerance: float) -> tuple[Tensor, bool]:
    """(...) value of transport from a cloud to itself, with gradients, and whether it has converged."""
    cost = as_cost(between(x, x, p))
    with torch.no_grad():
        mass = a.detach()
        side, solved = Side(mass, mass, epsilon), cost.detach() if isinstance(cost, Tensor) else cost
        problem = Problem(solved, side, side, Ranks(sync=False), mass.sum(-1))
        kernel = problem.kernel(torch.zeros_like(mass), torch.zeros_like(mass))
        moved, converged = symmetric(kernel, side, max_iterations, tolerance)
        f, _ = beyond_mass(problem, epsilon * moved, epsilon * moved)
        scaling = mass * moved.exp()
        value = dual_value(problem, f, f, mass.sum(-1))
        plan = kernel.plan(scaling, scaling) if isinstance(kernel, DenseKernel) else None
    return with_envelope(problem, cost, a, a, value, plan, f, f, parts_of(problem)), converged


def symmetric(kernel: object, side: Side, max_iterations: int, tolerance: float) -> tuple[Tensor, bool]:
    """(..., N) f / epsilon of the symmetric problem, and whether its marginal error is within the tolerance."""
    moved = torch.zeros_like(side.mass)
    limit = max(tolerance, 8 * torch.finfo(moved.dtype).eps)
    for _ in range(max_iterations):
        sums = kernel.row_sums(side.mass * moved.exp())  # type: ignore[attr-defined]
        best = kernel.f / side.epsilon - side.divisor(sums).log()  # type: ignore[attr-defined]
        error = (side.mass * torch.expm1(moved - best).abs()).sum(-1) / side.mass.sum(-1)
        if tolerance > 0 and float(error.max()) <= limit:
            return moved, True
        moved = (moved + best) / 2
    return moved, False
