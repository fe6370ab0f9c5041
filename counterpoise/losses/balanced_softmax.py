r"""Balanced softmax: the softmax of a class-balanced test set, trained on a long-tailed one.

.. math:: \ell_i = \mathrm{CE}(z_i + \log n,\; y_i)

The same as logit adjustment with tau = 1 (log n_c and log prior_c differ by a constant). Predict with the raw logits.

Source: Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, 2020, eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from counterpoise._core import Loss, Spec
from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy
from counterpoise.memory import ClassCounts, ClassStatistics, statistics_of


def balanced_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: ClassCounts | ClassStatistics,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Cross-entropy of logits + log(class counts); the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...); target: class indices (N, ...) or probabilities of the logits' shape.
        class_counts: (C,) training examples a class, or the ClassStatistics that hold them.
        class_weight: (C,), None = ones.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    statistics = statistics_of(class_counts)
    return adjusted_cross_entropy(
        logits,
        target,
        additive=statistics.derived(ClassStatistics.log_prior, logits),
        class_weight=class_weight,
        ignore_index=ignore_index,
        weight=weight,
        mask=mask,
        inner=inner,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


class BalancedSoftmaxLoss(Loss):
    """Module form of :func:`balanced_softmax_loss`; the prior lives in ``statistics`` and travels in checkpoints.

    Args:
        class_counts: (C,) training examples a class.
        zero_count: "error", "ignore" or "smooth", see :class:`~counterpoise.memory.ClassStatistics`.
    """

    spec = Spec(
        task="multiclass",
        source="Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, 2020, eq. 3",
        needs=("class_counts",),
        uses_prior=True,
    )

    def __init__(
        self,
        class_counts: ClassCounts,
        class_weight: Sequence[float] | Tensor | None = None,
        zero_count: str = "error",
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, inner=inner, reduction=reduction, normalizer=normalizer, sync=sync)
        self.statistics = ClassStatistics(class_counts, zero_count)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Raw logits (N, C, ...) and their targets to the reduced loss; predict with the raw logits."""
        return balanced_softmax_loss(
            logits,
            target,
            class_counts=self.statistics,
            class_weight=self.class_weight,
            weight=weight,
            mask=mask,
            **self.options,
        )
