"""The wheel as a user gets it: what is in it, and a run with nothing of the checkout in reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from counterpoise.recipes.run_folder import read_metrics
from tests.recipes.launching import QUICK, run_folders

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOT_BUILT = (".*", "build", "dist", "site", "outputs", "*.egg-info", "__pycache__", "docs", "benchmarks")
DATA = [
    "counterpoise/py.typed",
    "counterpoise/recipes/templates/report.html.j2",
    "counterpoise/recipes/conf/__init__.py",
]


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that nothing is written into it."""
    work = tmp_path_factory.mktemp("build")
    source = shutil.copytree(ROOT, work / "source", ignore=shutil.ignore_patterns(*NOT_BUILT))
    new_enough = int(version("setuptools").split(".")[0]) >= 77
    run(
        *(sys.executable, "-m", "build", "--wheel", "--outdir", work / "dist"),
        *(["--no-isolation"] if new_enough else []),
        cwd=Path(source),
    )
    (built,) = (work / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; the dependencies are those at hand, but not the checkout.

    A ``.pth`` file puts their folder on the path and does not read the ``.pth`` files in it, so that an editable
    install of this library stays out of reach.
    """
    venv = tmp_path_factory.mktemp("venv") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=venv.parent)
    (packages,) = venv.glob("lib/python*/site-packages")
    at_hand = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(at_hand))
    return venv


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
