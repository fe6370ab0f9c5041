"""``python -m benchmarks.kernel_growth``: how time and memory of fused passes grow with N, C and d; ``--write``.

Each curve is a forward and a backward pass at sizes over a decade or more; its exponent is the slope of the line
through the logarithms. Times are medians of a few runs with two threads; memory is what a pass adds to a process at its
peak, in a process of its own. The picture goes to docs/images/kernel_growth.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.__main__ import PAGE
from benchmarks.kernels import Step, normal, peak, seconds, step
from counterpoise.contrastive import CACRLoss, NTXentLoss, SupConLoss
from counterpoise.losses import AsymmetricLoss, LogitAdjustedLoss, SigmoidFocalLoss

PICTURE = PAGE.parent / "images" / "kernel_growth.svg"
RUNS = 5


def labels(loss: Callable[..., torch.Tensor], n: int, c: int) -> Step:
    g = torch.Generator().manual_seed(1)
    return step(loss, normal(n, c), (torch.rand(n, c, generator=g) < 0.1).float())


def classes(n: int, c: int) -> Step:
    loss = LogitAdjustedLoss(torch.linspace(1000, 10, c).long())
    return step(loss, normal(n, c), torch.randint(c, (n,), generator=torch.Generator().manual_seed(1)))


def views(loss: Callable[..., torch.Tensor], n: int, d: int) -> Step:
    return step(loss, normal(n, d), normal(n, d, seed=1))


def labelled(n: int, d: int) -> Step:
    y, loss = torch.arange(n) % 100, SupConLoss(temperature=0.1)
    return views(lambda a, b: loss(a, b, labels=y), n, d)


CURVES: dict[str, tuple[str, tuple[int, ...], Callable[[int], Step]]] = {
    "sigmoid focal": (
        "N",
        (100_000, 400_000, 1_600_000, 6_400_000),
        lambda n: labels(SigmoidFocalLoss(), n // 100, 100),
    ),
    "asymmetric": ("N", (100_000, 400_000, 1_600_000, 6_400_000), lambda n: labels(AsymmetricLoss(), n // 100, 100)),
    "logit-adjusted, 1,000 classes": ("N", (500, 2_000, 8_000, 32_000), lambda n: classes(n, 1000)),
    "logit-adjusted, 64 rows": ("C", (10_000, 40_000, 160_000, 640_000), lambda c: classes(64, c)),
    "NT-Xent, width 128": ("N", (512, 1024, 2048, 4096, 8192), lambda n: views(NTXentLoss(), n, 128)),
    "NT-Xent, 2,048 pairs": ("d", (64, 128, 256, 512, 1024), lambda d: views(NTXentLoss(), 2048, d)),
    "SupCon, width 128": ("N", (512, 1024, 2048, 4096, 8192), lambda n: labelled(n, 128)),
    "CACR, width 128": ("N", (512, 1024, 2048, 4096, 8192), lambda n: views(CACRLoss(), n, 128)),
}


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Slope of log value against log size, by least squares."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(values).double().clamp_min(1e-9).log()
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def times_of(name: str) -> list[float]:
    """Seconds a pass at every size."""
    _, sizes, make = CURVES[name]
    found = []
    for size in sizes:
        job = make(size)
        job()
        found.append(statistics.median(seconds(job, 1) for _ in range(RUNS)))
    return found


def peaks_of(name: str) -> list[float]:
    """MiB a pass at every size, in a process whose allocator gives large blocks back at once."""
    command = [sys.executable, "-m", "benchmarks.kernel_growth", "--peaks", name]
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


def draw(found: dict[str, tuple[list[float], list[float]]]) -> None:
    """Time and memory against size, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "counterpoise"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (times, memories) in found.items():
        sizes = CURVES[name][1]
        panels[0].loglog(sizes, [1e3 * t for t in times], "o-", label=f"{name} ({CURVES[name][0]})")
        panels[1].loglog(sizes, memories, "o-")
    panels[0].set(xlabel="size", ylabel="milliseconds a pass")
    panels[1].set(xlabel="size", ylabel="MiB at the peak")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Prints the exponents, and writes table and picture where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_growth", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md, and the picture")
    parser.add_argument("--peaks", choices=CURVES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.peaks:
        jobs = [CURVES[options.peaks][2](size) for size in CURVES[options.peaks][1]]
        print(json.dumps([statistics.median(peak(job) for _ in range(3)) for job in jobs]))
        return
    found = {name: (times_of(name), peaks_of(name)) for name in CURVES}
    lines = ["| pass | grows with | sizes | time | memory |", "| --- | --- | --- | ---: | ---: |"]
    for name, (times, memories) in found.items():
        letter, sizes, _ = CURVES[name]
        power = [f"{letter}^{exponent(sizes, values):.2f}" for values in (times, memories)]
        lines.append(f"| {name} | {letter} | {sizes[0]:,} to {sizes[-1]:,} | {power[0]} | {power[1]} |")
    print("\n".join(lines))
    if options.write:
        draw(found)
        text = "\n".join([*lines, "", f"![time and memory against size]({Path('images') / PICTURE.name})"])
        marked = re.compile(r"(<!-- kernels-growth -->).*?(<!-- /kernels-growth -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{text}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
