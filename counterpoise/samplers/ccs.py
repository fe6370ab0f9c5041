r"""Coverage-centric selection: the same number of examples from every stratum of a score, the hardest left out.

The hardest share beta of the examples is dropped, being mislabelled more often than not. The range of the rest is cut
into strata of equal width, and the budget is shared out from the smallest stratum up: each gives min(its size,
floor(budget left / strata left)), and examples are drawn uniformly within it. So easy regions, of which there is much,
do not crowd out the others, nor do they vanish.

The released strata end at 1.0001 times the largest score, which loses the largest example where that score is not
positive; here the last stratum is closed.

Source: Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates, 2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import check_number, generator_for
from counterpoise.samplers.selection import Selection, check_budget


def stratum_of(scores: Tensor, strata: int) -> Tensor:
    """(N,) stratum in [0, strata - 1] of each score (N,): equal widths from the least to the largest, both included."""
    low, high = torch.aminmax(scores.double())
    width = (high - low) / strata
    if float(width) == 0:
        return torch.zeros_like(scores, dtype=torch.int64)
    return ((scores.double() - low) / width).long().clamp_(0, strata - 1)


def stratum_budgets(sizes: Tensor, budget: int) -> Tensor:
    """(strata,) int64 shares of a budget, from the smallest stratum up (ties: the first)."""
    shares = torch.zeros(len(sizes), dtype=torch.int64)
    left = budget
    for done, k in enumerate(sizes.cpu().argsort(stable=True).tolist()):
        shares[k] = min(int(sizes[k]), left // (len(sizes) - done))
        left -= int(shares[k])
    return shares


def coverage_centric(
    scores: Tensor, budget: int, *, strata: int = 50, drop_hardest: float = 0.0, seed: int = 0
) -> Selection:
    """Stratified random selection by a score; the rule is at the top of this file.

    Args:
        scores: (N,) finite, larger = harder (EL2N, forgetting events, minus a margin).
        budget: picks in [1, N - dropped].
        strata: >= 1.
        drop_hardest: beta in [0, 1), the share of the largest scores that is left out: 0.3 at 90 % pruning, 0.2 at 80 %
            in the released examples.
        seed: >= 0, of the draw.

    Returns:
        A selection in order of strata, easiest first; weights are stratum size over its share, so that they sum to the
        examples of the strata that give any.

    Raises:
        ValueError: a shape or setting that does not fit.
    """
    if scores.ndim != 1 or not scores.is_floating_point() or not bool(scores.isfinite().all()):
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected (N,) finite floating numbers")
    check_number("strata", strata, 1)
    check_number("drop_hardest", drop_hardest, 0, 1)
    kept = scores.detach().argsort(stable=True)[: len(scores) - int(drop_hardest * len(scores))].sort().values
    check_budget(budget, len(kept))
    stratum = stratum_of(scores[kept], strata)
    sizes = torch.bincount(stratum, minlength=strata)
    generator, indices, weights = generator_for(seed), [], []
    for k, share in enumerate(stratum_budgets(sizes, budget).tolist()):
        members = kept[stratum == k]
        indices.append(members[torch.randperm(len(members), generator=generator)[:share].to(members.device)])
        weights += [len(members) / share] * share if share else []
    return Selection(torch.cat(indices), torch.tensor(weights, dtype=torch.float64, device=scores.device))
