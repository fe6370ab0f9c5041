"""tools/check_cuda.py: what it makes of the assembler's report, with a program in the place of nvcc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "check_cuda.py"
REPORT = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN12counterpoise4cuda4tileIfEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN12counterpoise4cuda4tileIfEEvPKT_
    {stack} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 420 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN12counterpoise4cuda4tileIdEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN12counterpoise4cuda4tileIdEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers
"""


def check(folder: Path, report: str | None, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the script where nvcc prints this report; with ``None`` there is no nvcc."""
    folder.mkdir(exist_ok=True)
    if report is not None:
        (folder / "report").write_text(report)
        nvcc = folder / "nvcc"
        nvcc.write_text(f"#!/bin/sh\n/bin/cat {folder}/report\nexit {status}\n")
        nvcc.chmod(0o755)
    command = [sys.executable, SCRIPT, "binary.cu"]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


def test_a_clean_report_is_put_into_a_table(tmp_path: Path) -> None:
    done = check(tmp_path, REPORT.format(stack=0, spilled=0))
    assert done.returncode == 0, done.stderr
    assert "| binary.cu | tile | sm_80 | 4 | 40 to 56 | 0 to 512 |" in done.stdout


@pytest.mark.parametrize(("stack", "spilled"), [(8, 4), (16, 0)])
def test_a_spill_or_a_stack_frame_is_a_failure(tmp_path: Path, stack: int, spilled: int) -> None:
    done = check(tmp_path, REPORT.format(stack=stack, spilled=spilled))
    assert done.returncode == 1
    assert f"binary.cu, sm_80: tile has a stack frame of {stack} bytes" in done.stderr


def test_a_warning_is_a_failure(tmp_path: Path) -> None:
    done = check(tmp_path, "warning #177-D: variable was declared but never referenced", status=1)
    assert done.returncode == 1
    assert "never referenced" in done.stderr


def test_a_report_that_is_not_understood_is_a_failure(tmp_path: Path) -> None:
    done = check(tmp_path, REPORT.format(stack=0, spilled=0).replace("Used 56", "Takes 56"))
    assert done.returncode == 1
    assert "not understood" in done.stderr


def test_without_nvcc_nothing_is_checked_and_that_is_said(tmp_path: Path) -> None:
    done = check(tmp_path, None)
    assert done.returncode == 0
    assert "nvcc is not installed" in done.stdout
