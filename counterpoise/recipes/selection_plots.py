"""The plot of a selection: how near what is kept comes to all the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from counterpoise.recipes.report_plots import COLORS, SIZE, STYLE, to_svg


def coverage_plot(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, title: str, key: str) -> str:
    """Curves over the number of kept examples (logarithmic); the first in colour, the second dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for (name, (x, y)), style in zip(curves.items(), ("-", "--"), strict=True):
            axes.plot(x, y, style, color=COLORS["accent" if style == "-" else "muted"], label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel("Kept examples")
        axes.legend()
        return to_svg(figure, key)


__all__ = ["coverage_plot"]
