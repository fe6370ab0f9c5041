"""``counterpoise-train`` from a test: in this process, which spares the imports, or in one of its own."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

QUICK = ("trainer.max_epochs=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
SCRIPT = Path(sys.executable).with_name("counterpoise-train")


@dataclass(frozen=True)
class Outcome:
    """What a launch in ``folder`` came to."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def runs(self) -> list[Path]:
        """The run folders below ``outputs``, oldest first."""
        return run_folders(self.folder)


def run_folders(folder: Path) -> list[Path]:
    """<folder>/outputs/<recipe>/<date>/<time>, oldest first."""
    return sorted(folder.glob("outputs/*/*/*"))


def launch(folder: Path, *arguments: str) -> Outcome:
    """``counterpoise-train`` with ``arguments`` from inside ``folder``, in this process."""
    from counterpoise.recipes.cli import train

    out, err, code = io.StringIO(), io.StringIO(), 0
    with as_if_alone(folder, ["counterpoise-train", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            train()
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue(), folder)


def launch_process(folder: Path, *arguments: str) -> Outcome:
    """The installed script in a process of its own."""
    done = subprocess.run([SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr, folder)


@contextmanager
def as_if_alone(folder: Path, argv: list[str]) -> Iterator[None]:
    """Puts back what a process that ends need not: folder, arguments, environment, modules, handlers, torch's mode."""
    root = logging.getLogger()
    before = Path.cwd(), sys.argv, list(sys.path), dict(os.environ), set(sys.modules), root.handlers[:], root.level
    deterministic = torch.are_deterministic_algorithms_enabled()
    os.chdir(folder)
    sys.argv = argv
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.argv, sys.path[:] = before[1], before[2]
        os.environ.clear()
        os.environ.update(before[3])
        for name in set(sys.modules) - before[4]:
            if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]
        root.handlers[:], root.level = before[5], before[6]
        torch.use_deterministic_algorithms(deterministic)
