"""Two modalities of the same examples: checks, rows, one direction; and modules that own learned scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise._core import Loss, check_embeddings
from counterpoise.contrastive._views import Rows, all_ranks, as_rows
from counterpoise.contrastive.info_nce import InfoNCE, info_nce, same_class


def as_pairs(
    z: Tensor,
    other: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    *,
    normalize: bool,
    sync: bool,
) -> tuple[Rows, Rows]:
    """Rows of both modalities, (N, d) each; raises ValueError for shapes that do not fit, or a modality left out."""
    check_embeddings("z", z)
    if other is None:
        raise ValueError(f"other is None, expected the second modality's embeddings {tuple(z.shape)}")
    check_embeddings("other", other, like=z)
    first, second = (as_rows(x[None], labels, weight, mask, normalize=normalize, sync=sync) for x in (z, other))
    return first, second


def against(queries: Rows, keys: Rows, temperature: float | Tensor, *, labelled: bool, sync: bool) -> InfoNCE:
    """InfoNCE of each local row against the other modality of all ranks; its counterpart is the positive."""
    rows, ids, log_weight = all_ranks(keys, sync=sync)
    return info_nce(
        queries.z,
        rows,
        query_ids=queries.ids,
        key_ids=ids,
        positive=same_class if labelled else queries.itself[:, None],
        candidate=None,
        key_log_weight=log_weight,
        temperature=temperature,
    )


class WithScalars(Loss):
    """A loss whose learned scalars, those of ``no_weight_decay``, stay in float32 in half-precision modules."""

    no_weight_decay: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name).detach() for name in self.no_weight_decay}
        super()._apply(fn, recurse)
        for name, old in before.items():
            scalar: nn.Parameter = getattr(self, name)
            if scalar.dtype in (torch.float16, torch.bfloat16):
                scalar.data = old.to(device=scalar.device, dtype=torch.float32)
        return self
