"""The representation-learning table: objectives on Fashion-MNIST, balanced and long-tailed, over random states.

``python -m benchmarks.self_supervised`` runs each cell as ``counterpoise-train`` would, skips cells already there, and
writes docs/results/self_supervised.md. A run stopped in a cell goes on in that cell.
"""

from __future__ import annotations

import itertools
import os
import statistics

from benchmarks.tables import ROOT, cell, command, gain, prose, spread, table, write_page

SELF = "recipe=self_supervised"
METHODS = {  # name in the run folder: what the table says, what is overridden
    "ntxent": ("NT-Xent (temperature 0.2)", [SELF, "loss=ntxent", "loss.temperature=0.2"]),
    "cacr": ("CACR", [SELF, "loss=cacr"]),
    "ascl": ("ASCL (bank 2,048)", [SELF, "loss=ascl", "recipe.bank_size=2048"]),
    "wmse": ("W-MSE (blocks of 128)", [SELF, "loss=wmse", "loss.block_size=128"]),
    "barlow_twins": ("Barlow Twins", [SELF, "loss=barlow_twins"]),
    "vicreg": ("VICReg", [SELF, "loss=vicreg"]),
    "supcon": ("SupCon (with labels)", ["recipe=supervised_contrastive", "loss=supcon", "loss.temperature=0.1"]),
}
BASELINE = "ntxent"
SETS = {
    "balanced": ("Balanced", ["data.imbalance_factor=1", "data.n_max=1000"]),
    "long_tailed": ("Long-tailed, imbalance factor 100", ["data.imbalance_factor=100", "data.n_max=4000"]),
}
COMMON = [
    *("data=fashion_mnist_lt", "data.class_order=0", "data.batch_size=256"),
    *("model.width=16", "trainer.max_epochs=12", "recipe.views.flip=true", "recipe.hidden=256", "recipe.dim=64"),
]
STATES = (0, 1, 2)
COLUMNS = {
    "balanced_knn_accuracy": "neighbours",
    "balanced_linear_accuracy": "linear probe",
    "tail_knn_accuracy": "neighbours, tail",
    "tail_linear_accuracy": "linear probe, tail",
    "effective_rank": "effective rank",
}
Found = dict[tuple[str, str], list[dict[str, float | None]]]


def overrides(name: str, method: str, state: int) -> list[str]:
    """What a cell is run with."""
    return [*METHODS[method][1], *COMMON, *SETS[name][1], f"seed={state}", f"data.seed={state}"]


def run(name: str, method: str, state: int) -> dict[str, float | None]:
    """Test metrics of one cell."""
    return cell("self_supervised", f"{name}-{method}-state{state}", overrides(name, method, state))["splits"]["test"]


def columns_of(name: str) -> dict[str, str]:
    """A balanced set has no tail."""
    return {key: label for key, label in COLUMNS.items() if name != "balanced" or not key.startswith("tail")}


def shown(values: list[float | None], key: str) -> str:
    """Percent, but for the rank."""
    return spread([v for v in values if v is not None], scale=1 if key == "effective_rank" else 100)


def page(found: Found) -> list[str]:
    """The result page."""
    lines = [
        "# Representation learning",
        "",
        *prose(
            """Fashion-MNIST, 10,000 training images balanced, or long-tailed with imbalance factor 100 (about 9,900
            images, the largest class 4,000, the smallest 40). The same encoder (stride-2, width 16, 64 features),
            projection head (256, then 64), two views (crops of 40 to 100 % of the area, flips, contrast, brightness),
            batches of 256, 12 epochs of AdamW with a cosine schedule for all. Features of the frozen encoder are judged
            on 10,000 balanced test images by the votes of 20 nearest training images and by a logistic regression with
            balanced class weights, both on the training split; the epoch is chosen by neighbours on a balanced
            validation split. Three random states (weights, views, order, subset and splits); percent (the rank: 1 to
            64), mean ± standard deviation. SupCon reads the labels, the others do not. Nothing was tuned for a method
            but NT-Xent's and SupCon's temperatures, which are the usual ones for small images."""
        ),
        *command("self_supervised"),
        "A single cell is",
        "",
        "<!-- no-run: a whole run; composed only -->",
        "```bash",
        f"counterpoise-train {' '.join(overrides('long_tailed', 'cacr', 0))}",
        "```",
        "",
    ]
    for name, (title, _) in SETS.items():
        columns = columns_of(name)
        rows = {
            label: [shown([m[key] for m in found[name, method]], key) for key in columns]
            for method, (label, _) in METHODS.items()
        }
        lines += [f"## {title}", "", *table("objective", rows, list(columns.values())), "", *verdict(found, name)]
    return lines


def verdict(found: Found, name: str) -> list[str]:
    """Every objective less NT-Xent, state by state, and which come first."""
    keys = ("balanced_knn_accuracy", "balanced_linear_accuracy")
    rows = {
        label: [gain([m[k] for m in found[name, method]], [m[k] for m in found[name, BASELINE]]) for k in keys]  # type: ignore[misc]
        for method, (label, _) in METHODS.items()
        if method != BASELINE
    }
    said = []
    for key in keys:
        means = {m: statistics.mean(x[key] for x in found[name, m]) for m in METHODS if m != "supcon"}  # type: ignore[misc]
        best = max(means, key=means.__getitem__)
        spans = max(means.values()) - min(means.values())
        said.append(f"by {COLUMNS[key]} {METHODS[best][0]} ({100 * spans:.1f} points from first to last)")
    head = "Less NT-Xent, in points, over random states: mean (smallest to largest)."
    told = f"The best mean without labels is, {'; '.join(said)}."
    return [head, "", *table("objective", rows, [COLUMNS[k] for k in keys]), "", *prose(told)]


def main() -> None:
    """Runs what is missing and writes the page."""
    os.chdir(ROOT)
    found: Found = {}
    for state, name, method in itertools.product(STATES, SETS, METHODS):  # so that a stopped table is balanced
        found.setdefault((name, method), []).append(run(name, method, state))
    write_page("self_supervised", page(found))


if __name__ == "__main__":
    main()
