"""What a report shows of classes of pixels: pictures, a table of classes, the weights of sparse and dense examples."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_pictures import PALETTE, decoded
from counterpoise.recipes.report_plots import histogram_plot, picture_plot
from counterpoise.recipes.report_sections import Cell, Figure, Table, format_metric


def picture_figure(run: RunFolder) -> Figure:
    """Input, truth and prediction of the first dense and the first sparse test images, two a row."""
    pictures = run.metric("pictures")
    if not pictures:
        raise NotAvailable("metrics.json has no pictures")
    names = [str(name) for name in run.metric("class_names")]
    shown = [
        (f"{p['density']}: input" if what == "input" else what, decoded(p[what]))
        for p in pictures
        for what in ("input", "truth", "prediction")
    ]
    legend = {name: PALETTE[c % len(PALETTE)] for c, name in enumerate(names)}
    svg = picture_plot(shown, columns=6 if len(pictures) > 1 else 3, key="pictures", legend=legend)
    told = f"{len(pictures)} test images: input, true classes, predicted classes."
    return Figure(Markup(svg), told, told)


def weight_figure(run: RunFolder) -> Figure:
    """How AdaWAC's shares of the supervised loss are spread over sparse and over dense training examples."""
    if "weights" not in run.metrics and "pictures" in run.metrics:
        raise NotAvailable("the run had no reweighter: every example has the same share")
    values, means = run.metric("weights", "values"), run.metric("weights", "mean")
    shares = {name: np.array(x, dtype=float) for name, x in values.items()}
    svg = histogram_plot(shares, title="Share of the supervised loss; the rest goes to consistency", key="weights")
    told = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None)
    alt = f"Histograms of the weights of {sum(map(len, values.values()))} training examples; means: {told}."
    return Figure(Markup(svg), alt, f"AdaWAC's weights at the best epoch, by density of labels; means: {told}.")


def class_table(run: RunFolder) -> Table:
    """One row a class, the background first."""
    classes, names = run.metric("per_class"), [str(name) for name in run.metric("class_names")]
    total = max(sum(classes["train_pixels"]), 1)
    rows = [
        [
            Cell(name),
            Cell(f"{100 * trained / total:.1f}%"),
            Cell(format_metric("iou", iou), bar=iou),
            Cell(format_metric("dice", dice)),
            Cell(f"{tested:,}"),
        ]
        for name, trained, iou, dice, tested in zip(
            names,
            classes["train_pixels"],
            classes["iou"],
            classes["dice"],
            classes["test_pixels"],
            strict=True,
        )
    ]
    return Table(["Class", "Training pixels", "IoU", "Dice", "Test pixels"], rows)
