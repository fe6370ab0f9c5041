"""Plots of clusters: mass over epochs, stacked, and which classes lie in which."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from counterpoise.recipes.report_plots import COLORS, SIZE, STYLE, percent_axis, short_name, to_svg

MOST_NAMED = 30
MOST_ANNOTATED = 12


def mass_plot(mass: np.ndarray, *, key: str) -> str:
    """Masses (E, K) of clusters over epochs, stacked, the largest of the last epoch at the bottom."""
    order = np.argsort(-mass[-1], kind="stable")
    shades = np.linspace(0.9, 0.25, len(order))
    with matplotlib.rc_context(STYLE):
        figure = Figure((SIZE[0], 3.4), layout="constrained")
        axes = figure.subplots()
        epochs = np.arange(len(mass))
        if len(mass) == 1:  # one epoch is no area
            epochs, mass = np.array([0, 1]), np.repeat(mass, 2, axis=0)
        base = np.zeros(len(mass))
        for shade, k in zip(shades, order, strict=True):
            axes.fill_between(
                epochs, base, base + mass[:, k], color=COLORS["accent"], alpha=shade, linewidth=0.4, edgecolor="white"
            )
            base = base + mass[:, k]
        percent_axis(axes, "Mass of each cluster's labels (share of the examples)")
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, key)


def contingency_plot(share: np.ndarray, classes: Sequence[str], clusters: Sequence[str], *, key: str) -> str:
    """(C, K) share of each class in each cluster, in the order given; annotated up to twelve."""
    image = np.empty((*share.shape, 4))
    image[:] = to_rgba(COLORS["accent"])
    image[..., 3] = share  # the page shows through: as good on dark as on light
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        axes.imshow(image, interpolation="nearest", aspect="auto")
        if max(share.shape) <= MOST_ANNOTATED:
            for (i, j), value in np.ndenumerate(share):
                if value >= 0.005:
                    color = "#ffffff" if value > 0.8 else COLORS["ink"]
                    axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
        for names, set_ticks in ((classes, axes.set_yticks), (clusters, axes.set_xticks)):
            few = len(names) <= MOST_NAMED
            set_ticks(range(len(names)) if few else [], [short_name(name) for name in names] if few else [])
        axes.tick_params(length=0)
        axes.set_title("Clusters of each class (% of the class)")
        axes.set_xlabel("Cluster")
        axes.set_ylabel("Class")
        axes.spines[:].set_visible(False)
        return to_svg(figure, key)
