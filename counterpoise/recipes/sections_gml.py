"""What a report shows of GML: the temperature that it learned."""

from __future__ import annotations

from markupsafe import Markup

from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_plots import curve_plot
from counterpoise.recipes.report_sections import Figure


def temperature_figure(run: RunFolder) -> Figure:
    """The learned temperature by epoch, each value the mean over an epoch's steps."""
    values = run.history.get("train/temperature")
    if values is None or not len(values):
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no temperature"))
    svg = curve_plot(run.history["epoch"], {"temperature": values}, title="Temperature", key="temperature")
    said = f"Learned temperature of the keys: {values[0]:.3f} in the first epoch, {values[-1]:.3f} in the last."
    return Figure(Markup(svg), f"Curve over {len(values)} epochs. {said}", said)
