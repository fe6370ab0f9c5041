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

_STYLE: dict[Any, Any] = {
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
_SIZE = (5.2, 4.5)  # inches
_NAMED_CLASSES = 30  # more names than this cannot be read beside each other
_ANNOTATED_CLASSES = 12


def class_plot(
    names: Sequence[str], counts: Sequence[float], recall: Sequence[float | None], bands: Sequence[str | None]
) -> str:
    """Training examples a class, largest first (bars), above the recall of the same classes (stems)."""
    order = np.argsort(-np.asarray(counts, dtype=float), kind="stable")
    n = np.asarray(counts, dtype=float)[order]
    rate = _numbers(recall)[order]
    band = [bands[i] or "" for i in order]
    colors = [COLORS.get(b, COLORS["accent"]) for b in band]
    known = rate[np.isfinite(rate)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(_SIZE, layout="constrained")
        panels = figure.subplots(2 if len(known) else 1, 1, sharex=True, squeeze=False)[:, 0]
        _count_panel(panels[0], n, colors)
        present = [b for b in BANDS if b in band]
        panels[0].legend(handles=[Patch(color=COLORS[b], label=b) for b in present], ncols=3, loc="upper right")
        if len(known):
            _recall_panel(panels[1], rate, colors, math.fsum(known) / len(known))
        panels[-1].set_xlim(-0.7, len(n) - 0.3)
        _class_ticks(panels[-1], [names[i] for i in order])
        return to_svg(figure, "classes")


def _count_panel(axes: Axes, counts: np.ndarray, colors: list[str]) -> None:
    bars = axes.bar(np.arange(len(counts)), counts, color=colors, width=0.78)
    axes.set_title("Training examples")
    if counts.max() > 20 * max(counts.min(), 1):
        axes.set_title("Training examples (log scale)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.minorticks_off()
    if len(counts) <= _ANNOTATED_CLASSES:
        axes.bar_label(bars, [f"{n:.0f}" for n in counts], fontsize=7.5, padding=1.5)
    axes.margins(y=0.14)


def _recall_panel(axes: Axes, rate: np.ndarray, colors: list[str], mean: float) -> None:
    x = np.arange(len(rate))
    axes.vlines(x, 0, rate, colors=colors, linewidth=max(1.0, min(3.0, 90 / len(x))))
    axes.scatter(x, rate, c=colors, s=max(6, min(30, 900 / len(x))), zorder=3, clip_on=False)
    axes.axhline(mean, color=COLORS["muted"], linestyle="--", linewidth=1)
    _percent(axes, f"Recall (dashed: mean {100 * mean:.1f}%)")


def bar_plot(names: Sequence[str], values: np.ndarray, *, title: str, marked: int | None = None) -> str:
    """Bars in [0, 1], one a name, NaN left out; ``marked`` is drawn in another colour."""
    colors = [COLORS["warn"] if i == marked else COLORS["accent"] for i in range(len(values))]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.subplots()
        bars = axes.bar(np.arange(len(values)), np.nan_to_num(values), color=colors, width=0.7)
        if len(values) <= _ANNOTATED_CLASSES:
            shown = ["n/a" if math.isnan(v) else f"{100 * v:.1f}%" for v in values]
            axes.bar_label(bars, shown, fontsize=8, padding=1.5)
        _percent(axes, title)
        _class_ticks(axes, names)
        return to_svg(figure, title.split()[0].lower() + "-bars")


def confusion_plot(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Row-normalised (C, C) confusion matrix, in the order given; annotated up to twelve classes."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = np.empty((*share.shape, 4))
    image[:] = to_rgba(COLORS["accent"])
    image[..., 3] = share  # the page shows through: as good on dark as on light
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.imshow(image, interpolation="nearest", aspect="auto")
        if len(share) <= _ANNOTATED_CLASSES:
            for (i, j), value in np.ndenumerate(share):
                if value >= 0.005:
                    color = "#ffffff" if value > 0.8 else COLORS["ink"]
                    axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
        _class_ticks(axes, names)
        few = len(names) <= _NAMED_CLASSES
        axes.set_yticks(range(len(names)) if few else [], [_short(name) for name in names] if few else [])
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
    with matplotlib.rc_context(_STYLE):
        figure = Figure(_SIZE, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.bar(x, np.nan_to_num(accuracy), width * 0.94, color=COLORS["accent"], label="accuracy")
        top.hlines(confidence, x - width / 2, x + width / 2, color=COLORS["warn"], linewidth=2, label="mean confidence")
        top.plot([0, 1], [0, 1], color=COLORS["ink"], linestyle="--", linewidth=0.9)
        top.legend(loc="upper left")
        _percent(top, f"Accuracy (ECE {100 * error:.1f}%)")
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
    with matplotlib.rc_context(_STYLE):
        figure = Figure(_SIZE, layout="constrained")
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
                _percent(axes, title, limits=False)
                _mark_best(axes, epoch, next(iter(curves.values())))
            else:
                axes.set_title(title)
        rows[-1].set_xlabel("Epoch")
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, "learning")


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


def _percent(axes: Axes, title: str, *, limits: bool = True) -> None:
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


def _class_ticks(axes: Axes, names: Sequence[str]) -> None:
    if len(names) > _NAMED_CLASSES:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(names)} classes, most to fewest training examples")
        return
    short = [_short(name) for name in names]
    slanted = max(map(len, short)) * len(short) > 50
    axes.set_xticks(range(len(names)), short, rotation=45 if slanted else 0)
    if slanted:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _short(name: str, longest: int = 14) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


__all__ = ["bar_plot", "class_plot", "confusion_plot", "learning_plot", "reliability_plot", "to_svg"]
