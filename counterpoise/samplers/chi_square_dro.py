r"""Chi-square DRO: weights of the worst distribution in a chi-square ball around uniform, or penalised by it, or both.

.. math:: \max_p \sum_i p_i \ell_i - \lambda D(p) \quad \text{s.t.} \quad D(p) \le \rho, \quad
          D(p) = \frac{1}{2m} \sum_i (m p_i - 1)^2

.. math:: p_i = \frac{(\ell_i - \eta)_+}{m L}, \qquad L = \max\big(\lambda, L_\rho\big)

solved exactly by sorting: with the k largest losses above eta, mu_k and s_k their mean and standard deviation and
d_k = k (1 + 2 rho) / m - 1,

.. math:: p_i = \frac{1}{k} \Big(1 + \sqrt{d_k}\, \frac{\ell_i - \mu_k}{s_k}\Big) \;\text{(ball)}, \qquad
          p_i = \frac{1}{k} + \frac{\ell_i - \mu_k}{\lambda m} \;\text{(penalty)}

Where even the uniform distribution on the largest losses lies in the ball, as in any batch with m <= 1 + 2 rho, that is
the answer. Losses of any sign: the released code gives the mean for losses at or below zero, by a test for equal
losses that divides by the largest. A mini-batch value is lower than that of the population on average.

Source: Levy et al., Large-Scale Methods for Distributionally Robust Optimization, 2020; the sort-based solution is
derived.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import relu

from counterpoise._core import PreciseBuffers, Spec, at_least_float32, check_number
from counterpoise.samplers._dro import check_losses, from_weights, in_float64, like_losses, on_all_ranks

EQUAL = 1e-12  # losses whose spread is below this fraction of their size are equal


def chi_square_weights(losses: Tensor, radius: float, *, penalty: float = 0.0) -> Tensor:
    """Weights (N,) that attain the maximum; they sum to one.

    Args:
        losses: (N,) of any sign; detached.
        radius: rho >= 0: 0 is the mean; inf is no ball (without a penalty: uniform on the largest losses).
        penalty: lambda >= 0, in units of the losses; inf is the mean.

    Raises:
        ValueError: losses that are not one a row, or settings out of range.
    """
    _check(radius, penalty)
    v = in_float64(losses)
    if len(v) == 0:
        return like_losses(v, losses)
    order = v.argsort(descending=True, stable=True)
    p = _best_response(v[order], radius, penalty)
    return like_losses(torch.empty_like(p).scatter(0, order, p), losses)


def chi_square_value(losses: Tensor, radius: float, *, penalty: float = 0.0) -> Tensor:
    """0-d maximum of the problem; its gradient is the weights. Arguments as :func:`chi_square_weights`."""
    v = in_float64(losses)
    p = chi_square_weights(v, radius, penalty=penalty)
    kept = 0.0 if penalty in (0, math.inf) else penalty * _divergence(p)
    return from_weights(losses, p, (p * v).sum() - kept)


def chi_square_dual(losses: Tensor, eta: Tensor, radius: float, *, penalty: float = 0.0) -> Tensor:
    r"""0-d upper bound of the value, equal to it at the best eta: minimise over the model and eta together.

    .. math:: \eta + \sqrt{1 + 2\rho}\, \sqrt{S} - \lambda \rho \;\text{ if } \sqrt{S} > \lambda \sqrt{1 + 2\rho},
              \quad \eta + \frac{S}{2\lambda} + \frac{\lambda}{2} \;\text{ otherwise}, \qquad
              S = \frac{1}{m} \sum_i (\ell_i - \eta)_+^2

    Args:
        losses: (N,), differentiable.
        eta: 0-d, trainable.
        radius: rho >= 0, or inf with a penalty.
        penalty: lambda in [0, inf).

    Raises:
        ValueError: losses that are not one a row, settings out of range, or neither a radius nor a penalty.
    """
    _check(radius, penalty)
    check_losses(losses)
    if math.isinf(radius) and penalty == 0:
        raise ValueError("radius is inf and penalty 0, expected a finite radius or a penalty > 0")
    root = vector_norm(relu(at_least_float32(losses) - eta)) / math.sqrt(max(len(losses), 1))
    stretch = math.sqrt(1 + 2 * radius)
    if penalty == 0:
        return eta + stretch * root
    soft = root.square() / (2 * penalty) + penalty / 2
    if math.isinf(radius):
        return eta + soft
    return eta + torch.where(root > penalty * stretch, stretch * root - penalty * radius, soft)


def _check(radius: float, penalty: float) -> None:
    check_number("radius", radius, 0)
    check_number("penalty", penalty, 0)


def _divergence(p: Tensor) -> Tensor:
    return (len(p) * p - 1).square().sum() / (2 * max(len(p), 1))


def _best_response(v: Tensor, radius: float, penalty: float) -> Tensor:
    """Losses in descending order to their weights."""
    spread = v[0] - v[-1]
    equal = spread <= EQUAL * torch.maximum(v[0].abs(), v[-1].abs())
    scale = torch.where(equal, 1, spread)
    u = torch.where(equal, 0 * v, (v - v[0]) / scale)  # in [-1, 0]
    u = torch.where(u.abs() <= torch.finfo(u.dtype).eps ** 2, 0 * u, u)  # whose squares could vanish
    if penalty == 0:
        return _of_ball(u, radius)
    penalised = _of_penalty(u, penalty / scale)
    if math.isinf(radius):
        return penalised
    return torch.where(_divergence(penalised) > radius, _of_ball(u, radius), penalised)


def _sums_above(u: Tensor) -> tuple[Tensor, Tensor]:
    """For each j the sums over i < j of u_i - u_j and of its square: running sums of terms >= 0, nothing cancels."""
    before = torch.arange(len(u), device=u.device, dtype=u.dtype)
    gap = torch.cat([0 * u[:1], u[:-1] - u[1:]])
    first = (before * gap).cumsum(0)
    second = (gap * (first + first - before * gap)).cumsum(0)
    return first, second


def _block(u: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and size of the leading block that ``inside`` counts."""
    k = inside.sum().clamp_min(1).to(u.dtype)
    within = torch.arange(len(u), device=u.device) < k
    mean = torch.where(within, u, 0).sum() / k
    deviation = (torch.where(within, u - mean, 0).square().sum() / k).sqrt()
    return mean, deviation, k


def _of_ball(u: Tensor, radius: float) -> Tensor:
    first, second = _sums_above(u)
    m, reach = len(u), 1 + 2 * radius
    mean, deviation, k = _block(u, (first == 0) | (m * second > reach * first.square()))
    d = (k * reach / m - 1).clamp_min(0)
    tilt = torch.where(deviation > 0, d.sqrt() / torch.where(deviation > 0, deviation, 1), 0)
    return _on_block(1 + tilt * (u - mean), k)


def _of_penalty(u: Tensor, penalty: Tensor) -> Tensor:
    first, _ = _sums_above(u)
    mean, _, k = _block(u, first < penalty * len(u))
    return _on_block(1 + k * (u - mean) / (penalty * len(u)), k)


def _on_block(p: Tensor, k: Tensor) -> Tensor:
    """What lies in the block and is positive, as a distribution."""
    p = torch.where(torch.arange(len(p), device=p.device) < k, p.clamp_min(0), 0 * p)
    return p / p.sum()


class ChiSquareDRO(PreciseBuffers):
    """Weights (N,) of the worst distribution near uniform; composes with every loss of one value a row.

    Normalisation "sum_one" over all ranks; the losses of all ranks are gathered. No state.

    Args:
        radius: rho >= 0; inf for the penalty alone.
        penalty: lambda >= 0, in units of the losses.

    Raises:
        ValueError: settings out of range, or losses that are not one a row.
    """

    spec = Spec(
        task="reweighter",
        source="Levy et al., Large-Scale Methods for Distributionally Robust Optimization, 2020",
        distributed="order_statistics",
    )
    normalization = "sum_one"

    def __init__(self, radius: float = 1.0, penalty: float = 0.0) -> None:
        super().__init__()
        _check(radius, penalty)
        self.radius = radius
        self.penalty = penalty

    def forward(
        self,
        losses: Tensor,
        *,
        target: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Losses (N,) to detached weights (N,)."""
        return on_all_ranks(losses, lambda v: chi_square_weights(v, self.radius, penalty=self.penalty))
