r"""Image and table: CLIP between an image and the row of a table about it, and its form with labels.

.. math:: \ell_i = -\frac{\lambda}{|P(i)|} \sum_{p \in P(i)} \log \frac{e^{z_i \cdot u_p / \tau}}
              {\sum_j e^{z_i \cdot u_j / \tau}}
          - \frac{1 - \lambda}{|P(i)|} \sum_{p \in P(i)} \log \frac{e^{u_i \cdot z_p / \tau}}
              {\sum_j e^{u_i \cdot z_j / \tau}}, \qquad \lambda = 0.5,\ \tau = 0.1

with images z, tables u, and P(i) the examples of i's class, i among them; without labels i alone. It is
:func:`~counterpoise.contrastive.clip_loss` with a fixed temperature. Tables are augmented by replacing a share of their
entries, some 0.3, with those of other rows in the same column.

The released form with labels uses the images' denominators for the tables' search too, and adds 1e-6 inside the
logarithm. Summed over a batch, what that leaves is the images' search alone, whatever lambda: ``legacy=True``.

Source: Hager et al., Best of Both Worlds: Multimodal Contrastive Learning with Tabular and Imaging Data, 2023, and the
released code; used for Alzheimer's disease by Huang, Multimodal Contrastive Learning and Tabular Attention for
Automated Alzheimer's Disease Prediction, 2023.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from counterpoise._core import Loss, Spec, check_number, reduce_losses, world_size
from counterpoise.contrastive._pairs import against, as_pairs
from counterpoise.contrastive.clip import clip_loss


def image_tabular_clip_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    direction_weight: float = 0.5,
    legacy: bool = False,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """The image-tabular loss; the formula is at the top of this file.

    Args:
        z: (N, d) images; other: (N, d) their tables.
        labels: (N,) class indices; None = every example is its own class.
        temperature: divisor > 0; a 0-d tensor may be learned.
        direction_weight: lambda in [0, 1], the share of images looking for their table.
        legacy: with labels, what the released code computes; without, nothing differs.
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
    if not legacy or labels is None:
        return clip_loss(
            z,
            other,
            labels=labels,
            temperature=temperature,
            direction_weight=direction_weight,
            normalize=normalize,
            weight=weight,
            mask=mask,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, 0, open_low=True)
    check_number("direction_weight", direction_weight, 0, 1)
    sync = sync and world_size() > 1
    first, second = as_pairs(z, other, labels, weight, mask, normalize=normalize, sync=sync)
    found = against(first, second, temperature, labelled=True, sync=sync)
    shifted = torch.logaddexp(found.log_sum_exp, torch.full_like(found.log_sum_exp, math.log(1e-6)))
    return reduce_losses(
        torch.where(found.valid, shifted - found.log_sum_exp + found.loss, 0),
        counted=first.counted,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


class ImageTabularCLIPLoss(Loss):
    """Module form of :func:`image_tabular_clip_loss`: ``loss(images, tables)``, with ``labels=labels`` or without.

    Args:
        temperature: > 0.
        direction_weight: lambda in [0, 1].
        legacy: with labels, what the released code computes.
        normalize: to unit length first.
    """

    spec = Spec(
        task="paired",
        source="Hager et al., Best of Both Worlds: Multimodal Contrastive Learning with Tabular and Imaging Data, 2023",
        distributed="gathers",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        direction_weight: float = 0.5,
        legacy: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature,
            direction_weight=direction_weight,
            legacy=legacy,
            normalize=normalize,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        if not isinstance(temperature, Tensor):
            check_number("temperature", temperature, 0, open_low=True)
        check_number("direction_weight", direction_weight, 0, 1)

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
        """Images and tables (N, d) to the reduced loss; ``bank`` is refused."""
        if bank is not None:
            raise ValueError("ImageTabularCLIPLoss got a bank, expected two modalities only")
        return image_tabular_clip_loss(z, other, labels=labels, weight=weight, mask=mask, **self.options)
