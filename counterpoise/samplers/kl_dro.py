r"""KL-DRO: weights of the worst distribution, by a KL penalty or in a KL ball around uniform.

.. math:: \max_p \sum_i p_i \ell_i - \lambda\, \mathrm{KL}(p \,\|\, \mathrm{unif})
          = \lambda \log \frac{1}{m} \sum_i e^{\ell_i / \lambda}, \qquad
          p = \mathrm{softmax}(\ell / \lambda)

The temperature lambda is given, or it is the one for which KL(p || unif) is the radius rho of the ball (found to
machine precision). From rho = log(m / number of largest losses) on, p is uniform on the largest losses.

The logarithm of a batch's mean is biased. The compositional estimate keeps that mean in a moving average of momentum b,

.. math:: u \leftarrow (1 - b)\, u + \frac{b}{m} \sum_i e^{\ell_i / \lambda}, \qquad
          w_i = \frac{e^{\ell_i / \lambda}}{m\, u}

as log u, since e^{l / lambda} overflows: batches harder than usual then count more than easy ones. These are the
example weights of doubly robust instance-reweighted adversarial training (l is then the loss under attack). b = 1 is
the plain softmax of the batch, and so is the first batch.

Source: Sow et al., Doubly Robust Instance-Reweighted Adversarial Training, 2024 (weights and moving average); the ball
as in Hu and Hong, Kullback-Leibler Divergence Constrained Distributionally Robust Optimization, 2013.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterpoise._core import PreciseBuffers, Spec, at_least_float32, check_number, in_second_pass
from counterpoise.samplers._dro import check_losses, from_weights, in_float64, like_losses, on_all_ranks

TIED = 1e-30  # losses that are closer than this fraction of the spread are tied
INTERVALS, ROUNDS, STEPS = 8, 6, 3  # the bracket shrinks to 2^-18; each Newton step then squares what is left


def kl_ball_weights(losses: Tensor, radius: float) -> Tensor:
    """Weights (N,) of the worst distribution p with KL(p || uniform) <= radius; they sum to one.

    Args:
        losses: (N,) of any sign; detached.
        radius: rho >= 0: 0 is the mean, log(N / number of largest losses) and more is uniform on the largest.

    Raises:
        ValueError: losses that are not one a row, or a radius below zero.
    """
    return like_losses(_solve_ball(losses, radius)[0], losses)


def kl_ball_temperature(losses: Tensor, radius: float) -> Tensor:
    """0-d temperature lambda of :func:`kl_ball_weights`: inf at radius 0, 0 where p is uniform on the largest."""
    return like_losses(_solve_ball(losses, radius)[1], losses)


def kl_ball_value(losses: Tensor, radius: float) -> Tensor:
    """0-d mean of the losses under :func:`kl_ball_weights`, which are its gradient. Without rows it is zero."""
    p = _solve_ball(losses, radius)[0]
    return from_weights(losses, p, (p * in_float64(losses)).sum())


def kl_dual(losses: Tensor, temperature: Tensor | float, radius: float = 0.0) -> Tensor:
    r"""0-d lambda rho + lambda log mean e^(l / lambda): an upper bound of the ball's value, equal at the best lambda.

    With radius 0 it is the value of the KL penalty. A loss to minimise over the model, and over lambda if that is a
    parameter; it holds for the rows of this process.

    Args:
        losses: (N,), N >= 1, differentiable.
        temperature: lambda > 0, 0-d.
        radius: rho >= 0.

    Raises:
        ValueError: losses that are not one a row, or a radius below zero.
    """
    check_losses(losses)
    check_number("radius", radius, 0)
    v = at_least_float32(losses)
    return temperature * (radius + (v / temperature).logsumexp(0) - math.log(max(len(v), 1)))


def _solve_ball(losses: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Weights (N,) and the temperature, float64."""
    check_number("radius", radius, 0)
    v = in_float64(losses)
    if len(v) == 0:
        return v, v.sum() + torch.inf
    top, spread = v.max(), v.max() - v.min()
    u = (v - top) / torch.where(spread > 0, spread, 1)  # in [-1, 0]
    u = torch.where(u > -TIED, 0 * u, u)
    largest = (u == 0).to(v.dtype)
    saturated = radius >= math.log(len(v)) - largest.sum().log()
    steepness = _steepness(u, radius) if radius > 0 else 0 * top
    p = torch.where(saturated, largest / largest.sum(), (steepness * u).softmax(0))
    return p + 0 * v, torch.where(saturated, 0, spread / steepness)


def _steepness(u: Tensor, radius: float) -> Tensor:
    """t > 0 with KL(softmax(t u) || unif) = radius: a bracket of log t that shrinks, then Newton inside it.

    KL(t) <= t^2 / 8 since u spans an interval of length one; and it is at its limit, to rounding, once e^(t u) has
    vanished for all but the largest. The derivative in log t is t^2 times the variance of u.
    """
    second = -torch.where(u < 0, u, -torch.ones_like(u)).max()
    low = torch.full_like(second, math.log(8 * radius) / 2)
    high = torch.maximum(low, ((math.log(len(u)) + 50) / second).log())
    ticks = torch.arange(1, INTERVALS, device=u.device, dtype=u.dtype)
    for _ in range(ROUNDS):
        step = (high - low) / INTERVALS
        below = (_divergence(u, (low + step * ticks).exp()) < radius).sum()
        low = low + step * below
        high = low + step
    s = (low + high) / 2
    for _ in range(STEPS):
        t = s.exp()
        p = (t * u).softmax(0)
        slope = t.square() * (p * (u - (p * u).sum()).square()).sum()
        error = _divergence(u, t.reshape(1))[0] - radius
        s = (s - error / slope.clamp_min(torch.finfo(u.dtype).tiny)).clamp(low, high)
    return s.exp()


def _divergence(u: Tensor, t: Tensor) -> Tensor:
    """KL(softmax(t u) || unif) for every t, exact in relative terms.

    It is the mean of q log q - q + 1 over q = m p, whose terms are all >= 0; with y = log q it is
    e^y (y - 1) + 1 = y^2/2 + y^3/3 + y^4/8 + ..., the sum of y^n / (n (n - 2)!).
    """
    x = t[:, None] * u
    less = x.expm1().mean(1, keepdim=True)
    y = x - torch.where(less > -0.5, less.log1p(), x.logsumexp(1, keepdim=True) - math.log(len(u)))
    series = torch.zeros_like(y)
    for n in range(16, 1, -1):
        series = series * y + 1 / (n * math.factorial(n - 2))
    return torch.where(y.abs() < 0.5, series * y * y, y.exp() * (y - 1) + 1).mean(1)


class KLDRO(PreciseBuffers):
    """Weights (N,) by a softmax of the losses, or of e^(l / lambda) over its moving average.

    Composes with every loss of one value a row. Normalisation "sum_one" over all ranks, whose losses are gathered;
    with a momentum below one they sum to one on average only, and to 1/momentum at most. State moves in ``train()``
    mode only, not inside ``second_pass()``, which uses the average of the first, and not on losses that are not finite.

    Args:
        temperature: lambda > 0, in units of the losses: inf is the mean, towards 0 the largest loss.
        radius: None, or rho >= 0: the KL ball, which finds its own temperature; ``temperature`` is then not used.
        momentum: b in (0, 1], the weight of the new batch in the moving average.

    Buffers: log_u (), steps (); both persistent.

    Raises:
        ValueError: settings out of range, a momentum in a ball, or losses that are not one a row.
    """

    spec = Spec(
        task="reweighter",
        source="Sow et al., Doubly Robust Instance-Reweighted Adversarial Training, 2024",
        distributed="order_statistics",
        stateful=True,
    )
    normalization = "sum_one"
    log_u: Tensor
    steps: Tensor

    def __init__(self, temperature: float = 1.0, radius: float | None = None, momentum: float = 1.0) -> None:
        super().__init__()
        check_number("temperature", temperature, 0, open_low=True)
        check_number("momentum", momentum, 0, 1, open_low=True)
        if radius is not None:
            check_number("radius", radius, 0)
            if momentum != 1:
                raise ValueError(f"momentum is {momentum}, expected 1 with a radius, whose temperature changes")
        self.temperature = temperature
        self.radius = radius
        self.momentum = momentum
        self.register_buffer("log_u", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
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
        radius = self.radius
        if radius is not None:
            return on_all_ranks(losses, lambda v: kl_ball_weights(v, radius))
        scaled = in_float64(losses) / self.temperature
        return on_all_ranks(scaled, self._softmax).to(at_least_float32(losses).dtype)

    def _softmax(self, x: Tensor) -> Tensor:
        """e^x / (m u) of the x = l / lambda of all ranks."""
        log_mean = x.logsumexp(0) - math.log(max(len(x), 1))
        log_u = self._averaged(log_mean.to(self.log_u.dtype))
        if self.training and not in_second_pass():
            finite = log_u.isfinite()
            self.log_u.copy_(torch.where(finite, log_u, self.log_u))
            self.steps.add_(finite.long())
        return (x - log_u).exp() / max(len(x), 1)

    def _averaged(self, log_mean: Tensor) -> Tensor:
        """Log u with this batch in it; in a second pass, the one of the first."""
        b = self.momentum
        if b == 1:
            return log_mean
        blended = torch.logaddexp(self.log_u + math.log1p(-b), log_mean + math.log(b))
        return torch.where(self.steps > 0, self.log_u if in_second_pass() else blended, log_mean)
