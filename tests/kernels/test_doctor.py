"""counterpoise-doctor: what it prints, and when its exit status says that something is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import counterpoise
from counterpoise import kernels
from counterpoise.kernels import _library, doctor

COMPILED = kernels.available()["binary_total"]["cpu"]


def test_names_versions_libraries_and_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for wanted in (counterpoise.__version__, torch.__version__, kernels.cpu_capability(), "libcounterpoise_cpu.so"):
        assert wanted in out
    for name, row in kernels.available().items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert ("cpu yes" in line) == row["cpu"]
        assert row["why_not"] in line
    assert "all is as it should be" in out


def test_shows_the_instruction_set_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COUNTERPOISE_CPU_CAPABILITY", "avx2")
    doctor.main([])
    assert "COUNTERPOISE_CPU_CAPABILITY=avx2" in capsys.readouterr().out


@pytest.mark.skipif(not COMPILED, reason="kernels are not compiled")
def test_every_family_is_tested_and_right(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([])
    out = capsys.readouterr().out
    for family in doctor.SELF_TESTS:
        assert any(line.split()[:3] == [family, "cpu", "ok:"] for line in out.splitlines())


@pytest.mark.skipif(not COMPILED, reason="kernels are not compiled")
def test_a_kernel_that_differs_from_its_plain_form_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loss(room: object, x: torch.Tensor) -> torch.Tensor:
        return x.sum() * (1.001 if kernels.runs_on(x) else 1)

    monkeypatch.setitem(doctor.SELF_TESTS, "element-wise", doctor.SelfTest("binary_total", "torch", loss))
    assert doctor.main([]) == 1
    assert "FAILED: fused and plain differ" in capsys.readouterr().out


@pytest.mark.skipif(not COMPILED, reason="kernels are not compiled")
def test_a_kernel_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def loss(room: object, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(doctor.SELF_TESTS, "element-wise", doctor.SelfTest("binary_total", "torch", loss))
    assert doctor.main([]) == 1
    assert "FAILED: RuntimeError: no such thing" in capsys.readouterr().out


def test_without_kernels_says_that_all_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    with kernels.disabled():
        assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "everything runs on plain PyTorch" in out
    assert "switched off by kernels.disabled()" in out


def test_a_library_that_does_not_load_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "libcounterpoise_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setitem(_library._why_not, "cpu", _library._load("cpu"))
    assert doctor.main([]) == 1
    assert "FAILED: libcounterpoise_cpu.so: does not load" in capsys.readouterr().out


def test_extras_are_looked_up_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2", 'pot>=0.9; extra == "transport"', 'no-such-thing; extra == "more"', 'json; extra == "more"']
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name in ("ot", "json") else None)
    found = dict(line.split(maxsplit=1) for line in doctor.extras())
    assert found == {"transport": "installed", "more": "missing: no-such-thing"}


def test_build_without_a_checkout_or_a_compiler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    assert doctor.main(["--build"]) == 1
    assert "no source checkout" in capsys.readouterr().out
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main(["--build"]) == 1
    assert "no C++ compiler" in capsys.readouterr().out


def test_build_runs_the_build_script_and_then_reports_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.main(["--build"]) == 0
    assert commands == [["setup.py", "build_ext", "--inplace"], ["-m", "counterpoise.kernels.doctor"]]


def test_a_failed_build_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "setup.py").write_text("raise SystemExit('the compiler gave up')")
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    monkeypatch.setenv("CXX", "sh")  # whatever is on the path
    assert doctor.main(["--build"]) == 1
    assert "the compiler gave up" in capsys.readouterr().out
