r"""W-MSE: views of an example should coincide once their batch is whitened; whitening takes the place of negatives.

.. math:: L = \frac{1}{T \binom{V}{2}} \sum_{t=1}^{T} \sum_{v < w} \frac{1}{N} \sum_i
              \lVert \bar z_{vi} - \bar z_{wi} \rVert^2, \qquad z_{vB} = W_{vB} (x_{vB} - \mu_{vB})

for V views x, T partitions of the batch into blocks B of S examples, and the whitening W of each block of each view by
itself (:func:`~counterpoise.contrastive.whiten`); the bar is to unit length, so that a row costs
:math:`2 - 2 \cos(z_{vi}, z_{wi})`. Without ``normalize`` a row costs the mean over the D features of the squared
difference, 1/D of the paper's; ``scale`` multiplies the loss.

Blocks bound the noise of the covariance: S = 2D is the paper's, and S > D is needed while eps = 0. What a partition is
matters little; that it changes matters. Batches of a shuffled loader differ in every step, so the first iteration takes
the examples as they come, and further ones fixed orders of positions; ``permutations`` gives others. Nothing is drawn.

The gradient flows through mean, covariance and whitening of every view (solo-learn detaches the second one by default:
the same value, another gradient). The head must not end in a batch normalisation. Several ranks: blocks of the batch of
all ranks, gathered with gradient.

Source: Ermolov et al., Whitening for Self-Supervised Representation Learning, 2021, eq. 3 to 5, and the released code.
"""

from __future__ import annotations

from torch import Tensor, nn

from counterpoise._core import No, Spec
from counterpoise.contrastive._views import stack_views
from counterpoise.contrastive._whitened_views import check_blocks, distance_of_whitened
from counterpoise.contrastive.whitening import Settings, whiten_blocks


def wmse_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    block_size: int | None = None,
    iterations: int = 1,
    permutations: Tensor | None = None,
    normalize: bool = True,
    kind: str = "cholesky",
    eps: float = 0.0,
    on_singular: str = "raise",
    scale: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = True,
) -> Tensor:
    """W-MSE; the formula is at the top of this file.

    Args:
        z: (N, D), or (V, N, D) several views; other: (N, D) the second view.
        block_size: S >= 2, divides N (over all ranks); None = one block.
        iterations: T >= 1 partitions; one block has only one.
        permutations: (T, N) orders of the examples (of all ranks, in rank order), cut into blocks of S.
        normalize: the whitened rows to unit length.
        kind: of whitening, "cholesky" or "zca".
        eps: epsilon in [0, 1], the share of the identity in the covariance.
        on_singular: a covariance that cannot be inverted: "raise", or "shrink" it by 0.001 to its mean variance.
        scale: > 0; D gives the paper's value without ``normalize``.
        weight: (N,) >= 0, of the examples in covariances and in the mean; only ratios within a batch matter.
        mask: (N,) bool, False leaves an example out of its block.
        sync: the examples of all ranks, once a process group exists.

    Returns:
        0-d, at least float32, in [0, 4] with ``normalize``. Without any counted example, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; blocks that cannot be whitened.
    """
    check_blocks(block_size, iterations, scale)
    settings = Settings(kind=kind, eps=eps, on_singular=on_singular).check()
    return distance_of_whitened(
        stack_views(z, other),
        lambda _, blocks, u: whiten_blocks(blocks, settings, weight=u, name="z"),
        block_size=block_size,
        iterations=iterations,
        permutations=permutations,
        normalize=normalize,
        scale=scale,
        weight=weight,
        mask=mask,
        sync=sync,
    )


class WMSELoss(nn.Module):
    """Module form of :func:`wmse_loss`: ``loss(view1, view2)``.

    Args:
        block_size: S >= 2, divides N; None = one block. The paper: twice the width of the embeddings.
        iterations: T >= 1 partitions. The paper: 1, and 4 on STL-10 and Tiny ImageNet with two views.
        normalize: the whitened rows to unit length.
        kind: "cholesky" or "zca".
        eps: epsilon in [0, 1].
        on_singular: "raise" or "shrink".
        scale: > 0.
    """

    spec = Spec(
        task="two_view",
        source="Ermolov et al., Whitening for Self-Supervised Representation Learning, 2021, eq. 3",
        distributed="gathers",
        per_row=No("one value a batch: each row's cost depends on the covariance of its block"),
        weight_linear=No("weights enter the covariances, which are scale-free in them"),
    )

    def __init__(
        self,
        block_size: int | None = None,
        iterations: int = 1,
        normalize: bool = True,
        kind: str = "cholesky",
        eps: float = 0.0,
        on_singular: str = "raise",
        scale: float = 1.0,
        sync: bool = True,
    ) -> None:
        super().__init__()
        check_blocks(block_size, iterations, scale)
        Settings(kind=kind, eps=eps, on_singular=on_singular).check()
        self.block_size = block_size
        self.iterations = iterations
        self.normalize = normalize
        self.kind = kind
        self.eps = eps
        self.on_singular = on_singular
        self.scale = scale
        self.sync = sync

    def forward(
        self,
        z: Tensor,
        other: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        bank: nn.Module | None = None,
        permutations: Tensor | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Views (N, D) to the loss of the batch; ``labels`` and ``bank`` are refused."""
        if labels is not None or bank is not None:
            raise ValueError(f"WMSELoss got {'labels' if bank is None else 'a bank'}, expected views only")
        return wmse_loss(
            z,
            other,
            block_size=self.block_size,
            iterations=self.iterations,
            permutations=permutations,
            normalize=self.normalize,
            kind=self.kind,
            eps=self.eps,
            on_singular=self.on_singular,
            scale=self.scale,
            weight=weight,
            mask=mask,
            sync=self.sync,
        )
