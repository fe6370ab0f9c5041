"""What every solver returns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from counterpoise.ot.costs import PointCost, rows_of, tiles

DIFFERENTIABLE_TO = 1e-3


@dataclass(frozen=True)
class OTResult:
    r"""A transport plan, or the potentials that give it.

    With marginals a and b, and P the plan, the entropic solvers have

    .. math:: P_{ij} = \alpha_i\, \beta_j\, e^{(f_i + g_j - C_{ij}) / \epsilon}

    where alpha = a, beta = b for the reference "product", and both are 1 where there is mass for "ones".

    Attributes:
        plan: (..., N, K), or None where the cost was given as points and is too large to be formed: see ``plan_rows``.
        f: (..., N) potential of the rows.
        g: (..., K) potential of the columns.
        value: (...) what was minimised; of balanced problems <P, C> + epsilon KL(P | a b^T).
        marginal_error: (...) L1 distance from what the marginals should be, relative to the total mass.
        iterations: how many were done.
        converged: whether every problem of the batch has an error within the tolerance.
        value_entropy: (...) of balanced entropic problems, <P, C> + epsilon sum P (log P - 1); else None.
    """

    plan: Tensor | None
    f: Tensor
    g: Tensor
    value: Tensor
    marginal_error: Tensor
    iterations: int
    converged: bool
    value_entropy: Tensor | None = None
    parts: Parts | None = field(default=None, repr=False)

    def plan_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the plan, (..., stop - start, K), without a gradient where they are formed here."""
        if self.plan is not None or self.parts is None:
            return self.plan[..., start:stop, :]  # type: ignore[index]
        return self.parts.plan_rows(self.f, self.g, start, stop)

    def barycenters(self, values: Tensor) -> Tensor:
        """Where each row's mass goes: sum_j P_ij values_j / sum_j P_ij, (..., N, e) from values (..., K, e).

        The plan is formed in tiles where there is none. Rows without mass are 0.
        """
        if self.plan is not None or self.parts is None:
            return barycenters_of(self.plan, values)  # type: ignore[arg-type]
        spans = tiles(self.parts.cost)
        found = [barycenters_of(self.plan_rows(start, stop), values) for start, stop in spans]
        return torch.cat(found, -2) if found else values.new_zeros(*self.f.shape, values.shape[-1])


@dataclass(frozen=True)
class Parts:
    """What a plan is made of beside the potentials."""

    cost: Tensor | PointCost
    alpha: Tensor
    beta: Tensor
    epsilon: float

    @torch.no_grad()
    def plan_rows(self, f: Tensor, g: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the plan."""
        exponents = f[..., start:stop, None] + g[..., None, :] - rows_of(self.cost, start, stop)
        kernel = exponents.mul_(1 / self.epsilon).clamp_max_(80).exp_()  # larger only where there is no mass
        return kernel.mul_(self.alpha[..., start:stop, None]).mul_(self.beta[..., None, :])


def barycenters_of(plan: Tensor, values: Tensor) -> Tensor:
    """Plan (..., n, K) and values (..., K, e) to (..., n, e)."""
    mass = plan.sum(-1, keepdim=True)
    return plan @ values.to(plan.dtype) / torch.where(mass > 0, mass, 1)


def warn_unless_converged(
    name: str, converged: bool, tolerance: float, max_iterations: int, *, implicit_at: Tensor | None = None
) -> None:
    """Warnings at the line that called the solver; none where a fixed number of iterations was asked for.

    Except of an implicit gradient, which is another problem's where the error, ``implicit_at``, is large.
    """
    if not converged and tolerance > 0:
        warnings.warn(
            f"{name} did not converge in {max_iterations} iterations, result.marginal_error says by how much: "
            "raise max_iterations, tolerance or epsilon",
            stacklevel=3,
        )
    if implicit_at is not None and float(implicit_at.max()) > DIFFERENTIABLE_TO:
        warnings.warn(
            f"marginal_error is above {DIFFERENTIABLE_TO}: the implicit gradient of the plan holds at convergence only",
            stacklevel=3,
        )
