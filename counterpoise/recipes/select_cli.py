"""``counterpoise-select``: scores a data set, keeps a part of it, and writes indices, weights and a page.

Exit codes: 0 done; 2 a mistake in the arguments or the data, told in one sentence; 1 anything else.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELP = """Selects a part of a labelled data set.

SOURCE is an .npz file with `embeddings` (N, D) and `labels` (N,), and `logits` (N, C) if you have them; or a .csv file
with --label; or a folder with one folder of images a class. Scores need logits: where there are none, a linear
classifier is fitted to the embeddings; for images a small network is trained, and the embeddings are its own.

OUT gets selection.npz (indices, weights, scores), selection.csv (a row for every kept example), config.yaml and
report.html."""


def select(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``counterpoise-select``."""
    try:
        from counterpoise.recipes.run_folder import command_line
        from counterpoise.recipes.selecting import KEEPS, METHODS
    except ModuleNotFoundError as missing:
        sys.exit(_complain(f"counterpoise-select needs {missing.name}: pip install 'counterpoise[recipes]'"))
    parser = argparse.ArgumentParser("counterpoise-select", description=HELP, formatter_class=_Raw, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--out", default="selected", help="folder that is written (default: selected)")
    names = [name for name in METHODS if name != "forgetting"]  # that one needs a training run
    parser.add_argument("--method", default="el2n", choices=names)
    parser.add_argument("--fraction", type=float, default=0.3, help="of the examples that are kept, in (0, 1]")
    parser.add_argument("--keep", default="hardest", choices=KEEPS, help="by scores")
    parser.add_argument("--across-classes", action="store_true", help="do not select inside every class")
    parser.add_argument("--label", help="column of the classes in a .csv file")
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels that images are scaled to")
    parser.add_argument("--epochs", type=int, default=5, help="of the network for images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        report = run(options, command_line())
    except (ValueError, TypeError, OSError) as error:
        sys.exit(_complain(str(error)))
    print(f"report: {os.path.relpath(report)}")


class _Raw(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _complain(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@dataclass
class Source:
    """A pool, what its classes and rows are called, and its pictures."""

    pool: Any
    class_names: list[str]
    row_names: list[str] | None = None
    images: Any = None


def run(options: argparse.Namespace, command: str) -> Path:
    """Selects as the options say and writes everything; gives the path of the page."""
    import yaml

    from counterpoise.recipes.report import write_report
    from counterpoise.recipes.report_sections import CLOSING, RESULTS
    from counterpoise.recipes.run_folder import environment, write_metrics
    from counterpoise.recipes.sections_selection import selection_sections
    from counterpoise.recipes.selecting import check_method, choose, write_selection

    check_method(options.method, options.fraction, options.keep)
    source = read(options)
    started = time.monotonic()
    chosen = choose(
        source.pool,
        options.method,
        options.fraction,
        balanced=not options.across_classes,
        keep=options.keep,
        seed=options.seed,
    )
    seconds = round(time.monotonic() - started, 3)
    picked, pool = chosen.selection, source.pool
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_selection(
        out / "selection.npz",
        {
            "indices": picked.indices,
            "weights": picked.weights,
            "scores": chosen.scores,
            "features": pool.features.half() if len(pool) <= 20_000 else None,
            "targets": pool.targets,
            "seconds": seconds,
        },
    )
    write_rows(out / "selection.csv", source, chosen)
    (out / "config.yaml").write_text(yaml.safe_dump(vars(options), sort_keys=False))
    kept = pool.targets[picked.indices].bincount(minlength=len(source.class_names)).tolist()
    found = {"method": options.method, "kept": len(picked), "of": len(pool), "seconds": seconds}
    write_metrics(
        out,
        {
            "recipe": "select",
            "status": "completed",
            "error": None,
            "notes": list(picked.notes),
            "command": command,
            "environment": environment("cpu", 1),
            "class_names": source.class_names,
            "class_counts": pool.targets.bincount(minlength=len(source.class_names)).tolist(),
            "selection": {**found, "kept_per_class": kept, "pictures": _pictures(source, chosen)},
        },
    )
    return write_report(out, [section for section in (*selection_sections, *CLOSING) if section is not RESULTS])


def read(options: argparse.Namespace) -> Source:
    """The pool that SOURCE holds.

    Raises:
        ValueError, FileNotFoundError: a source that is none of the three kinds, or one that does not fit.
    """
    path = Path(options.source).expanduser()
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".csv":
        return _read_csv(path, options.label)
    if path.is_dir():
        return _read_images(path, options)
    raise ValueError(f"SOURCE is {options.source!r}, expected an .npz file, a .csv file or an existing folder")


def _read_npz(path: Path) -> Source:
    import numpy as np
    import torch

    from counterpoise.recipes.selecting import Pool

    with np.load(path, allow_pickle=False) as arrays:
        missing = next((name for name in ("embeddings", "labels") if name not in arrays), None)
        if missing:
            raise ValueError(f"{path} holds {', '.join(arrays.files)}, expected an array named {missing!r}")
        embeddings, labels = torch.from_numpy(arrays["embeddings"]).float(), arrays["labels"]
        logits = torch.from_numpy(arrays["logits"]).float() if "logits" in arrays else None
    if embeddings.ndim != 2 or labels.shape != (len(embeddings),):
        raise ValueError(
            f"{path} has embeddings of shape {tuple(embeddings.shape)} and labels of shape {labels.shape}, "
            "expected (N, D) and (N,)"
        )
    names, codes = np.unique(labels, return_inverse=True)
    targets = torch.from_numpy(codes).long()
    if logits is not None and logits.shape != (len(targets), len(names)):
        raise ValueError(f"{path} has logits of shape {tuple(logits.shape)}, expected ({len(targets)}, {len(names)})")
    return Source(
        Pool(targets, embeddings, logits_of(embeddings, targets) if logits is None else logits),
        names.astype(str).tolist(),
    )


def _read_csv(path: Path, label: str | None) -> Source:
    import torch

    from counterpoise.recipes.data.csv import read_table
    from counterpoise.recipes.selecting import Pool

    if label is None:
        raise ValueError(f"{path} is a table, expected --label with the name of its column of classes")
    table = read_table(path)
    names, targets = table.codes("label", label)
    columns, _ = table.choose(None, [label])
    x = torch.stack([table.numbers(name) for name in columns], dim=1)
    spread = x.std(0, correction=0)
    x = ((x - x.mean(0)) / torch.where(spread > 0, spread, 1)).float()
    return Source(Pool(targets, x, logits_of(x, targets)), names)


def _read_images(path: Path, options: argparse.Namespace) -> Source:
    from counterpoise.recipes.data.image_folders import labelled_images
    from counterpoise.recipes.proxy import train_proxy
    from counterpoise.recipes.selecting import Pool

    images, names, files = labelled_images(path, options.image_size)
    logits, features = train_proxy(images, len(names), epochs=options.epochs, seed=options.seed)
    return Source(Pool(images.targets, features, logits), names, files, images)


def logits_of(embeddings: Any, targets: Any) -> Any:
    """(N, C) logits of a linear classifier on standardised embeddings (scikit-learn's logistic regression)."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(targets.unique()) < 2:
        raise ValueError("labels hold one class, expected at least 2")
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(embeddings.numpy(), targets.numpy())
    values = torch.from_numpy(fitted.decision_function(embeddings.numpy())).float()
    return torch.stack([torch.zeros_like(values), values], dim=1) if values.ndim == 1 else values


def write_rows(file: Path, source: Source, chosen: Any) -> None:
    """selection.csv: index, name where rows have one, class, weight, score; in the order of the picks."""
    picked, scores, names = chosen.selection, chosen.scores, source.row_names
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(
            ["index", *(["file"] if names else []), "class", "weight", *([] if scores is None else ["score"])]
        )
        for index, weight in zip(picked.indices.tolist(), picked.weights.tolist(), strict=True):
            row = [index, *([names[index]] if names else []), source.class_names[int(source.pool.targets[index])]]
            writer.writerow([*row, f"{weight:.6g}", *([] if scores is None else [f"{float(scores[index]):.6g}"])])


def _pictures(source: Source, chosen: Any) -> dict[str, Any]:
    from counterpoise.recipes.selecting import pictures

    if source.images is None:
        return {}
    return pictures(source.images, source.class_names, chosen.selection.indices, chosen.scores)


if __name__ == "__main__":
    select()
