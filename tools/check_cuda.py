"""Compiles the CUDA sources as the build does and looks at what came out; needs nvcc, no GPU.

Fails on a warning, a spilled register or a stack frame in any kernel. ``--write`` puts the table of registers and
shared memory into docs/kernels_cuda.md. Without nvcc there is nothing to do, and that is no failure.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels_cuda.md"
BEGIN, END = "<!-- table: tools/check_cuda.py --write -->", "<!-- end of the table -->"
ARCHITECTURES = (80, 90)
STRICT = ["-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<architecture>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel, as the assembler reports it; bytes but for the registers of a thread."""

    source: str
    symbol: str
    architecture: int
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def name(self) -> str:
        """The kernel's own name: the last of the nested names that the symbol begins with."""
        at, name = self.symbol.find("N") + 1 if self.symbol.startswith("_ZN") else 2, self.symbol
        while digits := re.match(r"\d+", self.symbol[at:]):
            at += len(digits[0])
            name = self.symbol[at : at + int(digits[0])]
            at += int(digits[0])
        return name


def build_script() -> SimpleNamespace:
    """setup.py, whose flags are used here too."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def compile_one(build: SimpleNamespace, source: Path, architecture: int) -> tuple[str, list[Kernel]]:
    """What went wrong (empty if nothing), and the kernels."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    headers = ["-isystem", str(build.torch_folder() / "include")]
    command = ["nvcc", *build.CUDA, *STRICT, target, *headers, "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        return f"{source.name}, sm_{architecture}:\n{output}", []
    kernels = [
        Kernel(
            source.name,
            found["symbol"],
            int(found["architecture"]),
            int(found["registers"]),
            int(shared[1]) if (shared := re.search(r"(\d+) bytes smem", found["rest"])) else 0,
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in ENTRY.finditer(output)
    ]
    missed = output.count("Compiling entry function") - len(kernels)
    return (f"{source.name}: {missed} kernels of which the report was not understood" if missed else ""), kernels


def complaints(kernels: list[Kernel]) -> list[str]:
    """One line a kernel that spills or has a stack frame."""
    return [
        f"{k.source}, sm_{k.architecture}: {k.name} has a stack frame of {k.stack} bytes and spills {k.spilled} bytes "
        f"({k.symbol})"
        for k in kernels
        if k.stack or k.spilled
    ]


def span(numbers: list[int]) -> str:
    """The smallest and the largest: "32", or "32 to 64"."""
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def table(kernels: list[Kernel]) -> str:
    """Markdown, a line for a kernel's instances on one architecture."""
    groups: dict[tuple[str, str, int], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.source, kernel.name, kernel.architecture].append(kernel)
    lines = [
        "| source | kernel | architecture | instances | registers | shared memory, bytes |",
        "|---|---|---|---|---|---|",
    ]
    for (source, name, architecture), some in sorted(groups.items()):
        registers, shared = span([k.registers for k in some]), span([k.shared for k in some])
        lines.append(f"| {source} | {name} | sm_{architecture} | {len(some)} | {registers} | {shared} |")
    return "\n".join(lines)


def write(page: Path, kernels: list[Kernel]) -> None:
    """Replaces the table in the page."""
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{table(kernels)}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    """Exit status: 0 if all is well or nvcc is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="names in csrc/cuda; all by default")
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels_cuda.md")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("check_cuda: nvcc is not installed: the CUDA sources were not checked")
        return 0
    build = build_script()
    if build.torch_folder() is None:
        print("check_cuda: torch is not installed, its headers are needed: the CUDA sources were not checked")
        return 0
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [s for s in sources if not arguments.sources or s.name in arguments.sources]
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: compile_one(build, *job), jobs))
    kernels = [kernel for _, some in done for kernel in some]
    problems = [problem for problem, _ in done if problem] + complaints(kernels)
    print(table(kernels))
    for problem in problems:
        print(problem, file=sys.stderr)
    if arguments.write and not problems:
        write(PAGE, kernels)
    print(f"check_cuda: {len(kernels)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
