"""What a report shows of attacks: accuracy by class and by radius, and a few images before and after."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_plots import paired_bar_plot, picture_plot, rate_plot
from counterpoise.recipes.report_sections import Cell, Figure, Table, format_metric


def class_figure(run: RunFolder) -> Figure:
    """Clean and robust accuracy of each class, side by side."""
    names, clean, robust = _per_class(run)
    title = f"Accuracy of each class, clean and at radius {run.metric('robustness', 'radius'):g}"
    svg = paired_bar_plot(names, {"clean": clean, "robust": robust}, title=title, key="robust-bars")
    worst = int(np.nanargmin(robust))
    said = f"Worst class under attack: {names[worst]}, {100 * robust[worst]:.1f}% (clean {100 * clean[worst]:.1f}%)."
    return Figure(Markup(svg), f"Bars: clean and robust accuracy of {len(names)} classes. {said}", said)


def curve_figure(run: RunFolder) -> Figure:
    """Accuracy against the radius of the attack."""
    curve, unit = run.metric("robustness", "curve"), run.metric("robustness", "unit")
    radii, accuracy = np.array(curve["radius"]), _numbers(curve["accuracy"])
    svg = rate_plot(radii, accuracy, title="Accuracy against radius", label=f"Radius, {unit}", key="radius-curve")
    points = ", ".join(f"{100 * a:.1f}% at {r:g}" for r, a in zip(radii, accuracy, strict=True))
    attack = run.metric("robustness", "attack")
    told = (
        f"What is wrong at one radius stays wrong at larger ones. At the trained radius: {attack}; elsewhere one start."
    )
    return Figure(Markup(svg), f"Accuracy by radius of the attack: {points}.", told)


def picture_figure(run: RunFolder) -> Figure:
    """A few test images before the attack, what it adds, and after it."""
    if not run.predictions:
        raise NotAvailable(run.problems.get("predictions.npz", "predictions.npz is empty"))
    pictures = run.predictions.get("pictures", np.zeros(0))
    if not len(pictures):
        raise NotAvailable("the inputs are no images")
    names = [str(name) for name in run.metric("class_names")]
    index = run.predictions["index"].tolist()
    rows = [index.index(i) for i in run.predictions["picture_index"].tolist()]
    true, clean, robust = (
        [names[c] for c in classes[rows]]
        for classes in (
            run.predictions["target"],
            run.predictions["logits"].argmax(1),
            run.predictions["robust_logits"].argmax(1),
        )
    )
    largest = max(float(np.abs(pictures[:, 1] - pictures[:, 0]).max()), 1e-12)
    shown = [(f"{t}: taken for {c}", pair[0]) for pair, t, c in zip(pictures, true, clean, strict=True)]
    shown += [("what is added", 0.5 + (pair[1] - pair[0]) / (2 * largest)) for pair in pictures]
    shown += [(f"taken for {c}", pair[1]) for pair, c in zip(pictures, robust, strict=True)]
    svg = picture_plot([(said, _pixels(x)) for said, x in shown], columns=len(pictures), key="attacked")
    turned = sum(a == t != b for t, a, b in zip(true, clean, robust, strict=True))
    alt = (
        f"{len(pictures)} test images, one a class: {turned} of them are classified correctly until they are attacked."
    )
    return Figure(Markup(svg), alt, f"{alt} Middle row: the change, {0.5 / largest:.1f} times as large, on grey.")


def robust_table(run: RunFolder) -> Table:
    """One row a class, the least robust first."""
    names, clean, robust = _per_class(run)
    per_class = run.metric("per_class")
    rows = [
        [
            Cell(names[i]),
            Cell(f"{per_class['train_count'][i]:,}"),
            Cell(format_metric("accuracy", clean[i])),
            Cell(format_metric("accuracy", robust[i]), bar=None if np.isnan(robust[i]) else float(robust[i])),
            Cell(f"{per_class['test_count'][i]:,}"),
        ]
        for i in np.argsort(robust, kind="stable")
    ]
    attack = run.metric("robustness", "attack")
    caption = f"Robust: correct within radius {run.metric('robustness', 'radius'):g}, attacked with {attack}."
    return Table(["Class", "Training", "Clean accuracy", "Robust accuracy", "Test"], rows, caption)


def _per_class(run: RunFolder) -> tuple[list[str], np.ndarray, np.ndarray]:
    rates = run.metric("robustness", "per_class")
    clean, robust = _numbers(rates["clean"]), _numbers(rates["robust"])
    names = [str(name) for name in run.metric("class_names")]
    if len(names) != len(robust) or not np.isfinite(robust).any():
        raise NotAvailable("metrics.json has no robust accuracy for each of its class names")
    return names, clean, robust


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _pixels(image: np.ndarray) -> np.ndarray:
    """(1 or 3, H, W) in [0, 1] to (H, W, 3) uint8."""
    pixels = (255 * image.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


__all__ = ["class_figure", "curve_figure", "picture_figure", "robust_table"]
