"""What a report shows: blocks (table, figure, code, list), the functions that build them from a run, the sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from markupsafe import Markup

from counterpoise.recipes.evaluation import BANDS, reliability
from counterpoise.recipes.report_data import NotAvailable, RunFolder, as_mapping
from counterpoise.recipes.report_plots import class_plot, confusion_plot, learning_plot, reliability_plot

METRICS = {
    "worst_group_accuracy": "Worst group's accuracy",
    "mean_average_precision": "Mean average precision",
    "robust_accuracy": "Robust accuracy",
    "worst_class_robust_accuracy": "Worst class's robust accuracy",
    "mean_iou": "Mean IoU",
    "fair_score": "Fair score (chooses the epoch)",
    **{f"recall_at_{k}": f"Recall at {k}, mean of both directions" for k in (5, 1, 10)},
    "balanced_linear_accuracy": "Linear probe, mean over classes",
    "balanced_knn_accuracy": "Nearest neighbours, mean over classes",
    "linear_accuracy": "Linear probe",
    "knn_accuracy": "Nearest neighbours",
    **{f"{b}_{n}_accuracy": f"{t}, {b}" for n, t in (("linear", "Linear probe"), ("knn", "Neighbours")) for b in BANDS},
    "std": "Spread of the features (1 = whole sphere)",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "p_rule": "p-rule",
    "worst_local_p_rule": "Worst local p-rule",
    "positive_rate_gap": "Gap of positive rates ↓",
    "worst_local_positive_rate_gap": "Worst local gap of positive rates ↓",
    "equalized_odds_gap": "Equalised-odds gap ↓",
    "adversary_balanced_accuracy": "Adversary's balanced accuracy ↓",
    "head_accuracy": "Head accuracy",
    "medium_accuracy": "Medium accuracy",
    "tail_accuracy": "Tail accuracy",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "expected_calibration_error": "Calibration error (ECE) ↓",
    "nll": "Negative log-likelihood ↓",
}
PERCENT = (
    "accuracy",
    "f1",
    "recall",
    "precision",
    "calibration_error",
    "iou",
    "dice",
    *("_at_1", "_at_5", "_at_10"),
)  # how names end that are shown in percent
SCORES = ("val/balanced_accuracy", "val/accuracy")
PER_CLASS = {
    "band": "Band",
    "train_count": "Training",
    "recall": "Recall",
    "precision": "Precision",
    "f1": "F1",
    "test_count": "Test",
}


@dataclass(frozen=True)
class Cell:
    """A table cell; ``band`` colours it, ``bar`` in [0, 1] draws a bar behind it."""

    text: str
    band: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under column titles; the first column heads its row. Further columns align right if ``numbers``."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    numbers: bool = True


@dataclass(frozen=True)
class Figure:
    """An inline SVG, its alternative text and its visible caption."""

    kind: ClassVar[str] = "figure"
    svg: Markup
    alt: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Preformatted text; with a ``summary`` it is folded away behind it."""

    kind: ClassVar[str] = "code"
    text: str
    summary: str = ""


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Missing:
    """What stands where a block could not be made."""

    kind: ClassVar[str] = "missing"
    what: str
    reason: str


Block = Table | Figure | Code | Items | Missing


@dataclass(frozen=True)
class Section:
    """A title and its blocks, by name; a block function may raise, and is then replaced by the reason."""

    title: str
    blocks: dict[str, Callable[[RunFolder], Block]]


def render_section(section: Section, run: RunFolder) -> dict[str, Any]:
    """Title, key and blocks of a section for the template; a block that raises becomes :class:`Missing`, at the end."""
    blocks: list[Block] = []
    for name, build in section.blocks.items():
        try:
            blocks.append(build(run))
        except NotAvailable as missing:
            blocks.append(Missing(name, str(missing)))
        except Exception as error:  # a report of a broken run must still come out
            blocks.append(Missing(name, f"{type(error).__name__}: {error}"))
    blocks.sort(key=lambda block: isinstance(block, Missing))
    key = section.title.lower().replace(" ", "-")
    has_figures = any(isinstance(block, Figure) for block in blocks)
    return {"title": section.title, "key": key, "blocks": blocks, "has_figures": has_figures}


def format_metric(name: str, value: Any) -> str:
    """``0.7134`` as "71.3%" for what is shown in percent, else three decimals; "n/a" for None and NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "n/a" if value is None else str(value)
    if not math.isfinite(value):
        return "n/a"
    if name.endswith(PERCENT):
        return f"{100 * value:.1f}%"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def result_rows(splits: Any) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The splits (val and test first) and, for each scalar, its label and its formatted value in every split."""
    by_split = {name: scalars for name, scalars in as_mapping(splits).items() if isinstance(scalars, dict) and scalars}
    order = [name for name in ("val", "test") if name in by_split] + sorted(set(by_split) - {"val", "test"})
    present = {key: None for name in order for key in by_split[name]}  # a set that keeps its order
    keys = [key for key in METRICS if key in present] + [key for key in present if key not in METRICS]
    label = {key: METRICS.get(key, key.replace("_", " ").capitalize()) for key in keys}
    return order, [(label[key], [format_metric(key, by_split[name].get(key)) for name in order]) for key in keys]


def _results(run: RunFolder) -> Table:
    splits, rows = result_rows(run.metric("splits"))
    if not rows:
        raise NotAvailable("metrics.json has no results yet")
    bands = as_mapping(run.metrics.get("bands"))
    members = as_mapping(run.metrics.get("per_class")).get("band") or []
    sizes = ", ".join(f"{members.count(b)} {b}" for b in BANDS if b in members)
    caption = "Bands: " + str(bands.get("note") or "") + (f" ({sizes})." if sizes else "")
    return Table(
        ["Metric", *splits], [[Cell(label), *map(Cell, values)] for label, values in rows], caption if bands else ""
    )


def _class_figure(run: RunFolder) -> Figure:
    per_class = as_mapping(run.metrics.get("per_class"))
    counts = per_class.get("train_count") or run.metric("class_counts")
    names = _class_names(run, len(counts))
    recall = per_class.get("recall") or [None] * len(counts)
    svg = class_plot(names, counts, recall, per_class.get("band") or [None] * len(counts))
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    alt = (
        f"Bars: training examples of {len(counts)} classes, from {counts[most]} ({names[most]}) to {counts[least]} "
        f"({names[least]})."
    )
    if not per_class.get("recall"):
        return Figure(Markup(svg), alt, "Training examples of each class.")
    alt += " Stems below: the recall of each class on the test split, as in the table of classes."
    return Figure(Markup(svg), alt, "Training examples of each class, and what the model recalls of it (test split).")


def _confusion_figure(run: RunFolder) -> Figure:
    matrix = np.asarray(run.metric("confusion"), dtype=float)
    counts = run.metrics.get("class_counts") or [0] * len(matrix)
    order = np.argsort(-np.asarray(counts, dtype=float), kind="stable")
    names = [_class_names(run, len(matrix))[i] for i in order]
    matrix = matrix[np.ix_(order, order)]
    svg = confusion_plot(matrix, names)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, -1)
    true, predicted = np.unravel_index(int(share.argmax()), share.shape)
    alt = f"Confusion matrix of {len(names)} classes in percent of the true class."
    caption = "Confusion in percent of the true class; classes from most to fewest training examples."
    if share[true, predicted] > 0:
        confused = f"{100 * share[true, predicted]:.0f}% of {names[true]} is taken for {names[predicted]}"
        alt, caption = f"{alt} Largest error: {confused}.", f"{caption} Largest error: {confused}."
    return Figure(Markup(svg), alt, caption)


def _reliability_figure(run: RunFolder) -> Figure:
    if not run.predictions:
        raise NotAvailable(run.problems.get("predictions.npz", "predictions.npz is empty"))
    logits, target = (torch.from_numpy(run.predictions[name]) for name in ("logits", "target"))
    if not len(logits) or bool(logits.isnan().any()):
        raise NotAvailable("predictions.npz holds no logits, or NaN among them")
    confidence, accuracy, count = (values.numpy() for values in reliability(logits, target))
    svg = reliability_plot(confidence, accuracy, count)
    over = float(np.nansum((confidence - accuracy) * count))
    alt = (
        f"Reliability diagram in {len(count)} bins: the model is {'over' if over > 0 else 'under'}confident on average."
    )
    return Figure(
        Markup(svg), alt, "Accuracy against confidence on the stored predictions; calibrated is the diagonal."
    )


def _learning_figure(run: RunFolder) -> Figure:
    if not run.history:
        raise NotAvailable(run.problems.get("history.csv", "history.csv has no rows"))

    def curves(*columns: str) -> dict[str, np.ndarray]:
        present = {name: run.history[name] for name in columns if name in run.history}
        return {name.replace("_", " "): values for name, values in present.items() if np.isfinite(values).any()}

    losses = curves("train/loss", "val/loss")
    others = [name for name in run.history if name.startswith("val/") and name not in (*SCORES, "val/loss")]
    scores = curves(*SCORES, *others[:3])
    if not losses and not scores:
        raise NotAvailable("history.csv has neither losses nor validation scores")
    curve, other = scores.get("val/balanced accuracy"), scores.get("val/accuracy")
    if curve is not None and other is not None and np.array_equal(curve, other, equal_nan=True):
        del scores["val/accuracy"]  # a balanced split: one curve hides the other
    epochs = next(iter((losses or scores).values()))
    svg = learning_plot(run.history.get("epoch", np.arange(len(epochs))), losses, scores)
    alt = f"Learning curves over {len(epochs)} epochs: {', '.join([*losses, *scores])}."
    return Figure(Markup(svg), alt, "Losses and validation scores by epoch; the dot marks the best epoch.")


def _class_table(run: RunFolder) -> Table:
    per_class = run.metric("per_class")
    length = len(run.metric("per_class", "train_count"))
    columns = {key: per_class.get(key) or [None] * length for key in PER_CLASS}
    names = _class_names(run, length)

    def row(i: int) -> list[Cell]:
        band, train, recall, precision, f1, test = (values[i] for values in columns.values())
        bar = recall if isinstance(recall, float) else None
        return [
            Cell(names[i], band=str(band or "")),
            Cell(str(band or "n/a"), band=str(band or "")),
            Cell(format_metric("count", train)),
            Cell(format_metric("recall", recall), bar=bar),
            Cell(format_metric("precision", precision)),
            Cell(format_metric("f1", f1)),
            Cell(format_metric("count", test)),
        ]

    order = sorted(range(length), key=lambda i: -columns["train_count"][i])
    return Table(["Class", *PER_CLASS.values()], [row(i) for i in order])


def _notes(run: RunFolder) -> Items:
    return Items([str(note) for note in run.metrics.get("notes") or []] or ["No notes."])


def _configuration(run: RunFolder) -> Code:
    if not run.config_text:
        raise NotAvailable(run.problems.get("config.yaml", "config.yaml is empty"))
    return Code(run.config_text, summary="config.yaml")


def _environment(run: RunFolder) -> Table:
    rows = [[Cell(str(key).replace("_", " ")), Cell(str(value))] for key, value in run.metric("environment").items()]
    return Table(["Part", "Version or value"], rows, numbers=False)


def _command(run: RunFolder) -> Code:
    return Code(str(run.metric("command")))


def _class_names(run: RunFolder, length: int) -> list[str]:
    names = [str(name) for name in run.metrics.get("class_names") or range(length)]
    if len(names) != length:
        raise NotAvailable(f"metrics.json has {len(names)} class names for {length} classes")
    return names


RESULTS = Section("Results", {"Table of results": _results})
LEARNING: dict[str, Callable[[RunFolder], Block]] = {"Learning curves": _learning_figure}
CLASS_PLOTS: dict[str, Callable[[RunFolder], Block]] = {
    "Class counts and recall": _class_figure,
    "Confusion matrix": _confusion_figure,
    "Reliability diagram": _reliability_figure,
}
CLASSES = Section("Classes", {"Table of classes": _class_table})
CLOSING = (
    Section("Notes", {"Notes": _notes}),
    Section("Reproduce", {"Command": _command}),
    Section("Configuration", {"Configuration": _configuration}),
    Section("Environment", {"Environment": _environment}),
)
SECTIONS = (RESULTS, Section("Plots", {**CLASS_PLOTS, **LEARNING}), CLASSES, *CLOSING)

__all__ = [
    "CLASSES",
    "CLASS_PLOTS",
    "CLOSING",
    "LEARNING",
    "METRICS",
    "RESULTS",
    "SECTIONS",
    "Cell",
    "Code",
    "Figure",
    "Items",
    "Missing",
    "Section",
    "Table",
    "format_metric",
    "render_section",
    "result_rows",
]
