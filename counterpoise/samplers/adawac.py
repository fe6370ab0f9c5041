r"""AdaWAC: per training example, a share for the supervised loss and the rest for consistency regularisation.

.. math:: \mathrm{logit}(w_i) \leftarrow \mathrm{logit}(w_i) + \eta\,(\ell_i - R_i), \qquad
          L = \frac{1}{N} \sum_i w_i\, \ell_i + (1 - w_i)\, R_i

the mirror ascent of min over the model, max over w of L. Examples that are hard to predict are trained on their
labels, easy ones on agreement between augmentations (R, its coefficient included; the paper's is 2 times the squared
distance of features). w is the one from after the update.

What is kept is the logit, one an example: the released code keeps w, which at eta = 8 underflows to exactly 0 in
float32 and never comes back, and does not save it. The order of visits does not matter.

Source: Dong et al., Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization under
Concept Shift, 2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import (
    PreciseBuffers,
    Spec,
    at_least_float32,
    check_number,
    check_per_row,
    check_within,
    in_second_pass,
    reduce_losses,
)
from counterpoise.distributed import gather_rows


def adawac_loss(supervised: Tensor, consistency: Tensor, weights: Tensor, *, sync: bool = False) -> Tensor:
    """The mean of w l + (1 - w) R over rows.

    Args:
        supervised: (N,) l; consistency: (N,) R.
        weights: (N,) w in [0, 1], detached.
        sync: the mean runs over the rows of all ranks.

    Returns:
        0-d, at least float32; without rows, a zero connected to the graph.

    Raises:
        ValueError: shapes that do not fit.
    """
    if supervised.ndim != 1:
        raise ValueError(f"supervised has shape {tuple(supervised.shape)}, expected (N,), one a row")
    check_per_row("consistency", consistency, supervised)
    check_per_row("weights", weights, supervised)
    l, r = at_least_float32(supervised), at_least_float32(consistency)  # noqa: E741
    w = weights.detach().to(l.dtype)
    return reduce_losses(w * l + (1 - w) * r, sync=sync)


class AdaWAC(PreciseBuffers):
    """Weights (N,) of the supervised losses, one logit a training example; :func:`adawac_loss` joins both halves.

    Normalisation "raw": w is a share of one example's two losses, in [0, 1], and no distribution over rows. Under
    :func:`~counterpoise.samplers.reweighted_loss` alone the supervised half becomes a mean weighted by w. State moves
    in ``train()`` mode only, not inside ``second_pass()``, and not in a step in which a loss of any rank is not finite.
    The increments of all ranks are gathered, so that every rank holds the same table; an example that is twice in a
    batch moves twice.

    Args:
        num_examples: size of the training set, that ``index`` counts.
        step_size: eta >= 0. The paper's segmentation runs use 2 and 8.

    Buffers: logits (num_examples,) float64, persistent, zero at the start (w = 1/2).

    Raises:
        ValueError: settings out of range, or a batch without index.
    """

    spec = Spec(
        task="reweighter",
        source="Dong et al., Adaptively Weighted Data Augmentation Consistency Regularization, 2023, algorithm 1",
        needs=("num_examples",),
        distributed="statistics",
        stateful=True,
    )
    normalization = "raw"
    logits: Tensor

    def __init__(self, num_examples: int, step_size: float = 1.0) -> None:
        super().__init__()
        check_number("num_examples", num_examples, 1)
        check_number("step_size", step_size, 0)
        self.step_size = step_size
        self.register_buffer("logits", torch.zeros(num_examples, dtype=torch.float64))

    @torch.no_grad()
    def forward(
        self,
        losses: Tensor,
        *,
        consistency: Tensor | None = None,
        target: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Supervised losses (N,), consistency losses (N,) and indices (N,) to detached weights (N,) of the former.

        Without consistency losses they are taken as zero: every visit then raises w by eta times the loss.
        """
        if losses.ndim != 1:
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected (N,), one a row")
        if index is None:
            raise ValueError("AdaWAC got no index: give the batch the indices of its training examples")
        check_per_row("index", index, losses)
        check_per_row("consistency", consistency, losses)
        check_within("index", index, 0, len(self.logits) - 1, what="indices of training examples")
        index = index.long()
        if self.training and not in_second_pass():
            gap = losses.detach().to(self.logits)
            gap = gap if consistency is None else gap - consistency.detach().to(self.logits)
            self._ascend(gather_rows(index), gather_rows(self.step_size * gap))
        return self.logits[index].sigmoid().to(at_least_float32(losses).dtype)

    def _ascend(self, index: Tensor, increment: Tensor) -> None:
        """Adds the increments of all ranks, or none of them if one is not finite."""
        self.logits.index_add_(0, index, torch.where(increment.isfinite().all(), increment, 0))
