"""What a report shows of embeddings: a map, pairs over time, signs of collapse, and the neighbours of some examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise.recipes.embedding_plots import band_plot, map_plot, share_plot
from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_pictures import decoded, encoded
from counterpoise.recipes.report_plots import curve_plot, learning_plot, picture_plot
from counterpoise.recipes.report_sections import (
    CLOSING,
    RESULTS,
    Cell,
    Figure,
    Section,
    Table,
    format_metric,
)

KNN = "val/knn_balanced_accuracy"
MAPPED = 800  # examples of the map
SHOWN, NEIGHBOURS = 6, 7  # queries, and the pictures beside each
SIGNS = {
    "val/std": "spread (1 = whole sphere)",
    "val/alignment": "alignment (0 = views coincide)",
    "val/uniformity": "uniformity (0 = one point)",
}


def unit_rows(run: RunFolder, name: str, most: int = MAPPED) -> np.ndarray:
    """(M, d) of the test embeddings under ``name``, evenly chosen, each divided by its length."""
    if name not in run.predictions:
        raise NotAvailable(run.problems.get("predictions.npz", f"predictions.npz has no {name}"))
    x = chosen(run.predictions[name], most)
    if len(x) < 10 or not np.isfinite(x).all():
        raise NotAvailable("fewer than ten test features, or some that are not finite")
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def chosen(rows: np.ndarray, most: int = MAPPED) -> np.ndarray:
    """At most so many of the rows, evenly."""
    return rows[:: max(1, len(rows) // most)][:most]


def in_plane(x: np.ndarray) -> np.ndarray:
    """(M, 2) for rows (M, d), by t-SNE from their principal components."""
    from sklearn.manifold import TSNE

    return TSNE(init="pca", perplexity=min(30, len(x) / 4), max_iter=500, random_state=0).fit_transform(x)


def map_figure(run: RunFolder) -> Figure:
    """Test features in the plane."""
    x = unit_rows(run, "features")
    classes = chosen(run.predictions["target"])
    names = [str(name) for name in run.metrics.get("class_names") or range(classes.max() + 1)]
    svg = map_plot(in_plane(x), classes, names, key="map")
    said = f"{len(x)} test examples, coloured by class; near points have near features, distances say little."
    return Figure(Markup(svg), f"Map of embeddings in the plane. {said}", said)


def pairs_figure(run: RunFolder) -> Figure:
    """Cosines of matching and of other pairs over time: median, and the range of 80 %."""
    bands = {}
    for name, label in (("positive", "views of one example"), ("negative", "views of two examples")):
        columns = [f"val/{name}_similarity_{q}" for q in (10, 50, 90)]
        if not set(columns) <= set(run.history):
            raise NotAvailable(run.problems.get("history.csv", "history.csv has no similarities"))
        bands[label] = [run.history[column] for column in columns]
    svg = band_plot(run.history["epoch"], bands, title="Cosine of embeddings: median and middle 80%", key="pairs")
    last = {label: float(c[1][-1]) for label, c in bands.items()}
    said = "In the last epoch the median is " + ", ".join(f"{v:.2f} for {label}" for label, v in last.items()) + "."
    return Figure(Markup(svg), f"Two bands over epochs. {said}", said)


def histogram_figure(run: RunFolder) -> Figure:
    """The same pairs of test examples, at the best epoch."""
    found = run.metric("similarities")
    edges, positive, negative = (np.asarray(found[name]) for name in ("edges", "positive", "negative"))
    svg = share_plot(edges, {"views of one example": positive, "views of two examples": negative}, key="similarities")
    overlap = float(np.minimum(positive, negative).sum())
    said = f"The two overlap by {100 * overlap:.0f}%."
    return Figure(Markup(svg), f"Histograms of cosines of test pairs. {said}", f"Test pairs at the best epoch. {said}")


def collapse_figure(run: RunFolder) -> Figure:
    """Spread, alignment and uniformity by epoch."""
    curves = {label: run.history[name] for name, label in SIGNS.items() if name in run.history}
    if not curves:
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no signs of collapse"))
    svg = curve_plot(run.history["epoch"], curves, title="Signs of collapse", key="collapse")
    rank = run.history.get("val/effective_rank")
    said = "Collapsed embeddings have spread 0 and uniformity 0."
    if rank is not None and len(rank):
        said += f" The effective rank goes from {rank[0]:.1f} to {rank[-1]:.1f}."
    return Figure(Markup(svg), f"Curves over {len(run.history['epoch'])} epochs. {said}", said)


def rank_figure(run: RunFolder) -> Figure:
    """Effective rank by epoch."""
    rank = run.history.get("val/effective_rank")
    if rank is None or not len(rank):
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no effective rank"))
    svg = curve_plot(run.history["epoch"], {"effective rank": rank}, title="Directions in use", key="rank")
    said = f"Effective rank of the embeddings: {rank[-1]:.1f} in the last epoch."
    return Figure(Markup(svg), f"Curve over epochs. {said}", said)


def learning_figure(run: RunFolder) -> Figure:
    """The objective, and what the nearest neighbours say."""
    if not run.history:
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no rows"))
    losses = {"objective": run.history["train/loss"]} if "train/loss" in run.history else {}
    scores = {"nearest neighbours": run.history[KNN]} if KNN in run.history else {}
    svg = learning_plot(run.history["epoch"], losses, scores)
    said = "Objective on the training split; balanced accuracy of the nearest neighbours on the validation split."
    return Figure(Markup(svg), f"Curves over {len(run.history['epoch'])} epochs. {said}", said)


def neighbour_figure(run: RunFolder) -> Figure:
    """Some test images, each before its nearest training images."""
    rows = run.metric("neighbours")
    if not rows:
        raise NotAvailable("the examples are not images")
    pictures = [
        (("test: " if i == 0 else "= " if name == row[0][0] else "") + name, decoded(text))
        for row in rows
        for i, (name, text) in enumerate(row)
    ]
    svg = picture_plot(pictures, columns=len(rows[0]), key="neighbours")
    right = sum(name == row[0][0] for row in rows for name, _ in row[1:])
    of = sum(len(row) - 1 for row in rows)
    said = f"Left a test image, beside it its nearest training images; {right} of {of} are of its class (=)."
    return Figure(Markup(svg), f"Small images. {said}", said)


def class_table(run: RunFolder) -> Table:
    """Recall of each class by both evaluations."""
    per_class = run.metric("per_class")
    names = [str(name) for name in run.metrics.get("class_names") or range(len(per_class["train_count"]))]
    columns = [key for key in ("knn_recall", "linear_recall") if key in per_class]
    rows = [
        [Cell(names[i], band=per_class["band"][i]), Cell(format_metric("count", per_class["train_count"][i]))]
        + [
            Cell(format_metric("recall", per_class[key][i]), bar=per_class[key][i])  # None draws no bar
            for key in columns
        ]
        for i in np.argsort(-np.asarray(per_class["train_count"]), kind="stable")
    ]
    titles = {"knn_recall": "Recall, nearest neighbours", "linear_recall": "Recall, linear probe"}
    return Table(["Class", "Training", *[titles[key] for key in columns]], rows)


def neighbour_pictures(data: Any, known: Tensor, classes: Tensor, queries: Tensor) -> list[list[tuple[str, str]]]:
    """Class and picture of some test images, one a class, and of their nearest training images; [] for tables."""
    if len(data.splits.input_shape) != 3 or not len(queries):
        return []
    names = [str(name) for name in data.splits.class_names]
    targets = data.splits.test.targets
    firsts = [int((targets == c).nonzero()[0]) for c in targets.unique()[:SHOWN]]
    near = (normalize(queries[firsts], dim=1) @ normalize(known, dim=1).T).topk(min(NEIGHBOURS, len(known))).indices
    return [
        [
            (names[int(targets[i])], encoded(data.splits.test[i]["input"])),
            *[(names[int(classes[j])], encoded(data.splits.train[j]["input"])) for j in row.tolist()],
        ]
        for i, row in zip(firsts, near, strict=True)
    ]


EMBEDDINGS = Section(
    "Embeddings",
    {
        "Map": map_figure,
        "Pairs over time": pairs_figure,
        "Histogram of pairs": histogram_figure,
        "Signs of collapse": collapse_figure,
        "Effective rank": rank_figure,
        "Learning curves": learning_figure,
    },
)
NEIGHBOURHOODS = Section("Neighbours", {"Nearest training images": neighbour_figure})
embedding_sections = (
    RESULTS,
    EMBEDDINGS,
    NEIGHBOURHOODS,
    Section("Classes", {"Table of classes": class_table}),
    *CLOSING,
)
