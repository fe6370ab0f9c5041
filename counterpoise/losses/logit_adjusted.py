r"""Logit adjustment: train with the class prior added to the logits, predict with the raw logits.

.. math:: \ell_i = \mathrm{CE}(z_i + \iota,\; y_i), \qquad \iota_c = \log(\pi_c^{\tau} + \epsilon)

Consistent for the balanced error. The same correction can be subtracted after training with plain cross-entropy
(:func:`post_hoc_logit_adjustment`); never do both. With a re-balancing sampler pi must be the *sampled* prior
(``loss.statistics.set_prior(sampler.class_probabilities)``), else the correction is made twice.

Source: Menon et al., Long-tail learning via logit adjustment, 2021, eq. 9 (post hoc) and 10 (loss); the epsilon is the
released code's. Other libraries: none offers it tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, at_least_float32, check_number
from counterpoise.losses._inputs import along_classes, class_vector
from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy
from counterpoise.memory import ClassCounts, ClassStatistics, statistics_of


def logit_adjusted_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: ClassCounts | ClassStatistics,
    tau: float = 1.0,
    epsilon: float = 1e-12,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Cross-entropy of logits + log(prior^tau + epsilon); the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...); target: class indices (N, ...) or probabilities of the logits' shape.
        class_counts: (C,) training examples a class, or the ClassStatistics that hold them.
        tau: strength >= 0; 0 is cross-entropy, 1 is consistent for the balanced error.
        epsilon: >= 0, keeps the logarithm finite.
        class_weight: (C,), None = ones.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    statistics = statistics_of(class_counts)
    return adjusted_cross_entropy(
        logits,
        target,
        additive=statistics.derived(prior_adjustment, logits, tau, epsilon),
        class_weight=class_weight,
        ignore_index=ignore_index,
        weight=weight,
        mask=mask,
        inner=inner,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def post_hoc_logit_adjustment(
    logits: Tensor, *, class_counts: ClassCounts | ClassStatistics, tau: float = 1.0, epsilon: float = 1e-12
) -> Tensor:
    """Logits (N, C, ...) of a model trained with plain cross-entropy, less log(prior^tau + epsilon).

    Not for a model trained with :func:`logit_adjusted_loss` or another prior-based loss: that corrects twice.
    """
    z = at_least_float32(logits)
    return z - along_classes(class_vector("class_counts", prior_adjustment(class_counts, tau, epsilon), z), z)


def prior_adjustment(class_counts: ClassCounts | ClassStatistics, tau: float, epsilon: float) -> Tensor:
    """(C,) float64 log(prior^tau + epsilon)."""
    check_number("tau", tau, 0)
    check_number("epsilon", epsilon, 0)
    return torch.log(statistics_of(class_counts).seen_prior() ** tau + epsilon)


class LogitAdjustedLoss(Loss):
    """Module form of :func:`logit_adjusted_loss`; the prior lives in ``statistics`` and travels in checkpoints.

    Args:
        class_counts: (C,) training examples a class.
        tau: strength >= 0.
        zero_count: "error", "ignore" or "smooth", see :class:`~counterpoise.memory.ClassStatistics`.
    """

    spec = Spec(
        task="multiclass",
        source="Menon et al., Long-tail learning via logit adjustment, 2021, eq. 10",
        needs=("class_counts",),
        uses_prior=True,
    )

    def __init__(
        self,
        class_counts: ClassCounts,
        tau: float = 1.0,
        epsilon: float = 1e-12,
        class_weight: Sequence[float] | Tensor | None = None,
        zero_count: str = "error",
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            tau=tau,
            epsilon=epsilon,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("tau", tau, 0)
        check_number("epsilon", epsilon, 0)
        self.statistics = ClassStatistics(class_counts, zero_count)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Raw logits (N, C, ...) and their targets to the reduced loss; predict with the raw logits."""
        # What logit_adjusted_loss does, a call less: that is a twentieth of a small step.
        options = self.options
        return adjusted_cross_entropy(
            logits,
            target,
            additive=self.statistics.derived(prior_adjustment, logits, options.pop("tau"), options.pop("epsilon")),
            class_weight=self.class_weight,
            weight=weight,
            mask=mask,
            **options,
        )
