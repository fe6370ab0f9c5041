r"""Tilted empirical risk: the log-mean-exp of the losses, of groups of them, or of both.

.. math:: R_g = \frac{1}{t} \log \frac{1}{n_g} \sum_{i \in g} e^{t \ell_i}, \qquad
          J = \frac{1}{\tau} \log \sum_g \frac{n_g}{N} e^{\tau R_g}

.. math:: w_i = \frac{n_g e^{\tau R_g}}{\sum_h n_h e^{\tau R_h}} \cdot
          \frac{e^{t \ell_i}}{\sum_{j \in g} e^{t \ell_j}}, \qquad g = g_i

A tilt above zero follows the hard examples, below zero it lets outliers go; 0 is the mean, inf and -inf are the largest
and the smallest loss. Without groups J is R of all rows, and w their softmax; t = tau is the same. A batch estimates
log E e^{t l} with a bias; :class:`KLDRO` with a momentum has the remedy.

Near t = 0 a plain log-sum-exp loses its digits (it divides a rounding error by t); log1p and expm1 keep them.

Source: Li et al., Tilted Empirical Risk Minimization, 2021, eq. 2; the nested form from memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterpoise._core import PreciseBuffers, Spec, check_choice, check_number, check_per_row
from counterpoise.samplers._dro import from_weights, in_float64, like_losses, on_all_ranks


def tilted_weights(
    losses: Tensor, tilt: float, *, group: Tensor | None = None, group_tilt: float | None = None
) -> Tensor:
    """Weights (N,), the gradient of :func:`tilted_value`; they sum to one.

    Args:
        losses: (N,) of any sign; detached.
        tilt: t, any number, inf and -inf included; inside groups where there are any.
        group: (N,) any integers that name groups; with ``group_tilt``.
        group_tilt: tau, any number, between groups; None = no groups.

    Raises:
        ValueError: shapes that do not fit, a tilt that is no number, or a group tilt without groups.
    """
    return like_losses(_solve(losses, tilt, group, group_tilt)[1], losses)


def tilted_value(
    losses: Tensor, tilt: float, *, group: Tensor | None = None, group_tilt: float | None = None
) -> Tensor:
    """0-d tilted risk J; its gradient is the weights. Arguments as :func:`tilted_weights`. Without rows it is zero."""
    value, weights = _solve(losses, tilt, group, group_tilt)
    return from_weights(losses, weights, value[0] if len(value) else 0.0)


def _solve(losses: Tensor, tilt: float, group: Tensor | None, group_tilt: float | None) -> tuple[Tensor, Tensor]:
    """J, repeated (N,), and the weights (N,), float64."""
    _check(tilt, group_tilt)
    v = in_float64(losses)
    if len(v) == 0:
        return v, v
    everyone = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    if group_tilt is None:
        value, weights, _ = _tilt(v, everyone, tilt)
        return value, weights
    if group is None:
        raise ValueError(f"group is None, expected (N,) groups for group_tilt={group_tilt}")
    check_per_row("group", group, losses)
    risk, inside, count = _tilt(v, _numbered(group), tilt)
    value, between, _ = _tilt(risk, everyone, group_tilt)  # over rows: a group counts by its size
    return value, between * count * inside


def _check(tilt: float, group_tilt: float | None) -> None:
    check_number("tilt", tilt)
    if group_tilt is not None:
        check_number("group_tilt", group_tilt)


def _numbered(group: Tensor) -> Tensor:
    """Any integers to 0, 1, ... without gaps."""
    ordered, order = group.detach().sort(stable=True)
    steps = torch.cat([torch.zeros_like(order[:1]), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter(0, order, steps.cumsum(0))


def _tilt(v: Tensor, groups: Tensor, tilt: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the tilted risk of its group, its weight in the group, and the group's number of rows."""

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(v).index_add(0, groups, x)[groups]

    count = total(torch.ones_like(v))
    if tilt == 0:
        return total(v) / count, 1 / count + 0 * v, count
    side = math.copysign(1.0, tilt)
    top = torch.full_like(v, -torch.inf).scatter_reduce(0, groups, side * v, "amax")[groups]
    gap = top - side * v
    x = torch.where(gap == 0, 0, -abs(tilt) * gap)
    sums = total(x.exp())
    less = total(x.expm1()) / count
    log_mean = torch.where(less > -0.5, less.log1p(), (sums / count).log())
    return side * top + log_mean / tilt, x.exp() / sums, count


class TiltedERM(PreciseBuffers):
    """Weights (N,) by a softmax of the losses, of group risks, or of both; composes with every loss of one value a row.

    Normalisation "sum_one" over all ranks; the losses of all ranks are gathered. No state.

    Args:
        tilt: t, any number: above 0 for hard examples, below 0 against outliers. With groups, inside them.
        group_tilt: tau, any number, between groups; None = no groups.
        by: which field of the batch holds the groups: "group", or "target" (every class is a group).

    Raises:
        ValueError: settings out of range, losses that are not one a row, or a group tilt and a batch without groups.
    """

    spec = Spec(
        task="reweighter",
        source="Li et al., Tilted Empirical Risk Minimization, 2021, eq. 2",
        distributed="order_statistics",
    )
    normalization = "sum_one"

    def __init__(self, tilt: float = 1.0, group_tilt: float | None = None, by: str = "group") -> None:
        super().__init__()
        _check(tilt, group_tilt)
        check_choice("by", by, ("group", "target"))
        self.tilt = tilt
        self.group_tilt = group_tilt
        self.by = by

    def forward(
        self,
        losses: Tensor,
        *,
        target: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Losses (N,) and, with a group tilt, groups (N,) to detached weights (N,)."""
        if self.group_tilt is None:
            return on_all_ranks(losses, lambda v: tilted_weights(v, self.tilt))
        groups = group if self.by == "group" else target
        if groups is None:
            raise ValueError(f"TiltedERM got no {self.by}: give the batch one, or leave group_tilt out")
        check_per_row(self.by, groups, losses)
        return on_all_ranks(losses, self._between_groups, groups)

    def _between_groups(self, losses: Tensor, groups: Tensor) -> Tensor:
        return tilted_weights(losses, self.tilt, group=groups, group_tilt=self.group_tilt)
