r"""Balanced assignment: examples to prototypes so that every prototype gets about as many; SwAV's codes.

.. math:: Q_{ik} = e^{s_{ik} / \epsilon - f_k - g_i}, \qquad
          f_k \leftarrow \log \sum_i e^{s_{ik} / \epsilon - g_i}, \qquad
          g_i \leftarrow \log \sum_k e^{s_{ik} / \epsilon - f_k}

starting at g = 0 and repeated a few times: an entropic transport plan between uniform marginals, stopped early. The
last step is that of the examples, so each row is a distribution; a prototype has B / K of the B examples only in the
limit.

Released codes exponentiate the scores, which overflows in half precision and leaves 0 / 0 for a prototype that is far
from all examples; in logarithms neither happens, and a shift of all scores changes nothing. They also scale columns to
1 / K and rows to 1 / B in between (SwAV) or not (lightly), which cancels. Several ranks: the sum over examples is over
those of all ranks, so that the codes are those of one process on the whole batch.

Logarithms are taken in the first of every three iterations. After that step of f, each row of

.. math:: E_{ik} = e^{s_{ik} / \epsilon - f_k - m_i}, \qquad m_i = \max_k (s_{ik} / \epsilon - f_k)

holds a one, and each column an entry of at least 1 / B. So the scalings of the next two iterations stay within (B K)^2,
and products of E with a vector do.

Source: Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020, eq. 3 to 5, and
the released code; Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, 2013.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import (
    at_least_float32,
    check_embeddings,
    check_number,
    check_per_row,
    without_autocast,
    world_size,
)
from counterpoise.distributed import gather_rows

IN_A_ROW = 3  # iterations with one kernel


@torch.no_grad()
def balanced_assignment(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    mask: Tensor | None = None,
    sync: bool = True,
) -> Tensor:
    """Codes of examples; the formula is at the top of this file.

    Args:
        scores: (B, K) similarity s of each example to each prototype, the larger the closer.
        epsilon: > 0; towards 0 the codes become one-hot, towards infinity uniform.
        iterations: >= 1.
        mask: (B,) bool, False leaves an example out; its row is 0 and may hold anything in ``scores``.
        sync: examples of all ranks, once a process group exists; each rank gets the rows of its own.

    Returns:
        (B, K), at least float32, without gradient; rows sum to one.

    Raises:
        ValueError, TypeError: shapes or settings that do not fit.
    """
    check_embeddings("scores", scores)
    check_number("epsilon", epsilon, 0, open_low=True)
    check_number("iterations", iterations, 1)
    check_per_row("mask", mask, scores, dtype=torch.bool)
    sync = sync and world_size() > 1
    with without_autocast(scores):
        s, g = at_least_float32(scores) / epsilon, None
        if mask is not None:
            s = torch.where(mask[:, None], s, -torch.inf)
        for done in range(0, iterations, IN_A_ROW):
            codes, g = _iterated(s, g, min(IN_A_ROW, iterations - done), mask, sync=sync)
        return codes


def _iterated(s: Tensor, g: Tensor | None, count: int, mask: Tensor | None, *, sync: bool) -> tuple[Tensor, Tensor]:
    """Codes (B, K) and g (B,) of ``count`` iterations from g, zero where None."""
    scores = s - _log_sum_over_ranks(s if g is None else s - g[:, None], sync=sync)
    top = scores.amax(1, keepdim=True)
    if mask is not None:
        top = torch.where(mask[:, None], top, 0)
    kernel = scores.sub_(top).exp_()
    u, v = _inverse(kernel.sum(1)), None
    for _ in range(count - 1):
        sums = u @ kernel
        v = _inverse(gather_rows(sums[None]).sum(0) if sync else sums)
        u = _inverse(kernel @ v)
    codes = kernel.mul_(u[:, None])
    return codes if v is None else codes.mul_(v), top[:, 0] - u.log()


def _inverse(x: Tensor) -> Tensor:
    """1 / x, 0 for nothing."""
    return torch.where(x == 0, 0, 1 / x)


def _log_sum_over_ranks(x: Tensor, *, sync: bool) -> Tensor:
    """(K,) log-sum-exp over the rows of all ranks, 0 where there is no row at all."""
    total = x.logsumexp(0)
    if sync:
        total = gather_rows(total[None]).logsumexp(0)
    return torch.where(total == -torch.inf, 0, total)
