r"""CLIP: two modalities of one example find each other among those of the batch.

.. math:: \ell_i = -\lambda \log \frac{e^{z_i \cdot u_i / \tau}}{\sum_j e^{z_i \cdot u_j / \tau}}
          - (1 - \lambda) \log \frac{e^{u_i \cdot z_i / \tau}}{\sum_j e^{u_i \cdot z_j / \tau}}

with z of one modality (images), u of the other (texts), no negatives within a modality, and lambda = 1/2. With labels
the positives are all of the other modality's examples of the same class, i's own among them; their log-probabilities
are averaged. ConVIRT and the image-tabular loss are settings of this one.

The temperature is learned as its inverse, the logit scale exp(t), from ln(1 / 0.07) and never above 100. Without weight
decay: it would pull the scale to 1. open_clip normalises in the model and takes unit vectors; its gather without
gradient needs the loss times the number of ranks, or, with the local rows alone, points another way. Here local rows
meet keys gathered *with* gradient, which is one process on the whole batch.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, figure 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise._core import Spec, check_number, reduce_losses, world_size
from counterpoise.contrastive._pairs import WithScalars, against, as_pairs


def clip_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    direction_weight: float = 0.5,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """CLIP's loss; the formula is at the top of this file.

    Args:
        z: (N, d) one modality, images; other: (N, d) the other of the same examples, texts or tables.
        labels: (N,) class indices; None = every example is its own class.
        temperature: divisor > 0, one over the logit scale; a 0-d tensor may be learned.
        direction_weight: lambda in [0, 1], the share of z looking for its counterpart in ``other``.
        normalize: to unit length first.
        weight: (N,), multiplies the losses of pairs; mask: (N,) bool, a masked pair is neither anchor nor key.
        reduction: "none" gives (N,), one value a pair; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: keys and denominators of all ranks, once a process group exists.

    Returns:
        (N,) or 0-d, at least float32. Without any pair, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit.
    """
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, 0, open_low=True)
    check_number("direction_weight", direction_weight, 0, 1)
    sync = sync and world_size() > 1
    first, second = as_pairs(z, other, labels, weight, mask, normalize=normalize, sync=sync)
    there, back = (
        against(*pair, temperature, labelled=labels is not None, sync=sync).loss
        for pair in ((first, second), (second, first))
    )
    return reduce_losses(
        direction_weight * there + (1 - direction_weight) * back,
        counted=first.counted,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


class CLIPLoss(WithScalars):
    """Module form of :func:`clip_loss`: ``loss(images, texts)``. Owns the logit scale.

    Args:
        temperature: > 0, where it starts or, with ``learn_temperature=False``, stays.
        learn_temperature: the logit scale is a parameter.
        max_scale: >= 1 / temperature, what a learned scale never exceeds: beyond it the parameter counts as this and
            gets only gradients that lead back.
        direction_weight: lambda in [0, 1].
        normalize: to unit length first.

    Parameter: logit_scale (), t = log(1 / temperature), float32 in half-precision modules; in ``no_weight_decay``.
    """

    spec = Spec(
        task="paired",
        source="Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, figure 3",
        distributed="gathers",
    )
    no_weight_decay = ("logit_scale",)

    def __init__(
        self,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        max_scale: float = 100.0,
        direction_weight: float = 0.5,
        normalize: bool = True,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            direction_weight=direction_weight,
            normalize=normalize,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_number("temperature", temperature, 0, open_low=True)
        check_number("direction_weight", direction_weight, 0, 1)
        check_number("max_scale", max_scale, 1 / temperature)
        self.max_scale = max_scale
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)

    @property
    def temperature(self) -> float:
        """tau as it stands now. For logging."""
        return 1 / float(self._scale().detach())

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
        """Embeddings (N, d) of two modalities to the reduced loss; ``bank`` is refused."""
        if bank is not None:
            raise ValueError("CLIPLoss got a bank, expected two modalities only")
        return clip_loss(
            z, other, labels=labels, temperature=1 / self._scale(), weight=weight, mask=mask, **self.options
        )

    def _scale(self) -> Tensor:
        return _AtMost.apply(self.logit_scale.exp(), self.max_scale)


class _AtMost(torch.autograd.Function):
    """Clamps from above; beyond the bound only a gradient that leads back is let through."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.bound = bound
        return scale.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return torch.where((scale < ctx.bound) | (grads[0] > 0), grads[0], 0), None
