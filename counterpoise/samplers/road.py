r"""ROAD: a network for the ratio r(x, s) that adversarial debiasing weighs its adversary's losses by.

.. math:: r_i = n_{s_i} \frac{e^{f(x_i, s_i)}}{\sum_{j: s_j = s_i} e^{f(x_j, s_j)}}, \qquad
          \min_f \frac{1}{N} \sum_i r_i \ell_i + \tau\, r_i \log r_i

l is the adversary's loss of guessing the sensitive group s, held fixed. The best possible r is that of
:class:`~counterpoise.samplers.BROAD`, where the objective is -tau log mean exp(-l / tau) in each group; the network's
is smooth in x, so that neighbours are weighed alike. A step of training is, with optimisers of their own:

1. the adversary, several times, on the plain mean of l;
2. this network on :func:`road_ratio_objective`;
3. the predictor on L_Y - lambda mean(r l), r = ``log_ratio.detach().exp()``.

The ratio is kept as its logarithm: r log r has no finite gradient once r has underflowed.

Source: Grari et al., On the Fairness ROAD: Robust Optimization for Adversarial Debiasing, 2024; step order from the
released code.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from counterpoise._core import at_least_float32, check_number, check_per_row, reduce_losses
from counterpoise.samplers.broad import group_log_ratios


def road_ratio_objective(
    log_ratio: Tensor, adversary_losses: Tensor, *, temperature: float, sync: bool = False
) -> Tensor:
    """What the ratio network minimises; the formula is at the top of this file.

    Args:
        log_ratio: (N,) log r, with a mean of r of one within each group.
        adversary_losses: (N,); no gradient flows into them.
        temperature: finite tau > 0; larger keeps r closer to one.
        sync: the mean runs over the rows of all ranks.

    Returns:
        0-d, at least float32.

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    check_number("temperature", temperature, 0, sys.float_info.max, open_low=True)
    if log_ratio.ndim != 1:
        raise ValueError(f"log_ratio has shape {tuple(log_ratio.shape)}, expected (N,), one a row")
    check_per_row("adversary_losses", adversary_losses, log_ratio)
    x = at_least_float32(log_ratio)
    return reduce_losses(x.exp() * (adversary_losses.detach().to(x) + temperature * x), sync=sync)


class RatioNetwork(nn.Module):
    """f(x, s) and its normalisation: features and groups to log r.

    Args:
        in_features: width of the features; the group is appended to them as a one-hot vector.
        hidden: width of the first layer, and twice that of the second; >= 2.
        num_groups: G >= 1.
        sync: mean one within each group over the rows of all ranks.
    """

    def __init__(self, in_features: int, hidden: int = 64, num_groups: int = 2, sync: bool = True) -> None:
        super().__init__()
        check_number("in_features", in_features, 1)
        check_number("hidden", hidden, 2)
        check_number("num_groups", num_groups, 1)
        self.num_groups = num_groups
        self.sync = sync
        self.network = nn.Sequential(
            nn.Linear(in_features + num_groups, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden // 2),
            nn.ReLU(),
            nn.Linear(hidden // 2, 1),
        )

    def forward(self, features: Tensor, group: Tensor) -> Tensor:
        """Features (N, in_features) and groups (N,) in [0, G - 1] to log r (N,), at least float32.

        Raises ValueError for shapes or groups that do not fit.
        """
        return group_log_ratios(self.scores(features, group), group, self.num_groups, sync=self.sync)

    def scores(self, features: Tensor, group: Tensor) -> Tensor:
        """f (N,), which the batch has no part in: log r before its normalisation. Raises as ``forward`` does."""
        if features.ndim != 2:
            raise ValueError(f"features has shape {tuple(features.shape)}, expected (N, d)")
        check_per_row("group", group, features)
        member = (group.long()[:, None] == torch.arange(self.num_groups, device=group.device)).to(features.dtype)
        return self.network(torch.cat([features, member], 1)).squeeze(1)
