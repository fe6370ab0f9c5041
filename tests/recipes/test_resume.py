"""C9: a run killed with kill -9 and started again ends with the same weights, bit for bit."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def job(folder: Path, workers: int, kill_at: int = 0) -> int:
    command = [sys.executable, "-m", "tests.recipes.resume_job", str(folder), str(workers), str(kill_at)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert job(folder, workers=0) == 0
    return folder


@pytest.mark.parametrize(
    ("workers", "kill_at"),
    [(0, 18), (2, 18), (0, 13)],
    ids=["mid-epoch", "mid-epoch, two workers", "just behind an epoch"],
)
def test_killed_and_resumed_is_bit_identical(uninterrupted: Path, tmp_path: Path, workers: int, kill_at: int) -> None:
    assert job(tmp_path, workers, kill_at) == -signal.SIGKILL
    assert not (tmp_path / "final.pt").exists()
    assert job(tmp_path, workers) == 0
    for file in ("last.pt", "final.pt"):
        expected = torch.load(uninterrupted / file, weights_only=True)
        actual = torch.load(tmp_path / file, weights_only=True)
        assert actual.keys() == expected.keys()
        assert {"bank.keys", "bank.pointer", "reweighter.log_q", "loss.statistics.prior"} <= expected.keys()
        different = [name for name in expected if not torch.equal(actual[name], expected[name])]
        assert not different


def test_the_history_of_a_resumed_run_has_each_epoch_once(uninterrupted: Path, tmp_path: Path) -> None:
    job(tmp_path, workers=0, kill_at=28)
    job(tmp_path, workers=0)
    rows = [list(csv.DictReader((folder / "history.csv").open())) for folder in (uninterrupted, tmp_path)]
    assert [row["epoch"] for row in rows[1]] == ["0", "1", "2"]
    assert [row["val/accuracy"] for row in rows[1]] == [row["val/accuracy"] for row in rows[0]]
