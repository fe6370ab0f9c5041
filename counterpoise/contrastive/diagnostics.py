r"""Signs of collapse: how much embeddings spread, over how many directions, and how close two views of an example are.

With unit vectors z (N, d), their second views z', and the singular values s of the centred embeddings:

.. math:: \mathrm{std} = \sqrt{\tfrac{1}{d} \textstyle\sum_j \mathrm{Var}(z_j)} \,\sqrt d, \qquad
          \mathrm{rank} = \exp\Big({-\textstyle\sum_k p_k \log p_k}\Big), \quad p_k = s_k / \textstyle\sum_l s_l

.. math:: \mathrm{align} = \mathbb{E}\,\lVert z - z' \rVert^2, \qquad
          \mathrm{uniform} = \log \mathbb{E}_{i \ne j}\, e^{-2 \lVert z_i - z_j \rVert^2}

The spread is 1 on the whole sphere and 0 where all embeddings are one point; the rank is d where all directions are
used alike and 1 on a line.

Source: alignment and uniformity, Wang and Isola, Understanding Contrastive Representation Learning through Alignment
and Uniformity on the Hypersphere, 2020, section 4; the rank, Roy and Vetterli, The Effective Rank, 2007, eq. 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise._core import at_least_float32, check_embeddings


class CollapseStatistics(NamedTuple):
    """What :func:`collapse_statistics` returns, each 0-d."""

    std: Tensor
    """In [0, 1], 1 = spread over the whole sphere."""
    effective_rank: Tensor
    """In [1, d]."""
    alignment: Tensor
    """In [0, 4], 0 = views of an example coincide; NaN without second views."""
    uniformity: Tensor
    """In [-8, 0], 0 = all embeddings are one point."""


@torch.no_grad()
def collapse_statistics(z: Tensor, other: Tensor | None = None) -> CollapseStatistics:
    """Statistics of embeddings; the formulas are at the top of this file.

    Args:
        z: (N, d) embeddings, N >= 2, normalised here.
        other: (N, d) the second views, for the alignment.

    Raises:
        ValueError: shapes that do not fit, or fewer than two embeddings.
    """
    check_embeddings("z", z)
    if len(z) < 2:
        raise ValueError(f"z has shape {tuple(z.shape)}, expected at least two embeddings")
    z = normalize(at_least_float32(z), dim=1)
    centred = z - z.mean(0)
    s = torch.linalg.svdvals(centred)
    total = s.sum()
    p = s / torch.where(total > 0, total, 1)
    rank = torch.special.entr(p).sum().exp()
    distances = torch.pdist(z).square()
    uniformity = (-2 * distances).logsumexp(0) - math.log(len(distances))
    alignment = z.new_tensor(math.nan)
    if other is not None:
        check_embeddings("other", other, like=z)
        alignment = (z - normalize(other.to(z), dim=1)).square().sum(1).mean()
    return CollapseStatistics(centred.square().mean(0).sum().sqrt(), rank, alignment, uniformity)
