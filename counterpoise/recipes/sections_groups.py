"""What a report shows of groups: a bar for each, and a table."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from counterpoise.recipes.report_data import RunFolder
from counterpoise.recipes.report_plots import bar_plot
from counterpoise.recipes.report_sections import Cell, Figure, Table, format_metric


def group_figure(run: RunFolder) -> Figure:
    """Accuracy of each group, the worst one in another colour."""
    groups = run.metric("groups")
    accuracy = np.array([np.nan if a is None else a for a in groups["accuracy"]])
    worst = int(np.nanargmin(accuracy))
    svg = bar_plot(groups["name"], accuracy, marked=worst, title="Accuracy of each group (test split)")
    said = f"Worst group: {groups['name'][worst]}, {100 * accuracy[worst]:.1f}%, best {100 * np.nanmax(accuracy):.1f}%."
    return Figure(Markup(svg), f"Bars: accuracy of {len(accuracy)} groups. {said}", said)


def group_table(run: RunFolder) -> Table:
    """One row a group, the worst first."""
    groups = run.metric("groups")
    rows = [
        [Cell(name), Cell(f"{trained:,}"), Cell(format_metric("accuracy", accuracy), bar=accuracy), Cell(f"{tested:,}")]
        for name, trained, accuracy, tested in zip(
            groups["name"], groups["train_count"], groups["accuracy"], groups["test_count"], strict=True
        )
    ]
    order = sorted(range(len(rows)), key=lambda i: (groups["accuracy"][i] is None, groups["accuracy"][i]))
    return Table(["Group", "Training", "Accuracy", "Test"], [rows[i] for i in order])
