"""What a report shows of fairness: rates by group and subgroup, weights, and what other epochs would have traded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from counterpoise.recipes.fairness_plots import grouped_bar_plot, trade_off_plot, weight_plot
from counterpoise.recipes.report_data import NotAvailable, RunFolder
from counterpoise.recipes.report_plots import learning_plot
from counterpoise.recipes.report_sections import Cell, Figure, Table, format_metric
from counterpoise.samplers.broad import group_log_ratios

EVERYBODY = "everybody"
FAIRNESS = {  # criterion: column of the history, what the axis says, whether more is better
    "demographic_parity": ("val/p_rule", "p-rule", True),
    "equalized_odds": ("val/equalized_odds_gap", "1 - equalised-odds gap", False),
}


def rate_figure(run: RunFolder) -> Figure:
    """Positive rate of each group, in everybody and in each subgroup."""
    names, groups, rates = _by_subgroup(run, "positive_rate")
    svg = grouped_bar_plot(
        names, dict(zip(groups, rates, strict=True)), title="Predicted positive (% of the group)", key="positive-rates"
    )
    scalars = run.metric("splits", "test")
    said = f"p-rule {format_metric('p_rule', scalars['p_rule'])}"
    if len(names) > 1:
        said += f", in the worst subgroup {format_metric('p_rule', scalars['worst_local_p_rule'])}"
    alt = f"Bars: share predicted positive in {len(groups)} groups, in {', '.join(names)}. {said}."
    return Figure(Markup(svg), alt, f"Share predicted positive, test split: {said}.")


def accuracy_figure(run: RunFolder) -> Figure:
    """Accuracy of each group, in everybody and in each subgroup."""
    names, groups, rates = _by_subgroup(run, "accuracy")
    svg = grouped_bar_plot(
        names, dict(zip(groups, rates, strict=True)), title="Accuracy (% of the group)", key="group-accuracies"
    )
    alt = f"Bars: accuracy of {len(groups)} groups, in {', '.join(names)}."
    return Figure(Markup(svg), alt, "Accuracy of each group, test split; numbers are in the table of groups.")


def weight_figure(run: RunFolder) -> Figure:
    """Weights of the test examples in each subgroup, as the predictor's step would have them."""
    if run.metric("fairness", "weights") == "none":
        raise NotAvailable("plain adversarial debiasing weighs everybody alike")
    if "log_weight" not in run.predictions:
        raise NotAvailable(run.problems.get("predictions.npz", "predictions.npz has no log_weight"))
    names = [str(name) for name in (run.metric("fairness").get("subgroups") or {"name": [EVERYBODY]})["name"]]
    score, group = (torch.from_numpy(run.predictions[name]) for name in ("log_weight", "group"))
    groups = run.metric("fairness", "groups")["name"]
    weights = group_log_ratios(score, group, len(groups), sync=False).exp().numpy()
    subgroup = run.predictions["subgroup"]
    shown = {name: weights[subgroup == k] for k, name in enumerate(names) if (subgroup == k).any()}
    svg = weight_plot(shown, title="Weights of the adversary's losses (% of the subgroup)", key="ratio-weights")
    means = {name: float(w.mean()) for name, w in shown.items()}
    most = max(means, key=lambda name: means[name])
    said = f"Mean weight by subgroup: {', '.join(f'{name} {mean:.2f}' for name, mean in means.items())}."
    alt = f"Histograms of weights in {len(shown)} subgroups, from {weights.min():.2g} to {weights.max():.2g}. {said}"
    tail = f" The group is easiest to guess in {most}." if len(shown) > 1 else ""
    return Figure(Markup(svg), alt, f"{said}{tail} One is the mean of each group.")


def cell_table(run: RunFolder) -> Table:
    """One row a group in everybody and in each subgroup."""
    found = run.metric("fairness")
    parts: list[tuple[str, dict[str, Any]]] = [(EVERYBODY, found["groups"])]
    subgroups = found.get("subgroups")
    for k, name in enumerate(subgroups["name"] if subgroups else []):
        parts.append((name, {key: values[k] for key, values in subgroups.items() if key not in ("name", "p_rule")}))
    columns = ("positive_rate", "accuracy", "true_positive_rate", "false_positive_rate")
    rows = [
        [
            Cell(f"{part}, {group}"),
            Cell(f"{cells['count'][g]:,}"),
            *(Cell(format_metric("accuracy", cells[column][g]), bar=cells[column][g]) for column in columns),
        ]
        for part, cells in parts
        for g, group in enumerate(found["groups"]["name"])
    ]
    head = ["Who", "Test", "Predicted positive", "Accuracy", "True-positive rate", "False-positive rate"]
    return Table(head, rows)


def learning_figure(run: RunFolder) -> Figure:
    """The predictor's and the adversary's loss, and the score that the best epoch is chosen by."""
    _check_history(run, "val/fair_score")
    told = {"train/loss": "predictor", "train/adversary_loss": "adversary"}
    losses = {name: run.history[column] for column, name in told.items() if column in run.history}
    scores = {"Fair score (validation)": run.history["val/fair_score"]}
    epochs = len(run.history["val/fair_score"])
    svg = learning_plot(run.history.get("epoch", np.arange(epochs)), losses, scores)
    groups = len(run.metric("fairness", "groups")["name"])
    said = f"An adversary that knows nothing has a loss of about {np.log(groups):.2f} where groups are of equal size."
    alt = f"Learning curves over {epochs} epochs: losses of predictor and adversary, fair score."
    return Figure(Markup(svg), alt, f"Losses by epoch and the score that chose the best one. {said}")


def trade_off_figure(run: RunFolder) -> Figure:
    """Every epoch between accuracy and fairness."""
    fairness, accuracy, best, front, label = _trade_off(run)
    svg = trade_off_plot(fairness, accuracy, best=best, front=front, label=label, key="trade-off")
    said = f"Chosen: balanced accuracy {100 * accuracy[best]:.1f}%, {label} {fairness[best]:.2f}."
    alt = f"Dots: {len(accuracy)} epochs, balanced accuracy against {label}, {len(front)} of them on the front. {said}"
    return Figure(Markup(svg), alt, f"Epochs on validation. {said}")


def trade_off_table(run: RunFolder) -> Table:
    """The epochs that no other beats in both, the most accurate first."""
    fairness, accuracy, best, front, label = _trade_off(run)
    local = run.history.get("val/worst_local_p_rule", np.full(len(accuracy), np.nan))
    epoch = run.history.get("epoch", np.arange(len(accuracy)))

    def row(i: int) -> list[Cell]:
        said = " (chosen)" if i == best else ""
        return [
            Cell(f"{int(epoch[i])}{said}"),
            Cell(format_metric("accuracy", float(accuracy[i])), bar=float(accuracy[i])),
            Cell(f"{fairness[i]:.3f}"),
            Cell(format_metric("p_rule", float(local[i]))),
            Cell(f"{run.history['val/fair_score'][i]:.3f}"),
        ]

    shown = sorted({*front.tolist(), best}, key=lambda i: (-accuracy[i], -fairness[i]))
    head = ["Epoch", "Balanced accuracy", label, "Worst local p-rule", "Fair score"]
    return Table(head, [row(i) for i in shown], f"Validation: epochs that none beats in both accuracy and {label}.")


def _trade_off(run: RunFolder) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, str]:
    """Fairness and balanced accuracy by epoch, the best epoch, the front, what the fairness is called."""
    column, label, more = FAIRNESS[run.metric("fairness", "criterion")]
    _check_history(run, "val/fair_score", "val/balanced_accuracy", column)
    fairness = run.history[column] if more else 1 - run.history[column]
    accuracy, score = run.history["val/balanced_accuracy"], run.history["val/fair_score"]
    best = int(np.nanargmax(score))
    if not np.isfinite(fairness[best]):
        raise NotAvailable("the fairness of the chosen epoch is undefined")
    known = np.where(np.isfinite(fairness) & np.isfinite(accuracy))[0]
    front = [i for i in known if not any(_beats(j, i, fairness, accuracy) for j in known)]
    return fairness, accuracy, best, np.array(front), label


def _beats(j: int, i: int, fairness: np.ndarray, accuracy: np.ndarray) -> bool:
    """Epoch j is nowhere worse than epoch i and somewhere better; of equals the first stays."""
    no_worse = fairness[j] >= fairness[i] and accuracy[j] >= accuracy[i]
    better = fairness[j] > fairness[i] or accuracy[j] > accuracy[i]
    return bool(no_worse and (better or j < i))


def _by_subgroup(run: RunFolder, rate: str) -> tuple[list[str], list[str], np.ndarray]:
    """Names of everybody and the subgroups, names of the groups, rates (G, 1 + K)."""
    found = run.metric("fairness")
    subgroups = found.get("subgroups") or {"name": [], rate: []}
    names = [EVERYBODY, *map(str, subgroups["name"])]
    rates = [found["groups"][rate], *subgroups[rate]]
    return names, [str(name) for name in found["groups"]["name"]], np.array(rates, dtype=float).T


def _check_history(run: RunFolder, *columns: str) -> None:
    missing = [name for name in columns if not np.isfinite(run.history.get(name, np.full(1, np.nan))).any()]
    if missing:
        raise NotAvailable(run.problems.get("history.csv", f"history.csv has no {missing[0]}"))


__all__ = [
    "accuracy_figure",
    "cell_table",
    "learning_figure",
    "rate_figure",
    "trade_off_figure",
    "trade_off_table",
    "weight_figure",
]
