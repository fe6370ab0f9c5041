r"""Scores of how hard an example is: EL2N and its variants, and gradient norms (GraNd).

.. math:: \mathrm{EL2N}_i = \lVert p_i - \mathrm{onehot}(y_i) \rVert_2, \qquad
          \mathrm{GraNd}_i = \lVert \nabla_\theta\, \mathrm{CE}(z_i, y_i) \rVert_2, \qquad
          \mathrm{GraNd}^{last}_i = \mathrm{EL2N}_i \sqrt{1 + \lVert h_i \rVert^2}

with p the softmax of the logits and h the input of the last linear layer. Larger is harder: keep the largest scores;
with label noise drop the top few per cent as well. Score in eval mode and without augmentation, after a few epochs (at
initialisation EL2N tells nothing), and average over several runs before ranking.

1 - p_y is formed from the other classes' probabilities, so that a score of an example fitted well keeps its digits.

Source: Paul et al., Deep Learning on a Data Diet: Finding Important Examples Early in Training, 2021, definitions 2.1
and 2.2; the L1 and margin variants are the released code's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from counterpoise._core import at_least_float32, check_choice, check_number, check_per_row, check_within

VARIANTS = ("l2", "l1", "max_margin", "sum_margin")


def el2n_scores(logits: Tensor, targets: Tensor, *, variant: str = "l2") -> Tensor:
    """How far the predicted probabilities are from the label; larger = harder.

    Args:
        logits: (N, C), or (R, N, C) of R runs, whose scores are averaged. -inf marks a masked class.
        targets: (N,) class indices in [0, C - 1].
        variant: "l2" (EL2N, in [0, sqrt 2]), "l1" (in [0, 2]), "max_margin" (max of the others' p_k - p_y, in
            [-1, 1]) or "sum_margin" (sum over the others of p_k - p_y, in [-(C - 1), 1]).

    Returns:
        (N,), at least float32.

    Raises:
        ValueError, TypeError: a shape, type, label or setting that does not fit.
    """
    check_choice("variant", variant, VARIANTS)
    errors, target = last_layer_errors(logits, targets)
    if variant == "l2":
        scores = torch.linalg.vector_norm(errors, dim=-1)
    elif variant == "l1":
        scores = errors.abs().sum(-1)
    else:
        label = torch.zeros_like(errors, dtype=torch.bool).scatter_(-1, target, True)
        margins = errors - 1 - errors.gather(-1, target)  # p_k - p_y for k other than y, since e_y = p_y - 1
        if variant == "sum_margin":
            scores = margins.masked_fill(label, 0).sum(-1)
        else:
            scores = margins.masked_fill(label, -torch.inf).amax(-1)
    return scores.mean(0) if scores.ndim == 2 else scores


def last_layer_errors(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(z) - onehot(y), of the logits' shape, and the targets as (..., N, 1) indices.

    It is the gradient of the cross-entropy with respect to the last layer's bias.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, expected a floating type")
    if logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (N, C) or (R, N, C) with C >= 2")
    check_per_row("targets", targets, logits[0] if logits.ndim == 3 else logits)
    if targets.is_floating_point():
        raise TypeError(f"targets has dtype {targets.dtype}, expected class indices of an integer type")
    check_within("targets", targets, 0, logits.shape[-1] - 1, what="class indices")
    target = targets.long()[:, None].expand(*logits.shape[:-1], 1)
    p = at_least_float32(logits.detach()).softmax(-1)
    others = p.scatter(-1, target, 0.0)
    return others.scatter(-1, target, -others.sum(-1, keepdim=True)), target


def grand_scores(logits: Tensor, targets: Tensor, features: Tensor) -> Tensor:
    """GraNd of the last linear layer, in closed form; larger = harder.

    Args:
        logits: (N, C), or (R, N, C) of R runs, whose scores are averaged.
        targets: (N,) class indices in [0, C - 1].
        features: (N, D) or (R, N, D), what went into the last layer, which has a bias.

    Returns:
        (N,), at least float32.

    Raises:
        ValueError, TypeError: a shape, type or label that does not fit.
    """
    errors, _ = last_layer_errors(logits, targets)
    if features.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, expected {(*logits.shape[:-1], 'D')} beside logits "
            f"{tuple(logits.shape)}"
        )
    length = torch.linalg.vector_norm(at_least_float32(features.detach()), dim=-1)
    scores = torch.linalg.vector_norm(errors, dim=-1) * torch.hypot(length, torch.ones_like(length))
    return scores.mean(0) if scores.ndim == 2 else scores


def grand_scores_full(model: nn.Module, inputs: Tensor, targets: Tensor, *, chunk_size: int = 32) -> Tensor:
    """GraNd over all parameters that require gradients; larger = harder.

    The model is put into eval mode for the time of the call, since per-example gradients do not exist through batch
    statistics, and is left as it was.

    Args:
        model: maps (N, ...) inputs to (N, C) logits.
        inputs: (N, ...).
        targets: (N,) class indices.
        chunk_size: per-example gradients held at once, >= 1.

    Returns:
        (N,), at least float32.

    Raises:
        ValueError: targets that do not fit, or a model without parameters that require gradients.
    """
    check_per_row("targets", targets, inputs)
    check_number("chunk_size", chunk_size, 1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model has no parameter that requires a gradient, expected at least one")
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(model, {**parameters, **fixed}, (x[None],))
        return nn.functional.cross_entropy(at_least_float32(logits), y[None])

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return torch.cat(
            [
                _norm_over_parameters(per_example(trained, x, y.long()))
                for x, y in zip(inputs.split(chunk_size), targets.split(chunk_size), strict=True)
            ]
        )
    finally:
        for module, training in modes.items():
            module.training = training


def _norm_over_parameters(gradients: dict[str, Tensor]) -> Tensor:
    """(B,) L2 norms of per-example gradients, each (B, ...)."""
    norms = [torch.linalg.vector_norm(at_least_float32(g).flatten(1), dim=1) for g in gradients.values()]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)
