"""Input checks and shapes that the losses share: multi-class and multi-label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from counterpoise._core import at_least_float32, check_device, check_per_row, check_within, readable


def check_multilabel(logits: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None) -> None:
    """Raises unless shapes and types of a multi-label loss's inputs fit together."""
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, expected a floating type")
    if logits.ndim < 1:
        raise ValueError("logits has shape (), expected (N,) or (N, C, ...)")
    if target.shape != logits.shape:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected that of logits {tuple(logits.shape)}")
    if not (logits.is_cpu and target.is_cpu):
        check_device("target", target, logits)
    check_per_row("weight", weight, logits)
    if mask is not None:
        _check_mask(mask, logits, logits.shape)


def labels_and_live(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits at least float32, labels of their type, and which entries count (None = all are seen to).

    An entry counts unless the mask leaves it out or its logit is -inf (a masked class) and its label 0. Entries that
    do not count get logit 0 and label 0, so that nothing of theirs reaches a value or a gradient.
    """
    z, t = at_least_float32(logits), target
    if mask is None and readable(z) and not (z == -torch.inf).any():
        t = t.to(z.dtype)
        check_within("target", t, 0, 1, what="labels")
        return z, t, None
    live = ~((z == -torch.inf) & (t == 0))
    if mask is not None:
        live = live & expand_mask(mask, z)
    t = torch.where(live, t.to(z.dtype), 0)
    check_within("target", t, 0, 1, what="labels")
    return torch.where(live, z, 0), t, live


def _check_mask(mask: Tensor, logits: Tensor, whole: torch.Size) -> None:
    shapes = (logits.shape[:1], whole)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool (True = counts)")
    if mask.shape not in shapes:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(shapes[0])} or {tuple(shapes[1])}")
    check_device("mask", mask, logits)


def check_multiclass(logits: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None) -> None:
    """Raises unless shapes and types of a multi-class loss's inputs fit together."""
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, expected a floating type")
    shape = logits.shape
    if len(shape) < 2:
        raise ValueError(f"logits has shape {tuple(shape)}, expected (N, C) or (N, C, d1, ...)")
    if not (logits.is_cpu and target.is_cpu):
        check_device("target", target, logits)
    indices_shape = shape[:1] + shape[2:]
    if mask is None and weight is None and target.shape == indices_shape and not target.is_floating_point():
        return  # what comes nearly always
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target has shape {tuple(target.shape)} and dtype {target.dtype}, expected class indices "
                f"{tuple(indices_shape)} of an integer type, or probabilities {tuple(logits.shape)}"
            )
    elif target.shape != indices_shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {tuple(indices_shape)} with class indices in "
            f"[0, {logits.shape[1] - 1}]"
        )
    check_per_row("weight", weight, logits)
    if mask is not None:
        _check_mask(mask, logits, indices_shape)


def class_indices(
    target: Tensor, num_classes: int, ignore_index: int, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Class indices as int64 with 0 where an entry does not count, and which entries do (None = all are seen to).

    Raises ValueError for an index outside [0, C - 1] that is not ``ignore_index``.
    """
    target = target.long()
    if mask is None and not 0 <= ignore_index < num_classes and readable(target) and target.numel():
        low, high = torch.aminmax(target)
        if low >= 0 and high < num_classes:
            return target, None
    if mask is not None:
        target = torch.where(expand_mask(mask, target), target, ignore_index)
    check_within("target", target, 0, num_classes - 1, what="class indices", ignore=ignore_index)
    counted = target != ignore_index
    return torch.where(counted, target, 0), counted


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A row mask (N,) or an entry mask, in the shape of ``like`` (N, ...)."""
    return mask if mask.shape == like.shape else mask.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def check_class_vector(name: str, x: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless ``x`` is (C,)."""
    if x.ndim == 1 and logits.ndim > 1 and x.numel() == logits.shape[1]:
        return
    if logits.ndim < 2:
        raise ValueError(f"{name} is given, expected logits of shape (N, C, ...), got {tuple(logits.shape)}")
    raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({logits.shape[1]},), one entry a class")


def class_vector(name: str, x: Tensor, logits: Tensor) -> Tensor:
    """``x`` (C,) in the logits' dtype and device; raises ValueError for another shape."""
    check_class_vector(name, x, logits)
    return x.to(logits)


def along_classes(x: Tensor, logits: Tensor) -> Tensor:
    """(C,) as (C, 1, ...), to broadcast over the logits (N, C, d1, ...)."""
    return x.reshape(-1, *[1] * (logits.ndim - 2))


def as_distribution(target: Tensor, z: Tensor) -> Tensor:
    """Class indices or probabilities as a distribution of the logits' shape and type."""
    t = target if target.is_floating_point() else one_hot(target, z.shape[1]).movedim(-1, 1)
    return t.to(z.dtype)


def smooth(t: Tensor, z: Tensor, label_smoothing: float) -> Tensor:
    """A target distribution with ``label_smoothing`` of its mass spread evenly over the classes that are not masked."""
    if label_smoothing == 0:
        return t
    live = (z > -torch.inf).to(z.dtype)
    return t * (1 - label_smoothing) + label_smoothing * live / live.sum(1, keepdim=True)
