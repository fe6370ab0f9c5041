r"""Exact transport, solved by POT's network simplex on the host.

.. math:: \min_{P \ge 0}\ \langle P, C \rangle \quad \text{s.t.}\quad P 1 = a,\ P^\top 1 = b, \qquad
          f_i + g_j \le C_{ij}, \quad \text{value} = \langle a, f \rangle + \langle b, g \rangle

With a mass m, P 1 <= a, P^T 1 <= b and 1^T P 1 = m: a virtual row and a virtual column of cost 0 take what stays, and
their own pair is too expensive to be used. f and g then are at most 0 off the virtual potentials, as subgradients of
the value.

Time grows with the cube of the size: for training, entropic transport is what one wants. Gradients are the plan and the
duals, one of many where the solution is degenerate.

Source: POT's solver: Bonneel et al., Displacement Interpolation Using Lagrangian Mass Transport, 2011; partial: Chapel,
Alaya and Gasso, Partial Optimal Transport with Applications on Positive-Unlabeled Learning, 2020, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_number
from counterpoise.ot._gradients import EnvelopeValue
from counterpoise.ot._inputs import as_cost, as_marginal, with_equal_totals
from counterpoise.ot._sides import Ranks
from counterpoise.ot.costs import PointCost
from counterpoise.ot.result import OTResult, warn_unless_converged


def emd(
    cost: Tensor | PointCost,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    mass: float | None = None,
    max_iterations: int = 1_000_000,
    gradient: str = "none",
) -> OTResult:
    """Transport without entropy; the problem is at the top of this file.

    Args:
        cost: (..., N, K) finite, or points whose matrix has at most 2^24 entries. Computed in float64 on the host.
        a: (N,) or (..., N) masses >= 0 of the rows; None = uniform with total 1.
        b: (K,) or (..., K), of the columns; with the total of ``a`` unless ``mass`` is given.
        mass: of partial transport, > 0 and at most either total; None = all.
        max_iterations: of the simplex.
        gradient: "none", or "envelope" of the value.

    Returns:
        OTResult in the cost's type and on its device; ``iterations`` is 0, which POT does not tell.

    Raises:
        ImportError: POT is not installed.
        ValueError, TypeError: shapes, types or settings that do not fit, totals that differ, a cost that is not finite.
    """
    check_choice("gradient", gradient, ("none", "envelope"))
    cost, ranks = as_cost(cost), Ranks(sync=False)
    if not isinstance(cost, Tensor):
        raise ValueError(f"cost has {cost.shape.numel()} entries, expected at most 2^24 for exact transport")
    if not bool(cost.isfinite().all()):
        raise ValueError("cost holds NaN or inf, expected finite numbers")
    a, b = as_marginal("a", a, cost, 0, ranks), as_marginal("b", b, cost, 1, ranks)
    if mass is None:
        b = with_equal_totals(a, b, ranks)
    else:
        check_number("mass", mass, 0, open_low=True)
        most = float(torch.minimum(a.detach().sum(-1), b.detach().sum(-1)).min())
        if mass > most * (1 + 1e-6):
            raise ValueError(f"mass is {mass}, expected at most the total of a and of b, {most:.6g}")
        mass = min(mass, most)
    batch = cost.shape[:-2]
    flat = (x.detach().reshape(-1, *x.shape[len(batch) :]).double().cpu() for x in (cost, a, b))
    solved = [simplex(c, x, y, mass, max_iterations) for c, x, y in zip(*flat, strict=True)]
    plan, f, g = (torch.stack(x).to(cost).reshape(*batch, *x[0].shape) for x in list(zip(*solved, strict=True))[:3])
    value = (plan * cost.detach()).sum((-2, -1))
    moved = plan.sum(-1) - a.detach() if mass is None else plan.sum(-1).sum(-1, keepdim=True) - mass
    error = moved.abs().sum(-1) / (a.detach().sum(-1) if mass is None else mass)
    if gradient == "envelope":
        value = EnvelopeValue.apply(cost, a, b, value, plan, f, g, False)
    result = OTResult(plan, f, g, value, error, 0, all(optimal for *_, optimal in solved))
    warn_unless_converged("emd", result.converged, 1.0, max_iterations)
    return result


def simplex(
    cost: Tensor, a: Tensor, b: Tensor, mass: float | None, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Plan (N, K), duals (N,) and (K,), and whether it is optimal, of one problem in float64 on the host."""
    n, k = cost.shape
    if mass is not None:
        dear = 2 * cost.abs().max() + 1  # more than a detour through the virtual row and column costs
        cost = torch.nn.functional.pad(cost, (0, 1, 0, 1))
        cost[n, k] = dear
        a, b = torch.cat([a, (b.sum() - mass)[None]]), torch.cat([b, (a.sum() - mass)[None]])
    plan, log = pot().emd(a.numpy(), b.numpy(), cost.numpy(), numItermax=max_iterations, log=True)
    f, g = torch.from_numpy(log["u"]), torch.from_numpy(log["v"])
    f = torch.where(a > 0, f, (cost - g)[:, b > 0].amin(1))
    g = torch.where(b > 0, g, (cost - f[:, None])[a > 0].amin(0))
    if mass is not None:
        f, g = f + g[k], g + f[n]
    else:
        f, g = f - f.mean(), g + f.mean()
    return torch.from_numpy(plan)[:n, :k].clone(), f[:n], g[:k], log["warning"] is None


def pot() -> Any:
    """POT, which only some extras install."""
    try:
        import ot
    except ImportError as missing:
        raise ImportError("counterpoise.ot.emd needs ot: pip install 'counterpoise[recipes]'", name="ot") from missing
    return ot
