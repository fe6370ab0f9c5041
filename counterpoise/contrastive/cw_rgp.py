r"""CW-RGP: channel whitening with random group partition, W-MSE the other way round.

.. math:: z_{vB} = \Sigma^{-1/2} X, \qquad \Sigma = \frac{1}{D/g - 1} X X^\top

for each group of D/g channels of the block's S examples, centred over their channels: examples become uncorrelated
instead of features, so that collapse is ruled out by S <= D/g - 1 examples a block and a small batch is enough. Which
channels form a group is drawn anew for every view and every block. The loss is that of
:mod:`~counterpoise.contrastive.wmse` on z, with ZCA whitening; ``axis="batch"`` whitens features instead, in groups.

The draws of :class:`CWRGPLoss` are a function of its ``seed`` and of the number of training steps, which it keeps in a
buffer: a resumed run goes on with the draws it would have had. Several ranks: blocks of the batch of all ranks.

Source: Weng et al., An Investigation into Whitening Loss for Self-supervised Learning, 2022, and the released code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from counterpoise._core import No, Spec, in_second_pass, uniform_by_index
from counterpoise.contrastive._views import stack_views
from counterpoise.contrastive._whitened_views import check_blocks, distance_of_whitened
from counterpoise.contrastive.whitening import Settings, whiten_blocks


def cw_rgp_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    groups: int = 4,
    channel_permutations: Tensor | None = None,
    block_size: int | None = None,
    iterations: int = 1,
    permutations: Tensor | None = None,
    normalize: bool = True,
    kind: str = "zca",
    axis: str = "channel",
    eps: float = 0.0,
    correction: float = 1,
    on_singular: str = "raise",
    scale: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = True,
) -> Tensor:
    """CW-RGP; the formula is at the top of this file.

    Args:
        z: (N, D), or (V, N, D) several views; other: (N, D) the second view.
        groups: g, divides D.
        channel_permutations: order of the channels before they are grouped, (D,) or anything that broadcasts to
            (T, V, N / S, D): iterations, views, blocks. None = as they come.
        block_size: S >= 2, divides N (over all ranks); None = one block. On the channel axis S <= D / g - 1.
        iterations: T >= 1 partitions into blocks.
        permutations: (T, N) orders of the examples, cut into blocks of S.
        normalize: the whitened rows to unit length.
        kind: of whitening, "zca" or "cholesky".
        axis: "channel" or "batch".
        eps: epsilon in [0, 1], the share of the identity in the covariance.
        correction: what the divisor of the covariance is short of the number of observations.
        on_singular: a covariance that cannot be inverted: "raise", or "shrink" it by 0.001 to its mean variance.
        scale: > 0.
        weight: (N,) >= 0, of the examples in the mean (and in covariances over the batch).
        mask: (N,) bool, False leaves an example out of its block.
        sync: the examples of all ranks, once a process group exists.

    Returns:
        0-d, at least float32, in [0, 4] with ``normalize``. Without any counted example, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; blocks that cannot be whitened.
    """
    views = stack_views(z, other)
    given = channel_permutations
    if given is not None and (given.ndim not in (1, 2, 3, 4) or given.shape[-1] != views.shape[-1]):
        raise ValueError(
            f"channel_permutations has shape {tuple(given.shape)}, expected (D,) or (T, V, N / S, D) with "
            f"D = {views.shape[-1]}"
        )

    def order(iteration: int, blocks: Tensor) -> Tensor | None:
        if given is None or given.ndim < 4:
            return given
        return given[iteration if len(given) > 1 else 0]

    return _loss(
        views,
        order,
        Settings(kind, axis, groups, eps, correction, on_singular),
        block_size=block_size,
        iterations=iterations,
        permutations=permutations,
        normalize=normalize,
        scale=scale,
        weight=weight,
        mask=mask,
        sync=sync,
    )


def _loss(
    views: Tensor,
    order: Callable[[int, Tensor], Tensor | None],
    settings: Settings,
    *,
    block_size: int | None,
    iterations: int,
    permutations: Tensor | None,
    normalize: bool,
    scale: float,
    weight: Tensor | None,
    mask: Tensor | None,
    sync: bool,
) -> Tensor:
    """The loss with the channels of each iteration's blocks (V, N / S, S, D) in the order that ``order`` gives them."""
    check_blocks(block_size, iterations, scale)
    settings.check()

    def whitened(iteration: int, blocks: Tensor, u: Tensor | None) -> Tensor:
        channels = order(iteration, blocks)
        if channels is not None:
            channels = channels.expand(*blocks.shape[:2], -1)
        return whiten_blocks(blocks, settings, permutation=channels, weight=u, name="z")

    return distance_of_whitened(
        views,
        whitened,
        block_size=block_size,
        iterations=iterations,
        permutations=permutations,
        normalize=normalize,
        scale=scale,
        weight=weight,
        mask=mask,
        sync=sync,
    )


class CWRGPLoss(nn.Module):
    """Module form of :func:`cw_rgp_loss`, which draws the groups: ``loss(view1, view2)``.

    Args:
        groups: g, divides D. The paper: 4 on CIFAR and STL-10, 2 on Tiny ImageNet.
        block_size: S >= 2, divides N, at most D / g - 1; None = one block. The paper: 64, and 128 on Tiny ImageNet.
        iterations: T >= 1 partitions into blocks.
        shuffle: draw the groups; without, they are runs of channels.
        normalize: the whitened rows to unit length.
        kind: "zca" or "cholesky".
        axis: "channel" or "batch".
        eps: epsilon in [0, 1].
        on_singular: "raise" or "shrink".
        scale: > 0.
        seed: of the draws.

    Buffer: steps () int64, the training steps so far, of which the draws are a function; it moves in training mode
    only, not inside ``second_pass()`` and not with a loss that is not finite.
    """

    spec = Spec(
        task="two_view",
        source="Weng et al., An Investigation into Whitening Loss for Self-supervised Learning, 2022",
        distributed="gathers",
        per_row=No("one value a batch: each row's cost depends on the covariance of its block"),
        weight_linear=No("the mean over examples is a weighted one, scale-free in the weights"),
        stateful=True,
    )
    steps: Tensor

    def __init__(
        self,
        groups: int = 4,
        block_size: int | None = None,
        iterations: int = 1,
        shuffle: bool = True,
        normalize: bool = True,
        kind: str = "zca",
        axis: str = "channel",
        eps: float = 0.0,
        on_singular: str = "raise",
        scale: float = 1.0,
        seed: int = 0,
        sync: bool = True,
    ) -> None:
        super().__init__()
        check_blocks(block_size, iterations, scale)
        self.settings = Settings(kind, axis, groups, eps, 1, on_singular).check()
        self.block_size = block_size
        self.iterations = iterations
        self.shuffle = shuffle
        self.normalize = normalize
        self.scale = scale
        self.seed = seed
        self.sync = sync
        self.register_buffer("steps", torch.tensor(0))

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
            raise ValueError(f"CWRGPLoss got {'labels' if bank is None else 'a bank'}, expected views only")
        loss = _loss(
            stack_views(z, other),
            self._draw,
            self.settings,
            block_size=self.block_size,
            iterations=self.iterations,
            permutations=permutations,
            normalize=self.normalize,
            scale=self.scale,
            weight=weight,
            mask=mask,
            sync=self.sync,
        )
        if self.training and not in_second_pass():
            self.steps += loss.detach().isfinite()
        return loss

    def _draw(self, iteration: int, blocks: Tensor) -> Tensor | None:
        """(V, N / S, D) orders of the channels at this step; one group has only one."""
        if not self.shuffle or self.settings.groups == 1:
            return None
        views, count, _, channels = blocks.shape
        row = (self.steps * self.iterations + iteration) * views * count
        row = row + torch.arange(views * count, device=blocks.device)
        return uniform_by_index(row, channels, self.seed).argsort(-1).unflatten(0, (views, count))
