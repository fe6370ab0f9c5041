r"""BROAD: weights for adversarial debiasing that look where the sensitive attribute is easiest to guess.

.. math:: r_i = n_{s_i} \frac{e^{-\ell_i / \tau}}{\sum_{j: s_j = s_i} e^{-\ell_j / \tau}}

with l the *adversary's* loss of guessing the sensitive group s from the prediction. A small loss there is local
unfairness, and gets a large weight. The weights are the exact minimum of E[r l] + tau E[r log r] at a mean of one in
each group; :class:`~counterpoise.samplers.RatioNetwork` fits a smooth one instead. The predictor minimises

.. math:: L_Y - \lambda\, \frac{1}{N} \sum_i r_i \ell_i

tau -> infinity is plain adversarial debiasing (r = 1), tau -> 0 puts a whole group's weight on one example. The sums
run over the rows of all ranks, and are formed in log space: plain exponentials underflow at l / tau > 745.

Source: Grari et al., On the Fairness ROAD: Robust Optimization for Adversarial Debiasing, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from counterpoise._core import (
    Spec,
    at_least_float32,
    check_choice,
    check_number,
    check_per_row,
    check_within,
    sum_over_ranks,
)
from counterpoise.distributed import all_reduce_sum, gather_rows


def group_log_ratios(scores: Tensor, group: Tensor, num_groups: int, *, sync: bool = True) -> Tensor:
    """log r of r proportional to exp(scores), with a mean of one within each group; differentiable.

    Args:
        scores: (N,).
        group: (N,) in [0, num_groups - 1]; a group without rows is fine.
        num_groups: G >= 1.
        sync: means over the rows of all ranks.

    Returns:
        (N,), at least float32.

    Raises:
        ValueError, TypeError: shapes or groups that do not fit.
    """
    check_number("num_groups", num_groups, 1)
    if scores.ndim != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected (N,), one a row")
    check_per_row("group", group, scores)
    check_within("group", group, 0, num_groups - 1, what="group indices")
    x, group = at_least_float32(scores), group.long()
    peak = x.new_full((num_groups,), -torch.inf).scatter_reduce(0, group, x.detach(), "amax")
    if sync:
        peak = gather_rows(peak[None]).amax(0)
    below = x - torch.where(peak.isfinite(), peak, 0)[group]
    total = x.new_zeros(num_groups).index_add(0, group, torch.exp(below))
    count = x.new_zeros(num_groups).index_add(0, group, torch.ones_like(x, requires_grad=False))
    if sync:
        total, count = all_reduce_sum(total), sum_over_ranks(count)
    return below - torch.where(count > 0, total / count.clamp_min(1), 1).log()[group]


class BROAD(nn.Module):
    """Weights (N,) from the adversary's per-example losses and the sensitive groups.

    Normalisation "mean_one": one on average within each group of the batch of all ranks, so over the batch too. No
    state. ``reweighted_loss(adversary_losses, broad, group=s)`` is the term that the predictor maximises; with a
    predictor's own losses the weights would favour examples that are easy already.

    Args:
        group_counts: (G,) training examples a sensitive group; only their number G is read.
        temperature: tau in (0, inf]; inf gives ones. The paper's grid is within (0, 0.7].
        by: which field of the batch holds the groups: "group", or "target".

    Raises:
        ValueError: settings out of range, or a batch without groups.
    """

    spec = Spec(
        task="reweighter",
        source="Grari et al., On the Fairness ROAD: Robust Optimization for Adversarial Debiasing, 2024",
        needs=("group_counts",),
        distributed="statistics",
    )
    normalization = "mean_one"

    def __init__(self, group_counts: Sequence[int] | Tensor, temperature: float = 0.5, by: str = "group") -> None:
        super().__init__()
        check_number("temperature", temperature, 0, open_low=True)
        check_choice("by", by, ("group", "target"))
        if len(group_counts) == 0:
            raise ValueError("group_counts is empty, expected one entry a group")
        self.num_groups = len(group_counts)
        self.temperature = temperature
        self.by = by

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
        """The adversary's losses (N,) and groups (N,) in [0, G - 1] to detached weights (N,)."""
        groups = group if self.by == "group" else target
        if groups is None:
            raise ValueError(f'BROAD got no {self.by}: give the batch one, or say by="target" for classes as groups')
        if losses.ndim != 1:
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected (N,), one a row")
        check_per_row(self.by, groups, losses)
        check_within(self.by, groups, 0, self.num_groups - 1, what="group indices")
        scores = -at_least_float32(losses.detach()) / self.temperature
        return group_log_ratios(scores, groups, self.num_groups).exp()
