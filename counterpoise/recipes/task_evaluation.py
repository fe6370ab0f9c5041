"""What a model of several tasks is worth: metrics of each task, and one score in [0, 1] over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from counterpoise.recipes.evaluation import Scores
from counterpoise.recipes.tasks import Task

METRIC_NAMES = {"classification": ("balanced_accuracy", "accuracy"), "regression": ("r2", "rmse", "mae")}
Outputs = dict[str, Tensor]


class TaskPredictions(Metric):
    """Outputs and targets of all batches and ranks; ``compute()`` gives :func:`task_metrics`.

    The same examples read by every rank change nothing.

    Args:
        tasks: K of them.
    """

    def __init__(self, tasks: list[Task]) -> None:
        super().__init__()
        self.tasks = tasks
        for i in range(len(tasks)):
            self.add_state(f"output_{i}", [], dist_reduce_fx="cat")
            self.add_state(f"target_{i}", [], dist_reduce_fx="cat")

    def update(self, outputs: Outputs, targets: Outputs) -> None:
        """Outputs (N, size) and targets (N,) or (N, D) by task."""
        for i, task in enumerate(self.tasks):
            getattr(self, f"output_{i}").append(outputs[task.name].detach())
            getattr(self, f"target_{i}").append(targets[task.name])

    def compute(self) -> dict[str, dict[str, float | None]]:
        """Metrics by task."""
        found = {}
        for i, task in enumerate(self.tasks):
            parts = (dim_zero_cat(getattr(self, f"{of}_{i}")) for of in ("output", "target"))
            found[task.name] = task_metrics(task, *parts)
        return found


def task_metrics(task: Task, output: Tensor, target: Tensor) -> dict[str, float | None]:
    r"""Metrics of one task over the rows whose target is there; None where undefined.

    Classification: accuracy, and balanced accuracy over the classes that occur. Regression, over all dimensions: RMSE,
    MAE, and the mean over dimensions of

    .. math:: R^2 = 1 - \frac{\sum_i (y_i - \hat y_i)^2}{\sum_i (y_i - \bar y)^2}

    which is undefined where a dimension is constant. A NaN among the outputs leaves every metric of the task undefined.

    Args:
        output: (N, size); target: (N,) or (N, D).
    """
    counted = task.counted(target)
    z, y = output.detach()[counted].double().cpu(), target.detach()[counted].cpu()
    undefined: dict[str, float | None] = dict.fromkeys(METRIC_NAMES[task.kind])
    if not len(y) or bool(z.isnan().any()):
        return {"count": len(y), **undefined}
    if task.classifies:
        hits = (z.argmax(1) == y).double()
        total = y.bincount(minlength=task.size)
        recall = y.bincount(hits, minlength=task.size)[total > 0] / total[total > 0]
        return {"count": len(y), "balanced_accuracy": float(recall.mean()), "accuracy": float(hits.mean())}
    y = y.double().reshape(z.shape)
    error, spread = z - y, (y - y.mean(0)).square().sum(0)
    r2 = float((1 - error.square().sum(0) / spread).mean()) if bool((spread > 0).all()) else None
    return {
        "count": len(y),
        "r2": r2,
        "rmse": float(error.square().mean().sqrt()),
        "mae": float(error.abs().mean()),
    }


def task_score(metrics: dict[str, float | None]) -> float | None:
    """In [0, 1], higher is better: balanced accuracy, or max(R2, 0); None where undefined."""
    if "balanced_accuracy" in metrics:
        return metrics["balanced_accuracy"]
    r2 = metrics["r2"]
    return None if r2 is None else max(r2, 0.0)


def mean_score(metrics: dict[str, dict[str, float | None]]) -> float | None:
    """The mean of :func:`task_score` over tasks; None unless it is defined for each."""
    scores = [task_score(found) for found in metrics.values()]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def evaluated(tasks: list[Task], outputs: Outputs, targets: Outputs, train: dict[str, int]) -> Scores:
    """Scores of a split.

    Args:
        tasks: K; outputs, targets: by task, see :class:`TaskPredictions`.
        train: training targets of each task, for the table.
    """
    metrics = {task.name: task_metrics(task, outputs[task.name], targets[task.name]) for task in tasks}
    scalars: dict[str, float | None] = {"score": mean_score(metrics)}
    for task in tasks:
        scalars |= {f"{task.name}_{name}": metrics[task.name][name] for name in METRIC_NAMES[task.kind]}
    details: list[dict[str, Any]] = [
        {
            "name": task.name,
            "kind": task.kind,
            "size": task.size,
            "train_count": train[task.name],
            "score": task_score(metrics[task.name]),
            **metrics[task.name],
        }
        for task in tasks
    ]
    notes = [
        f"Task {name!r} has no score, and so the split has none: its targets are constant or missing, or its outputs "
        "not numbers."
        for name, found in metrics.items()
        if task_score(found) is None
    ]
    return Scores(scalars, {"tasks": details}, notes)


def targets_there(tasks: list[Task], targets: dict[str, Tensor]) -> dict[str, int]:
    """How many targets of each task are there."""
    return {task.name: int(torch.count_nonzero(task.counted(targets[task.name]))) for task in tasks}
