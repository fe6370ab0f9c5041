"""Checks of costs, marginals and settings, and the form in which the solvers take them."""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import at_least_float32, check_choice, check_number
from counterpoise.ot._sides import Ranks
from counterpoise.ot.costs import FORMED, PointCost

GRADIENTS = ("none", "envelope", "implicit", "unroll")
TOTALS_AGREE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative


def as_cost(cost: Tensor | PointCost) -> Tensor | PointCost:
    """A floating (..., N, K) matrix of at least float32; points whose matrix is small enough are formed."""
    if isinstance(cost, PointCost):
        return cost.matrix() if cost.shape.numel() <= FORMED else cost
    if not isinstance(cost, Tensor):
        raise TypeError(f"cost is a {type(cost).__name__}, expected a tensor (..., N, K) or points as a PointCost")
    if cost.ndim < 2 or cost.shape[-1] == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}, expected (..., N, K) with K >= 1")
    return at_least_float32(cost)


def as_marginal(name: str, x: Tensor | None, cost: Tensor | PointCost, axis: int, ranks: Ranks) -> Tensor:
    """Masses (..., n) of the cost's leading shape and type; None = uniform with total 1."""
    *batch, n, k = cost.shape
    like = cost if isinstance(cost, Tensor) else cost.points[0]
    size, shape = (n, k)[axis], (*batch, (n, k)[axis])
    if x is None:
        count = ranks.sum(torch.tensor(size, device=like.device)) if axis == 0 else torch.tensor(size)
        if int(count) == 0:
            raise ValueError("cost has no rows, expected (..., N, K) with N >= 1")
        return like.new_full(shape, 1 / int(count))
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor of shape {shape}")
    if x.shape[-1:] != (size,) or x.ndim > len(shape) or x.shape[:-1] not in ((), tuple(batch)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    x = x.to(like.dtype).expand(shape)
    check_mass(name, x, ranks if axis == 0 else Ranks(sync=False))
    return x


def check_mass(name: str, x: Tensor, ranks: Ranks) -> None:
    """Raises unless masses are finite, at least 0, and positive in total."""
    wrong = (~(x >= 0) | (x == torch.inf)).any()
    total = ranks.sum(x.detach().sum(-1))
    flags = torch.stack([wrong, (total == 0).any()]).to(x.dtype)
    negative, empty = ranks.max(flags).tolist()
    if negative:
        raise ValueError(f"{name} holds a negative mass, NaN or inf, expected masses >= 0")
    if empty:
        raise ValueError(f"{name} sums to 0, expected a positive total mass")


def with_equal_totals(a: Tensor, b: Tensor, ranks: Ranks) -> Tensor:
    """``b``, scaled by what rounding left between its total and that of ``a``; raises where it is more."""
    totals = ranks.sum(a.detach().sum(-1)), b.detach().sum(-1)
    apart = ((totals[0] - totals[1]).abs() / totals[0]).max()
    if apart > TOTALS_AGREE[a.dtype]:
        i = int(((totals[0] - totals[1]).abs() / totals[0]).argmax())
        raise ValueError(
            f"b sums to {totals[1].reshape(-1)[i].item():.6g}, expected the total of a, "
            f"{totals[0].reshape(-1)[i].item():.6g}: normalise both, or use unbalanced_sinkhorn or partial_sinkhorn"
        )
    return b * (totals[0] / totals[1])[..., None]


def check_settings(
    epsilon: float,
    max_iterations: int,
    tolerance: float,
    gradient: str,
    scaling: float | str | None,
    gradients: tuple[str, ...] = GRADIENTS,
) -> None:
    """Raises unless every setting of a solver is in range."""
    check_number("epsilon", epsilon, 0, open_low=True)
    check_number("max_iterations", max_iterations, 1)
    if int(max_iterations) != max_iterations:
        raise ValueError(f"max_iterations is {max_iterations}, expected a whole number")
    check_number("tolerance", tolerance, 0)
    check_choice("gradient", gradient, gradients)
    if scaling is None or scaling == "auto":
        return
    check_number("scaling", scaling, 0, 1, open_low=True)
    if scaling == 1:
        raise ValueError(f'scaling is {scaling}, expected a factor below 1, "auto" or None')


def check_formed(cost: Tensor | PointCost, gradient: str) -> None:
    """Raises where the gradient of a plan is wanted that is never formed."""
    if isinstance(cost, PointCost) and gradient in ("implicit", "unroll"):
        raise ValueError(
            f'gradient is "{gradient}" and the cost has {cost.shape.numel()} entries in tiles, '
            'expected "none" or "envelope": the plan is not formed'
        )
