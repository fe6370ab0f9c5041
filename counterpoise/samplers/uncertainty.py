r"""Uncertainty scores from logits alone: no labels are needed, larger is less certain.

.. math:: \text{least confidence } 1 - \max_k p_k, \qquad \text{entropy } -\sum_k p_k \log p_k, \qquad
          \text{margin } p_{(2)} - p_{(1)}

The orientation is one for all, so that the largest scores are the examples to keep, or to have labelled. DeepCore sorts
differently with and without class balance, and its least confidence reads logits in place of probabilities.

Source: Settles, Active Learning Literature Survey, 2009, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoise._core import at_least_float32, check_choice


def uncertainty_scores(logits: Tensor, *, kind: str = "entropy") -> Tensor:
    """How uncertain a prediction is; larger = less certain.

    Args:
        logits: (N, C), or (R, N, C) of R runs, whose scores are averaged. -inf marks a masked class.
        kind: "least_confidence" in [0, 1 - 1/C], "entropy" in [0, log C] (natural), or "margin" in [-1, 0].

    Returns:
        (N,), at least float32.

    Raises:
        ValueError, TypeError: a shape, type or setting that does not fit.
    """
    check_choice("kind", kind, ("least_confidence", "entropy", "margin"))
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, expected a floating type")
    if logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (N, C) or (R, N, C) with C >= 2")
    z = at_least_float32(logits.detach())
    p = z.softmax(-1)
    if kind == "least_confidence":
        scores = p.scatter(-1, p.argmax(-1, keepdim=True), 0.0).sum(-1)
    elif kind == "entropy":
        log_p = z.log_softmax(-1)
        scores = -torch.where(p > 0, p * log_p, 0).sum(-1)
    else:
        top = p.topk(2, dim=-1).values
        scores = top[..., 1] - top[..., 0]
    return scores.mean(0) if scores.ndim == 2 else scores
