"""The long-tailed result table: losses on long-tailed Fashion-MNIST, over class orders and random states.

``python -m benchmarks.long_tailed`` runs each cell as ``counterpoise-train`` would, skips cells already there, and
writes docs/results/long_tailed.md. A run stopped in a cell goes on in that cell.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from counterpoise.recipes.cli import launch
from counterpoise.recipes.composition import resolved
from counterpoise.recipes.run import load_result
from counterpoise.recipes.run_folder import config_hash

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "outputs" / "results" / "long_tailed"
PAGE = ROOT / "docs" / "results" / "long_tailed.md"
METHODS = {  # name in the run folder: what the table says, what is overridden
    "cross_entropy": ("cross-entropy", ["loss=cross_entropy"]),
    "softmax_focal": ("focal (gamma = 2)", ["loss=softmax_focal"]),
    "class_balanced": ("class-balanced (beta = 0.9999)", ["loss=class_balanced"]),
    "ldam_drw": ("LDAM-DRW", ["experiment=ldam_drw"]),
    "balanced_softmax": ("balanced softmax", ["loss=balanced_softmax"]),
    "logit_adjusted": ("logit adjustment (tau = 1)", ["loss=logit_adjusted"]),
}
BASELINE = "cross_entropy"
ORDERS = (0, 1)
STATES = (0, 1, 2)
COLUMNS = {
    "balanced_accuracy": "balanced accuracy",
    "head_accuracy": "head",
    "medium_accuracy": "medium",
    "tail_accuracy": "tail",
    "expected_calibration_error": "calibration error",
}


def cell(method: str, order: int, state: int) -> dict[str, float]:
    """Test metrics of one run, from its folder or by running it."""
    overrides = ["data=fashion_mnist_lt", *METHODS[method][1], f"data.class_order={order}", f"seed={state}"]
    overrides += [f"data.seed={state}", "trainer.enable_progress_bar=false"]
    folder = RUNS / f"{method}-order{order}-state{state}"
    with initialize_config_module("counterpoise.recipes.conf", version_base="1.3"):
        config = resolved(compose("train", overrides=overrides), folder)
    done = load_result(folder)
    same = done.metrics.get("config_hash") == config_hash(config)
    if not (same and done.metrics.get("status") == "completed"):
        print(f"running {folder.name}", file=sys.stderr)
        launch(config, folder, resume=same)
        done = load_result(folder)
    return done.metrics["splits"]["test"]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over random states, in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def page(found: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    """The result page."""
    lines = [
        "# Long-tailed classification",
        "",
        "Long-tailed Fashion-MNIST, imbalance factor 100 (about 9,900 training images, the largest class 4,000, the",
        "smallest 40), the small stride-2 encoder, 30 epochs of SGD with a cosine schedule, the best epoch by balanced",
        "accuracy on a balanced validation split, then the test split once. Two class orders,",
        f"{len(STATES)} random states each (weights, data order, subset and split); percent, mean ± standard deviation",
        "over random states. Head, medium and tail are terciles of the classes by training count.",
        "",
        "<!-- no-run: trains twelve networks -->",
        "```bash",
        "python -m benchmarks.long_tailed",
        "```",
        "",
        "A single cell is",
        "`counterpoise-train data=fashion_mnist_lt loss=logit_adjusted data.class_order=0 seed=0 data.seed=0`.",
        "",
    ]
    for order in ORDERS:
        lines += [f"## Class order {order}", "", f"| loss | {' | '.join(COLUMNS.values())} |"]
        lines += ["|---" * (len(COLUMNS) + 1) + "|"]
        for loss, name in LOSSES.items():
            row = [spread([metrics[column] for metrics in found[loss, order]]) for column in COLUMNS]
            lines.append(f"| {name} | {' | '.join(row)} |")
        lines += ["", verdict(found, order), ""]
    return "\n".join(lines)


def verdict(found: dict[tuple[str, int], list[dict[str, float]]], order: int) -> str:
    """The difference in tail recall, run by run."""
    runs: dict[str, Any] = {loss: [m["tail_accuracy"] for m in found[loss, order]] for loss in LOSSES}
    gains = [100 * (b - a) for a, b in zip(runs["cross_entropy"], runs["logit_adjusted"], strict=True)]
    return (
        f"Logit adjustment less cross-entropy in tail recall: {statistics.mean(gains):+.1f} points "
        f"(smallest {min(gains):+.1f}, largest {max(gains):+.1f}, standard deviation {statistics.stdev(gains):.1f})."
    )


def main() -> None:
    """Runs what is missing and writes the page."""
    os.chdir(ROOT)
    cells = itertools.product(STATES, ORDERS, LOSSES)  # interleaved, so that a stopped table is balanced
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for state, order, loss in cells:
        found.setdefault((loss, order), []).append(cell(loss, order, state))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(found))
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
