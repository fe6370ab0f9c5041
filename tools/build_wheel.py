"""Builds the wheel with the CPU kernels, looks at what its libraries need, and tries it in an environment of its own.

    python tools/build_wheel.py                 # into dist/
    python tools/build_wheel.py --fresh         # dependencies from the package index instead of those at hand

The libraries may need torch's stable C interface, libc, libm, libstdc++ and libgcc, nothing else: no Python and no C++
of torch. The wheel is tagged for the oldest manylinux whose versions of those satisfy it: by auditwheel where that is
installed, else by renaming. Built on the distribution of a manylinux image, it runs on all later ones.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_BUILT = (".*", "build", "dist", "site", "outputs", "*.egg-info", "__pycache__", "docs", "benchmarks", "*.so")
STABLE = ("aoti_torch_", "torch_")
TOOLCHAIN = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")  # versions of libc, libstdc++ and libgcc
CUDA_RUNTIME = "libcudart"
UNVERSIONED = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
# The newest versions that the oldest distributions of each manylinux have.
MANYLINUX = {
    "2_17": {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 8, 0)},
    "2_28": {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    "2_31": {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (10, 0, 0)},
    "2_34": {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (11, 0)},
    "2_35": {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    "2_39": {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
}


@dataclass(frozen=True)
class Needs:
    """What a library takes from others."""

    disallowed: list[str]  # symbols that no stable interface has
    newest: dict[str, tuple[int, ...]]  # by "GLIBC", "GLIBCXX", ...

    @property
    def manylinux(self) -> str | None:
        """The oldest that has all of it: "2_28"."""
        for name, has in MANYLINUX.items():
            if all(needed <= has[what] for what, needed in self.newest.items()):
                return name
        return None

    def __str__(self) -> str:
        return ", ".join(f"{what} {'.'.join(map(str, needed))}" for what, needed in sorted(self.newest.items()))


def needs_of(symbols: str) -> Needs:
    """From the lines of ``nm -D --undefined-only``."""
    disallowed: list[str] = []
    newest: dict[str, tuple[int, ...]] = {}
    for line in symbols.splitlines():
        name, _, tag = line.split()[-1].partition("@")
        what, _, numbers = tag.lstrip("@").partition("_")
        if what in TOOLCHAIN and re.fullmatch(r"[\d.]+", numbers):
            newest[what] = max(newest.get(what, ()), tuple(map(int, numbers.split("."))))
        elif not (name.startswith(STABLE) or name in UNVERSIONED or what.startswith(CUDA_RUNTIME)):
            disallowed.append(name)
    return Needs(disallowed, newest)


def audit(library: Path) -> Needs:
    """What a library needs, by binutils' nm."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    return needs_of(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def audit_wheel(wheel: Path) -> dict[str, Needs]:
    """What each library in a wheel needs, by its name."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        return {name: audit(Path(archive.extract(name, folder))) for name in names}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Runs a command with nothing of this environment in reach; its output, and ``RuntimeError`` where it fails."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path, kind: str = "wheel", **variables: str) -> Path:
    """A wheel (or "sdist") in ``folder``, built from a copy of the tree, so that nothing is written into it.

    ``variables`` are set in the environment of the build, ``COUNTERPOISE_BUILD="0"``, say.
    """
    new_enough = int(version("setuptools").split(".")[0]) >= 77
    with tempfile.TemporaryDirectory() as work:
        source = shutil.copytree(ROOT, Path(work) / "source", ignore=shutil.ignore_patterns(*NOT_BUILT))
        command = [sys.executable, "-m", "build", f"--{kind}", "--outdir", Path(work) / "dist"]
        run(*command, *(["--no-isolation"] if new_enough else []), cwd=Path(source), **variables)
        (built,) = (Path(work) / "dist").iterdir()
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(built, folder / built.name))


def retag(wheel: Path) -> Path:
    """The wheel under the name of its manylinux, if it has libraries and there is one."""
    found = audit_wheel(wheel)
    names = [needs.manylinux for needs in found.values()]
    if not found or None in names or "-linux_" not in wheel.name:
        return wheel
    if shutil.which("auditwheel"):
        before = set(wheel.parent.glob("*.whl"))
        excluded = [f"--exclude={name}" for name in ("libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so.*")]
        run("auditwheel", "repair", *excluded, "--wheel-dir", wheel.parent, wheel, cwd=wheel.parent)
        (made,) = set(wheel.parent.glob("*.whl")) - before
        return made
    oldest = max((name for name in names if name), key=list(MANYLINUX).index)
    tag = f"manylinux_{oldest}"
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "zipfile", "-e", wheel, folder, cwd=wheel.parent)
        (info,) = Path(folder).glob("*.dist-info")
        text = (info / "WHEEL").read_text()
        (info / "WHEEL").write_text(text.replace("-linux_", f"-{tag}_"))
        return _zip(Path(folder), info, wheel.with_name(wheel.name.replace("-linux_", f"-{tag}_")))


def _zip(folder: Path, info: Path, wheel: Path) -> Path:
    """Packs a wheel's files again, with the checksum of the changed one in its record."""
    changed = f"{info.name}/WHEEL"
    raw = (info / "WHEEL").read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
    lines = (info / "RECORD").read_text().splitlines()
    lines = [f"{changed},sha256={digest},{len(raw)}" if line.startswith(f"{changed},") else line for line in lines]
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
    return wheel


def install(wheel: Path, folder: Path, *, fresh: bool = False) -> Path:
    """A new environment in ``folder`` with the wheel; its Python.

    The dependencies are those at hand, but not the checkout: a ``.pth`` file puts their folder on the path and does not
    read the ``.pth`` files in it, so that an editable install of this library stays out of reach. With ``fresh`` they
    come from the package index.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    alone = [] if fresh else ["--no-deps", "--no-index"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *alone, wheel, cwd=folder)
    if not fresh:
        (packages,) = folder.glob("lib/python*/site-packages")
        at_hand = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (packages / "dependencies.pth").write_text("\n".join(at_hand))
    return python


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--fresh", action="store_true", help="install torch and numpy from the package index")
    arguments = parser.parse_args()
    if find_spec("build") is None:
        print("build_wheel: needs the package build (pip install build)")
        return 1
    wheel = build(arguments.out.resolve(), COUNTERPOISE_BUILD="1")
    wrong = False
    for name, needs in audit_wheel(wheel).items():
        print(f"{name}: needs {needs}: manylinux {(needs.manylinux or 'none').replace('_', '.')}")
        for symbol in needs.disallowed:
            print(f"{name}: takes {symbol}, which belongs to no stable interface")
            wrong = True
    wheel = retag(wheel)
    print(wheel)
    with tempfile.TemporaryDirectory() as folder:
        python = install(wheel, Path(folder) / "venv", fresh=arguments.fresh)
        print(run(python.with_name("counterpoise-doctor"), cwd=Path(folder)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
