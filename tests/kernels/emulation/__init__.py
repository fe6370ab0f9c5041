"""Runs the CUDA kernels' own source on threads of the host: see cuda.h for what this shows and what it cannot.

To add a family: keep its kernels and the functions that launch them in ``csrc/cuda/<family>.cuh`` (launched by
``launch()`` of block.cuh, so that the same choice of kernel is tested), write ``tests/kernels/emulation/<family>.cpp``
after the pattern of binary.cpp (read arrays and numbers from the folder, launch, keep the results), and call
``build("<family>")`` and ``run(...)`` from a test. Nothing else needs to know of it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
STOPPED = 70  # the exit status of a program whose kernel stopped at bad data
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64)  # as csrc numbers them
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread", "-fno-strict-aliasing"]
SANITIZERS = {
    "none": ["-O1"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++")


def build(family: str, folder: Path, sanitizer: str = "none", *defines: str) -> Path:
    """Compiles ``<family>.cpp`` with the kernels that it includes."""
    program = folder / f"{family}_{sanitizer}"
    source = FOLDER / f"{family}.cpp"
    command = [compiler() or "g++", *FLAGS, *SANITIZERS[sanitizer], *(f"-D{name}" for name in defines)]
    command += ["-include", str(FOLDER / "cuda.h"), str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def execute(program: Path, *arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs it, whatever comes of it; a barrier that some threads never reach ends in ``TimeoutExpired``."""
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=timeout)


def run(
    program: Path,
    folder: Path,
    arrays: Mapping[str, Tensor | None],
    numbers: Mapping[str, float],
    results: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """What the program makes of these inputs.

    Args:
        arrays: by the names under which it reads them; ``None`` is a null pointer there.
        numbers: likewise; ``<name>_offset`` moves the array of that name by so many bytes.
        results: which to fetch, and their types; they come flat.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run with other arrays
    folder.mkdir()
    for name, tensor in arrays.items():
        if tensor is not None:
            raw = tensor.detach().contiguous().flatten()
            (folder / name).write_bytes(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    (folder / "numbers").write_text("".join(f"{name} {float(value)!r}\n" for name, value in numbers.items()))
    done = execute(program, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: _read(folder / name, dtype) for name, dtype in results.items()}


def _read(path: Path, dtype: torch.dtype) -> Tensor:
    raw = path.read_bytes()
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
