"""What a report shows of label sets: average precision by frequency, a table, test images with their labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_pictures import decoded
from counterpoise.recipes.report_plots import class_plot, picture_plot
from counterpoise.recipes.report_sections import Cell, Figure, Table, format_metric


def label_figure(run: RunFolder) -> Figure:
    """Training positives of each label, above its average precision."""
    labels, names = run.metric("per_class"), _names(run)
    counts, precision = labels["train_count"], labels["average_precision"]
    svg = class_plot(
        names, counts, precision, labels["band"], counted="Training positives", score="Average precision", key="labels"
    )
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    alt = (
        f"Bars: training positives of {len(counts)} labels, from {counts[most]} ({names[most]}) to {counts[least]} "
        f"({names[least]}). Stems below: the average precision of each label, as in the table of labels."
    )
    return Figure(Markup(svg), alt, "Training positives of each label, and its average precision (test split).")


def label_table(run: RunFolder) -> Table:
    """One row a label, the most frequent first."""
    labels, names = run.metric("per_class"), _names(run)

    def row(i: int) -> list[Cell]:
        band, precision = labels["band"][i], labels["average_precision"][i]
        return [
            Cell(names[i], band=band),
            Cell(band, band=band),
            Cell(format_metric("count", labels["train_count"][i])),
            Cell(format_metric("average_precision", precision), bar=precision),
            Cell(format_metric("f1", labels["f1"][i])),
            Cell(format_metric("count", labels["test_count"][i])),
        ]

    order = sorted(range(len(names)), key=lambda i: -labels["train_count"][i])
    columns = ["Label", "Band", "Training positives", "Average precision", "F1 at 0.5", "Test positives"]
    return Table(columns, [row(i) for i in order])


def label_count_table(run: RunFolder) -> Table:
    """Test examples by their number of labels, true and predicted."""
    counts = run.metric("labels_per_example")
    true, predicted = np.array(counts["true"]), np.array(counts["predicted"])
    numbers = np.arange(len(true))
    shown = np.where(true + predicted > 0)[0]
    rows = [[Cell(f"{n}"), Cell(f"{true[n]:,}"), Cell(f"{predicted[n]:,}")] for n in shown]
    means = [float((x * numbers).sum() / max(x.sum(), 1)) for x in (true, predicted)]
    rows.append([Cell("Mean"), *(Cell(f"{mean:.2f}") for mean in means)])
    return Table(["Labels per example", "Test examples", "Predicted (above 0.5)"], rows)


def example_figure(run: RunFolder) -> Figure:
    """The first test images with their labels; what the prediction missed or added is told apart."""
    names = _names(run)
    pictures = [(_told(example, names), decoded(example["image"])) for example in run.metric("examples")]
    if not pictures:
        raise NotAvailable("metrics.json has no examples")
    svg = picture_plot(pictures, columns=4, key="examples")
    exact = sum(set(example["true"]) == set(example["predicted"]) for example in run.metric("examples"))
    alt = f"The first {len(pictures)} test images; for {exact} of them the predicted labels are the true ones."
    return Figure(Markup(svg), alt, f"{alt} ✓ found, ✗ missed, + added.")


def _told(example: dict[str, Any], names: list[str]) -> str:
    """One line each for what was found, missed and added."""
    true, predicted = set(example["true"]), set(example["predicted"])
    marked = {"✓": true & predicted, "✗": true - predicted, "+": predicted - true}
    lines = [f"{mark} {', '.join(names[c] for c in sorted(labels))}" for mark, labels in marked.items() if labels]
    return "\n".join(_clipped(line) for line in lines) or "no label"


def _clipped(line: str, longest: int = 32) -> str:
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _names(run: RunFolder) -> list[str]:
    names = [str(name) for name in run.metric("class_names")]
    if len(names) != len(run.metric("per_class", "train_count")):
        raise NotAvailable(f"metrics.json has {len(names)} names for another number of labels")
    return names
