r"""LDAM: a larger margin for rarer classes, on cosine logits.

.. math:: \ell_i = \mathrm{CE}\big(s\,(z_i - m_{y_i}\,[c = y_i]),\; y_i\big), \qquad
          m_c = m_{\max} \frac{n_c^{-1/4}}{\max_j n_j^{-1/4}}

z are cosines, from :class:`CosineLinear`: with unbounded logits the scale s overflows. Usually paired with deferred
re-weighting: class weights switched on late in training. Equal counts give every class the margin ``max_margin``, not
zero: LDAM on balanced data is not cross-entropy. With class weights the released code divides by their sum
(``normalizer="weight"``).

Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, 2019, eq. 13; scale and
normalised margins from the released code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from counterpoise._core import Loss, Spec, at_least_float32, check_number, without_autocast
from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy
from counterpoise.memory import ClassCounts, ClassStatistics, statistics_of


def ldam_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: ClassCounts | ClassStatistics,
    max_margin: float = 0.5,
    scale: float = 30.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Cross-entropy of scaled cosines with a margin on the target; the formula is at the top of this file.

    Args:
        logits: cosines (N, C) or (N, C, d1, ...) in [-1, 1]; target: class indices (N, ...), or probabilities of the
            logits' shape, where each class's margin counts by its probability.
        class_counts: (C,) training examples a class, or the ClassStatistics that hold them.
        max_margin: margin of the rarest class, >= 0 (0.5 for CIFAR, 0.3 for ImageNet and iNaturalist).
        scale: s > 0.
        class_weight: (C,), None = ones.

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    statistics = statistics_of(class_counts)
    return adjusted_cross_entropy(
        logits,
        target,
        margin=statistics.derived(ldam_margins, logits, max_margin),
        scale=scale,
        class_weight=class_weight,
        ignore_index=ignore_index,
        weight=weight,
        mask=mask,
        inner=inner,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def ldam_margins(class_counts: ClassCounts | ClassStatistics, max_margin: float = 0.5) -> Tensor:
    """(C,) float64 margins, ``max_margin`` for the rarest class; only the ratios of the counts matter."""
    check_number("max_margin", max_margin, 0)
    raw = statistics_of(class_counts).seen_prior() ** -0.25
    return raw * (max_margin / raw.max())


class LDAMLoss(Loss):
    """Module form of :func:`ldam_loss`. Warns once if the first logits it sees are not cosines.

    Args:
        class_counts: (C,) training examples a class.
        max_margin: margin of the rarest class, >= 0.
        scale: > 0.
        zero_count: "error", "ignore" or "smooth", see :class:`~counterpoise.memory.ClassStatistics`.
    """

    spec = Spec(
        task="multiclass",
        source="Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, 2019, eq. 13",
        needs=("class_counts", "cosine_logits"),
        uses_prior=True,
    )

    def __init__(
        self,
        class_counts: ClassCounts,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Sequence[float] | Tensor | None = None,
        zero_count: str = "error",
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            max_margin=max_margin,
            scale=scale,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("max_margin", max_margin, 0)
        check_number("scale", scale, 0, open_low=True)
        self.statistics = ClassStatistics(class_counts, zero_count)
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)
        self._looked = False

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Cosines (N, C, ...) and their targets to the reduced loss."""
        if not self._looked and not torch.compiler.is_compiling() and logits.is_floating_point():
            self._look(logits.detach())
        # What ldam_loss does, a call less: that is a twentieth of a small step.
        options = self.options
        return adjusted_cross_entropy(
            logits,
            target,
            margin=self.statistics.derived(ldam_margins, logits, options.pop("max_margin")),
            class_weight=self.class_weight,
            weight=weight,
            mask=mask,
            **options,
        )

    def _look(self, logits: Tensor) -> None:
        """One look at the first batch: a read-back at every step would stall an accelerator."""
        self._looked = True
        largest = logits[logits.isfinite()].abs().max().item() if logits.isfinite().any() else 0.0
        if largest > 1 + max(1e-3, 4 * torch.finfo(logits.dtype).eps):
            warnings.warn(
                f"LDAMLoss got logits of up to {largest:.3g}, expected cosines in [-1, 1]: use a CosineLinear head",
                stacklevel=3,
            )


class CosineLinear(nn.Module):
    """Classifier head whose logits are cosines: normalised features against normalised class vectors.

    Args:
        in_features: width d >= 1.
        num_classes: C >= 1.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        check_number("in_features", in_features, 1)
        check_number("num_classes", num_classes, 1)
        self.weight = nn.Parameter(normalize(torch.empty(num_classes, in_features).uniform_(-1, 1), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d) to cosines (N, C), at least float32."""
        with without_autocast(features):
            unit, classes = (
                normalize(at_least_float32(features), dim=1),
                normalize(at_least_float32(self.weight), dim=1),
            )
            return linear(unit, classes.to(unit.dtype))
