r"""Herding: picks examples so that their mean follows the mean of all.

.. math:: j_{t+1} = \arg\min_{j \notin A} \Bigl\lVert (t + 1)\,\mu - \sum_{s \in A} x_s - x_j \Bigr\rVert
          \quad (\text{"nearest"}), \qquad
          j_{t+1} = \arg\max_{j \notin A} \langle w_t, x_j \rangle, \; w_{t+1} = w_t + \mu - x_{j_{t+1}}, \; w_0 = \mu
          \quad (\text{"inner\_product"})

The two coincide on features of unit norm. iCaRL normalises its features first; here they are taken as they come.
DeepCore takes the farthest example from the residual instead of the nearest, a defect: it is not offered.

Source: Welling, Herding Dynamical Weights to Learn, 2009; nearest form: Rebuffi et al., iCaRL: Incremental Classifier
and Representation Learning, 2017, algorithm 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_choice
from counterpoise.samplers.selection import Selection, check_budget, check_features, check_targets, select_per_class


def herding(features: Tensor, budget: int, *, rule: str = "nearest", targets: Tensor | None = None) -> Selection:
    """Greedy selection without replacement; the formulas are at the top of this file.

    Args:
        features: (N, D), finite.
        budget: picks in [1, N].
        rule: "nearest" to the residual, or "inner_product".
        targets: (N,) class indices: select inside each class, with shares of the budget as
            :func:`~counterpoise.samplers.selection.class_budgets` divides it.

    Returns:
        A selection of equal weights that sum to N (to each class's size with targets), whose value is the distance
        between the mean of the picks and the mean of all (None with targets). Ties go to the lowest index.

    Raises:
        ValueError, TypeError: a shape, type or setting that does not fit.
    """
    check_features(features)
    check_budget(budget, len(features))
    check_choice("rule", rule, ("nearest", "inner_product"))
    if targets is not None:
        check_targets(targets, features)

        def inside(members: Tensor, share: int) -> Selection:
            return herding(features[members], share, rule=rule)

        return select_per_class(targets, budget, inside, assigns=False)
    x = features.detach().double()
    mean = x.mean(0)
    x = x - mean  # the residual is then minus the sum of the picks, and products lose fewer digits
    shift = mean if rule == "inner_product" else torch.zeros_like(mean)
    half_squares = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    if rule == "nearest":
        half_squares = x.square().sum(1) / 2
    residual, picks = shift.clone(), []
    taken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(budget):
        merit = (x @ residual - half_squares).masked_fill(taken, -torch.inf)
        pick = int((merit == merit.max()).nonzero()[0])
        picks.append(pick)
        taken[pick] = True
        residual = residual - x[pick]
    indices = torch.tensor(picks, device=x.device)
    weights = torch.full((budget,), len(x) / budget, dtype=torch.float64, device=x.device)
    return Selection(indices, weights, value=float(x[indices].mean(0).norm()))
