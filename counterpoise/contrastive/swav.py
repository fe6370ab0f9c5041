r"""SwAV: the cluster of one view is predicted from another; no pairs, no negatives.

.. math:: s_{vik} = \bar z_{vi} \cdot \bar c_k, \qquad
          L = \frac{1}{|A|} \sum_{v \in A} \frac{1}{V - 1} \sum_{w \ne v} \frac{1}{N} \sum_i
              -\sum_k q_{vik} \log \mathrm{softmax}(s_{wi} / \tau)_k

with learned prototypes c, unit vectors like the embeddings (the bars), and codes q of the views A, the first
``code_views`` (with multi-crop the two large ones): the balanced assignment of the view's scores
(:func:`~counterpoise.ot.balanced_assignment`), held fixed. A row, view w of example i, costs V / (|A| (V - 1)) times
the sum over v, so that the mean of rows is L.

A batch that is small beside K has no balance to speak of: with a bank, its embeddings are assigned together with each
view's, and only the batch's codes are used. Normalising prototypes in the formula is what the released code does to the
weights after each step. It also keeps them fixed for the first steps of a run: ``prototypes.requires_grad_(False)``.

Several ranks: codes are those of the batch of all ranks; a bank is the same on all of them and counts once.

Source: Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020, eq. 1 to 5, and
the released code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from counterpoise._core import (
    Loss,
    Spec,
    at_least_float32,
    check_number,
    check_per_row,
    generator_for,
    rank,
    reduce_losses,
    without_autocast,
    world_size,
)
from counterpoise.contrastive._unit import unit
from counterpoise.contrastive._views import list_views
from counterpoise.memory import MemoryBank
from counterpoise.ot.assignment import balanced_assignment


def swav_loss(
    z: Tensor,
    other: Tensor | None = None,
    *,
    prototypes: Tensor,
    bank: MemoryBank | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    code_views: int = 2,
    normalize: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = True,
) -> Tensor:
    """SwAV; the formula is at the top of this file.

    Args:
        z: (N, d), or (V, N, d) several views; other: (N, d) the second view.
        prototypes: (K, d).
        bank: embeddings that are assigned too; read, never written. Enqueue after the backward pass.
        temperature: tau > 0.
        epsilon: > 0, iterations: >= 1, of the assignment.
        code_views: |A| >= 1, the first views, whose codes the other views predict; at most V.
        normalize: embeddings and prototypes to unit length first.
        weight: (N,), of all views of an example, not in the assignment; mask: (N,) bool, False leaves an example out.
        reduction: "none" gives (V*N,), view-major; "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: assignment and denominators over all ranks, once a process group exists.

    Returns:
        (V*N,) or 0-d, at least float32, at least 0.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit.
    """
    _check(temperature, epsilon, iterations, code_views)
    views = list_views(z, other)
    v, d = len(views), views[0].shape[-1]
    if v < 2:
        raise ValueError(f"z holds {v} views, expected at least two: z and other, or z of shape (V, N, d)")
    for name, width in (("prototypes", prototypes.shape[-1]), ("bank", d if bank is None else bank.keys.shape[1])):
        if width != d:
            raise ValueError(f"{name} has width {width}, expected {d}, that of z")
    if bank is not None and not normalize:
        raise ValueError("normalize is False, expected True with a bank: its keys are unit vectors")
    check_per_row("weight", weight, views[0])
    check_per_row("mask", mask, views[0], dtype=torch.bool)
    x = [at_least_float32(view) for view in views]
    if mask is not None:
        x = [torch.where(mask[:, None], view, 0) for view in x]
    sync = sync and world_size() > 1
    with without_autocast(x[0]):
        c = prototypes.to(x[0])
        x, c = ([unit(view, dim=-1) for view in x], unit(c, dim=-1)) if normalize else (x, c)
        c, of_view = c / temperature, min(code_views, v)  # logits are scores over tau, and so epsilon is over tau too
        logits = [view @ c.T for view in x]
        codes = [
            _codes(s.detach(), c.detach(), bank, mask, epsilon / temperature, iterations, sync=sync)
            for s in logits[:of_view]
        ]
        rows = [_cost(s, [q for i, q in enumerate(codes) if i != w]) for w, s in enumerate(logits)]
    return reduce_losses(
        torch.cat(rows) * (v / (of_view * (v - 1))),
        counted=None if mask is None else mask.repeat(v),
        weight=None if weight is None else weight.repeat(v),
        reduction=reduction,
        normalizer=normalizer,
        sync=sync,
    )


def _cost(logits: Tensor, codes: list[Tensor]) -> Tensor:
    """(N,) cross-entropy of a view's logits (N, K), summed over the codes (N, K) that it predicts."""
    if not codes:
        return torch.zeros_like(logits[:, 0])
    target = codes[0] if len(codes) == 1 else torch.stack(codes).sum(0)
    return -torch.linalg.vecdot(target, log_softmax(logits, dim=-1))


def _codes(
    scores: Tensor,
    prototypes: Tensor,
    bank: MemoryBank | None,
    mask: Tensor | None,
    epsilon: float,
    iterations: int,
    *,
    sync: bool,
) -> Tensor:
    """(N, K) codes of a view with these scores, of embeddings with ``prototypes``, assigned together with the bank."""
    n = len(scores)
    if bank is not None:
        counted = torch.ones(n, dtype=torch.bool, device=scores.device) if mask is None else mask
        usable = bank.valid & (not sync or rank() == 0)  # the same bank everywhere: once
        scores, mask = torch.cat([scores, bank.keys.to(scores) @ prototypes.T]), torch.cat([counted, usable])
    return balanced_assignment(scores, epsilon=epsilon, iterations=iterations, mask=mask, sync=sync)[:n]


def _check(temperature: float, epsilon: float, iterations: int, code_views: int) -> None:
    check_number("temperature", temperature, 0, open_low=True)
    check_number("epsilon", epsilon, 0, open_low=True)
    check_number("iterations", iterations, 1)
    check_number("code_views", code_views, 1)


class SwAVLoss(Loss):
    """Module form of :func:`swav_loss`, which owns the prototypes: ``loss(view1, view2)``.

    Args:
        embedding_dim: d.
        num_prototypes: K >= 2; some ten times the number of classes that one hopes for.
        temperature: tau > 0.
        epsilon: > 0, iterations: >= 1, of the assignment.
        code_views: |A| >= 1, the first views, which get codes.
        normalize: embeddings and prototypes to unit length first.
        seed: of the prototypes at the start, random unit vectors.

    Parameters: prototypes (K, d), kept in float32 in half-precision modules; give them to the optimiser.
    """

    spec = Spec(
        task="two_view",
        source="Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020, eq. 2",
        needs=("embedding_dim",),
        distributed="statistics",
        exempt={"finite_differences": "codes depend on the scores, and as targets pass no gradient on"},
    )

    def __init__(
        self,
        embedding_dim: int,
        num_prototypes: int = 300,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        code_views: int = 2,
        normalize: bool = True,
        seed: int = 0,
        reduction: str = "mean",
        normalizer: str | float = "count",
        sync: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature,
            epsilon=epsilon,
            iterations=iterations,
            code_views=code_views,
            normalize=normalize,
            reduction=reduction,
            normalizer=normalizer,
            sync=sync,
        )
        _check(temperature, epsilon, iterations, code_views)
        check_number("embedding_dim", embedding_dim, 1)
        check_number("num_prototypes", num_prototypes, 2)
        start = torch.randn(num_prototypes, embedding_dim, generator=generator_for(seed))
        self.prototypes = nn.Parameter(unit(start, dim=1))

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
        """Views (N, d) to the reduced loss; ``labels`` are refused."""
        if labels is not None:
            raise ValueError("SwAVLoss got labels, expected views only")
        return swav_loss(z, other, prototypes=self.prototypes, bank=bank, weight=weight, mask=mask, **self.options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.prototypes.detach()
        super()._apply(fn, recurse)
        c = self.prototypes
        if c.dtype in (torch.float16, torch.bfloat16):
            c.data = before.to(device=c.device, dtype=torch.float32)
        return self
