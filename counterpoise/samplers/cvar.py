r"""CVaR: the mean of the worst fraction alpha of the losses, as weights.

.. math:: \max_p \sum_i p_i \ell_i - \lambda\, \mathrm{KL}(p \,\|\, \mathrm{unif}) \quad \text{s.t.} \quad
          p_i \le \frac{1}{\alpha m}, \quad \sum_i p_i = 1

For lambda = 0 the largest losses get the cap 1/(alpha m), and the next one what is left; with lambda > 0,

.. math:: p_i = \frac{1}{m} \min\big(e^{(\ell_i - \eta)/\lambda}, 1/\alpha\big)

with eta so that they sum to one. Both are solved exactly by sorting; the released code bisects to a tolerance of 1e-4,
by which its weights sum to one. Of tied losses the first gets weight first.

A mini-batch CVaR is lower than that of the population on average, by about 1/sqrt(m). Losses that are not finite give
weights that are not.

Source: Levy et al., Large-Scale Methods for Distributionally Robust Optimization, 2020; the sort-based solution with
a penalty is derived.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import relu

from counterpoise._core import PreciseBuffers, Spec, at_least_float32, check_number
from counterpoise.samplers._dro import check_losses, from_weights, in_float64, like_losses, on_all_ranks


def cvar_weights(losses: Tensor, alpha: float, *, penalty: float = 0.0) -> Tensor:
    """Weights (N,) that attain the maximum; they sum to one, and none is above 1/(alpha N).

    Args:
        losses: (N,) of any sign; detached.
        alpha: fraction in (0, 1]: 1 is the mean, 1/N and less the maximum.
        penalty: lambda >= 0 of the divergence from uniform; inf is the mean.

    Raises:
        ValueError: losses that are not one a row, or settings out of range.
    """
    _check(alpha, penalty)
    v = in_float64(losses)
    if len(v) == 0:
        return like_losses(v, losses)
    order = v.argsort(descending=True, stable=True)
    p = _capped(v[order], alpha) if penalty == 0 else _capped_exponential(v[order], alpha, penalty)
    return like_losses(torch.empty_like(p).scatter(0, order, p), losses)


def cvar_value(losses: Tensor, alpha: float, *, penalty: float = 0.0) -> Tensor:
    """0-d maximum of the problem; its gradient is the weights. Arguments as :func:`cvar_weights`."""
    v = in_float64(losses)
    p = cvar_weights(v, alpha, penalty=penalty)
    kept = 0.0 if penalty in (0, math.inf) else penalty * torch.xlogy(p, len(p) * p).sum()
    return from_weights(losses, p, (p * v).sum() - kept)


def cvar_dual(losses: Tensor, eta: Tensor, alpha: float, *, penalty: float = 0.0) -> Tensor:
    r"""0-d upper bound of the value, equal to it at the best eta: minimise over the model and eta together.

    .. math:: \eta + \frac{1}{\alpha m} \sum_i (\ell_i - \eta)_+ \quad \text{or} \quad
              \eta + \frac{\lambda}{m} \sum_i \psi\big((\ell_i - \eta)/\lambda\big)

    with psi(x) = e^x - 1 up to x = log(1/alpha), and its tangent beyond. Rows are independent given eta: across ranks
    the mean over ranks of equal batches is exact.

    Args:
        losses: (N,), differentiable.
        eta: 0-d, trainable; best at the (1 - alpha)-quantile of the losses if there is no penalty.
        alpha: in (0, 1].
        penalty: lambda in [0, inf).

    Raises:
        ValueError: losses that are not one a row, or settings out of range.
    """
    _check(alpha, penalty)
    check_losses(losses)
    above = at_least_float32(losses) - eta
    if penalty == 0:
        return eta + relu(above).sum() / (alpha * max(len(losses), 1))
    x, cap = above / penalty, -math.log(alpha)
    psi = torch.expm1(x.clamp_max(cap)) + relu(x - cap) / alpha
    return eta + penalty * psi.sum() / max(len(losses), 1)


def _check(alpha: float, penalty: float) -> None:
    check_number("alpha", alpha, 0, 1, open_low=True)
    check_number("penalty", penalty, 0)


def _capped(v: Tensor, alpha: float) -> Tensor:
    """Losses in descending order: the cap for the first, the rest for the next."""
    size = alpha * len(v)
    filled = (size - torch.arange(len(v), device=v.device, dtype=v.dtype)).clamp(0, 1)
    return (filled + 0 * v) / filled.sum()  # 0 * v: NaN stays NaN


def _capped_exponential(v: Tensor, alpha: float, penalty: float) -> Tensor:
    """Losses in descending order: e^(x - eta), the first k of them capped.

    With the first k at the cap, the others share m - k/alpha, which gives eta_k; the right k is the first for which
    the next one stays below the cap. Losses are then counted from that one, so that tiny penalties keep their digits.
    """
    m, lowest = len(v), torch.finfo(v.dtype).min / 4
    capped = torch.arange(m, device=v.device, dtype=v.dtype)
    left = m - capped / alpha
    log_left = left.clamp_min(torch.finfo(v.dtype).tiny).log()
    x = ((v - v[0]) / penalty).clamp_min(lowest)
    share = x - x.flip(0).logcumsumexp(0).flip(0)  # log of what the next one has of the rest
    too_few = (left > 0) & (share + log_left > -math.log(alpha))
    k = torch.minimum(too_few.long().cumprod(0).sum(), (left > 0).sum() - 1).reshape(1)
    x = ((v - v.gather(0, k)) / penalty).clamp(lowest, -lowest)
    free = capped >= k
    eta = torch.where(free, x, -torch.inf).logsumexp(0) - log_left.gather(0, k)
    p = torch.where(free, (x - eta).exp().clamp_max(1 / alpha), 1 / alpha) + 0 * x
    return p / p.sum()


class CVaR(PreciseBuffers):
    """Weights (N,) on the worst fraction of the losses of the batch; composes with every loss of one value a row.

    Normalisation "sum_one" over all ranks; the losses of all ranks are gathered. No state.

    Args:
        alpha: fraction in (0, 1]; 1 is the mean.
        penalty: lambda >= 0: larger for smoother weights.

    Raises:
        ValueError: settings out of range, or losses that are not one a row.
    """

    spec = Spec(
        task="reweighter",
        source="Levy et al., Large-Scale Methods for Distributionally Robust Optimization, 2020",
        distributed="order_statistics",
    )
    normalization = "sum_one"

    def __init__(self, alpha: float = 0.1, penalty: float = 0.0) -> None:
        super().__init__()
        _check(alpha, penalty)
        self.alpha = alpha
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
        return on_all_ranks(losses, lambda v: cvar_weights(v, self.alpha, penalty=self.penalty))
