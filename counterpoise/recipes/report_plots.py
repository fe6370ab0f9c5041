"""The plots of a report: plain data in, one inline SVG out, in the colours of the page (light or dark)."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from counterpoise.recipes.evaluation import BANDS

# Drawn in these colours, then handed to the page's style sheet under these names.
COLORS = {
    "ink": "#1b2530",
    "muted": "#66727f",
    "line": "#d9dee4",
    "accent": "#2b6cb0",
    "warn": "#c2562b",
    "head": "#27548a",
    "medium": "#2f9c95",
    "tail": "#e08a2e",
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's typeface
    "svg.hashsalt": "counterpoise",
    "text.parse_math": False,  # a class may be called "$"
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": COLORS["muted"],
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), COLORS["ink"]),
}
SIZE = (5.2, 4.5)  # inches
_NAMED_CLASSES = 30  # more names than this cannot be read beside each other
_ANNOTATED_CLASSES = 12


def class_plot(
    names: Sequence[str],
    counts: Sequence[float],
    recall: Sequence[float | None],
    bands: Sequence[str | None],
    *,
    counted: str = "Training examples",
    score: str = "Recall",
    key: str = "classes",
) -> str:
    """Training examples a class, largest first (bars), above the recall, or another ``score``, of the same (stems)."""
    order = np.argsort(-np.asarray(counts, dtype=float), kind="stable")
    n = np.asarray(counts, dtype=float)[order]
    rate = _numbers(recall)[order]
    band = [bands[i] or "" for i in order]
    colors = [COLORS.get(b, COLORS["accent"]) for b in band]
    known = rate[np.isfinite(rate)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        panels = figure.subplots(2 if len(known) else 1, 1, sharex=True, squeeze=False)[:, 0]
        _count_panel(panels[0], n, colors, counted)
        present = [b for b in BANDS if b in band]
        panels[0].legend(handles=[Patch(color=COLORS[b], label=b) for b in present], ncols=3, loc="upper right")
        if len(known):
            _rate_panel(panels[1], rate, colors, f"{score} (dashed: mean {100 * math.fsum(known) / len(known):.1f}%)")
        panels[-1].set_xlim(-0.7, len(n) - 0.3)
        class_ticks(panels[-1], [names[i] for i in order])
        return to_svg(figure, key)


def _count_panel(axes: Axes, counts: np.ndarray, colors: list[str], title: str) -> None:
    bars = axes.bar(np.arange(len(counts)), counts, color=colors, width=0.78)
    axes.set_title(title)
    if counts.max() > 20 * max(counts.min(), 1):
        axes.set_title(f"{title} (log scale)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.minorticks_off()
    if len(counts) <= _ANNOTATED_CLASSES:
        axes.bar_label(bars, [f"{n:.0f}" for n in counts], fontsize=7.5, padding=1.5)
    axes.margins(y=0.14)


def _rate_panel(axes: Axes, rate: np.ndarray, colors: list[str], title: str) -> None:
    x = np.arange(len(rate))
    axes.vlines(x, 0, rate, colors=colors, linewidth=max(1.0, min(3.0, 90 / len(x))))
    axes.scatter(x, rate, c=colors, s=max(6, min(30, 900 / len(x))), zorder=3, clip_on=False)
    axes.axhline(float(np.nanmean(rate)), color=COLORS["muted"], linestyle="--", linewidth=1)
    percent_axis(axes, title)


def bar_plot(names: Sequence[str], values: np.ndarray, *, title: str, marked: int | None = None) -> str:
    """Bars in [0, 1], one a name, NaN left out; ``marked`` is drawn in another colour."""
    colors = [COLORS["warn"] if i == marked else COLORS["accent"] for i in range(len(values))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        bars = axes.bar(np.arange(len(values)), np.nan_to_num(values), color=colors, width=0.7)
        if len(values) <= _ANNOTATED_CLASSES:
            shown = ["n/a" if math.isnan(v) else f"{100 * v:.1f}%" for v in values]
            axes.bar_label(bars, shown, fontsize=8, padding=1.5)
        percent_axis(axes, title)
        axes.set_ylim(0, 1.08)  # room for the label of a full bar
        class_ticks(axes, names)
        return to_svg(figure, title.split()[0].lower() + "-bars")


def paired_bar_plot(names: Sequence[str], values: dict[str, np.ndarray], *, title: str, key: str) -> str:
    """Two bars in [0, 1] a name, side by side; ``values`` by what the legend says, NaN left out."""
    colors = (COLORS["line"], COLORS["accent"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for (label, rates), color, shift in zip(values.items(), colors, (-0.2, 0.2), strict=True):
            edges: dict[str, Any] = {"edgecolor": COLORS["muted"], "linewidth": 0.5}
            axes.bar(np.arange(len(rates)) + shift, np.nan_to_num(rates), 0.4, color=color, label=label, **edges)
        percent_axis(axes, title)
        class_ticks(axes, names)
        axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08 if len(names) > _NAMED_CLASSES else -0.16))
        return to_svg(figure, key)


def rate_plot(x: np.ndarray, rates: np.ndarray, *, title: str, label: str, key: str) -> str:
    """Rates in [0, 1] against x, as a line through marked points."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        axes.plot(x, rates, "-o", color=COLORS["accent"], markersize=4, clip_on=False)
        percent_axis(axes, title)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        return to_svg(figure, key)


def confusion_plot(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Row-normalised (C, C) confusion matrix, in the order given; annotated up to twelve classes."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = np.empty((*share.shape, 4))
    image[:] = to_rgba(COLORS["accent"])
    image[..., 3] = share  # the page shows through: as good on dark as on light
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        axes.imshow(image, interpolation="nearest", aspect="auto")
        if len(share) <= _ANNOTATED_CLASSES:
            for (i, j), value in np.ndenumerate(share):
                if value >= 0.005:
                    color = "#ffffff" if value > 0.8 else COLORS["ink"]
                    axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
        class_ticks(axes, names)
        few = len(names) <= _NAMED_CLASSES
        axes.set_yticks(range(len(names)) if few else [], [short_name(name) for name in names] if few else [])
        axes.tick_params(length=0)
        axes.set_title("Confusion (% of the true class)")
        axes.set_xlabel("Predicted")
        axes.set_ylabel("True")
        axes.spines[:].set_visible(False)
        return to_svg(figure, "confusion")


def reliability_plot(confidence: np.ndarray, accuracy: np.ndarray, count: np.ndarray) -> str:
    """Accuracy against confidence in equal-width bins (B,), with the share of examples in each bin below."""
    width = 1 / len(count)
    x = (np.arange(len(count)) + 0.5) * width
    error = float(np.nansum(np.abs(confidence - accuracy) * count) / count.sum())
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.bar(x, np.nan_to_num(accuracy), width * 0.94, color=COLORS["accent"], label="accuracy")
        top.hlines(confidence, x - width / 2, x + width / 2, color=COLORS["warn"], linewidth=2, label="mean confidence")
        top.plot([0, 1], [0, 1], color=COLORS["ink"], linestyle="--", linewidth=0.9)
        top.legend(loc="upper left")
        percent_axis(top, f"Accuracy (ECE {100 * error:.1f}%)")
        bottom.bar(x, count / count.sum(), width * 0.94, color=COLORS["muted"])
        bottom.set_title("Share of examples")
        bottom.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bottom.yaxis.set_major_locator(MaxNLocator(3))
        bottom.set_xlabel("Confidence")
        bottom.set_xlim(0, 1)
        bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return to_svg(figure, "reliability")


def learning_plot(epoch: np.ndarray, losses: dict[str, np.ndarray], scores: dict[str, np.ndarray]) -> str:
    """Losses (above) and scores in [0, 1] (below) by epoch; the first score's best epoch is marked."""
    titled = ((losses, "Loss"), (scores, "Validation"))
    panels = [(title if len(curves) > 1 else next(iter(curves)), curves) for curves, title in titled if curves]
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(rows, panels, strict=True):
            for (label, values), style in zip(curves.items(), ("-", "--"), strict=False):
                color = COLORS["accent"] if style == "-" else COLORS["muted"]
                known = np.isfinite(values)
                marker = "o" if known.sum() <= 15 else None
                x = epoch[known]
                axes.plot(x, values[known], style, color=color, label=label, marker=marker, markersize=3)
            if len(curves) > 1:
                axes.legend(loc="best")
            if curves is scores:
                percent_axis(axes, title, limits=False)
                _mark_best(axes, epoch, next(iter(curves.values())))
            else:
                axes.set_title(title)
        rows[-1].set_xlabel("Epoch")
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, "learning")


def curve_plot(
    x: np.ndarray, curves: dict[str, np.ndarray], *, title: str, key: str, log: bool = False, percent: bool = False
) -> str:
    """Named curves over epochs, each in a colour and style of its own, on a linear or logarithmic scale."""
    colors = [COLORS[name] for name in ("accent", "warn", "medium", "tail", "head", "muted")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for i, (label, values) in enumerate(curves.items()):
            known = np.isfinite(values)
            style = ("-", "--", ":")[i // len(colors) % 3]
            marker = "o" if known.sum() <= 15 else None
            axes.plot(
                x[known], values[known], style, color=colors[i % len(colors)], label=label, marker=marker, markersize=3
            )
        if percent:
            percent_axis(axes, title, limits=False)
        axes.set_title(title)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.minorticks_off()
        axes.legend(loc="best")
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, key)


def scatter_plot(panels: Sequence[tuple[str, np.ndarray, np.ndarray]], *, key: str) -> str:
    """Predicted (second) against true (first) numbers, a panel a name; a perfect prediction lies on the diagonal."""
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure((SIZE[0] if columns > 1 else 3.6, 2.9 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (title, true, predicted) in zip(grid, panels, strict=False):
            axes.scatter(true, predicted, s=5, color=COLORS["accent"], alpha=0.45, linewidths=0)
            ends = [float(np.nanmin(true)), float(np.nanmax(true))]
            axes.plot(ends, ends, color=COLORS["ink"], linestyle="--", linewidth=0.9)
            axes.set_title(title)
            axes.set_xlabel("True")
            axes.set_ylabel("Predicted")
        for axes in figure.axes[len(panels) :]:
            axes.set_axis_off()
        return to_svg(figure, key)


def histogram_plot(values: dict[str, np.ndarray], *, title: str, key: str, bins: int = 30) -> str:
    """Two histograms over the same bins, stacked; what is not finite is left out."""
    finite = {name: x[np.isfinite(x)] for name, x in values.items()}
    colors = [COLORS["accent"], COLORS["line"]][: len(finite)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        edges: dict[str, Any] = {"edgecolor": COLORS["muted"], "linewidth": 0.4}
        axes.hist(list(finite.values()), bins=bins, stacked=True, label=list(finite), color=colors, **edges)
        axes.set_title(title)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return to_svg(figure, key)


def picture_plot(
    pictures: Sequence[tuple[str, np.ndarray]], *, columns: int, key: str, legend: dict[str, str] | None = None
) -> str:
    """Captioned images (H, W, 3) uint8 in rows of ``columns``, unsmoothed; ``legend``: names of colours."""
    rows = math.ceil(len(pictures) / columns)
    lines = 1 + max(caption.count("\n") for caption, _ in pictures)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((1.7 * columns, (1.6 + 0.14 * lines) * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (caption, pixels) in zip(panels, pictures, strict=False):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(caption, fontsize=8)
        for axes in figure.axes:
            axes.set_axis_off()
        if legend:
            patches = [Patch(color=color, label=short_name(name)) for name, color in legend.items()]
            figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6))
        return to_svg(figure, key)


def to_svg(figure: Figure, key: str) -> str:
    """The figure as an ``<svg>`` element without header or metadata; ``key`` makes its ids unique on the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that the measuring typeface lacks is no loss here
        figure.savefig(buffer, format="svg", metadata=nothing, dpi=200)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def percent_axis(axes: Axes, title: str, *, limits: bool = True) -> None:
    """A title, and percent on the vertical axis, from 0 to 100 with ``limits``."""
    axes.set_title(title)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if limits:
        axes.set_ylim(0, 1)


def _mark_best(axes: Axes, epoch: np.ndarray, values: np.ndarray) -> None:
    if not np.isfinite(values).any():
        return
    best = int(np.nanargmax(values))
    axes.plot(epoch[best], values[best], "o", color=COLORS["tail"], markersize=6, zorder=4)
    side = "right" if best > len(values) / 2 else "left"
    label = f"{100 * values[best]:.1f}%"
    axes.annotate(label, (epoch[best], values[best]), (0, 8), textcoords="offset points", ha=side)
    axes.margins(y=0.18)


def class_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names of classes below their bars, aslant where they are many, left out where they could not be read."""
    if len(names) > _NAMED_CLASSES:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(names)} classes, most to fewest training examples")
        return
    short = [short_name(name) for name in names]
    slanted = max(map(len, short)) * len(short) > 50
    axes.set_xticks(range(len(names)), short, rotation=45 if slanted else 0)
    if slanted:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def short_name(name: str, longest: int = 14) -> str:
    """A name that fits, cut with an ellipsis."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


__all__ = [
    "COLORS",
    "SIZE",
    "STYLE",
    "bar_plot",
    "class_plot",
    "class_ticks",
    "confusion_plot",
    "curve_plot",
    "histogram_plot",
    "learning_plot",
    "paired_bar_plot",
    "percent_axis",
    "picture_plot",
    "rate_plot",
    "reliability_plot",
    "scatter_plot",
    "short_name",
    "to_svg",
]
