"""What a report shows of clusters: their mass over time, the classes in them, their members, and the curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from torch import Tensor

from counterpoise.recipes.cluster_plots import contingency_plot, mass_plot
from counterpoise.recipes.embedding_plots import maps_plot
from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_pictures import decoded, encoded
from counterpoise.recipes.report_plots import curve_plot, learning_plot, picture_plot
from counterpoise.recipes.report_sections import (
    CLASS_PLOTS,
    CLASSES,
    CLOSING,
    RESULTS,
    Cell,
    Figure,
    Section,
    Table,
    format_metric,
)
from counterpoise.recipes.sections_embeddings import chosen, in_plane, unit_rows

SHOWN, MEMBERS = 10, 8  # clusters with pictures, and pictures of each


def mass_figure(run: RunFolder) -> Figure:
    """Share of the labels' mass that each cluster gets, epoch by epoch, stacked."""
    mass = np.asarray(run.metric("clusters", "mass_by_epoch"), dtype=float)
    if not mass.size:
        raise NotAvailable("nothing was trained, so there is no mass over time")
    svg = mass_plot(mass, key="cluster-mass")
    last = np.sort(mass[-1])[::-1] / mass[-1].sum()
    said = (
        f"Labels held {100 * mass[0].sum():.0f}% of the examples in the first epoch and {100 * mass[-1].sum():.0f}% in "
        f"the last, of which the largest of {len(last)} clusters got {100 * last[0]:.0f}% and the smallest "
        f"{100 * last[-1]:.1f}%."
    )
    return Figure(Markup(svg), f"Stacked areas over {len(mass)} epochs. {said}", said)


def contingency_figure(run: RunFolder) -> Figure:
    """Where the examples of each class went (training split)."""
    table = np.asarray(run.metric("clusters", "contingency"), dtype=float)
    cluster_of = run.metric("clusters", "cluster_of_class")
    names = [str(name) for name in run.metrics.get("class_names") or range(table.shape[1])]
    classes = np.argsort(-table.sum(0), kind="stable")
    matched = [cluster_of[c] for c in classes if cluster_of[c] is not None]
    clusters = [*matched, *sorted(set(range(len(table))) - set(matched))]
    share = (table / np.maximum(table.sum(0), 1))[clusters][:, classes].T
    svg = contingency_plot(share, [names[c] for c in classes], [str(k) for k in clusters], key="contingency")
    split = [names[c] for c in classes if table[:, c].sum() and table[:, c].max() < 0.5 * table[:, c].sum()]
    said = "Each row is a class, from the largest down: the share of it in each cluster, its own on the diagonal. "
    said += f"No cluster holds half of {', '.join(split[:5])}." if split else "Half of every class is in one cluster."
    return Figure(Markup(svg), f"Heat map of {len(names)} classes and {len(table)} clusters. {said}", said)


def map_figure(run: RunFolder) -> Figure:
    """Test embeddings in the plane, by cluster, and once more by class where classes are known."""
    x = unit_rows(run, "embedding")
    found = chosen(run.predictions["logits"])
    panels = {"Clusters": (found.argmax(1), [f"cluster {k}" for k in range(found.shape[1])])}
    said = f"{len(x)} test examples, coloured by cluster"
    if "target" in run.predictions:
        classes = chosen(run.predictions["target"])
        names = [str(name) for name in run.metrics.get("class_names") or range(classes.max() + 1)]
        panels["Classes"] = (classes, names)
        said += ", and below by class"
    said += "; near points have near embeddings, distances say little."
    return Figure(Markup(maps_plot(in_plane(x), panels, key="map")), f"Map of embeddings in the plane. {said}", said)


def picture_figure(run: RunFolder) -> Figure:
    """The surest members of some clusters, a row each."""
    rows = run.metric("clusters", "pictures")
    if not rows:
        raise NotAvailable("the examples are not images")
    pictures = [(caption, decoded(text)) for row in rows for caption, text in row]
    svg = picture_plot(pictures, columns=MEMBERS, key="members")
    said = f"The surest training examples of {len(rows)} clusters, the largest first, a row each"
    said += ", with their class." if run.metrics.get("per_class") else "."
    return Figure(Markup(svg), f"Small images. {said}", said)


def cluster_table(run: RunFolder) -> Table:
    """One row a cluster of the training split, the largest first."""
    found = run.metric("clusters")
    names = [str(name) for name in run.metrics.get("class_names") or []]
    table, total = found.get("contingency"), max(sum(found["size"]), 1)
    class_of = {k: c for c, k in enumerate(found.get("cluster_of_class") or []) if k is not None}
    rows = []
    for k in sorted(range(len(found["size"])), key=lambda k: -found["size"][k]):
        size = found["size"][k]
        row = [Cell(str(k)), Cell(f"{size:,}", bar=size / total), Cell(format_metric("c", found["confidence"][k]))]
        if table is not None:
            purity = max(table[k]) / size if size else None
            row += [Cell(names[class_of[k]] if k in class_of else "none"), Cell(format_metric("accuracy", purity))]
        rows.append(row)
    columns = ["Cluster", "Examples", "Mean confidence", *(["Matched class", "Largest class"] if table else [])]
    return Table(
        columns, rows, "Training split. Largest class: its share of the cluster." if table else "Training split."
    )


def training_table(run: RunFolder) -> Table:
    """The results on the training split, which nothing was told of classes either."""
    found = run.metric("clusters", "training")
    rows = [[Cell(name.replace("_", " ").capitalize()), Cell(format_metric(name, x))] for name, x in found.items()]
    return Table(["Metric", "Training split"], rows, "No class was read in training, so this split counts as well.")


def learning_figure(run: RunFolder) -> Figure:
    """The loss, and what validation views tell of each other."""
    if not run.history:
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no rows"))
    losses = {"loss": run.history["train/loss"]} if "train/loss" in run.history else {}
    scores = {"information that views share": run.history["val/shared_information"]}
    svg = learning_plot(run.history["epoch"], losses, scores)
    said = "The loss grows with the mass of the labels; the dot marks the best epoch, chosen without classes."
    return Figure(Markup(svg), f"Curves over {len(run.history['epoch'])} epochs. {said}", said)


def quality_figure(run: RunFolder) -> Figure:
    """What the classes of the validation split say, epoch by epoch."""
    named = {
        "mutual_information": "mutual information",
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced accuracy",
    }
    curves = {label: run.history[f"val/{name}"] for name, label in named.items() if f"val/{name}" in run.history}
    if not curves:
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no values by classes"))
    svg = curve_plot(
        run.history["epoch"], curves, title="Against the classes (validation)", key="quality", percent=True
    )
    said = "Watched only: no class takes part in training or in the choice of the epoch."
    return Figure(Markup(svg), f"Curves over {len(run.history['epoch'])} epochs. {said}", said)


def cluster_pictures(data: Any, cluster: Tensor, confidence: Tensor) -> list[list[tuple[str, str]]]:
    """Class and picture of the surest training examples of the largest clusters; [] where these are no images."""
    shape = data.splits.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        return []
    labelled = data.splits.facts.get("labelled", True)
    names, targets = data.splits.class_names, data.splits.train.targets
    rows = []
    for k in cluster.bincount().argsort(descending=True, stable=True)[:SHOWN].tolist():
        members = (cluster == k).nonzero().flatten()
        members = members[confidence[members].argsort(descending=True, stable=True)][:MEMBERS].tolist()
        row = [
            (str(names[int(targets[i])]) if labelled else f"cluster {k}", encoded(data.splits.train[i]["input"]))
            for i in members
        ]
        rows.append(row + [("", row[-1][1])] * (MEMBERS - len(row)) if row else [])
    return [row for row in rows if row]


def cluster_sections(labelled: bool) -> tuple[Section, ...]:
    """Those of a report, with or without what needs classes."""
    clusters: dict[str, Any] = {"Mass over time": mass_figure, "Map": map_figure}
    clusters |= {"Pictures by cluster": picture_figure}
    if not labelled:
        blocks = {**clusters, "Learning curves": learning_figure, "Table of clusters": cluster_table}
        return (RESULTS, Section("Clusters", blocks), *CLOSING)
    clusters |= {"Classes and clusters": contingency_figure, "Learning curves": learning_figure}
    clusters |= {"Against the classes": quality_figure, "Table of clusters": cluster_table}
    of_classes = {"Class counts and recall": CLASS_PLOTS["Class counts and recall"]}
    return (
        RESULTS,
        Section("Clusters", {**clusters, "Training split": training_table}),
        Section("Plots", of_classes),
        CLASSES,
        *CLOSING,
    )
