"""The representation-learning table: objectives on Fashion-MNIST, balanced and long-tailed, over random states.

``python -m benchmarks.self_supervised`` runs each cell as ``counterpoise-train`` would, skips cells already there, and
writes docs/results/self_supervised.md. A run stopped in a cell goes on in that cell. ``--four-views`` runs and writes
the last section alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import PAGES, ROOT, RUNS, cell, command, gain, prose, spread, table, write_page
from counterpoise.contrastive import collapse_statistics
from counterpoise.recipes import SmallCNN
from counterpoise.recipes.data import LabelledData, fashion_mnist_lt
from counterpoise.recipes.embedding_evaluation import LinearProbe, knn_scores, recalls
from counterpoise.recipes.evaluation import assign_bands

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
SIZES = {
    "balanced": {"imbalance_factor": 1, "n_max": 1000},
    "long_tailed": {"imbalance_factor": 100, "n_max": 4000},
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
FOUR_VIEWS = ("ntxent", "cacr")  # an anchor has three positives, which CACR weighs against one another
FOUR_EPOCHS = 6  # as many views as two over the table's twelve
FOUR_TITLE = "## Four views"
REFERENCES = {"untrained": "(the encoder untrained)", "pixels": "(pixels)"}
Found = dict[tuple[str, str], list[dict[str, float | None]]]


def overrides(name: str, method: str, state: int) -> list[str]:
    """What a cell is run with."""
    return [*METHODS[method][1], *COMMON, *SETS[name][1], f"seed={state}", f"data.seed={state}"]


def run(name: str, method: str, state: int) -> dict[str, float | None]:
    """Test metrics of one cell."""
    return cell("self_supervised", f"{name}-{method}-state{state}", overrides(name, method, state))["splits"]["test"]


def run_four_views(method: str, state: int) -> dict[str, float | None]:
    """The same on the long-tailed set with four views and half the epochs."""
    changed = ["recipe.views.num_views=4", f"trainer.max_epochs={FOUR_EPOCHS}"]
    settings = [*overrides("long_tailed", method, state), *changed]
    return cell("self_supervised", f"long_tailed-{method}_four_views-state{state}", settings)["splits"]["test"]


def reference(name: str, kind: str, state: int) -> dict[str, float | None]:
    """The same judges on features that nothing was trained for, kept in a file."""
    file = RUNS / "self_supervised" / f"{name}-{kind}-state{state}.json"
    if not file.exists():
        file.write_text(json.dumps(judged(name, kind, state)))
    return json.loads(file.read_text())


def judged(name: str, kind: str, state: int) -> dict[str, float | None]:
    """Neighbours and linear probe on pixels or on an untrained encoder's features."""
    data = fashion_mnist_lt(**SIZES[name], class_order=0, seed=state, batch_size=500)  # type: ignore[arg-type]
    torch.manual_seed(state)
    encoder = torch.nn.Flatten() if kind == "pixels" else SmallCNN(1, 10, width=16).eval().encoder
    (known, classes), (queries, target) = (features(encoder, data, of) for of in (data.splits.train, data.splits.test))
    band, _ = assign_bands(data.class_counts)
    found: dict[str, float | None] = {"effective_rank": float(collapse_statistics(queries[:1000]).effective_rank)}
    scores = {"knn": knn_scores(known, classes, queries, 10), "linear": LinearProbe(known, classes, 10)(queries)}
    for judge, score in scores.items():
        of_class = [r for r in recalls(score, target) if r is not None]
        tail = [r for r, b in zip(of_class, band, strict=True) if b == "tail"]
        found[f"balanced_{judge}_accuracy"] = statistics.mean(of_class)
        found[f"tail_{judge}_accuracy"] = statistics.mean(tail) if tail else None
    return found


@torch.no_grad()
def features(encoder: Any, data: LabelledData, split: Any) -> tuple[Tensor, Tensor]:
    batches = [(encoder(batch["input"]), batch["target"]) for batch in data.in_order(split)]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


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
            for method, label in {**{m: label for m, (label, _) in METHODS.items()}, **REFERENCES}.items()
        }
        lines += [f"## {title}", "", *table("objective", rows, list(columns.values())), "", *verdict(found, name)]
    lines += prose(
        """Where a claimed edge does not show: CACR weighs several positives against one another, and with two views an
        anchor has one, so that its weights of attraction decide nothing here and only its repulsion differs from
        NT-Xent. ASCL's soft neighbours gain by the votes of neighbours, and lose by the linear probe, in every state.
        Barlow Twins was made for embeddings of thousands of features, not of 64; its embeddings and those of W-MSE use
        the fewest directions (an effective rank of 29)."""
    )
    return lines + prose(
        """The last two rows of a table are no methods: they say what the judges make of features that nothing was
        trained for. Twelve epochs of a small encoder are far from where these objectives end; the table compares them
        at one small budget, at which they are worth about as much as the pixels of these centred images, in 64 numbers
        in place of 784. Trained for five epochs on all 59,000 images at twice the width, NT-Xent's features reach 84 %
        by neighbours and 86 % by the linear probe (one random state)."""
    )


def four_views(found: dict[str, list[dict[str, float | None]]]) -> list[str]:
    """The section on four views: of NT-Xent and CACR, with NT-Xent on two views beside them."""
    names = {
        "two": "NT-Xent, two views, 12 epochs",
        **{m: f"{METHODS[m][0].split(' (')[0]}, four views, {FOUR_EPOCHS} epochs" for m in FOUR_VIEWS},
    }
    rows = {label: [shown([m[key] for m in found[name]], key) for key in COLUMNS] for name, label in names.items()}
    judged_by = [key for key in COLUMNS if key != "effective_rank"]
    apart = {
        f"CACR less {label}": [gain([m[k] for m in found["cacr"]], [m[k] for m in found[name]]) for k in judged_by]  # type: ignore[misc]
        for name, label in names.items()
        if name != "cacr"
    }
    above = [
        f"in {sum(a[key] > b[key] for a, b in zip(found['cacr'], found['ntxent'], strict=True))}"  # type: ignore[operator]
        for key in ("balanced_knn_accuracy", "balanced_linear_accuracy")
    ]
    return [
        FOUR_TITLE,
        "",
        *prose(
            f"""With four views an anchor has three positives, and CACR's weights of attraction decide something. The
            long-tailed protocol above with `recipe.views.num_views=4` and {FOUR_EPOCHS} epochs in place of 12, so that
            as many views are embedded as with two; the schedule of the learning rate ends with them."""
        ),
        *table("objective", rows, list(COLUMNS.values())),
        "",
        "In points, over random states: mean (smallest to largest).",
        "",
        *table("difference", apart, [COLUMNS[key] for key in judged_by]),
        "",
        *prose(
            f"""Above NT-Xent with four views CACR is {above[0]} by neighbours, and {above[1]} by the linear probe, of
            {len(STATES)} random states."""
        ),
    ]


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


def section() -> list[str]:
    """Runs what is missing of the last section, and gives it."""
    found: dict[str, list[dict[str, float | None]]] = {}
    for state, method in itertools.product(STATES, FOUR_VIEWS):
        found.setdefault(method, []).append(run_four_views(method, state))
    return four_views({"two": [run("long_tailed", BASELINE, state) for state in STATES], **found})


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.self_supervised", description=__doc__)
    parser.add_argument("--four-views", action="store_true", help="the last section alone")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.four_views:
        above = (PAGES / "self_supervised.md").read_text().split(f"{FOUR_TITLE}\n")[0].rstrip().splitlines()
        write_page("self_supervised", [*above, "", *section()])
        return
    found: Found = {}
    for state, name, method in itertools.product(STATES, SETS, METHODS):  # so that a stopped table is balanced
        found.setdefault((name, method), []).append(run(name, method, state))
    for state, name, kind in itertools.product(STATES, SETS, REFERENCES):
        found.setdefault((name, kind), []).append(reference(name, kind, state))
    write_page("self_supervised", [*page(found), *section()])


if __name__ == "__main__":
    main()
