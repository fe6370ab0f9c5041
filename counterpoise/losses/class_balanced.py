r"""Class-balanced loss: any of three base losses, weighted by the effective number of examples of the target's class.

.. math:: \ell_i = w_{y_i}\, \mathrm{base}(z_i, y_i), \qquad w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}},
          \quad \textstyle\sum_c w_c = C

base is softmax cross-entropy, binary cross-entropy over the one-hot target ("sigmoid"), or sigmoid focal ("focal");
the two latter are summed over the classes, as in the released code. With them, start the last bias at -log(C - 1).
One widely copied port takes "softmax" as BCE of softmax probabilities and averages "sigmoid" over N * C.

Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019, eq. 6 (and the official code).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from counterpoise._core import Loss, Spec, check_choice, check_number, combine_inner, reduce_losses
from counterpoise.losses._inputs import check_class_vector, check_multiclass, class_indices
from counterpoise.losses.cross_entropy import cross_entropy_loss
from counterpoise.losses.sigmoid_focal import sigmoid_focal_loss
from counterpoise.memory import ClassCounts, ClassStatistics, statistics_of

BASES = ("softmax", "sigmoid", "focal")


def class_balanced_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_counts: ClassCounts | ClassStatistics,
    beta: float = 0.9999,
    base: str = "softmax",
    gamma: float = 1.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    inner: str = "mean",
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """A base loss times the effective-number weight of its class; the formula is at the top of this file.

    Args:
        logits: (N, C) or (N, C, d1, ...); target: class indices (N,) or (N, d1, ...).
        class_counts: (C,) training examples a class, or the ClassStatistics that hold them.
        beta: in [0, 1]; 0 weighs every class the same, 1 by inverse frequency.
        base: "softmax", "sigmoid" or "focal".
        gamma: focusing exponent of "focal", >= 0 (the paper's grid: 0.5, 1, 2).

    The other arguments, the shapes returned and the errors are those of :func:`adjusted_cross_entropy`.
    """
    check_choice("base", base, BASES)
    check_multiclass(logits, target, mask, weight)
    if target.is_floating_point():
        raise TypeError(f"target has dtype {target.dtype}, expected class indices of an integer type")
    statistics = statistics_of(class_counts)
    weights = ClassStatistics.effective_number_weights
    w = statistics.derived(weights, logits, beta, source=statistics.counts)
    check_class_vector("class_counts", w, logits)
    if base == "softmax":
        return cross_entropy_loss(
            logits,
            target,
            class_weight=w,
            ignore_index=ignore_index,
            weight=weight,
            mask=mask,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
    target, counted = class_indices(target, logits.shape[1], ignore_index, mask)
    losses = sigmoid_focal_loss(
        logits.movedim(1, -1).flatten(0, -2),
        one_hot(target, logits.shape[1]).flatten(0, -2),
        gamma=gamma if base == "focal" else 0.0,
        mask=None if counted is None else counted.flatten(),
        inner="sum",
        reduction="none",
    ).reshape(target.shape)
    w = w[target]
    rows, counted_rows = combine_inner(losses * w, counted, inner)
    return reduce_losses(
        rows,
        counted=counted_rows,
        weight=weight,
        carried_weight=combine_inner(w, counted, inner)[0],
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


class ClassBalancedLoss(Loss):
    """Module form of :func:`class_balanced_loss`; the counts live in ``statistics`` and travel in checkpoints.

    Args:
        class_counts: (C,) training examples a class.
        beta: in [0, 1].
        base: "softmax", "sigmoid" or "focal".
        gamma: focusing exponent of "focal", >= 0.
        zero_count: "error", "ignore" or "smooth", see :class:`~counterpoise.memory.ClassStatistics`.
    """

    spec = Spec(
        task="multiclass",
        source="Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019, eq. 6",
        needs=("class_counts",),
    )

    def __init__(
        self,
        class_counts: ClassCounts,
        beta: float = 0.9999,
        base: str = "softmax",
        gamma: float = 1.0,
        zero_count: str = "error",
        ignore_index: int = -100,
        inner: str = "mean",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = False,
    ) -> None:
        super().__init__(
            beta=beta,
            base=base,
            gamma=gamma,
            ignore_index=ignore_index,
            inner=inner,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("beta", beta, 0, 1)
        check_number("gamma", gamma, 0)
        check_choice("base", base, BASES)
        self.statistics = ClassStatistics(class_counts, zero_count)

    def forward(
        self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (N, C, ...) and class indices to the reduced loss."""
        return class_balanced_loss(
            logits, target, class_counts=self.statistics, weight=weight, mask=mask, **self.options
        )
