r"""ASCL without a bank: predictions meet the teacher's key and, softly, its neighbours in the batch; no negatives.

.. math:: \ell_i = 2 - 2 \sum_j \frac{y_{ij}}{\sum_l y_{il}} \cos(h_i, k_j), \qquad y_{ii} = 1

with h the predictor's output, k the teacher's keys without gradient and :math:`y_{ij}`, j != i, as in
:mod:`counterpoise.contrastive.ascl` over the other N - 1 keys of the batch, those of all ranks. kind="normal" is one
direction of BYOL, and so is a batch of one or two: among fewer than two neighbours none can stand out. The release
returns one value per example and never averages them.

Source: Feng and Patras, Adaptive Soft Contrastive Learning, 2022, and the released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, reduce_losses, without_autocast, world_size
from counterpoise.contrastive._teacher import as_keys, student_and_teacher
from counterpoise.contrastive._views import as_rows
from counterpoise.contrastive.ascl import check_settings, soft_neighbors
from counterpoise.distributed import gather_rows
from counterpoise.memory import MemoryBank


def ascl_byol_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    kind: str = "adaptive",
    num_neighbors: int = 1,
    target_temperature: float = 0.05,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """ASCL's form beside BYOL; the formula is at the top of this file. All embeddings are normalised here.

    Args:
        z: (N, d) predictions, or (V, N, d) of several views.
        other: keys of a momentum encoder, detached here: (N, d) of another view, or (L, N, d) of the first L views of
            the same examples. A prediction's loss is the mean over the keys of views other than its own.
        kind: "adaptive", "adaptive_hard", "hard" or "normal".
        num_neighbors: kappa >= 1.
        target_temperature: tau' > 0.
        weight: (N,), of all views of an example; mask: (N,) bool, a masked example is no neighbour either.
        reduction: "none" gives (V*N,), view-major; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: neighbours and denominators of all ranks, once a process group exists.

    Returns:
        (V*N,) or 0-d, at least float32, each row in [0, 4].

    Raises:
        ValueError, TypeError: shapes or settings that do not fit.
    """
    check_settings(kind, num_neighbors, target_temperature)
    queries, keys, same_views = student_and_teacher(z, other)
    sync = sync and world_size() > 1
    rows = as_rows(queries, None, weight, mask, normalize=True, sync=sync)
    views, keys = rows.z.unflatten(0, queries.shape[:2]), as_keys(keys, mask)
    ids = rows.ids[: keys.shape[1], 1]
    all_ids = gather_rows(ids) if sync else ids
    candidate = ids[:, None] != all_ids
    if mask is not None or sync:  # on every rank, masked or not
        here = torch.ones_like(ids) if mask is None else mask.long()
        candidate = candidate & ((gather_rows(here) if sync else here) > 0)
    targets = []
    with without_autocast(keys):
        for k in keys:
            neighbors = gather_rows(k) if sync else k
            y, _ = soft_neighbors(k, neighbors, candidate, kind, num_neighbors, target_temperature)
            targets.append((k + y @ neighbors) / (1 + y.sum(1, keepdim=True)))
    losses = []
    for v, h in enumerate(views):
        met = torch.stack([t for u, t in enumerate(targets) if not (same_views and u == v)])
        losses.append(2 - 2 * (h * met.mean(0)).sum(1))
    return reduce_losses(
        torch.cat(losses),
        counted=rows.counted,
        weight=rows.weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


class ASCLBYOLLoss(Loss):
    """Module form of :func:`ascl_byol_loss`: ``loss(predictions, keys)``.

    Args:
        kind: "adaptive", "adaptive_hard", "hard" or "normal".
        num_neighbors: kappa >= 1.
        target_temperature: tau' > 0.
    """

    spec = Spec(
        task="teacher_views",
        needs=("momentum_encoder", "predictor"),
        source="Feng and Patras, Adaptive Soft Contrastive Learning, 2022",
        distributed="gathers",
    )

    def __init__(
        self,
        kind: str = "adaptive",
        num_neighbors: int = 1,
        target_temperature: float = 0.05,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            kind=kind,
            num_neighbors=num_neighbors,
            target_temperature=target_temperature,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        check_settings(kind, num_neighbors, target_temperature)

    def forward(
        self,
        z: Tensor,
        other: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        bank: MemoryBank | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predictions and keys (N, d) to the reduced loss; ``labels`` and ``bank`` are refused."""
        if labels is not None or bank is not None:
            raise ValueError(f"{'labels' if bank is None else 'bank'} given, expected views and keys only")
        return ascl_byol_loss(z, other, weight=weight, mask=mask, **self.options)
