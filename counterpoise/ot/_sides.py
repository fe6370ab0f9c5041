r"""The two sides of a transport problem: what a potential becomes, given the sums of the kernel on its side.

A plan is P_ij = alpha_i beta_j exp((f_i + g_j - C_ij) / epsilon). With the sums

.. math:: R_i = \sum_j \beta_j\, e^{(g_j - C_ij) / \epsilon}

the best f for a given g is, by the kind of the side,

.. math:: f_i = \epsilon \log \frac{a_i}{\alpha_i R_i} \text{ (exact)}, \qquad
          f_i = \frac{\rho_i}{\rho_i + \epsilon}\, \epsilon \log \frac{a_i}{\alpha_i R_i}
          \text{ (KL of strength } \rho_i),

.. math:: f_i = \min\big(\lambda,\ \epsilon \log \tfrac{a_i}{\alpha_i R_i}\big) \text{ (at most } a_i)

with lambda such that the plan has its given mass, and likewise g, from the column sums. Sums taken with an offset,
R_i exp(o_i / epsilon), give f_i - o_i, which keeps its digits where f_i / epsilon is large.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from counterpoise.distributed import all_reduce_sum, world_size

NEWTON_STEPS = 3
STEEP = -40.0  # logarithm of a slope that can be divided by


def safe_log(x: Tensor) -> Tensor:
    """log x, and -inf with gradient 0 where x = 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).log(), -torch.inf)


def capped(exponent: Tensor) -> Tensor:
    """No exponent that overflows, as that of an entry without mass may."""
    return exponent.clamp_max(math.log(torch.finfo(exponent.dtype).max) - 20)


def largest(x: Tensor) -> Tensor:
    """Largest entry of the last dimension, the smallest number where there is none: a rank may have no rows."""
    bottom = x.new_full((*x.shape[:-1], 1), torch.finfo(x.dtype).min)
    return torch.cat([x, bottom], -1).amax(-1)


@dataclass
class Ceiling:
    """Upper bound of the potentials of a side whose masses are bounds.

    Attributes:
        amount: (..., 1) mass of the plan.
        value: (..., 1) lambda, which a solver moves in place.
    """

    amount: Tensor
    value: Tensor


@dataclass
class Side:
    """Rows or columns.

    Attributes:
        mass: (..., n) a.
        reference: (..., n) alpha, 0 where the mass is.
        epsilon: of the entropy.
        penalty: (n,) rho, inf where exact; None = exact everywhere.
        ceiling: of a side of which no more than ``mass`` is taken; else None.
    """

    mass: Tensor
    reference: Tensor
    epsilon: float
    penalty: Tensor | None = None
    ceiling: Ceiling | None = None
    void: Tensor | None = field(init=False)  # 1 where there is no mass, which keeps divisions finite
    log_ratio: Tensor = field(init=False)  # log a / alpha
    pull: Tensor | None = field(init=False)  # 1 / (rho + epsilon)

    def __post_init__(self) -> None:
        empty = self.mass == 0
        self.void = empty.to(self.mass.dtype) if bool(empty.any()) else None
        ratio = 1 if self.reference is self.mass else self.mass / torch.where(empty, 1, self.reference)
        self.log_ratio = torch.where(empty, torch.ones_like(self.mass), ratio).log()
        self.pull = None if self.penalty is None else 1 / (self.penalty + self.epsilon)

    @property
    def damping(self) -> Tensor | None:
        """(n,) rho / (rho + epsilon), None where all are 1."""
        return None if self.pull is None else 1 - self.epsilon * self.pull

    def log_scaling(self, log_sums: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """(potential - offset) / epsilon from logarithms of the sums with that offset, (..., n)."""
        moved = self.log_ratio - log_sums
        if self.pull is not None:
            moved = (1 - self.epsilon * self.pull) * moved - self.pull * offset
        if self.ceiling is not None:
            moved = torch.minimum(moved, (self.ceiling.value - offset) / self.epsilon)
        return moved

    def level(self, ceiling: Ceiling, log_sums: Tensor, offset: Tensor | float, ranks: Ranks) -> Tensor:
        """(..., 1) lambda at which the plan has its mass m: sum_i min(s w_i, a_i) = m for s = exp(lambda / epsilon).

        Newton steps for a function that is concave and piecewise linear, from the last lambda: few are enough, since
        iterations make up for what is left. log w is the first line.
        """
        logs, log_mass, m = self.without_void(log_sums - offset / self.epsilon), safe_log(self.mass), ceiling.amount
        least = m.log() - ranks.logsumexp(logs[..., None])  # no a_i binds
        level = torch.maximum(ceiling.value / self.epsilon, least).detach()
        for _ in range(NEWTON_STEPS):
            free = logs + level < log_mass
            held = ranks.sum(torch.minimum(logs + level, log_mass).exp().sum(-1, keepdim=True))
            bottom = torch.finfo(m.dtype).min / 4  # not -inf, of which alone a log-sum-exp has no gradient
            log_slope = ranks.logsumexp(torch.where(free, logs + level, bottom)[..., None])
            level = newton_step(level, m - held, log_slope, m, least)
        return self.epsilon * level

    def raise_ceiling(self, log_sums: Tensor, offset: Tensor, ranks: Ranks) -> None:
        """Moves the ceiling, where there is one, to what the sums ask for."""
        if self.ceiling is not None:
            self.ceiling.value.copy_(self.level(self.ceiling, log_sums, offset, ranks))

    def potential(self, sums: Tensor, offset: Tensor) -> Tensor:
        """f from sums with an offset."""
        return offset + self.epsilon * self.log_scaling(self.divisor(sums).log(), offset)

    def scaled(self, sums: Tensor, offset: Tensor) -> Tensor:
        """alpha exp((f - offset) / epsilon) from sums with an offset."""
        if self.pull is None and self.ceiling is None:
            return self.mass / self.divisor(sums)
        return self.reference * self.log_scaling(self.divisor(sums).log(), offset).exp()

    def best_mass(self, sums: Tensor, offset: Tensor) -> Tensor:
        """Marginal of the plan with the best potential, from sums with an offset."""
        if self.pull is None and self.ceiling is None:
            return self.mass
        log_sums = self.divisor(sums).clamp_min(torch.finfo(sums.dtype).tiny).log()
        return self.reference * self.without_void(self.log_scaling(log_sums, offset) + log_sums).exp()

    def divisor(self, sums: Tensor) -> Tensor:
        """The sums, without the zeros of entries that have no mass."""
        return sums if self.void is None else sums + self.void

    def without_void(self, offset: Tensor) -> Tensor:
        """The offset, -inf where there is no mass."""
        return offset if self.void is None else offset.masked_fill(self.void > 0, -torch.inf)

    def gain(self, potential: Tensor) -> Tensor:
        """What a unit of this side's mass adds to the dual value: f, rho (1 - exp(-f / rho)), or f - lambda."""
        if self.ceiling is not None:
            return potential - self.ceiling.value
        if self.penalty is None:
            return potential
        rho = torch.where(self.penalty.isinf(), 1, self.penalty)
        return torch.where(self.penalty.isinf(), potential, -rho * torch.expm1(capped(-potential / rho)))

    def share(self, potential: Tensor) -> Tensor:
        """P 1 / a at the optimum, of a side without ceiling: exp(-f / rho), 1 where exact."""
        return torch.ones_like(potential) if self.penalty is None else capped(-potential / self.penalty).exp()

    def part(self, start: int, stop: int) -> Side:
        """Entries [start, stop); the ceiling is shared."""
        part = copy(self)
        for name in ("mass", "reference", "penalty", "void", "log_ratio", "pull"):
            value = getattr(self, name)
            setattr(part, name, value if value is None else value[..., start:stop])
        return part


def newton_step(level: Tensor, missing: Tensor, log_slope: Tensor, total: Tensor, least: Tensor) -> Tensor:
    """The level at which a linear function of exp(level), with this slope in logarithms, makes up for what is missing.

    A slope that is too small to divide by is that of entries from which the level is still far: what there is beside
    them does not matter then.
    """
    rounding = missing.abs() <= 4 * torch.finfo(missing.dtype).eps * total
    missing = missing - torch.where(rounding, missing.detach(), 0)
    steep, some = log_slope > STEEP, missing > 0
    growth = 1 + missing / torch.where(steep, log_slope, 0).exp()
    near = torch.where(growth > 0, growth, 1).log()
    far = torch.where(some, torch.where(some, missing, 1).log() - torch.where(steep, 0, log_slope), 0)
    step = torch.maximum(level + torch.where(steep, near, far), least)
    return torch.where(torch.where(steep, growth > 0, missing >= 0), step, least)


class Ranks:
    """Sums and extremes over the ranks that share the rows; for one process, what they are given."""

    def __init__(self, sync: bool) -> None:
        self.several = sync and world_size() > 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, with gradient."""
        return all_reduce_sum(x) if self.several else x

    def max(self, x: Tensor) -> Tensor:
        """Largest over ranks, without gradient."""
        if not self.several:
            return x.detach()
        most = x.detach().clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most

    def logsumexp(self, x: Tensor) -> Tensor:
        """Over the last dimension but one of x (..., N, K), the rows of all ranks: (..., K)."""
        if not self.several:
            return x.logsumexp(-2)
        top = self.max(largest(x.detach().mT))
        return top + safe_log(self.sum((x - top[..., None, :]).exp().sum(-2)))
