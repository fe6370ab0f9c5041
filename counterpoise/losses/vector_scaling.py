r"""Vector scaling: logits of rare classes are divided as well as shifted while training; predict with the raw logits.

.. math:: \ell_i = \mathrm{CE}(z_i / \Delta + \iota,\; y_i), \qquad
          \Delta_c = (\pi_{\max} / \pi_c)^{\gamma}, \quad \iota_c = \tau \log \pi_c

gamma = 0 is logit adjustment, tau = 0 is CDT (class-dependent temperatures), both 0 or equal counts are cross-entropy.
Once a network fits every training example, a shift alone no longer moves its decision boundary; Delta still does.
Delta alone harms the start of training, which is what tau > 0 is kept for. Delta means little for cosine logits whose
scale is fixed elsewhere.

With a re-balancing sampler pi must be the *sampled* prior (``loss.statistics.set_prior(sampler.class_probabilities)``).
Other libraries: none offers it. Defaults are the released code's; the paper's CIFAR-10-LT setting is gamma = 0.2,
tau = 1.2.

Source: Kini et al., Label-Imbalanced and Group-Sensitive Classification under Overparameterization, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, check_number
from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy
from counterpoise.memory import ClassCounts, ClassStatistics, statistics_of


def vector_scaling_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: ClassCounts | ClassStatistics,
    gamma: float = 0.3,
    tau: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Cross-entropy of scaled and shifted logits; the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...); target: class indices (N, ...) or probabilities of the logits' shape.
        class_counts: (C,) training examples a class, or the ClassStatistics that hold them.
        gamma: exponent >= 0 of the division; 0 is off.
        tau: strength >= 0 of the shift; 0 is off.
        class_weight: (C,), None = ones.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    check_number("gamma", gamma, 0)
    check_number("tau", tau, 0)
    statistics = statistics_of(class_counts)
    additive = multiplicative = None
    if tau > 0:
        additive = statistics.derived(_iota, logits, tau)
    if gamma > 0:
        multiplicative = statistics.derived(_inverse_delta, logits, gamma)
    return adjusted_cross_entropy(
        logits,
        target,
        additive=additive,
        multiplicative=multiplicative,
        class_weight=class_weight,
        ignore_index=ignore_index,
        weight=weight,
        mask=mask,
        inner=inner,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def class_scaling(class_counts: ClassCounts | ClassStatistics, gamma: float, tau: float) -> tuple[Tensor, Tensor]:
    """Delta and iota, each (C,) float64; logits are divided by Delta >= 1 and shifted by iota <= 0."""
    check_number("gamma", gamma, 0)
    check_number("tau", tau, 0)
    prior = statistics_of(class_counts).seen_prior()
    return (prior.max() / prior) ** gamma, tau * torch.log(prior)


def _iota(statistics: ClassStatistics, tau: float) -> Tensor:
    return class_scaling(statistics, 0.0, tau)[1]


def _inverse_delta(statistics: ClassStatistics, gamma: float) -> Tensor:
    return 1 / class_scaling(statistics, gamma, 0.0)[0]


class VectorScalingLoss(Loss):
    """Module form of :func:`vector_scaling_loss`; the prior lives in ``statistics`` and travels in checkpoints.

    Args:
        class_counts: (C,) training examples a class.
        gamma: exponent >= 0 of the division.
        tau: strength >= 0 of the shift.
        class_weight: (C,) numbers, None = ones.
        zero_count: "error", "ignore" or "smooth", see :class:`~counterpoise.memory.ClassStatistics`.
    """

    spec = Spec(
        task="multiclass",
        source="Kini et al., Label-Imbalanced and Group-Sensitive Classification under Overparameterization, 2021",
        needs=("class_counts",),
        uses_prior=True,
    )

    def __init__(
        self,
        class_counts: ClassCounts,
        gamma: float = 0.3,
        tau: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        zero_count: str = "error",
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            gamma=gamma,
            tau=tau,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("gamma", gamma, 0)
        check_number("tau", tau, 0)
        self.statistics = ClassStatistics(class_counts, zero_count)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Raw logits (N, C, ...) and their targets to the reduced loss; predict with the raw logits."""
        return vector_scaling_loss(
            logits,
            target,
            class_counts=self.statistics,
            class_weight=self.class_weight,
            weight=weight,
            mask=mask,
            **self.options,
        )
