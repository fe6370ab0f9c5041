"""``counterpoise-doctor``: what is active here, why something is not, and whether the kernels give right results.

Prints versions, libraries, instruction set, every operator by device, a self-test of each family against its plain
PyTorch form, and which optional packages are installed. ``--build`` compiles the kernels of a source checkout first.
The exit status is 1 if something fails that should work, else 0: what is merely absent is no failure.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import counterpoise
from counterpoise import kernels
from counterpoise.kernels import _library

CHECKOUT = _library.FOLDER.parents[1]
TOLERANCE = 1e-5  # float32, relative to the largest entry
MODULES = {  # where a package's module has another name
    "faiss-cpu": "faiss",
    "faiss-gpu": "faiss",
    "hydra-core": "hydra",
    "myst-parser": "myst_parser",
    "pot": "ot",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "types-pyyaml": "",  # stubs alone
    "import-linter": "importlinter",
}


@dataclass(frozen=True)
class SelfTest:
    """A small problem of one family, whose loss is differentiated once fused and once plain."""

    operator: str  # without which there is nothing to test
    room: str  # which module has the losses; named, not imported: the rooms import this package
    loss: Callable[[Any, Tensor], Tensor]  # (room, (rows, 19)) -> value
    rows: int = 7


def _element_wise(losses: Any, logits: Tensor) -> Tensor:
    target = torch.arange(logits.numel(), device=logits.device).reshape(logits.shape).remainder(3).eq(0).float()
    fading = losses.sigmoid_focal_loss(logits, target) + losses.asymmetric_loss(logits, target)
    return fading + losses.binary_cross_entropy_loss(logits, target)


def _row_wise(losses: Any, logits: Tensor) -> Tensor:
    target = torch.arange(len(logits), device=logits.device)
    counts = list(range(1, logits.shape[1] + 1))
    return losses.logit_adjusted_loss(logits, target, class_counts=counts) + losses.softmax_focal_loss(logits, target)


def _soft_row_wise(losses: Any, logits: Tensor) -> Tensor:
    target = torch.softmax(logits.detach().flip(1) / 4, 1)
    return losses.cross_entropy_loss(logits, target) + losses.cross_entropy_loss(logits, target, label_smoothing=0.1)


def _pairwise(contrastive: Any, z: Tensor) -> Tensor:
    return contrastive.ntxent_loss(*z.chunk(2))


def _transport(ot: Any, x: Tensor) -> Tensor:
    # On a GPU a small problem is one block's, a larger one is shared out.
    few, all_rows = (ot.sinkhorn(some.square() / 36, epsilon=0.1, gradient="envelope").value for some in (x[:7], x))
    return few + all_rows


def _selection(samplers: Any, x: Tensor) -> Tensor:
    # What is selected is not differentiated: its value scales something that is.
    points = x.detach()
    value = samplers.facility_location(points, 20).value + samplers.k_center_greedy(points, 20, first=0).value
    return value * x.square().mean()


def _neighbors(neighbors: Any, x: Tensor) -> Tensor:
    values, keys = neighbors.nearest_neighbors(x.detach(), x.detach().flip(0), 9)
    return (values.sum() + keys.double().square().sum()) * x.square().mean()


SELF_TESTS = {
    "element-wise": SelfTest("binary_total", "counterpoise.losses", _element_wise),
    "row-wise": SelfTest("rows_total", "counterpoise.losses", _row_wise),
    "row-wise/soft": SelfTest("soft_rows_total", "counterpoise.losses", _soft_row_wise),
    # So many rows that their similarities are taken in tiles.
    "pairwise": SelfTest("pairwise_rows", "counterpoise.contrastive", _pairwise, rows=600),
    "transport": SelfTest("transport_sweep", "counterpoise.ot", _transport, rows=900),
    "selection": SelfTest("selection_taken", "counterpoise.samplers", _selection, rows=90),
    "neighbours": SelfTest("selection_nearest", "counterpoise.neighbors", _neighbors, rows=90),
}


def difference(test: SelfTest, device: str) -> float:
    """The largest difference between fused and plain, of value and gradient, relative to the largest entry."""
    room = import_module(test.room)

    def run() -> tuple[Tensor, Tensor]:
        x = 6 * torch.linspace(0, 7 * test.rows, 19 * test.rows, device=device).sin().reshape(test.rows, 19)
        x.requires_grad_()
        value = test.loss(room, x)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    fused = run()
    with kernels.disabled():
        plain = run()
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
        for a, b in zip(fused, plain, strict=True)
    )


def versions() -> Iterator[str]:
    """Lines on what runs."""
    yield f"counterpoise  {counterpoise.__version__} in {Path(counterpoise.__file__).parent}"
    yield f"Python        {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch         {torch.__version__}, {torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        yield "CUDA          torch is built without it"
    elif not torch.cuda.is_available():
        yield f"CUDA          {torch.version.cuda} in torch, no device"
    else:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield f"CUDA          {torch.version.cuda} in torch; {names}"


def libraries() -> Iterator[str]:
    """Lines on the compiled libraries and the instruction set."""
    for device in ("cpu", "cuda"):
        path, reason = _library._path(device), _library._why_not[device]
        state = f"not loaded: {reason}" if reason else f"loaded from {path.parent}"
        yield f"{path.name:28}{state}"
    forced = os.environ.get("COUNTERPOISE_CPU_CAPABILITY")
    found = f"{kernels.cpu_capability()} (torch's own kernels: {torch.backends.cpu.get_cpu_capability()})"
    yield f"{'instruction set':28}{found}{', COUNTERPOISE_CPU_CAPABILITY=' + forced if forced else ''}"
    if os.environ.get("COUNTERPOISE_KERNELS", "1") == "0":
        yield "switched off by COUNTERPOISE_KERNELS=0"


def operators() -> Iterator[str]:
    """A line an operator."""
    for name, row in kernels.available().items():
        where = ", ".join(f"{device} {'yes' if row[device] else 'no'}" for device in ("cpu", "cuda"))
        yield f"{name:32}{where:18}{row['why_not']}".rstrip()


def self_tests() -> Iterator[tuple[str, bool]]:
    """A line a family and device, and whether it is as it should be."""
    found = kernels.available()
    for family, test in SELF_TESTS.items():
        for device in ("cpu", "cuda"):
            if not found[test.operator][device]:
                continue
            try:
                largest = difference(test, device)
            except Exception as error:
                yield f"{family:16}{device:6}FAILED: {type(error).__name__}: {error}", False
                continue
            right = largest <= TOLERANCE
            verdict = "ok" if right else "FAILED"
            yield f"{family:16}{device:6}{verdict}: fused and plain differ by {largest:.1e} at most", right


def broken_libraries() -> Iterator[str]:
    """A line a library that lies there and should load, but does not."""
    for device in ("cpu", "cuda"):
        if _library._path(device).exists() and _library._why_not[device].startswith("does not load"):
            yield f"{_library._path(device).name}: {_library._why_not[device]}"


def extras() -> Iterator[str]:
    """A line an optional group of packages: installed, or what is missing. Nothing is imported."""
    groups: dict[str, list[str]] = {}
    try:
        needed = requires("counterpoise") or []
    except PackageNotFoundError:
        yield "unknown: the package is not installed, only on the path"
        return
    for line in needed:
        if marker := re.search(r"extra == ['\"]([\w-]+)['\"]", line):
            name = re.match(r"[\w.-]+", line)
            if name and name[0] != "counterpoise":
                groups.setdefault(marker[1], []).append(name[0])
    for extra, packages in sorted(groups.items()):
        missing = [name for name in packages if not _installed(name)]
        yield f"{extra:16}{'missing: ' + ', '.join(missing) if missing else 'installed'}"


def _installed(package: str) -> bool:
    module = MODULES.get(package.lower(), package.lower().replace("-", "_"))
    return not module or find_spec(module) is not None


def build() -> str:
    """Compiles the kernels of a checkout; an empty string, or what stood in the way."""
    if not (CHECKOUT / "setup.py").exists() or not (CHECKOUT / "csrc").is_dir():
        return f"no source checkout: {_library.FOLDER.parent} was installed; see the README on building from source"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("c++") is None:
        return f"no C++ compiler: {compiler} is not on the path (CXX names another)"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = os.environ | {"COUNTERPOISE_BUILD": "1"}  # an error where it fails, not a package without kernels
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False)
    return f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}" if done.returncode else ""


def report() -> bool:
    """Prints everything; whether all is as it should be."""
    right = True
    for title, lines in (
        ("versions", versions()),
        ("libraries", libraries()),
        ("operators", operators()),
        ("optional packages", extras()),
    ):
        print(f"{title}\n  " + "\n  ".join(lines))
    print("self-tests")
    tested = False
    for line, passed in self_tests():
        tested, right = True, right and passed
        print(f"  {line}")
    if not tested:
        print("  none: no kernels are active, everything runs on plain PyTorch")
    for line in broken_libraries():
        print(f"  FAILED: {line}")
        right = False
    print("all is as it should be" if right else "something fails that should work")
    return right


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="counterpoise-doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--build", action="store_true", help="compile the kernels of a source checkout first")
    if parser.parse_args(arguments).build:
        print("building the kernels ...")
        if trouble := build():
            print(f"not built: {trouble}")
            return 1
        print("built")
        # Libraries are loaded at import: the report is that of a new process.
        return subprocess.run([sys.executable, "-m", "counterpoise.kernels.doctor"], check=False).returncode
    return 0 if report() else 1


if __name__ == "__main__":
    sys.exit(main())
