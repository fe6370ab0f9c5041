"""Plots of fairness: bars by group beside each other, weights by subgroup, epochs between accuracy and fairness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from counterpoise.recipes.report_plots import COLORS, SIZE, STYLE, class_ticks, percent_axis, to_svg

SERIES = ("accent", "tail", "medium", "warn", "head", "muted")


def grouped_bar_plot(names: Sequence[str], values: Mapping[str, np.ndarray], *, title: str, key: str) -> str:
    """For each name one bar in [0, 1] a series, side by side, with its percent; NaN is left out and says so."""
    width = 0.8 / len(values)
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for i, (label, rates) in enumerate(values.items()):
            x = np.arange(len(rates)) + (i - (len(values) - 1) / 2) * width
            bars = axes.bar(x, np.nan_to_num(rates), 0.94 * width, color=_color(i), label=label)
            if len(values) * len(names) <= 16:
                shown = ["n/a" if np.isnan(rate) else f"{100 * rate:.0f}" for rate in rates]
                axes.bar_label(bars, shown, fontsize=8, padding=1.5)
        percent_axis(axes, title)
        class_ticks(axes, names)
        _legend_below(axes, len(values))
        return to_svg(figure, key)


def weight_plot(weights: Mapping[str, np.ndarray], *, title: str, key: str) -> str:
    """Histograms of positive weights, on a logarithmic axis, one outline a series."""
    known = np.concatenate(list(weights.values()))
    low, high = min(0.5, float(known.min())), max(2.0, float(known.max()))
    edges = np.geomspace(max(low, 1e-4), high, 25)
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for i, (label, values) in enumerate(weights.items()):
            share = np.full(len(values), 1 / max(len(values), 1))
            inside = np.clip(values, edges[0], edges[-1])
            axes.hist(
                inside, edges.tolist(), weights=share, histtype="step", linewidth=1.6, color=_color(i), label=label
            )
        axes.axvline(1, color=COLORS["muted"], linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        axes.set_xlabel("Weight (dashed: one)")
        percent_axis(axes, title, limits=False)
        _legend_below(axes, len(weights))
        return to_svg(figure, key)


def trade_off_plot(
    fairness: np.ndarray, accuracy: np.ndarray, *, best: int, front: np.ndarray, label: str, key: str
) -> str:
    """One dot an epoch: accuracy against fairness, those of the front in another colour, the chosen one large."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        axes.scatter(fairness, accuracy, s=14, color=COLORS["muted"], alpha=0.5, label="epochs")
        order = front[np.argsort(fairness[front])]
        axes.plot(fairness[order], accuracy[order], "o-", markersize=4, color=COLORS["accent"], label="none is better")
        axes.plot(fairness[best], accuracy[best], "o", markersize=9, color=COLORS["tail"], label="chosen")
        percent_axis(axes, "Balanced accuracy against fairness (validation)", limits=False)
        axes.set_xlabel(label)
        _legend_below(axes, 3)
        return to_svg(figure, key)


def _color(i: int) -> str:
    return COLORS[SERIES[i % len(SERIES)]]


def _legend_below(axes: Axes, entries: int) -> None:
    axes.figure.legend(loc="outside lower center", ncols=min(entries, 4))


__all__ = ["grouped_bar_plot", "trade_off_plot", "weight_plot"]
