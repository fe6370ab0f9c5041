r"""Multi-level estimate of a robust risk: the small-batch bias is removed at the cost of variance.

.. math:: \hat L = L(v_{1:b}) + \frac{1}{P(n)} \Big( L(v_{1:n}) - \tfrac12 \big( L(v_{1:n/2}) + L(v_{n/2+1:n}) \big)
          \Big), \qquad n = 2^j b, \quad P(n) \propto 2^{-j}, \quad j = 1, \ldots, J

A batch of n examples underestimates a robust risk; the differences telescope, so that the mean of the estimate is that
of batches of 2^J b examples, while a batch holds J b / (1 - 2^{-J}) on average. Weights may be negative. The variance
is high: keep J small. Averages over ranks of such estimates are estimates of the same.

Source: Levy et al., Large-Scale Methods for Distributionally Robust Optimization, 2020, section 4.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from counterpoise._core import check_number
from counterpoise.samplers._dro import check_losses


def multilevel_sizes(base: int, levels: int) -> tuple[list[int], list[float]]:
    """Batch sizes n = 2^j base, j = 1, ..., levels, and the probabilities with which to draw them.

    Args:
        base: rows of the base estimate, >= 1.
        levels: J >= 1.
    """
    check_number("base", base, 1)
    check_number("levels", levels, 1)
    raw = [2.0**-j for j in range(1, levels + 1)]
    return [base * 2**j for j in range(1, levels + 1)], [p / sum(raw) for p in raw]


def multilevel_estimate(losses: Tensor, value: Callable[[Tensor], Tensor], *, base: int, probability: float) -> Tensor:
    """0-d estimate, differentiable where ``value`` is.

    Args:
        losses: (n,) of a batch whose size was drawn, n even and at least 2 base.
        value: losses (k,) to 0-d, such as ``partial(cvar_value, alpha=0.1)``.
        base: rows of the base estimate, >= 1.
        probability: P(n) in (0, 1].

    Raises:
        ValueError: a size or a probability out of range.
    """
    check_losses(losses)
    check_number("base", base, 1)
    check_number("probability", probability, 0, 1, open_low=True)
    n = len(losses)
    if n % 2 or n < 2 * base:
        raise ValueError(f"losses has {n} rows, expected an even number of at least 2 * base = {2 * base}")
    halves = (value(losses[: n // 2]) + value(losses[n // 2 :])) / 2
    return value(losses[:base]) + (value(losses) - halves) / probability
