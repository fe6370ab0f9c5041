r"""NT-Xent, the normalised-temperature cross-entropy of SimCLR; with a memory bank, MoCo's queue loss.

.. math:: \ell_i = -\frac{z_i \cdot z_{i^+}}{\tau} + \log \sum_{a \ne i} e^{z_i \cdot z_a / \tau}

over all V*N rows, i+ the same example's other view. With a bank the anchors are ``z``, the positives ``other`` and the
negatives the bank's keys alone. With labels, examples of one label are positives of one another and their
log-probabilities are averaged (pytorch-metric-learning instead forms a pair at a time and drops the other positives
from the denominator).

Several ranks: local rows against the keys of all ranks, gathered with gradient.

Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020, eq. 1; the bank: He et
al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020, eq. 1. lightly's form of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import Loss, Spec, check_choice, check_number, reduce_losses, world_size
from counterpoise.contrastive._views import Rows, all_ranks, as_rows, other_views, stack_views
from counterpoise.contrastive.info_nce import InfoNCE, info_nce, positive_or_bank, same_label
from counterpoise.memory import MemoryBank


def ntxent_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    bank: MemoryBank | None = None,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction_over: str = "valid",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """NT-Xent; the formula is at the top of this file.

    Args:
        z: (N, d), or (V, N, d) several views; other: (N, d) the second view.
        labels: (N,) class indices; None = every example is its own class.
        bank: negatives; read, never written. Enqueue the keys after the backward pass.
        temperature: divisor > 0; a tensor may be learned.
        normalize: to unit length first.
        reduction_over: the mean runs over the "valid" rows (with a positive) or "all".
        weight: (N,), of all views of an example; mask: (N,) bool, a masked example is neither anchor nor key.
        reduction: "none" gives (V*N,), view-major, or (N,) with a bank; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: keys and denominators of all ranks, once a process group exists.

    Returns:
        (V*N,) or 0-d, at least float32. Without any positive in the batch, a zero connected to the graph.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit; a bank without a second view.
    """
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, 0, open_low=True)
    check_choice("reduction_over", reduction_over, ("valid", "all"))
    if bank is not None and not normalize:
        raise ValueError("normalize is False, expected True with a bank: its keys are unit vectors")
    views = stack_views(z, other)
    sync = sync and world_size() > 1
    rows = as_rows(views, labels, weight, mask, normalize=normalize, sync=sync)
    if bank is None:
        keys, key_ids, log_weight = all_ranks(rows, sync=sync)
        result = info_nce(
            rows.z,
            keys,
            query_ids=rows.ids,
            key_ids=key_ids,
            positive=other_views(rows.itself, len(views)) if labels is None else same_label,
            candidate=None,
            itself=rows.itself,
            key_log_weight=log_weight,
            temperature=temperature,
        )
    else:
        rows, result = _against_bank(rows, views, bank, temperature, labelled=labels is not None, sync=sync)
    counted = result.valid if reduction_over == "valid" else torch.ones_like(result.valid)
    if rows.counted is not None:
        counted = counted & rows.counted
    return reduce_losses(
        result.loss,
        counted=counted,
        weight=rows.weight,
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _against_bank(
    rows: Rows, views: Tensor, bank: MemoryBank, temperature: float | Tensor, *, labelled: bool, sync: bool
) -> tuple[Rows, InfoNCE]:
    """Anchors of the first view against their second view and the bank."""
    v, n, d = views.shape
    if v != 2 or bank.keys.shape[1] != d:
        raise ValueError(f"bank of width {bank.keys.shape[1]} got views {(v, n, d)}, expected two views of its width")
    anchors, others = (Rows(*(None if x is None else x[part] for x in rows)) for part in (slice(n), slice(n, None)))  # type: ignore[arg-type]
    of_bank = torch.stack([torch.full_like(bank.labels, -1), bank.labels], dim=1)
    unusable = torch.where(bank.valid, 0.0, -torch.inf)
    if not labelled:
        return anchors, _own_against_bank(anchors, others, bank, of_bank, unusable, temperature)
    keys, key_ids, own = all_ranks(others, sync=sync)  # a positive may lie on another rank
    result = info_nce(
        anchors.z,
        torch.cat([keys, bank.keys.to(keys)]),
        query_ids=anchors.ids,
        key_ids=torch.cat([key_ids, of_bank]),
        candidate=positive_or_bank,
        key_log_weight=torch.cat([torch.zeros_like(keys[:, 0]) if own is None else own, unusable.to(keys.dtype)]),
        temperature=temperature,
    )
    return anchors, result


def _own_against_bank(
    anchors: Rows, others: Rows, bank: MemoryBank, of_bank: Tensor, unusable: Tensor, temperature: float | Tensor
) -> InfoNCE:
    """Each anchor's own second view is its positive, which no other row sees: one logit beside those of the bank."""
    z, tau = anchors.z, temperature
    attraction = (z * others.z).sum(1) / (tau.to(z.dtype) if isinstance(tau, Tensor) else tau)
    negatives = info_nce(
        z,
        bank.keys.to(z, copy=True),  # it may be written to before the backward pass
        query_ids=anchors.ids,
        key_ids=of_bank,
        positive=anchors.ids[:, :0],  # none in the bank
        candidate=None,
        key_log_weight=unusable,
        temperature=tau,
    ).log_sum_exp
    lse = torch.logaddexp(attraction, negatives)
    return InfoNCE(lse - attraction, lse, attraction - lse, torch.ones_like(lse, dtype=torch.bool))


class NTXentLoss(Loss):
    """Module form of :func:`ntxent_loss`: ``loss(view1, view2)``, ``loss(embeddings, labels=labels)`` or with a bank.

    Args:
        temperature: divisor > 0. SimCLR used 0.5 on CIFAR-10 and 0.1 on ImageNet, MoCo 0.07.
        normalize: to unit length first.
        reduction_over: "valid" or "all".
    """

    spec = Spec(
        task="two_view",
        source="Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020, eq. 1",
        distributed="gathers",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        normalize: bool = True,
        reduction_over: str = "valid",
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature,
            normalize=normalize,
            reduction_over=reduction_over,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        if not isinstance(temperature, Tensor):
            check_number("temperature", temperature, 0, open_low=True)
        check_choice("reduction_over", reduction_over, ("valid", "all"))

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
        """Views (N, d) to the reduced loss."""
        return ntxent_loss(z, other, labels=labels, bank=bank, weight=weight, mask=mask, **self.options)
