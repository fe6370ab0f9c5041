"""Plots of embeddings: maps of points by class, bands over epochs, and shares in bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from counterpoise.recipes.report_plots import COLORS, SIZE, STYLE, short_name, to_svg

MARKERS = "os^Dv*XP"  # with ten colours, eighty classes that differ
MOST_NAMED = 20


def map_plot(points: np.ndarray, classes: np.ndarray, names: Sequence[str], *, key: str) -> str:
    """Points (N, 2) coloured by their class (N,); classes beyond twenty share the legend's last entry."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((SIZE[0], 4.4), layout="constrained")
        _coloured(figure.subplots(), points, classes, names)
        figure.legend(loc="outside right upper", fontsize=8, markerscale=2)
        return to_svg(figure, key)


def maps_plot(
    points: np.ndarray,
    panels: Mapping[str, tuple[np.ndarray, Sequence[str]]],
    *,
    key: str,
    lines: Sequence[tuple[int, int]] = (),
) -> str:
    """The same points (N, 2), a panel below another for each of their labels (N,) with names; ``lines`` join some."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((SIZE[0], 3.6 * len(panels)), layout="constrained")
        for axes, (title, (labels, names)) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            for a, b in lines:
                axes.plot(*points[[a, b]].T, color=COLORS["muted"], linewidth=0.4, alpha=0.5, zorder=0)
            _coloured(axes, points, labels, names)
            axes.set_title(title)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, markerscale=2)
        return to_svg(figure, key)


def _coloured(axes: Any, points: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> None:
    """Points by class, each in a colour and shape of its own."""
    palette = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, c in enumerate(np.unique(classes)):
        chosen = points[classes == c]
        label = short_name(names[c]) if i < MOST_NAMED else None
        marker = MARKERS[i // 10 % len(MARKERS)]
        look = {"color": palette[i % 10], "marker": marker, "alpha": 0.75, "linewidths": 0, "label": label}
        axes.scatter(chosen[:, 0], chosen[:, 1], s=9, **look)
    axes.set_xticks([])
    axes.set_yticks([])


def band_plot(x: np.ndarray, bands: Mapping[str, Sequence[np.ndarray]], *, title: str, key: str) -> str:
    """Named (low, middle, high) over epochs: a line in a band."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for (label, (low, middle, high)), color in zip(bands.items(), ("accent", "warn", "medium"), strict=False):
            axes.fill_between(x, low, high, color=COLORS[color], alpha=0.25, linewidth=0)
            axes.plot(x, middle, color=COLORS[color], label=label, marker="o" if len(x) <= 15 else None, markersize=3)
        axes.set_title(title)
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")
        return to_svg(figure, key)


def share_plot(edges: np.ndarray, shares: dict[str, np.ndarray], *, key: str, title: str = "Cosine") -> str:
    """Histograms over the same bins, one over the other; shares of each sum to one."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for (label, share), color in zip(shares.items(), ("accent", "warn", "medium"), strict=False):
            axes.stairs(share, edges, color=COLORS[color], fill=True, alpha=0.35)
            axes.stairs(share, edges, color=COLORS[color], label=label)
        axes.set_xlabel(title)
        axes.set_yticks([])
        axes.legend(loc="best")
        return to_svg(figure, key)


__all__ = ["band_plot", "map_plot", "maps_plot", "share_plot"]
