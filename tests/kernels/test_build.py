"""What is asked for before a build, and what the built libraries may need; nothing is compiled here."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import build_wheel, check_cuda

ROOT = Path(__file__).parents[2]


def asked(monkeypatch: pytest.MonkeyPatch, *, compiler: str | None, torch: Path | None, build: str = "") -> list[str]:
    """What the build backend asks for beside setuptools, where these are found."""
    backend = runpy.run_path(str(ROOT / "build_backend.py"))
    found = SimpleNamespace(compiler=lambda: compiler, torch_folder=lambda: torch)
    monkeypatch.setitem(backend["headers"].__globals__, "build_script", lambda: found)
    monkeypatch.setenv("COUNTERPOISE_BUILD", build)
    return backend["headers"]()


def test_torch_is_asked_for_where_it_is_missing_and_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, compiler="g++", torch=None) == ["torch>=2.11"]
    assert asked(monkeypatch, compiler="g++", torch=ROOT) == []
    assert asked(monkeypatch, compiler=None, torch=None) == []
    assert asked(monkeypatch, compiler="g++", torch=None, build="0") == []


def test_the_backend_finds_compiler_and_torch_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nonexistent")
    backend = runpy.run_path(str(ROOT / "build_backend.py"))
    build = backend["build_script"]()
    assert build.compiler() is None
    assert (build.torch_folder() / "include").is_dir()
    assert backend["headers"]() == []


@pytest.mark.parametrize(("asked_for", "status"), [("", 0), ("1", 1)])
def test_without_a_compiler_the_kernels_are_left_out_unless_they_are_asked_for(asked_for: str, status: int) -> None:
    env = os.environ | {"PATH": "", "CXX": "/nonexistent", "COUNTERPOISE_BUILD": asked_for}
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "no C++ compiler" in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="links with g++ on Linux")
def test_a_c_plus_plus_runtime_of_its_own_is_noticed(tmp_path: Path) -> None:
    """Such a library would end the process on the first bad label."""
    source = tmp_path / "thrower.cpp"
    source.write_text('#include <stdexcept>\nvoid refuse() { throw std::runtime_error("no"); }\n')
    shares_runtime = runpy.run_path(str(ROOT / "setup.py"))["shares_runtime"]
    for name, flags, shared in (("shared", [], True), ("static", ["-static-libstdc++"], False)):
        library = tmp_path / f"{name}.so"
        subprocess.run(["g++", "-shared", "-fPIC", *flags, str(source), "-o", str(library)], check=True)
        assert shares_runtime(library) is shared


SYMBOLS = """\
                 U _ZNSt13runtime_errorC1ERKS_@GLIBCXX_3.4.21
                 U _Unwind_Resume@GCC_3.0
                 U __cxa_throw@CXXABI_1.3
                 U exp@GLIBC_2.29
                 U memcpy@GLIBC_2.14
                 U aoti_torch_get_dtype
                 U torch_parallel_for
                 w __gmon_start__
"""


def test_a_library_of_stable_symbols_alone_passes() -> None:
    needs = build_wheel.needs_of(SYMBOLS)
    assert needs.disallowed == []
    assert needs.newest["GLIBC"] == (2, 29)
    assert needs.manylinux == "2_31"
    assert "GLIBC 2.29" in str(needs)


@pytest.mark.parametrize(
    "symbol", ["PyObject_Call", "_ZN2at8internal15invoke_parallelEv", "_ZN3c105ErrorE", "GOMP_parallel@GOMP_4.0"]
)
def test_symbols_of_python_of_torch_and_of_others_do_not(symbol: str) -> None:
    assert build_wheel.needs_of(f"{SYMBOLS} U {symbol}\n").disallowed == [symbol.partition("@")[0]]


def test_the_oldest_manylinux_that_has_all_of_it() -> None:
    assert build_wheel.needs_of(" U memcpy@GLIBC_2.14").manylinux == "2_17"
    assert build_wheel.needs_of(" U dlsym@GLIBC_2.34").manylinux == "2_34"
    assert build_wheel.needs_of(" U f@GLIBCXX_3.4.30").manylinux == "2_35"
    assert build_wheel.needs_of(" U f@GLIBC_2.99").manylinux is None


def test_names_of_kernels_are_read_from_their_symbols() -> None:
    def name(symbol: str) -> str:
        return check_cuda.Kernel("", symbol, 80, 0, 0, 0, 0).name

    assert name("_ZN12counterpoise4cuda15binary_concludeIfEEvNS0_10BinarySumsIT_EEi") == "binary_conclude"
    assert name("_Z1kIfEvPKT_") == "k"
