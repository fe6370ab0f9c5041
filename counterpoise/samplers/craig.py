r"""CRAIG: a weighted subset of each class whose gradient follows that of the class.

.. math:: S_{ij} = \max(D) - D_{ij}, \quad D_{ij} = \lVert G_i - G_j \rVert, \quad G_i = (p_i - \mathrm{onehot}(y_i))\,
          (h_i, 1)

with the gradients of the last layer, whose distances bound those of all gradients up to a constant; the subset
maximises facility location within each class. Weights count the examples that a pick stands for: train with their mean
brought to one, as :class:`~counterpoise.samplers.CoresetSampler` does, or scale the learning rate.

Source: Mirzasoleiman et al., Coresets for Data-efficient Training of Machine Learning Models, 2020, algorithm 1,
section 3.4.
"""

from __future__ import annotations

from torch import Tensor

from counterpoise._core import check_choice, check_number
from counterpoise.samplers.dissimilarity import GradientDistance
from counterpoise.samplers.facility_location import greedy_facility_location
from counterpoise.samplers.scores import last_layer_errors
from counterpoise.samplers.selection import Selection, check_budget, check_features, select_per_class


def craig(
    logits: Tensor,
    targets: Tensor,
    budget: int,
    *,
    features: Tensor | None = None,
    method: str = "lazy",
    delta: float = 0.01,
    seed: int = 0,
) -> Selection:
    """Facility location on last-layer gradients, class by class; the formula is at the top of this file.

    Args:
        logits: (N, C), finite.
        targets: (N,) class indices in [0, C - 1].
        budget: picks in [classes with examples, N], shared out in proportion to the classes' sizes.
        features: (N, D), what went into the last layer; None takes the gradient of its bias alone.
        method: "lazy" or "stochastic", see :func:`~counterpoise.samplers.facility_location`.
        delta: in (0, 1), of the stochastic method.
        seed: >= 0, of the stochastic method.

    Returns:
        A selection, class after class, whose weights sum to N (within a class to its size).

    Raises:
        ValueError, TypeError: a shape, type, label or setting that does not fit.
    """
    check_choice("method", method, ("lazy", "stochastic"))
    check_number("delta", delta, 0, 1, open_low=True)
    check_features(logits, "logits")
    check_budget(budget, len(logits))
    errors, _ = last_layer_errors(logits, targets)
    if features is not None:
        check_features(features)
        if len(features) != len(logits):
            raise ValueError(f"features has shape {tuple(features.shape)}, expected ({len(logits)}, D)")

    def inside(members: Tensor, share: int) -> Selection:
        h = None if features is None else features.detach()[members]
        return greedy_facility_location(GradientDistance(errors[members], h), share, method, delta, seed)

    return select_per_class(targets, budget, inside)
