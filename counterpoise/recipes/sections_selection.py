"""What a report shows of a selection: scores, class balance, coverage, and pictures of what was kept and dropped."""

from __future__ import annotations

import numpy as np
import torch
from markupsafe import Markup

from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_pictures import decoded
from counterpoise.recipes.report_plots import histogram_plot, paired_bar_plot, picture_plot
from counterpoise.recipes.report_sections import Cell, Figure, Section, Table
from counterpoise.recipes.selecting import coverage_curve, read_selection
from counterpoise.recipes.selection_plots import coverage_plot

MOST_COVERED = 5_000  # examples that a coverage curve is drawn from


def _arrays(run: RunFolder) -> dict[str, np.ndarray]:
    file = run.path / "selection.npz"
    if not file.exists():
        raise NotAvailable("there is no selection.npz")
    return read_selection(file)


def facts_table(run: RunFolder) -> Table:
    """How it was selected, and how long that took."""
    found = run.metric("selection")
    shown = {
        "Method": found["method"],
        "Used to": found.get("use"),
        "Kept": f"{found['kept']:,} of {found['of']:,} ({100 * found['kept'] / found['of']:.1f}%)",
        "Selection took": f"{found['seconds']} s",
    }
    if found.get("effective_share") is not None:
        shown["Effective share of the weighted examples"] = f"{100 * found['effective_share']:.1f}%"
    rows = [[Cell(name), Cell(str(value))] for name, value in shown.items() if value is not None]
    return Table(["Selection", ""], rows, numbers=False)


def score_figure(run: RunFolder) -> Figure:
    """Histogram of the scores, kept against dropped."""
    arrays = _arrays(run)
    if "scores" not in arrays:
        raise NotAvailable("the method has no score an example")
    scores = arrays["scores"]
    kept = np.zeros(len(scores), dtype=bool)
    kept[arrays["indices"]] = True
    svg = histogram_plot(
        {"kept": scores[kept], "dropped": scores[~kept]}, title="Scores (larger = harder)", key="scores"
    )
    said = f"Median score {np.median(scores[kept]):.3f} of what is kept"
    if (~kept).any():
        said += f", {np.median(scores[~kept]):.3f} of what is dropped"
    return Figure(Markup(svg), f"Histogram of scores. {said}.", f"{said}.")


def balance_figure(run: RunFolder) -> Figure:
    """Share of each class before and after."""
    arrays = _arrays(run)
    targets = arrays["targets"].astype(int)
    names = [str(name) for name in run.metrics.get("class_names") or range(targets.max() + 1)]
    before = np.bincount(targets, minlength=len(names)) / len(targets)
    after = np.bincount(targets[arrays["indices"]], minlength=len(names)) / len(arrays["indices"])
    svg = paired_bar_plot(names, {"all examples": before, "kept": after}, title="Share of each class", key="balance")
    changed = int(np.abs(after - before).argmax())
    said = f"Largest change: {names[changed]}, {100 * (after - before)[changed]:+.1f} points."
    return Figure(Markup(svg), f"Bars: share of {len(names)} classes, before and after. {said}", said)


def coverage_figure(run: RunFolder) -> Figure:
    """How near the kept examples are to all others, as more of them are kept; against random ones."""
    arrays = _arrays(run)
    if "features" not in arrays or len(arrays["indices"]) < 2:
        raise NotAvailable("no features were stored, or a single example was kept")
    features = torch.from_numpy(arrays["features"].astype(np.float32))
    order = torch.from_numpy(arrays["indices"])
    seen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    others = features[seen[:MOST_COVERED]]
    of = {}
    for name, picks in (("selection", order), ("random", seen[: len(order)])):
        placed = torch.cat([others, features[picks]])
        of[name] = coverage_curve(placed, torch.arange(len(others), len(placed)))
    svg = coverage_plot(of, title="Mean distance to the nearest kept example", key="coverage")
    last = {name: values[-1] for name, (_, values) in of.items()}
    said = f"With all {len(order):,} picks {last['selection']:.3g}, with as many random ones {last['random']:.3g}."
    return Figure(Markup(svg), f"Two curves that fall with the number of kept examples. {said}", said)


def picture_figure(run: RunFolder) -> Figure:
    """A few kept and a few dropped examples."""
    examples = run.metric("selection", "pictures")
    pictures = [
        (f"{kind}\n{name}", decoded(text)) for kind in ("kept", "dropped") for name, text in examples.get(kind) or []
    ]
    if not pictures:
        raise NotAvailable("the examples are not images")
    columns = max(len(examples.get(kind) or []) for kind in ("kept", "dropped"))
    svg = picture_plot(pictures, columns=columns, key="picked")
    said = "The first picks (above), and the examples that a score would drop first, or the first dropped (below)."
    return Figure(Markup(svg), "Small images of kept and dropped examples.", said)


selection_sections = (
    Section(
        "Selection",
        {
            "Table of the selection": facts_table,
            "Histogram of scores": score_figure,
            "Class balance": balance_figure,
            "Coverage curve": coverage_figure,
            "Kept and dropped": picture_figure,
        },
    ),
)
