r"""Several tasks as one scalar, with equal or chosen weights; and the means over each task's own rows.

.. math:: L = \sum_{k\ \mathrm{present}} w_k L_k, \qquad
          L_k = \frac{1}{n_k} \sum_{i\ \mathrm{counts\ for}\ k} \ell_{ik}

A task is averaged over the rows that have it, n_k of them over all ranks, and not over the batch: a rarely labelled
task would fade otherwise. A task that no row has takes no part. Equal weights are w = 1: the sum of the task losses,
not their mean. They are the baseline that a learned weighting has to beat.

Source: linear scalarisation of multi-task losses (no paper of its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from counterpoise._core import (
    No,
    PreciseBuffers,
    Spec,
    at_least_float32,
    check_number,
    check_per_row,
    sum_over_ranks,
    world_size,
)
from counterpoise.losses._inputs import expand_mask

TaskLosses = Tensor | Mapping[str, Tensor]
AVERAGED = No("tasks are averaged over rows of their own before they are weighted")


def task_means(
    losses: TaskLosses,
    *,
    names: Sequence[str] | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean loss of each task over the rows that count for it, and which tasks are present. For weighting and logging.

    Args:
        losses: (N, K), one column a task; or task name to (N,) values or to a 0-d mean, which counts as one row. A loss
            that counts and is NaN makes its task's mean NaN; it is never left out silently.
        names: of the K tasks, in order; those that a mapping lacks are absent. None = the mapping's own order, which
            must be that of every rank.
        weight: (N,) >= 0, multiplies the losses of a row.
        mask: bool, True = counts; (N,) rows or (N, K) labels that are there. What does not count may hold NaN.
        sync: rows of all ranks: n_k is summed over ranks, and the local mean is world_size * local sum / n_k.

    Returns:
        (K,) means, 0 and connected to the graph for an absent task, at least float32; (K,) bool, which tasks have a row
        that counts and has a weight above 0.

    Raises:
        ValueError, TypeError: a shape, type or name that does not fit.
    """
    if isinstance(losses, Mapping):
        x, counted = _columns(losses, names, ragged=weight is None and mask is None)
    else:
        x, counted = at_least_float32(losses), None
        if x.ndim != 2 or (names is not None and x.shape[1] != len(names)):
            tasks = "K" if names is None else str(len(names))
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected (N, {tasks}), one column a task")
    check_per_row("weight", weight, x)
    counted = _counted(mask, x, counted)
    s = x.new_ones(len(x), 1) if weight is None else weight.to(x.dtype)[:, None]
    total = torch.where(counted, s * x, 0).sum(0)
    rows = torch.stack([counted.sum(0), (counted & (s > 0)).sum(0)])
    if sync:
        total, rows = total * world_size(), sum_over_ranks(rows)
    return total / rows[0].clamp_min(1), rows[1] > 0


def _counted(mask: Tensor | None, x: Tensor, given: Tensor | None) -> Tensor:
    """(N, K) bool: the mask, less tasks that were not given."""
    counted = torch.ones_like(x, dtype=torch.bool) if given is None else given
    if mask is None:
        return counted
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool (True = counts)")
    if mask.shape not in (x.shape[:1], x.shape):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:1])} or {tuple(x.shape)}")
    return counted & expand_mask(mask, x)


def _columns(losses: Mapping[str, Tensor], names: Sequence[str] | None, ragged: bool) -> tuple[Tensor, Tensor]:
    """A mapping as (N, K), padded with zeros where a task has fewer rows, and which entries were given."""
    names = list(losses) if names is None else names
    for name in losses:
        if name not in names:
            raise ValueError(f"losses holds {name!r}, expected tasks among {list(names)}")
    if not losses:
        raise ValueError("losses is empty, expected at least one task (an absent one as a tensor of shape (0,))")
    longest = max(x.numel() for x in losses.values())
    columns, counted = [], []
    for name in names:
        x = losses.get(name)
        if x is None:
            x = next(iter(losses.values())).new_zeros(0)
        elif x.ndim > 1 or (not ragged and x.shape != (longest,)):
            raise ValueError(
                f"losses[{name!r}] has shape {tuple(x.shape)}, expected "
                + ("(N,) or ()" if ragged else f"({longest},): weight and mask speak of rows that all tasks share")
            )
        flat = at_least_float32(x).reshape(-1)
        rows = torch.arange(longest, device=flat.device) < len(flat)
        columns.append(torch.cat([flat, flat.new_zeros(longest - len(flat))]))
        counted.append(rows)
    return torch.stack(columns, 1), torch.stack(counted, 1)


def equal_weighted_loss(
    losses: TaskLosses,
    *,
    names: Sequence[str] | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = False,
) -> Tensor:
    """Sum of the task means, 0-d; arguments and errors are those of :func:`task_means`."""
    return task_means(losses, names=names, weight=weight, mask=mask, sync=sync)[0].sum()


def static_weighted_loss(
    losses: TaskLosses,
    *,
    task_weights: Mapping[str, float] | Sequence[float] | Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = False,
) -> Tensor:
    """Weighted sum of the task means, 0-d.

    Args:
        losses: (N, K), or task name to (N,) or 0-d.
        task_weights: K numbers, or task name to number.

    The other arguments and the errors are those of :func:`task_means`.
    """
    names, values = names_and_values("task_weights", task_weights)
    mean, _ = task_means(losses, names=names, weight=weight, mask=mask, sync=sync)
    w = torch.as_tensor(values).to(mean)
    if w.shape != mean.shape:
        raise ValueError(f"task_weights has shape {tuple(w.shape)}, expected ({len(mean)},), one weight a task")
    return (w * mean).sum()


def names_and_values(
    argument: str, given: Mapping[str, object] | Sequence[object] | Tensor
) -> tuple[list[str] | None, object]:
    """Task names (None for a plain sequence) and what was given for them; ValueError where there is none."""
    if len(given) == 0:
        raise ValueError(f"{argument} is empty, expected one entry a task")
    return (list(given), list(given.values())) if isinstance(given, Mapping) else (None, given)


class EqualWeighting(torch.nn.Module):
    """Module form of :func:`equal_weighted_loss`.

    Args:
        names: of the tasks, where losses come as a mapping of which an entry may be missing.
        sync: rows of all ranks, see :func:`task_means`.
    """

    spec = Spec(task="multi_task", source="Unweighted sum of task losses", per_row=AVERAGED)

    def __init__(self, names: Sequence[str] | None = None, sync: bool = False) -> None:
        super().__init__()
        self.names = None if names is None else tuple(names)
        self.sync = sync

    def forward(self, losses: TaskLosses, *, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Task losses (N, K), or by name, to the total."""
        return equal_weighted_loss(losses, names=self.names, weight=weight, mask=mask, sync=self.sync)


class StaticWeighting(PreciseBuffers):
    """Module form of :func:`static_weighted_loss`.

    Args:
        task_weights: K numbers >= 0, or task name to number. A task that should not train is better left out: a
            weight of 0 still turns a NaN into a NaN.
        sync: rows of all ranks, see :func:`task_means`.

    Buffers: task_weights (K,) float64, persistent.
    """

    spec = Spec(
        task="multi_task", source="Linear scalarisation of task losses", needs=("task_weights",), per_row=AVERAGED
    )
    task_weights: Tensor

    def __init__(self, task_weights: Mapping[str, float] | Sequence[float], sync: bool = False) -> None:
        super().__init__()
        names, values = names_and_values("task_weights", task_weights)
        for value in values:  # type: ignore[attr-defined]
            check_number("task_weights", value, 0)
        self.names = names
        self.sync = sync
        self.register_buffer("task_weights", torch.tensor(values, dtype=torch.float64))

    @property
    def effective_weights(self) -> Tensor:
        """(K,) what each task's mean is multiplied by. For logging."""
        return self.task_weights

    def forward(self, losses: TaskLosses, *, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Task losses (N, K), or by name, to the total."""
        mean, _ = task_means(losses, names=self.names, weight=weight, mask=mask, sync=self.sync)
        return (self.task_weights.to(mean) * mean).sum()
