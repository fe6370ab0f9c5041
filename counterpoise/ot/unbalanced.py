r"""Unbalanced Sinkhorn: entropic transport whose marginals are pulled to a and b instead of fixed.

.. math:: \min_{P \ge 0}\ \langle P, C \rangle + \epsilon\, \mathrm{KL}(P \,\|\, \alpha \beta^\top)
          + \sum_i \rho_i\, \mathrm{KL}\big((P 1)_i \,\|\, a_i\big)
          + \sum_j \sigma_j\, \mathrm{KL}\big((P^\top 1)_j \,\|\, b_j\big)

.. math:: f_i \leftarrow \frac{\rho_i}{\rho_i + \epsilon}\, \epsilon \Big( \log \frac{a_i}{\alpha_i}
          - \log \sum_j \beta_j\, e^{(g_j - C_{ij}) / \epsilon} \Big), \qquad P 1 = a \circ e^{-f / \rho}

with KL(p | q) = p log(p / q) - p + q, and g likewise. A penalty of infinity makes an entry exact (its factor is one),
so that rows may be exact, columns relaxed, and each entry differ. The *reference* changes the plan: "product" is alpha
= a, beta = b; "ones" is 1 on both sides (the entropy itself; of its KL the constant number of entries is left out).

The common shift (f + c, g - c) is what the iteration above is slow in: of it 1 - epsilon / (rho + epsilon) or so is
left an iteration. Its best value has a closed form after each iteration; with H the smaller of the two exact masses,

.. math:: c = \frac{1}{1 / \rho + 1 / \sigma} \log \frac{\sum_i a_i\, e^{-f_i / \rho_i} - H}
          {\sum_j b_j\, e^{-g_j / \sigma_j} - H}

where rho and sigma are the smallest of their side. That is exact where each side's penalties are one number, or that
number and infinity with the other side exact, and never too long a step otherwise.

Other libraries: POT takes one penalty a side, its default reference is the product too, and its translation-invariant
solver needs both sides relaxed; OTT recentres only then.

Source: Chizat et al., Scaling Algorithms for Unbalanced Optimal Transport Problems, 2018, algorithm 1; Séjourné,
Vialard and Peyré, Faster Unbalanced Optimal Transport: Translation Invariant Sinkhorn and 1-D Frank-Wolfe, 2022,
section 3; the shift with exact entries is derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import check_choice
from counterpoise.kernels import transport as fused
from counterpoise.ot._assemble import transport
from counterpoise.ot._inputs import as_cost, as_marginal, check_formed, check_settings, with_equal_totals
from counterpoise.ot._kernels import Problem
from counterpoise.ot._sides import Ranks, Side, safe_log
from counterpoise.ot.costs import PointCost
from counterpoise.ot.result import OTResult, warn_unless_converged

Penalty = float | Sequence[float] | Tensor


def unbalanced_sinkhorn(
    cost: Tensor | PointCost,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    penalty_a: Penalty,
    penalty_b: Penalty,
    reference: str = "product",
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    gradient: str = "none",
    scaling: float | str | None = "auto",
    sync: bool = False,
) -> OTResult:
    """Entropic transport between marginals that may be missed at a price; the problem is at the top of this file.

    Args:
        cost: (..., N, K), or points; as in :func:`sinkhorn`.
        a: (N,) or (..., N) masses >= 0 of the rows; None = uniform with total 1. A row of no mass has a plan of 0.
        b: (K,) or (..., K), of the columns; totals may differ unless every penalty is infinite.
        epsilon: strength > 0 of the entropy.
        penalty_a: rho > 0 of the rows, a number or (N,); inf = exact.
        penalty_b: sigma > 0 of the columns, a number or (K,).
        reference: "product" or "ones".
        max_iterations: at most so many.
        tolerance: of the mass that another iteration would move, relative to the total of ``a``; 0 runs max_iterations.
        gradient: "none", "envelope", "implicit" or "unroll"; as in :func:`sinkhorn`.
        scaling: of epsilon; as in :func:`sinkhorn`.
        sync: rows are split over ranks; a vector penalty_a is this rank's.

    Returns:
        OTResult; ``value`` is the whole objective, ``marginal_error`` what the tolerance is about.

    Raises:
        ValueError, TypeError: shapes, types or settings that do not fit, negative masses, penalties that are not
            positive, exact marginals that no plan can have.
    """
    check_settings(epsilon, max_iterations, tolerance, gradient, scaling)
    check_choice("reference", reference, ("product", "ones"))
    cost, ranks = as_cost(cost), Ranks(sync)
    check_formed(cost, gradient)
    a, b = as_marginal("a", a, cost, 0, ranks), as_marginal("b", b, cost, 1, ranks)
    rho, sigma = as_penalty("penalty_a", penalty_a, a, ranks), as_penalty("penalty_b", penalty_b, b, Ranks(sync=False))
    b = check_exact_masses(a, b, rho, sigma, ranks)

    def problem_of(cost: Tensor | PointCost, a: Tensor, b: Tensor) -> Problem:
        product = reference == "product"
        alpha, beta = (a, b) if product else ((a > 0).to(a.dtype), (b > 0).to(b.dtype))
        rows, columns = Side(a, alpha, epsilon, rho), Side(b, beta, epsilon, sigma)
        shift = None if rho is None and sigma is None else Shift(a, b, rho, sigma, ranks)
        return Problem(cost, rows, columns, ranks, ranks.sum(a.detach().sum(-1)), shift, product)

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
    implicit_at = result.marginal_error if gradient == "implicit" else None
    warn_unless_converged("unbalanced_sinkhorn", result.converged, tolerance, max_iterations, implicit_at=implicit_at)
    return result


class Shift:
    """The best common shift c of the potentials: f + c, g - c."""

    def __init__(self, a: Tensor, b: Tensor, rho: Tensor | None, sigma: Tensor | None, ranks: Ranks) -> None:
        self.ranks = ranks
        exact_a, exact_b = ranks.sum(exact_mass(a, rho)), exact_mass(b, sigma)
        common = torch.minimum(exact_a, exact_b)
        self.rows, self.columns = (a, rho, safe_log(exact_a - common)), (b, sigma, safe_log(exact_b - common))
        least = -float(ranks.max(-torch.as_tensor(smallest(rho), device=a.device, dtype=a.dtype)))
        self.length = 1 / (1 / least + 1 / smallest(sigma))

    @property
    def numbers(self) -> fused.Shift:
        """For the fused iteration."""
        return fused.Shift(self.rows[2], self.columns[2], self.length)

    def __call__(self, f: Tensor, g: Tensor) -> Tensor:
        """(..., 1)."""
        of_rows = self._log_mass(*self.rows, f, self.ranks)
        of_columns = self._log_mass(*self.columns, g, Ranks(sync=False))
        c = self.length * (of_rows - of_columns)
        return torch.where(c.isfinite(), c, 0)[..., None]  # not finite: exact masses leave the relaxed entries nothing

    @staticmethod
    def _log_mass(mass: Tensor, penalty: Tensor | None, log_exact: Tensor, potential: Tensor, ranks: Ranks) -> Tensor:
        """log of the sum over relaxed entries of mass exp(-potential / penalty), plus the exact mass."""
        if penalty is None:
            return log_exact
        logs = torch.where(penalty.isinf(), -torch.inf, safe_log(mass) - potential / penalty)
        return torch.logaddexp(ranks.logsumexp(logs[..., None])[..., 0], log_exact)


def exact_mass(mass: Tensor, penalty: Tensor | None) -> Tensor:
    """(...) mass of the entries that are exact."""
    return (mass if penalty is None else torch.where(penalty.isinf(), mass, 0)).sum(-1)


def smallest(penalty: Tensor | None) -> float:
    """The smallest of a side's penalties, inf for one that is exact."""
    return float("inf") if penalty is None or penalty.numel() == 0 else float(penalty.min())


def as_penalty(name: str, penalty: Penalty, mass: Tensor, ranks: Ranks) -> Tensor | None:
    """(n,) penalties, None where all are infinite on all ranks."""
    x = torch.as_tensor(penalty, dtype=mass.dtype, device=mass.device)
    if x.ndim > 1 or (x.ndim == 1 and len(x) != mass.shape[-1]):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected a number or ({mass.shape[-1]},)")
    negative, finite = ranks.max(torch.stack([(~(x > 0)).any(), x.isfinite().any()]).to(mass.dtype)).tolist()
    if negative:
        raise ValueError(f"{name} holds a number that is not above 0, expected penalties > 0, inf for exact")
    return x.expand(mass.shape[-1:]) if finite else None


def check_exact_masses(a: Tensor, b: Tensor, rho: Tensor | None, sigma: Tensor | None, ranks: Ranks) -> Tensor:
    """``b``, with the total of ``a`` where both are exact; raises where exact rows and columns exclude each other."""
    if rho is None and sigma is None:
        return with_equal_totals(a, b, ranks)
    of_rows, of_columns = ranks.sum(exact_mass(a.detach(), rho)), exact_mass(b.detach(), sigma)
    for name, inner, outer, exact in (("columns", of_columns, of_rows, rho), ("rows", of_rows, of_columns, sigma)):
        if exact is None and bool((inner > outer * (1 + 1e-6)).any()):
            raise ValueError(f"exact {name} hold more mass than the whole of the other side, expected no more")
    return b
