"""Cross-entropy with class weights and label smoothing: the baseline that everything else is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from counterpoise._core import Loss, Spec
from counterpoise.losses.adjusted_cross_entropy import adjusted_cross_entropy


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    r""":math:`\ell_i = -\sum_c w_c t_{ic} \log \mathrm{softmax}(z_i)_c`, t smoothed by ``label_smoothing``.

    Differs from torch in the mean: torch divides by the sum of the class weights of the batch, so a batch of one class
    cancels them; here that is ``normalizer="weight"``, and the default divides by the number of rows.

    Args:
        logits: (N, C) or (N, C, d1, ...); target: class indices (N, ...) or probabilities of the logits' shape.
        class_weight: (C,), None = ones.
        label_smoothing: in [0, 1].

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    return adjusted_cross_entropy(
        logits,
        target,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        weight=weight,
        mask=mask,
        inner=inner,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


class CrossEntropyLoss(Loss):
    """Module form of :func:`cross_entropy_loss`; ``class_weight`` is a buffer.

    Args:
        class_weight: (C,) numbers, or None.
        label_smoothing: in [0, 1].
    """

    spec = Spec(task="multiclass", source="Maximum likelihood; label smoothing: Szegedy et al., 2016")

    def __init__(
        self,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        self.register_buffer("class_weight", None)
        self.set_class_weight(class_weight)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (N, C, ...) and their targets to the reduced loss."""
        return cross_entropy_loss(
            logits, target, class_weight=self.class_weight, weight=weight, mask=mask, **self.options
        )
