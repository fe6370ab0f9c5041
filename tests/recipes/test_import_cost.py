"""A person who wants one loss pays for one loss: little time beside torch, and none of the recipes' packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

OURS = "import counterpoise.losses, counterpoise.samplers, counterpoise.contrastive, counterpoise.neighbors"
NOT_OURS = ("lightning", "hydra", "omegaconf", "torchmetrics", "sklearn", "scipy", "matplotlib", "ot", "faiss")
BUDGET = 0.1  # seconds beside torch; about 0.025 on two cores


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=env)


def seconds_of_ours(importtime: str) -> float:
    """Cumulative time of the outermost entries of ours: a parent is printed behind its children, less indented."""
    lines = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| ( *)(\S+)$", importtime, flags=re.MULTILINE)
    total, inside = 0, None
    for cumulative, indent, name in reversed(lines):
        if inside is not None and len(indent) > inside:
            continue
        inside = None
        if name.split(".")[0] == "counterpoise":
            total, inside = total + int(cumulative), len(indent)
    return total / 1e6


def test_the_sum_counts_each_outermost_entry_once() -> None:
    report = """import time: self [us] | cumulative | imported package
import time:       100 |        100 | torch
import time:        10 |         10 |   math
import time:         5 |         15 |     counterpoise._core
import time:         5 |         20 |   counterpoise.memory
import time:        30 |         60 | counterpoise.losses
import time:        40 |         40 | counterpoise.samplers
"""
    assert seconds_of_ours(report) == 100e-6


def test_losses_add_little_to_torch(tmp_path: Path) -> None:
    """What an installed package costs: its bytecode is compiled once, here in the first run."""
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = ("-X", "importtime", "-c", "import torch; import counterpoise.losses")
    python(*command, **kept)
    runs = [python(*command, **kept).stderr for _ in range(3)]
    assert all(" counterpoise.losses\n" in run for run in runs)
    assert min(map(seconds_of_ours, runs)) < BUDGET


def test_the_core_imports_none_of_the_recipes_packages() -> None:
    listed = python("-c", f"{OURS}; import sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))").stdout
    assert "counterpoise" in listed.split()
    assert not set(NOT_OURS) & set(listed.split())
