"""Reads a run folder leniently: what is missing or broken is empty, with the reason, and never an exception."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf


@dataclass(frozen=True)
class RunFolder:
    """What could be read of a run folder; ``problems`` says why a file could not."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    history: dict[str, np.ndarray] = field(default_factory=dict)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def metric(self, *keys: str) -> Any:
        """The entry of metrics.json under ``keys``, or :class:`NotAvailable`."""
        node: Any = self.metrics
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        if node is None:
            reason = self.problems.get("metrics.json", f"metrics.json has no {'.'.join(keys)}")
            raise NotAvailable(reason)
        return node


class NotAvailable(Exception):
    """Raised by a block whose input is missing; the report shows the reason."""


def read_run(folder: Path) -> RunFolder:
    """Reads a run folder leniently: a file that is missing or broken is empty and named in ``problems``."""
    problems: dict[str, str] = {}

    def attempt(name: str, read: Callable[[Path], Any], empty: Any) -> Any:
        try:
            return read(folder / name)
        except FileNotFoundError:
            problems[name] = f"there is no {name}"
        except Exception as error:  # whatever is wrong with the file, the report is written
            problems[name] = f"{name} cannot be read ({type(error).__name__}: {error})"
        return empty

    return RunFolder(
        folder,
        metrics=attempt("metrics.json", _read_metrics, {}),
        config=attempt("config.yaml", _read_config, {}),
        config_text=attempt("config.yaml", lambda path: path.read_text(encoding="utf-8", errors="replace"), ""),
        history=attempt("history.csv", _read_history, {}),
        predictions=attempt("predictions.npz", _read_predictions, {}),
        problems=problems,
    )


def as_mapping(node: Any) -> dict[str, Any]:
    """``node`` if it is a dictionary, else an empty one."""
    return node if isinstance(node, dict) else {}


def _read_metrics(path: Path) -> dict[str, Any]:
    return _expect_mapping(json.loads(path.read_text(encoding="utf-8")))


def _read_config(path: Path) -> dict[str, Any]:
    return _expect_mapping(OmegaConf.to_container(OmegaConf.load(path), resolve=False))


def _expect_mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, expected a mapping")
    return content


def _read_history(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in (rows[0] if rows else ()) if name}


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):  # blank, or cut off in mid-line
        return float("nan")


def _read_predictions(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


__all__ = ["NotAvailable", "RunFolder", "as_mapping", "read_run"]
