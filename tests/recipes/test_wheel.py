"""The wheel as a user gets it: what is in it, and a run with nothing of the checkout in reach."""

from __future__ import annotations

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from counterpoise.recipes.run_folder import read_metrics
from tests.recipes.launching import QUICK, run_folders
from tools import build_wheel
from tools.build_wheel import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DATA = [
    "counterpoise/py.typed",
    "counterpoise/recipes/templates/report.html.j2",
    "counterpoise/recipes/conf/__init__.py",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With kernels where there is a compiler."""
    asked = {"COUNTERPOISE_BUILD": "1"} if shutil.which("g++") else {}
    return build_wheel.build(tmp_path_factory.mktemp("dist"), **asked)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; the dependencies are those at hand, but not the checkout."""
    folder = tmp_path_factory.mktemp("venv") / "venv"
    build_wheel.install(wheel, folder)
    return folder


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_configs_template_and_type_marker_are_in_the_wheel(wheel: Path) -> None:
    configs = {str(p.relative_to(ROOT)) for p in (ROOT / "counterpoise" / "recipes" / "conf").rglob("*.yaml")}
    assert len(configs) > 30
    assert configs | set(DATA) <= names_in(wheel)


def test_every_module_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "counterpoise").rglob("*.py")}
    names = names_in(wheel)
    assert modules <= names
    assert {name.split("/")[0] for name in names} == {"counterpoise", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}


def test_the_core_needs_torch_and_numpy_alone(environment: Path) -> None:
    program = (
        "from importlib.metadata import requires; print(*[r for r in requires('counterpoise') if 'extra' not in r])"
    )
    needed = run(environment / "bin" / "python", "-c", program, cwd=environment)
    assert [name.partition(">")[0] for name in needed.split()] == ["torch", "numpy"]


def test_the_installed_script_trains_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    where = run(environment / "bin" / "python", "-c", "import counterpoise; print(counterpoise.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment), "the wheel is tested, not the checkout"
    out = run(environment / "bin" / "counterpoise-train", *QUICK, cwd=tmp_path)
    (folder,) = run_folders(tmp_path)
    assert read_metrics(folder)["status"] == "completed"
    assert (folder / "report.html").stat().st_size > 10_000
    assert "report: outputs/long_tailed/" in out


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_kernels_need_stable_interfaces_alone_and_run(wheel: Path, environment: Path, tmp_path: Path) -> None:
    found = build_wheel.audit_wheel(wheel)
    assert list(found) == ["counterpoise/kernels/libcounterpoise_cpu.so"]
    for needs in found.values():
        assert not needs.disallowed
        assert needs.manylinux is not None, str(needs)
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    tagged = build_wheel.retag(Path(shutil.copy(wheel, tmp_path)))
    assert "manylinux" in tagged.name
    build_wheel.install(tagged, tmp_path / "venv")
    out = run(tmp_path / "venv" / "bin" / "counterpoise-doctor", cwd=tmp_path)
    assert "element-wise    cpu   ok" in out


def test_without_a_compiler_the_package_is_pure_python_and_runs(tmp_path: Path) -> None:
    python = Path(sys.executable).parent
    wheel = build_wheel.build(tmp_path, PATH=str(python), CXX="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names_in(wheel) if name.endswith(".so")]
    build_wheel.install(wheel, tmp_path / "venv")
    out = run(tmp_path / "venv" / "bin" / "counterpoise-doctor", cwd=tmp_path)
    assert "everything runs on plain PyTorch" in out


def test_the_source_distribution_holds_what_is_compiled(tmp_path: Path) -> None:
    archive = build_wheel.build(tmp_path, kind="sdist")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"setup.py", "build_backend.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]
