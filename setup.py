"""Builds the compiled kernels where a compiler and torch's headers are at hand; else the package is pure Python.

The libraries use torch's stable interface alone: no Python headers, one binary for many versions of torch and Python.

``COUNTERPOISE_BUILD=0`` leaves them out; with ``COUNTERPOISE_BUILD=1`` it is an error if they cannot be built. CUDA
kernels are built with ``COUNTERPOISE_CUDA=1``, or where nvcc and a device are there;
``COUNTERPOISE_CUDA_ARCHITECTURES`` (default ``80;90``) names what for.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
COMMON = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
LOOPS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]  # no OpenMP, its pragma
CUDA = ["-std=c++20", "-O3", "-DUSE_CUDA", TARGET, "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def torch_folder() -> Path | None:
    """Where torch lies: on the path, or (in pip's isolated build) in the environment that is installed into."""
    found = find_spec("torch")
    if found and found.origin:
        return Path(found.origin).parent
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    return installed if (installed / "include" / "torch" / "csrc" / "stable").is_dir() else None


def wants_cuda() -> bool:
    """Whether CUDA kernels are asked for, or could run here."""
    asked = os.environ.get("COUNTERPOISE_CUDA")
    if asked is not None:
        return asked == "1"
    return shutil.which("nvcc") is not None and Path("/dev/nvidia0").exists()


def extensions() -> list[Extension]:
    """One for each back end that can be built."""
    asked = os.environ.get("COUNTERPOISE_BUILD")
    if asked == "0":
        return []
    if compiler() is None or torch_folder() is None:
        if asked == "1":
            raise SystemExit("counterpoise: no C++ compiler or no torch headers, and COUNTERPOISE_BUILD=1")
        print("counterpoise: no C++ compiler or no torch headers: building without kernels")
        return []
    sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*"))]
    backends = ["cpu", "cuda"] if wants_cuda() else ["cpu"]
    return [
        Extension(f"counterpoise.kernels.{name}", sources=sources, optional=name == "cpu" and asked != "1")
        for name in backends
    ]


def instruction_sets() -> dict[str, list[str]]:
    """Flags by name: three on x86-64, one elsewhere."""
    names = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    return {name: INSTRUCTION_SETS[name] for name in names}


def shares_runtime(library: Path) -> bool:
    """Whether a library names a shared C++ runtime, which is then torch's own, among what it needs."""
    return any(name in library.read_bytes() for name in (b"libstdc++.so", b"libc++.so"))


class BuildKernels(build_ext):
    """Compiles csrc/ into one plain shared library for each back end."""

    def finalize_options(self) -> None:
        """In a checkout a build that fails is an error; from a package it leaves the kernels out, with a warning."""
        super().finalize_options()
        for extension in self.extensions or []:
            extension.optional = extension.optional and not self.inplace

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: Python's own interface is not used."""
        *folder, name = fullname.split(".")
        return os.path.join(*folder, f"libcounterpoise_{name}.so")

    def build_extension(self, extension: Extension) -> None:
        """Compiles what is not up to date, and links."""
        name = extension.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp) / name
        folder.mkdir(parents=True, exist_ok=True)
        jobs = self.cpu_jobs(folder) if name == "cpu" else self.cuda_jobs(folder)
        newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*"))
        stale = [job for job in jobs if self.force or not job[0].exists() or job[0].stat().st_mtime < newest]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self.run_tool(job[1]), stale))
        self.run_tool(self.link(name, [str(job[0]) for job in jobs], target))
        if platform.system() == "Linux" and not shares_runtime(target):
            target.unlink()
            raise CompileError(
                f"{target.name} was linked with a C++ runtime of its own, through which no error reaches torch: "
                "install the compiler's shared libstdc++, or name another compiler with CXX"
            )

    def cpu_jobs(self, folder: Path) -> list[tuple[Path, list[str]]]:
        """(object, command): loops once an instruction set, everything else once."""
        jobs = []
        for source in sorted((ROOT / "csrc" / "cpu" / "arch").glob("*.cpp")):
            for name, flags in instruction_sets().items():
                made = folder / f"{source.stem}_{name}.o"
                jobs.append(
                    (made, [*self.cxx(), *LOOPS, *flags, f"-DCP_ARCH={name}", "-c", str(source), "-o", str(made)])
                )
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            made = folder / f"{source.stem}.o"
            jobs.append((made, [*self.cxx(), *self.headers(), TARGET, "-c", str(source), "-o", str(made)]))
        return jobs

    def cuda_jobs(self, folder: Path) -> list[tuple[Path, list[str]]]:
        """(object, command), one a source."""
        architectures = os.environ.get("COUNTERPOISE_CUDA_ARCHITECTURES", "80;90").split(";")
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
        jobs = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            made = folder / f"{source.stem}.o"
            jobs.append((made, ["nvcc", *CUDA, *codes, *self.headers(), "-c", str(source), "-o", str(made)]))
        return jobs

    def cxx(self) -> list[str]:
        """The compiler with the flags of every unit."""
        return [compiler() or "g++", *COMMON]

    def headers(self) -> list[str]:
        """Torch's include folder, whose warnings are not ours."""
        return ["-isystem", str(torch_folder() / "include")]

    def link(self, name: str, objects: list[str], target: Path) -> list[str]:
        """Names torch's library without its folder: it is loaded already when ours is."""
        libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
        if name == "cuda":
            return ["nvcc", "-shared", "-cudart=shared", *objects, *libraries, "-ltorch_cuda", "-o", str(target)]
        # -lgcc: the conversions of half types from the static library, which the shared one has since version 12 alone.
        return [*self.cxx(), "-shared", *objects, *libraries, "-lgcc", "-o", str(target)]

    def run_tool(self, command: list[str]) -> None:
        """Runs a compiler; its output is shown where it fails."""
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{' '.join(command)}\n{done.stderr}")
        if done.stderr:
            self.announce(done.stderr)


class AnyPython(bdist_wheel):
    """A wheel with libraries is bound to a platform, not to a version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython})
