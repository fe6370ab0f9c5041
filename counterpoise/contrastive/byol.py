r"""BYOL: a prediction from one view meets what a slowly moving teacher makes of the other; no negatives.

.. math:: \ell_i = \lVert \bar p_{1i} - \bar t_{2i} \rVert^2 + \lVert \bar p_{2i} - \bar t_{1i} \rVert^2
          = 4 - 2 \cos(p_{1i}, t_{2i}) - 2 \cos(p_{2i}, t_{1i})

with p the predictor's output on the student's embedding and t the teacher's embedding, without gradient; bars are to
unit length. One direction alone is called as ``loss(p1, t2)``, both as ``loss(p, t)`` with p, t (2, N, d): the *sum* of
the directions, where lightly's ``NegativeCosineSimilarity`` leaves the halving to the user:
:math:`L = 4 + 4 \cdot \tfrac{1}{2} (-\cos - \cos)`. With V views each prediction meets the other views' targets, and
what a row costs is twice the mean over them.

Without ``normalize`` a row costs the mean over features of the squared difference. The teacher's momentum along the
run: :func:`~counterpoise.memory.momentum_schedule`.

Source: Grill et al., Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, 2020, eq. 2; several views:
released code of Ermolov et al., 2021.
"""

from __future__ import annotations

from torch import Tensor, nn

from counterpoise._core import Loss, Spec
from counterpoise.contrastive._predictions import prediction_distances, reduce_predictions


def byol_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """BYOL; the formula is at the top of this file.

    Args:
        z: (N, d) predictions, or (V, N, d) of several views.
        other: targets, detached here: (N, d) of another view, or (L, N, d) of the first L views, each of which the
            predictions of all other views meet.
        normalize: both to unit length first.
        weight: (N,), of all views of an example; mask: (N,) bool, False leaves an example out.
        reduction: "none" gives (V*N,), view-major; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: denominators of all ranks, once a process group exists.

    Returns:
        (V*N,) or 0-d, at least float32; with ``normalize`` in [0, 4] a direction, in [0, 8] for both.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; no targets.
    """
    rows, both_ways = prediction_distances(z, other, weight, mask, normalize=normalize)
    rows = 2 * rows if both_ways else rows
    return reduce_predictions(rows, weight, mask, reduction=reduction, normalizer=normalizer, sync=sync)


class BYOLLoss(Loss):
    """Module form of :func:`byol_loss`: ``loss(predictions, targets)``.

    Args:
        normalize: predictions and targets to unit length first.
    """

    spec = Spec(
        task="teacher_views",
        source="Grill et al., Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, 2020, eq. 2",
        needs=("momentum_encoder", "predictor"),
    )

    def __init__(
        self,
        normalize: bool = True,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, normalizer=normalizer, sync=sync)

    def forward(
        self,
        z: Tensor,
        other: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        bank: nn.Module | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predictions and targets (N, d) or (V, N, d) to the reduced loss; ``labels`` and ``bank`` are refused."""
        if labels is not None or bank is not None:
            raise ValueError(f"BYOLLoss got {'labels' if bank is None else 'a bank'}, expected predictions and targets")
        return byol_loss(z, other, weight=weight, mask=mask, **self.options)
