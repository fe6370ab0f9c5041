"""``python -m benchmarks.ot``: transport solvers against POT and a plain iteration; ``--write`` into the page.

Fifty iterations each, cost given as a matrix in float32, epsilon a twentieth of its mean. The plain iteration is the
one of textbooks: a kernel, two matrix-vector products an iteration, nothing stabilised. Times are CPU times of one
thread; the sides take turns, and who goes first changes from round to round.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ot
import torch
from torch import Tensor

from benchmarks.__main__ import PAGE, environment
from counterpoise.ot import SquaredEuclidean, sinkhorn

SIZES = ((5_120, 100), (20_000, 100), (4_096, 4_096))
ITERATIONS = 50
CLOUDS = (100_000, 1_000, 16)


def problem(n: int, k: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Cost between normal points in 8 dimensions, uneven marginals, epsilon."""
    g = torch.Generator().manual_seed(0)
    cost = torch.cdist(torch.randn(n, 8, generator=g), torch.randn(k, 8, generator=g)).square()
    a, b = (torch.rand(size, generator=g) + 0.5 for size in (n, k))
    return cost, a / a.sum(), b / b.sum(), float(cost.mean()) / 20


def by_hand(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """The unstabilised matrix-vector iteration; a plan."""
    kernel, v = (-cost / epsilon).exp(), torch.ones_like(b)
    for _ in range(ITERATIONS):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v


def seconds(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def ratios(ours: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each other side over ours."""
    sides = {"ours": ours, **others}
    for job in sides.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            taken[name].append(seconds(sides[name]))
    return {name: statistics.median(t / o for t, o in zip(taken[name], taken["ours"], strict=True)) for name in others}


def solver_line(n: int, k: int, rounds: int) -> str:
    """POT's log-domain solver on the same tensors, and the plain iteration."""
    cost, a, b, epsilon = problem(n, k)
    found = ratios(
        lambda: sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=ITERATIONS, tolerance=0).plan,
        {
            "POT": lambda: ot.sinkhorn(
                a, b, cost, epsilon, method="sinkhorn_log", numItermax=ITERATIONS, stopThr=0, warn=False
            ),
            "plain": lambda: by_hand(cost, a, b, epsilon),
        },
        rounds,
    )
    plan = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=ITERATIONS, tolerance=0).plan
    apart = float((plan - by_hand(cost, a, b, epsilon)).abs().sum())  # type: ignore[operator]
    return f"| {n:,} x {k:,} | {found['POT']:.1f} x faster | {1 / found['plain']:.2f} x its time | {apart:.0e} |"


def child() -> None:
    """Prints MiB above what was there before, of a problem between two point clouds."""
    n, k, d = CLOUDS
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)
    sinkhorn(SquaredEuclidean(x[:100], y[:10]), epsilon=1.0, max_iterations=2, tolerance=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    found = sinkhorn(SquaredEuclidean(x, y), epsilon=2.0, max_iterations=10, tolerance=0)
    print(memory("VmHWM") - before, float(found.value))


def memory(line: str) -> float:
    """MiB that Linux reports of this process: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def report(rounds: int) -> str:
    """The table and the line below it."""
    lines = ["| size | POT, `sinkhorn_log` | plain iteration | plans differ by (L1) |", "| --- | ---: | ---: | ---: |"]
    lines += [solver_line(n, k, rounds) for n, k in SIZES]
    command = [sys.executable, "-m", "benchmarks.ot", "--child"]
    extra = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])
    n, k, d = CLOUDS
    lines += ["", f"Points of {n:,} x {k:,} in {d} dimensions: {extra:.0f} MiB beside the points."]
    return "\n".join([*lines, "", environment().replace(", forward and backward", ", fifty iterations") + "."])


def main() -> None:
    """Prints the table, and writes it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ot", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        child()
        return
    found = report(options.rounds)
    print(found)
    if options.write:
        marked = re.compile(r"(<!-- ot -->).*?(<!-- /ot -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{found}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
