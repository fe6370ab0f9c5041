"""What a report shows of several tasks: a table, weights and scores over epochs, predicted against true numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_plots import curve_plot, scatter_plot
from counterpoise.recipes.report_sections import Cell, Figure, Table, format_metric

SHOWN = 400  # points of a scatter plot


def task_table(run: RunFolder) -> Table:
    """One row a task: what it is, how many targets, its score and errors on the test split."""
    rows = [
        [
            Cell(task["name"]),
            Cell(_kind(task)),
            Cell(f"{task['train_count']:,}"),
            Cell(f"{task['count']:,}"),
            Cell(format_metric("score", task["score"]), bar=task["score"]),
            Cell(_told(task)),
        ]
        for task in run.metric("tasks")
    ]
    caption = "Score: balanced accuracy of a classification, max(R², 0) of a regression; errors are in its own units."
    return Table(["Task", "Kind", "Training targets", "Test targets", "Score", "Metrics"], rows, caption)


def _kind(task: dict[str, Any]) -> str:
    if task["kind"] == "classification":
        return f"classification, {task['size']} classes"
    return "regression" if task["size"] == 1 else f"regression, {task['size']} dimensions"


def _told(task: dict[str, Any]) -> str:
    if task["kind"] == "classification":
        return f"accuracy {format_metric('accuracy', task['accuracy'])}"
    return ", ".join(f"{name} {format_metric(name, task[name.lower()])}" for name in ("RMSE", "MAE"))


def weight_figure(run: RunFolder) -> Figure:
    """Effective weights at the end of each epoch."""
    curves = _columns(run, "weight/")
    svg = curve_plot(_epochs(run), curves, title="Effective weight (log scale)", key="weights", log=True)
    last = ", ".join(f"{name} {values[np.isfinite(values)][-1]:.3g}" for name, values in curves.items())
    said = f"What each task's mean loss is multiplied by; at the end: {last}."
    return Figure(Markup(svg), f"Effective weights of {len(curves)} tasks by epoch. {said}", said)


def score_figure(run: RunFolder) -> Figure:
    """The score of each task, and their mean."""
    own = _columns(run, "val/score_")
    mean = {"mean": run.history["val/score"]} if "val/score" in run.history else {}
    svg = curve_plot(_epochs(run), {**own, **mean}, title="Validation score", key="scores", percent=True)
    said = "Score of each task on validation by epoch; the best epoch is that of the best mean."
    return Figure(Markup(svg), f"Learning curves of {len(own)} tasks: {', '.join(own)}. {said}", said)


def loss_figure(run: RunFolder) -> Figure:
    """The combined loss of training."""
    curves = _columns(run, "train/loss")
    svg = curve_plot(_epochs(run), {"loss": curves[""]}, title="Combined training loss", key="combined-loss")
    said = "The combined loss may fall below 0, and is not comparable between weightings."
    return Figure(Markup(svg), f"Combined training loss by epoch. {said}", said)


def scatter_figure(run: RunFolder) -> Figure:
    """Predicted against true numbers of each dimension of each regression, on stored test predictions."""
    if not run.predictions:
        raise NotAvailable(run.problems.get("predictions.npz", "predictions.npz is empty"))
    panels = [panel for task in run.metric("tasks") if task["kind"] == "regression" for panel in _panels(run, task)]
    if not panels:
        raise NotAvailable("no task is a regression")
    said = f"Predicted against true (test split, up to {SHOWN} examples); the diagonal is perfect."
    return Figure(Markup(scatter_plot(panels, key="scatter")), f"{len(panels)} scatter plots. {said}", said)


def _panels(run: RunFolder, task: dict[str, Any]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    name = task["name"]
    true, predicted = (run.predictions[f"{of}_{name}"] for of in ("target", "output"))
    true = true.reshape(predicted.shape)
    rows = np.flatnonzero(np.isfinite(true).all(axis=1))
    rows = rows[:: max(1, -(-len(rows) // SHOWN))]
    size = int(task["size"])
    titles = [name if size == 1 else f"{name}, {d}" for d in range(min(size, 8))]
    return [(title, true[rows, d], predicted[rows, d]) for d, title in enumerate(titles) if len(rows)]


def _columns(run: RunFolder, prefix: str) -> dict[str, np.ndarray]:
    """Columns of history.csv that start with ``prefix`` and hold numbers, without it."""
    found = {n.removeprefix(prefix): x for n, x in run.history.items() if n.startswith(prefix) and np.isfinite(x).any()}
    if not found:
        raise NotAvailable(run.problems.get("history.csv", f"history.csv has no {prefix} columns"))
    return found


def _epochs(run: RunFolder) -> np.ndarray:
    return run.history["epoch"]
