r"""ConVIRT: an image and a sentence of its report find each other, the image's search counting more.

.. math:: \ell_i = -\lambda \log \frac{e^{v_i \cdot u_i / \tau}}{\sum_j e^{v_i \cdot u_j / \tau}}
          - (1 - \lambda) \log \frac{e^{u_i \cdot v_i / \tau}}{\sum_j e^{u_i \cdot v_j / \tau}},
          \qquad \lambda = 0.75,\ \tau = 0.1

with images v and texts u: :func:`~counterpoise.contrastive.clip_loss` with a fixed temperature and unequal directions;
lambda = 1/2 is CLIP. Draw a random *sentence* of the report a step, not the report, and leave hue and saturation of the
images alone.

Source: Zhang et al., Contrastive Learning of Medical Visual Representations from Paired Images and Text, 2022. The
authors release no training code; lambda and tau are those of a third-party implementation.
"""

from __future__ import annotations

from torch import Tensor, nn

from counterpoise._core import Loss, Spec, check_number
from counterpoise.contrastive.clip import clip_loss


def convirt_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    direction_weight: float = 0.75,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """ConVIRT's loss; the formula is at the top of this file.

    Args:
        z: (N, d) images; other: (N, d) their texts.
        temperature: divisor > 0; a 0-d tensor may be learned.
        direction_weight: lambda in [0, 1], the share of images looking for their text.
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
    return clip_loss(
        z,
        other,
        temperature=temperature,
        direction_weight=direction_weight,
        normalize=normalize,
        weight=weight,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


class ConVIRTLoss(Loss):
    """Module form of :func:`convirt_loss`: ``loss(images, texts)``.

    Args:
        temperature: > 0.
        direction_weight: lambda in [0, 1].
        normalize: to unit length first.
    """

    spec = Spec(
        task="paired",
        source="Zhang et al., Contrastive Learning of Medical Visual Representations from Paired Images and Text, 2022",
        distributed="gathers",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        direction_weight: float = 0.75,
        normalize: bool = True,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature,
            direction_weight=direction_weight,
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
        """Images and texts (N, d) to the reduced loss; ``labels`` and ``bank`` are refused."""
        if labels is not None or bank is not None:
            raise ValueError(f"ConVIRTLoss got {'labels' if bank is None else 'a bank'}, expected two modalities only")
        return convirt_loss(z, other, weight=weight, mask=mask, **self.options)
