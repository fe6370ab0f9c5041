"""The report of a run: one self-contained HTML page made from what lies in the run folder, and a table for terminals.

A report never fails because something is missing: what cannot be shown is named, with the reason. It is a list of
sections, each a title and a few functions from a :class:`RunFolder` to a block; a recipe may pass a list of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.table import Table as RichTable
from rich.text import Text as RichText

from counterpoise.recipes.report_data import RunFolder, as_mapping, read_run
from counterpoise.recipes.report_sections import METRICS, SECTIONS, Section, format_metric, render_section, result_rows

TILES = (
    "worst_group_accuracy",
    "robust_accuracy",
    "mean_average_precision",
    "mean_iou",
    "balanced_accuracy",
    "accuracy",
    "tail_accuracy",
    "expected_calibration_error",
)
FACTS = ("loss", "model", "reweighter", "sampler", "optimizer", "scheduler", "seed")


def write_report(folder: Path, sections: Sequence[Section] | None = None) -> Path:
    """Writes ``folder/report.html`` from metrics.json, config.yaml, history.csv and predictions.npz.

    Any of them may be missing. The page needs nothing else: style and plots are inside. It is replaced in one step,
    so that a reader never meets half a report. Returns its path.

    Args:
        folder: an existing run folder.
        sections: what to show, default :data:`SECTIONS`.

    Raises:
        FileNotFoundError: ``folder`` is not a directory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder is {str(folder)!r}, expected an existing run folder")
    run = read_run(folder)
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(
        **headline(run),
        sections=[render_section(section, run) for section in (SECTIONS if sections is None else sections)],
    )
    return _write_atomically(folder / "report.html", page)


def results_table(metrics: dict[str, Any]) -> RichTable:
    """The scalar metrics of metrics.json, one column a split, for the end of the terminal output."""
    splits, rows = result_rows(metrics.get("splits"))
    table = RichTable(title=RichText(str(metrics.get("recipe") or "results")), title_justify="left")
    table.add_column("metric")
    for split in splits:
        table.add_column(RichText(split), justify="right")
    for label, values in rows:
        table.add_row(RichText(label), *(RichText(value) for value in values))
    return table


def headline(run: RunFolder) -> dict[str, Any]:
    """What stands above the sections: recipe, dataset, status, error, tiles of results, facts about the run."""
    metrics, config = run.metrics, run.config
    recipe = metrics.get("recipe") or _name(config.get("recipe")) or "run"
    test = as_mapping(as_mapping(metrics.get("splits")).get("test"))
    facts = [(key.capitalize(), _describe(config[key])) for key in FACTS if config.get(key) not in (None, {})]
    return {
        "recipe": str(recipe).replace("_", " "),
        "dataset": _name(config.get("data")) or run.path.resolve().name,
        "loss": _name(config.get("loss")),
        "status": str(metrics.get("status") or "unknown"),
        "error": metrics.get("error"),
        "folder": run.path.resolve().name,
        "version": as_mapping(metrics.get("environment")).get("counterpoise"),
        "tiles": _tiles(test),
        "facts": facts + _cost_facts(as_mapping(metrics.get("cost"))),
        "hash": str(metrics.get("config_hash") or "")[:12],
    }


def _tiles(test: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of up to four scalars of the test split: the known ones, or else the first ones."""
    keys = [key for key in TILES if key in test] or list(test)
    return [(METRICS.get(key, key.replace("_", " ").capitalize()), format_metric(key, test[key])) for key in keys[:4]]


def _write_atomically(path: Path, text: str) -> Path:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", errors="replace")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _name(node: Any) -> str:
    """A node of the configuration in a word: its name, or the last part of its ``_target_``."""
    if isinstance(node, dict):
        return str(node.get("name") or str(node.get("_target_") or "").rpartition(".")[2])
    return "" if node is None else str(node)


def _describe(node: Any) -> str:
    """A node of the configuration in a line: its name and its plain settings."""
    if not isinstance(node, dict):
        return str(node)
    settings = [
        f"{key} {value}"
        for key, value in node.items()
        if isinstance(value, (int, float, str)) and not key.startswith("_") and key != "name"
    ]
    return _name(node) + (f" ({', '.join(settings[:5])})" if settings else "")


def _cost_facts(cost: dict[str, Any]) -> list[tuple[str, str]]:
    known = {key: x for key, x in cost.items() if isinstance(x, (int, float)) and math.isfinite(x)}
    facts = []
    if "train_seconds" in known:
        minutes, seconds = divmod(round(known["train_seconds"]), 60)
        duration = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
        facts.append(("Training", (f"{known['epochs']} epochs in " if "epochs" in known else "") + duration))
    if "examples_per_second" in known:
        facts.append(("Throughput", f"{known['examples_per_second']:,.0f} examples/s"))
    if "parameters" in known:
        facts.append(("Parameters", f"{known['parameters']:,}"))
    return facts


__all__ = ["SECTIONS", "Section", "results_table", "write_report"]
