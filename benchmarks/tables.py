"""What the result tables share: cells that are runs of ``counterpoise-train``, kept by configuration, and pages."""

from __future__ import annotations

import statistics
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from counterpoise.recipes.cli import launch
from counterpoise.recipes.composition import resolved
from counterpoise.recipes.run import load_result
from counterpoise.recipes.run_folder import config_hash

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "outputs" / "results"
PAGES = ROOT / "docs" / "results"


def cell(table: str, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """metrics.json of one run: read from its folder if this very configuration completed there, else run.

    A run that was stopped goes on from its last checkpoint.
    """
    folder = RUNS / table / name
    with initialize_config_module("counterpoise.recipes.conf", version_base="1.3"):
        config = resolved(compose("train", overrides=[*overrides, "trainer.enable_progress_bar=false"]), folder)
    done = load_result(folder)
    same = done.metrics.get("config_hash") == config_hash(config)
    if not (same and done.metrics.get("status") == "completed"):
        print(f"running {table}/{name}", file=sys.stderr, flush=True)
        launch(config, folder, resume=same)
        done = load_result(folder)
    return done.metrics


def spread(values: Iterable[float], scale: float = 100) -> str:
    """Mean and standard deviation over random states, in percent by default."""
    scaled = [scale * value for value in values]
    return f"{statistics.mean(scaled):.1f} ± {statistics.stdev(scaled):.1f}"


def gain(ours: Sequence[float], theirs: Sequence[float], scale: float = 100) -> str:
    """The difference state by state: mean, smallest, largest."""
    differences = [scale * (a - b) for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.mean(differences):+.1f} (from {min(differences):+.1f} to {max(differences):+.1f})"


def table(head: str, rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join([head, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]


def prose(text: str) -> list[str]:
    """A paragraph as wrapped lines, and an empty one behind it."""
    return [*textwrap.wrap(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False), ""]


def command(module: str) -> list[str]:
    """How a page is made, as a block that the documentation's tests do not run."""
    return ["<!-- no-run: trains many networks -->", "```bash", f"python -m benchmarks.{module}", "```", ""]


def write_page(name: str, lines: Sequence[str]) -> None:
    """Writes docs/results/<name>.md."""
    PAGES.mkdir(parents=True, exist_ok=True)
    path = PAGES / f"{name}.md"
    path.write_text("\n".join([*lines, ""]))
    print(path.relative_to(ROOT))
