"""``python -m benchmarks.selection``: coreset selection against the plain loops; ``--write`` fills docs/performance.md.

Times are CPU times of one thread, which a busy machine disturbs least. Growth and memory are measured in processes of
their own: the peak of resident memory over what the process held when the features were there.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.__main__ import PAGE, environment
from counterpoise.samplers import facility_location, k_center_greedy
from counterpoise.samplers.selection import Selection

GROWTH = {  # (N, picks): one N with several picks, one number of picks with several N
    "k_center_greedy": ((25_000, 500), (50_000, 500), (100_000, 500), (50_000, 125), (50_000, 250), (50_000, 1_000)),
    "facility_location": ((10_000, 200), (20_000, 200), (40_000, 200), (20_000, 100), (20_000, 400)),
}
LARGE = (200_000, 128, 1_000)


def features(n: int, d: int) -> Tensor:
    """Normal features of seed 0: the hard case, without clusters."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def select(method: str, x: Tensor, budget: int) -> object:
    if method == "k_center_greedy":
        return k_center_greedy(x, budget, first=0)
    if method == "facility_location by class":
        return facility_location(x, budget, targets=torch.arange(len(x)) % 10)
    return facility_location(x, budget)


def plain_k_center(x: Tensor, budget: int) -> list[int]:
    """The loop that one would write."""
    picks = [0]
    least = ((x - x[0]) ** 2).sum(1)
    while len(picks) < budget:
        picks.append(int(least.argmax()))
        least = torch.minimum(least, ((x - x[picks[-1]]) ** 2).sum(1))
    return picks


def naive_facility_location(x: Tensor, budget: int) -> tuple[list[int], list[float]]:
    """Every gain at every pick, from a similarity matrix that is kept in memory and summed in double precision."""
    distance = torch.cdist(x.double(), x.double())
    similarity, best = distance.max() - distance, torch.zeros(len(x), dtype=torch.float64)
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < budget:
        gain = sum((part - best[i : i + 256, None]).clamp_(min=0).sum(0) for i, part in tiles(similarity))
        picks.append(int(gain.argmax()))
        gains.append(float(gain.max()))
        best = torch.maximum(best, similarity[:, picks[-1]])
    return picks, gains


def updated_facility_location(x: Tensor, budget: int) -> tuple[list[int], list[float]]:
    """The naive greedy's picks and gains, with gains brought up to date over the rows that a pick has changed."""
    distance = torch.cdist(x.double(), x.double())
    similarity, best = distance.neg_().add_(-distance.min()), torch.zeros(len(x), dtype=torch.float64)
    gain = similarity.sum(0)
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < budget:
        picks.append(int(gain.argmax()))
        gains.append(float(gain.max()))
        column = similarity[:, picks[-1]].clone()
        for rows in (column > best).nonzero().flatten().split(256):
            part, before, after = similarity[rows], best[rows, None], column[rows, None]
            gain -= (part - before).clamp_(min=0).sum(0) - (part - after).clamp_(min=0).sum(0)
        best = torch.maximum(best, column)
    return picks, gains


def tiles(matrix: Tensor) -> list[tuple[int, Tensor]]:
    return [(i, matrix[i : i + 256]) for i in range(0, len(matrix), 256)]


def seconds(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def k_center_line(rounds: int = 7) -> str:
    """20,000 x 64, 500 picks: the ratio of interleaved runs, and how many picks are the same."""
    x = features(20_000, 64)
    ours, theirs = k_center_greedy(x, 500, first=0).indices.tolist(), plain_k_center(x, 500)
    ratios = [
        seconds(lambda: plain_k_center(x, 500)) / seconds(lambda: k_center_greedy(x, 500, first=0))
        for _ in range(rounds)
    ]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4)
    return (
        f"| k_center_greedy | plain loop | 20,000 x 64, 500 picks | {median:.1f} x ({low:.1f} to {high:.1f}) "
        f"| {same} of 500 |"
    )


def agreement(found: Selection, picks: list[int], gains: list[float]) -> str:
    """How many picks are the same, and how far apart gains are."""
    same = sum(a == b for a, b in zip(found.indices.tolist(), picks, strict=True))
    apart = max(abs(a - b) / b for a, b in zip(found.gains.tolist(), gains, strict=True))  # type: ignore[union-attr]
    return f"{same} of {len(picks)}, gains within {apart:.0e}"


def facility_line(x: Tensor, budget: int) -> str:
    """Against all of the naive greedy: the ratio, and how many picks are the same."""
    found = facility_location(x, budget)
    ours = seconds(lambda: facility_location(x, budget))
    start = time.process_time()
    picks, gains = naive_facility_location(x, budget)
    theirs = time.process_time() - start
    size = f"{len(x):,} x {x.shape[1]}, {budget} picks"
    ratio = f"{theirs / ours:.0f} x"
    return f"| facility_location | naive greedy | {size} | {ratio} | {agreement(found, picks, gains)} |"


def facility_lines(full: bool) -> list[str]:
    """A small set, and a large one: with all picks of the naive greedy, or a few of them timed."""
    large = features(20_000, 64)
    lines = [facility_line(features(4_000, 64), 200)]
    return [*lines, facility_line(large, 500) if full else timed_line(large, 500)]


def timed_line(x: Tensor, budget: int) -> str:
    """The naive greedy's time from five of its picks; its picks from gains that are brought up to date."""
    start = time.process_time()
    found = facility_location(x, budget)
    ours = time.process_time() - start
    one, few = (seconds(lambda m=m: naive_facility_location(x, m)) for m in (1, 6))  # type: ignore[misc]
    theirs = one + (budget - 1) * (few - one) / 5
    size = f"{len(x):,} x {x.shape[1]}, {budget} picks, of theirs 5 timed"
    same = agreement(found, *updated_facility_location(x, budget))
    return f"| facility_location | naive greedy | {size} | {theirs / ours:.0f} x | {same} |"


def in_child(method: str, n: int, d: int, budget: int) -> tuple[float, float]:
    """Seconds, and MiB above what was there before, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.selection", "--child", method, str(n), str(d), str(budget)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(out[0]), float(out[1])


def child(method: str, n: int, d: int, budget: int) -> None:
    x = features(n, d)
    select(method, features(300, d), 10)  # libraries warm up
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    took = seconds(lambda: select(method, x, budget))
    print(took, memory("VmHWM") - before)


def memory(line: str) -> float:
    """MiB that Linux reports of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{line}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares exponent of y ~ x^k."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def growth_line(method: str) -> str:
    """Exponents of the time in N, at one number of picks, and in the picks, at one N."""
    found = {size: min(in_child(method, size[0], 64, size[1])[0] for _ in range(2)) for size in GROWTH[method]}
    picks, n = GROWTH[method][0][1], GROWTH[method][1][0]
    in_n = {size[0]: t for size, t in found.items() if size[1] == picks}
    in_m = {size[1]: t for size, t in found.items() if size[0] == n}
    ranges = [f"{min(x):,} to {max(x):,}" for x in (in_n, in_m)]
    exponents = [slope(list(x.items())) for x in (in_n, in_m)]
    return f"| {method} | N^{exponents[0]:.2f} ({ranges[0]}) | m^{exponents[1]:.2f} ({ranges[1]}) |"


def large_line(method: str, runs: int = 1) -> str:
    """The largest peak of some runs: how the allocator places freed tiles differs between them."""
    n, d, budget = LARGE
    extra = max(in_child(method, n, d, budget)[1] for _ in range(runs))
    return f"| {method} | {n:,} x {d}, {budget:,} picks | {extra:.0f} MiB |"


def report(large: bool) -> str:
    """The three tables."""
    lines = ["| ours | against | size | faster | same picks |", "| --- | --- | --- | ---: | --- |"]
    lines += [k_center_line(), *facility_lines(full=large)]
    lines += ["", "| method | time grows with N as | with the picks as |", "| --- | ---: | ---: |"]
    lines += [growth_line("k_center_greedy"), growth_line("facility_location")]
    lines += ["", "| method | size | memory beside the features |", "| --- | --- | ---: |"]
    lines += [large_line("k_center_greedy", runs=5), large_line("facility_location by class")]
    lines += [large_line("facility_location")] if large else []
    return "\n".join([*lines, "", environment().replace(", forward and backward", " features") + "."])


def main() -> None:
    """Prints the tables, and writes them where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument(
        "--large", action="store_true", help="all naive picks at 20,000, and all of 200,000 examples: an hour"
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        method, n, d, budget = options.child
        child(method, int(n), int(d), int(budget))
        return
    found = report(options.large)
    print(found)
    if options.write:
        marked = re.compile(r"(<!-- selection -->).*?(<!-- /selection -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{found}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
