r"""SimSiam: a prediction from one view meets the embedding of the other, held fixed; no negatives and no teacher.

.. math:: \ell_i = -\tfrac{1}{2} \cos(p_{1i}, \mathrm{sg}\, z_{2i}) - \tfrac{1}{2} \cos(p_{2i}, \mathrm{sg}\, z_{1i})

with p the predictor's output on an embedding z and sg the stopped gradient, without which all embeddings collapse to
one. One direction alone is called as ``loss(p1, z2)``, both as ``loss(p, z)`` with p, z (2, N, d); with V views each
prediction meets the other views' embeddings and costs the mean over them. It is BYOL's loss on other targets:
:math:`L_\mathrm{BYOL} = 4 + 4 L` for both directions.

Source: Chen and He, Exploring Simple Siamese Representation Learning, 2021, eq. 1 to 4.
"""

from __future__ import annotations

from torch import Tensor, nn

from counterpoise._core import Loss, Spec
from counterpoise.contrastive._predictions import prediction_distances, reduce_predictions


def simsiam_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """SimSiam; the formula is at the top of this file.

    Args:
        z: (N, d) predictions, or (V, N, d) of several views.
        other: embeddings, detached here: (N, d) of another view, or (L, N, d) of the first L views, each of which the
            predictions of all other views meet.
        weight: (N,), of all views of an example; mask: (N,) bool, False leaves an example out.
        reduction: "none" gives (V*N,), view-major; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: denominators of all ranks, once a process group exists.

    Returns:
        (V*N,) or 0-d, at least float32, in [-1, 1].

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; no embeddings.
    """
    rows, _ = prediction_distances(z, other, weight, mask, normalize=True)
    return reduce_predictions(rows / 2 - 1, weight, mask, reduction=reduction, normalizer=normalizer, sync=sync)


class SimSiamLoss(Loss):
    """Module form of :func:`simsiam_loss`: ``loss(predictions, embeddings)``."""

    spec = Spec(
        task="teacher_views",
        source="Chen and He, Exploring Simple Siamese Representation Learning, 2021, eq. 1",
        needs=("predictor",),
    )

    def __init__(
        self,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(reduction=reduction, normalizer=normalizer, sync=sync)

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
        """Predictions and embeddings (N, d) or (V, N, d) to the reduced loss; ``labels`` and ``bank`` are refused."""
        if labels is not None or bank is not None:
            raise ValueError(
                f"SimSiamLoss got {'labels' if bank is None else 'a bank'}, expected predictions and embeddings"
            )
        return simsiam_loss(z, other, weight=weight, mask=mask, **self.options)
