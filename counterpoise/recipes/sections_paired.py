"""What a report shows of pairs: how often partners find each other, at what cosine, and what a row retrieves."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise.recipes.embedding_plots import band_plot, maps_plot, share_plot
from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_pictures import decoded, encoded
from counterpoise.recipes.report_plots import (
    COLORS,
    SIZE,
    STYLE,
    curve_plot,
    learning_plot,
    percent_axis,
    picture_plot,
    to_svg,
)
from counterpoise.recipes.report_sections import CLOSING, RESULTS, Figure, Section
from counterpoise.recipes.retrieval import recall_at
from counterpoise.recipes.sections_embeddings import chosen, class_table, in_plane, unit_rows

SHOWN, RETRIEVED = 6, 6  # rows of a table, and the images that each retrieves
SAID = 2  # of a row's entries, those farthest from the mean
MAPPED, JOINED = 400, 60  # test pairs of the map, and those of which the two are joined
SIGNS = {
    "val/std": "spread of images (1 = whole sphere)",
    "val/table_std": "spread of rows",
    "val/alignment": "alignment (0 = partners coincide)",
    "val/uniformity": "uniformity of images (0 = one point)",
    "val/table_uniformity": "uniformity of rows",
}
RANKS = {"val/effective_rank": "images", "val/table_effective_rank": "rows"}
SCORES = ("recall_at_1", "recall_at_5", "recall_at_10")


def rank_curve(ranks: Tensor) -> dict[str, list[float]]:
    """Recall at some k, evenly spread over a logarithmic axis, of ranks (N,)."""
    at = sorted({round(k) for k in np.geomspace(1, max(len(ranks), 1), 40)})
    return {"k": [float(k) for k in at], "recall": [recall_at(ranks, k) for k in at]}


def recall_figure(run: RunFolder) -> Figure:
    """Recall at k in both directions, against chance."""
    curves = run.metric("recalls")
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(SIZE, layout="constrained")
        axes = canvas.subplots()
        for (name, curve), color in zip(curves.items(), ("accent", "warn"), strict=False):
            axes.plot(curve["k"], curve["recall"], color=COLORS[color], label=name.replace("_", " "))
        k = np.asarray(next(iter(curves.values()))["k"])
        axes.plot(k, k / k[-1], "--", color=COLORS["muted"], label="chance")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("k, the best that are looked at")
        percent_axis(axes, "Partners among the best k")
        axes.legend(loc="best")
        svg = to_svg(canvas, "recalls")
    shares = [f"{name.replace('_', ' ')} {100 * _at(curve, 5):.0f}%" for name, curve in curves.items()]
    said = f"Among the best 5 of {k[-1]:,.0f}: {', '.join(shares)}; by chance {500 / k[-1]:.1f}%."
    return Figure(Markup(svg), f"Rising curves. {said}", said)


def _at(curve: dict[str, list[float]], k: int) -> float:
    return float(np.interp(k, curve["k"], curve["recall"]))


def retrieval_figure(run: RunFolder) -> Figure:
    """Some rows of the test table: the image of each, and what it retrieves."""
    rows = run.metric("retrieved")
    if not rows:
        raise NotAvailable("there are no test pairs")
    pictures = [(caption, decoded(text)) for row in rows for caption, text in row]
    svg = picture_plot(pictures, columns=len(rows[0]), key="retrieved")
    hits = sum(any(caption.startswith("=") for caption, _ in row[1:]) for row in rows)
    said = (
        f"Left a test image under what its row says most of it, in standard deviations; beside it the images that the "
        f"row retrieves, best first. Its own (=) is among them for {hits} of {len(rows)} rows."
    )
    return Figure(Markup(svg), f"Small images. {said}", said)


def histogram_figure(run: RunFolder) -> Figure:
    """Cosines of matching and of other test pairs at the best epoch."""
    found = run.metric("similarities")
    edges, positive, negative = (np.asarray(found[name]) for name in ("edges", "positive", "negative"))
    shares = {"image and its row": positive, "image and another row": negative}
    svg = share_plot(edges, shares, key="similarities")
    said = f"The two overlap by {100 * float(np.minimum(positive, negative).sum()):.0f}%."
    return Figure(Markup(svg), f"Histograms of cosines of test pairs. {said}", f"Test pairs at the best epoch. {said}")


def bands_figure(run: RunFolder) -> Figure:
    """The same on validation pairs, by epoch."""
    bands: dict[str, Any] = {}
    for name, label in (("positive", "image and its row"), ("negative", "image and another row")):
        columns = [run.history.get(f"val/{name}_similarity_{q}") for q in (10, 50, 90)]
        if any(c is None for c in columns):
            raise NotAvailable(run.problems.get("history.csv", "history.csv has no similarities"))
        bands[label] = columns
    svg = band_plot(run.history["epoch"], bands, title="Cosine of embeddings: median and middle 80%", key="pairs")
    said = ", ".join(f"{c[1][-1]:.2f} for {label}" for label, c in bands.items())
    said = f"In the last epoch the median is {said}."
    return Figure(Markup(svg), f"Two bands over epochs. {said}", said)


def map_figure(run: RunFolder) -> Figure:
    """Test embeddings of both modalities in one plane, and once more by class where there are any."""
    sides = [unit_rows(run, name, MAPPED) for name in ("image", "table")]
    n = len(sides[0])
    panels = {"Modalities": (np.repeat([0, 1], n), ["images", "rows"])}
    names = [str(name) for name in run.metrics.get("class_names") or []]
    if len(names) > 1:
        panels["Classes"] = (np.tile(chosen(run.predictions["target"], MAPPED), 2), names)
    joined = [(i, n + i) for i in range(0, n, max(1, n // JOINED))][:JOINED]
    svg = maps_plot(in_plane(np.concatenate(sides)), panels, key="map", lines=joined)
    apart = float(np.linalg.norm(sides[0].mean(0) - sides[1].mean(0)))
    said = (
        f"{n} test images and their rows, {len(joined)} of them joined, coloured by modality"
        f"{', and below by class' if len(panels) > 1 else ''}. The centres of the two modalities are {apart:.2f} "
        f"apart, of vectors of length one; distances on the map say little."
    )
    return Figure(Markup(svg), f"Map of embeddings in the plane. {said}", said)


def _curves(run: RunFolder, named: dict[str, str]) -> dict[str, np.ndarray]:
    curves = {label: run.history[name] for name, label in named.items() if name in run.history}
    if not curves:
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no signs of collapse"))
    return curves


def collapse_figure(run: RunFolder) -> Figure:
    """Spread and uniformity of either modality, and how far partners are apart, by epoch."""
    curves = _curves(run, SIGNS)
    svg = curve_plot(run.history["epoch"], curves, title="Signs of collapse", key="collapse")
    said = "Of validation pairs. Collapsed embeddings have spread 0 and uniformity 0; alignment alone may be collapse."
    return Figure(Markup(svg), f"Curves over {len(run.history['epoch'])} epochs. {said}", said)


def rank_figure(run: RunFolder) -> Figure:
    """Effective rank of either modality by epoch."""
    curves = _curves(run, RANKS)
    svg = curve_plot(run.history["epoch"], curves, title="Directions in use (effective rank)", key="rank")
    said = "In the last epoch " + ", ".join(f"{x[-1]:.1f} of {label}" for label, x in curves.items()) + "."
    return Figure(Markup(svg), f"Curves over {len(run.history['epoch'])} epochs. {said}", said)


def learning_figure(run: RunFolder) -> Figure:
    """The objective and the recalls."""
    if not run.history:
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no rows"))
    losses = {"objective": run.history["train/loss"]} if "train/loss" in run.history else {}
    names = [name for name in SCORES if f"val/{name}" in run.history]
    scores = {name.replace("_", " "): run.history[f"val/{name}"] for name in names}
    svg = learning_plot(run.history["epoch"], losses, scores)
    said = "Objective on the training split; recall at 1, 5 and 10 on the validation split, both directions' mean."
    return Figure(Markup(svg), f"Curves over {len(run.history['epoch'])} epochs. {said}", said)


def retrieved_pictures(data: Any, image: Tensor, table: Tensor) -> list[list[tuple[str, str]]]:
    """For some test rows: the image with what the row says, then the nearest images, "=" before the row's own."""
    test, names = data.splits.test, data.splits.class_names
    step = max(1, len(image) // SHOWN)
    found = []
    for i in range(0, len(image), step)[:SHOWN]:
        near = (normalize(image, dim=1) @ normalize(table[i], dim=0)).topk(min(RETRIEVED, len(image))).indices
        row = [(_said(test.table[i], test.columns), encoded(test[i]["input"]["image"]))]
        for place, j in enumerate(near.tolist(), start=1):
            caption = f"{'=' if j == i else ''}{place}"
            caption += f": {names[int(test.targets[j])]}" if len(names) > 1 else ""
            row.append((caption, encoded(test[j]["input"]["image"])))
        found.append(row)
    return found


def _said(row: Tensor, columns: list[str]) -> str:
    """The entries of a row that lie farthest from the mean, a line each."""
    most = row.abs().topk(min(SAID, len(row))).indices.tolist()
    return "\n".join(f"{columns[i]} {float(row[i]):+.1f}" for i in torch.tensor(most).tolist())


RETRIEVAL = Section(
    "Retrieval",
    {
        "Images that rows retrieve": retrieval_figure,
        "Recall": recall_figure,
        "Histogram of pairs": histogram_figure,
        "Pairs over time": bands_figure,
        "Learning curves": learning_figure,
    },
)
EMBEDDINGS = Section(
    "Embeddings", {"Map": map_figure, "Signs of collapse": collapse_figure, "Effective rank": rank_figure}
)


def paired_sections(*, labelled: bool) -> tuple[Section, ...]:
    """The sections of a run, with a table of classes where there are any."""
    classes = (Section("Classes", {"Table of classes": class_table}),) if labelled else ()
    return (RESULTS, RETRIEVAL, EMBEDDINGS, *classes, *CLOSING)


__all__ = ["paired_sections", "rank_curve", "retrieved_pictures"]
