r"""SigLIP: whether an image and a text belong together, asked of every pair by itself.

.. math:: \ell_i = -\sum_j \log \sigma\big(y_{ij} (s\, z_i \cdot u_j + b)\big), \qquad
          y_{ij} = \begin{cases} 1 & i = j \\ -1 & \text{otherwise} \end{cases}

with z of one modality, u of the other, and the mean over i: a sum over the pairs divided by N, not by N^2. No softmax
couples the pairs, so the batch may be split in any way. With labels all pairs of one class are positives. Scale and
bias are learned, from s = 10 and b = -10: nearly all pairs are negatives, and the bias says so from the start.

Compiled kernels hold one tile of logits at a time (:mod:`counterpoise.kernels.pairwise`); in plain PyTorch, and in what
``torch.compile`` traces, the rows are taken in tiles beyond ``tile_elements`` logits. Both recompute them in the
backward pass. Several ranks: local rows against the other modality of all ranks, that is one block with positives and
blocks without (``negative_only``), as the released code computes it, in whatever order it exchanges them.

Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from counterpoise._core import Spec, check_number, reduce_losses, without_autocast, world_size
from counterpoise.contrastive._pairs import WithScalars, as_pairs
from counterpoise.contrastive._views import all_ranks
from counterpoise.contrastive.info_nce import same_class
from counterpoise.kernels import pair_rules, pairwise


def siglip_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    negative_only: bool = False,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
    tile_elements: int = 2**24,
) -> Tensor:
    """SigLIP's loss; the formula is at the top of this file.

    Args:
        z: (N, d) one modality, images; other: (N, d) the other of the same examples, texts.
        labels: (N,) class indices; None = every example is its own class.
        scale: s > 0, a multiplier; bias: b. Numbers, or 0-d tensors that may be learned.
        negative_only: no pair is a positive: a block of images and texts that do not belong together.
        normalize: to unit length first.
        weight: (N,), multiplies the losses of rows; mask: (N,) bool, a masked example is neither row nor column.
        reduction: "none" gives (N,), one value a row, summed over its pairs; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: columns and denominators of all ranks, once a process group exists.
        tile_elements: at most this many logits are held at a time.

    Returns:
        (N,) or 0-d, at least float32. Without any row, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit.
    """
    if not isinstance(scale, Tensor):
        check_number("scale", scale, 0, open_low=True)
    if not isinstance(bias, Tensor):
        check_number("bias", bias)
    sync = sync and world_size() > 1
    first, second = as_pairs(z, other, labels, weight, mask, normalize=normalize, sync=sync)
    columns, column_ids, log_weight = all_ranks(second, sync=sync)
    q, there = scale * first.z, None if log_weight is None else log_weight == 0
    b = bias.to(q.dtype) if isinstance(bias, Tensor) else bias
    ids = None if negative_only else first.itself if labels is None else first.ids
    if len(q) * len(columns) > pairwise.SMALL and pairwise.serves(q, columns):
        losses = _streamed(q, columns, b, log_weight, ids, column_ids)
    else:
        losses = _in_rows(q, columns, b, there, ids, column_ids, max(1, tile_elements // max(len(columns), 1)))
    return reduce_losses(
        losses,
        counted=first.counted,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _streamed(
    q: Tensor,
    columns: Tensor,
    b: float | Tensor,
    log_weight: Tensor | None,
    of_rows: Tensor | None,
    column_ids: Tensor,
) -> Tensor:
    """What :func:`_in_rows` gives, in tiles."""
    there = None if log_weight is None else log_weight == 0
    by_index = of_rows is not None and of_rows.ndim == 1
    rules = pair_rules.pairs(
        q,
        positive=pair_rules.NONE if of_rows is None or by_index else pair_rules.SAME_CLASS,
        query_ids=None if by_index else of_rows,
        key_ids=column_ids,
        index=of_rows[:, None] if of_rows is not None and by_index else None,
        log_weight=log_weight,
    )
    bias = b if isinstance(b, Tensor) else q.new_tensor(b)
    return pairwise.sigmoid_sums(
        q, columns, bias, rules, lambda q, k, bias: _tile(q, k, bias, there, of_rows, column_ids)
    )


def _in_rows(
    q: Tensor,
    columns: Tensor,
    b: float | Tensor,
    there: Tensor | None,
    of_rows: Tensor | None,
    column_ids: Tensor,
    rows: int,
) -> Tensor:
    """(N,) losses from whole rows of logits, so many at a time."""
    if len(q) <= rows:
        return _tile(q, columns, b, there, of_rows, column_ids)
    losses = []
    for start in range(0, len(q), rows):
        tile = slice(start, start + rows)
        own = None if of_rows is None else of_rows[tile]
        losses.append(checkpoint(_tile, q[tile], columns, b, there, own, column_ids, use_reentrant=False))
    return torch.cat(losses)


def _tile(
    q: Tensor, columns: Tensor, b: float | Tensor, there: Tensor | None, of_rows: Tensor | None, column_ids: Tensor
) -> Tensor:
    """Losses of a tile of rows (n,); positives by the columns' index (n,), by ids (n, 2), or none."""
    with without_autocast(q):
        logits = q @ columns.T + b
    signed = -logits
    if of_rows is not None and of_rows.ndim == 1:
        signed = signed.scatter(1, of_rows[:, None], logits.gather(1, of_rows[:, None]))
    elif of_rows is not None:
        signed = torch.where(same_class(of_rows, column_ids), logits, signed)
    costs = -logsigmoid(signed)
    return (costs if there is None else torch.where(there, costs, 0)).sum(1)


class SigLIPLoss(WithScalars):
    """Module form of :func:`siglip_loss`: ``loss(images, texts)``. Owns scale and bias.

    Args:
        scale: > 0, where the scale starts.
        bias: where the bias starts.
        normalize: to unit length first.

    Parameters: logit_scale (), the logarithm of s, and logit_bias (); float32 in half-precision modules; both in
    ``no_weight_decay``.
    """

    spec = Spec(
        task="paired",
        source="Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, algorithm 1",
        distributed="gathers",
    )
    no_weight_decay = ("logit_scale", "logit_bias")

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        normalize: bool = True,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, normalizer=normalizer, sync=sync)
        check_number("scale", scale, 0, open_low=True)
        check_number("bias", bias)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

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
            raise ValueError("SigLIPLoss got a bank, expected two modalities only")
        return siglip_loss(
            z,
            other,
            labels=labels,
            scale=self.logit_scale.exp(),
            bias=self.logit_bias,
            weight=weight,
            mask=mask,
            **self.options,
        )
