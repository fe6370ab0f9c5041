"""``python -m benchmarks.pseudo_labels``: SP2OT labels against a plain transcription of its algorithm.

The transcription is what the paper prints and its code runs: scalings without the shift in closed form, at most 1000
iterations from the scalings before, and steps of majorisation-minimisation until the objective changes by less than
1e-6. It gets a sparse affinity too, which the released code has dense. Both sides solve the same problem: that of the
affinity made convex, as is the default, and that of the affinity as it is. Times are CPU times of one thread; the sides
take turns, and who goes first changes from round to round. ``--write`` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.__main__ import PAGE, environment
from counterpoise.ot import knn_affinity, sp2ot_labels
from counterpoise.ot.semantic import lowest_eigenvalue

EPSILON, PENALTY, WEIGHT = 0.1, 1.0, 0.195
DIM, NEIGHBORS = 32, 20
MASSES = (0.1, 0.3, 0.7)


def problem(rows: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Logits of a half-trained head on Gaussian classes of unequal size, and the affinity of their features."""
    generator = torch.Generator().manual_seed(0)
    share = torch.logspace(0, -2, clusters)
    classes = torch.multinomial(share, rows, replacement=True, generator=generator)
    centres = torch.randn(clusters, DIM, generator=generator)
    x = centres[classes] + 0.9 * torch.randn(rows, DIM, generator=generator)
    heads = centres + 0.7 * torch.randn(clusters, DIM, generator=generator)
    cosine = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(heads, dim=1).T
    return 10 * cosine, knn_affinity(x, NEIGHBORS)


def transcribed(logits: Tensor, affinity: Tensor, mass: float, shifted: bool) -> Tensor:
    """SP2OT labels (N, K) as published, of S as it is or without its negative eigenvalues."""
    n, clusters = logits.shape
    log_p = logits.double().log_softmax(1)
    s = affinity.double()
    both = (s.to_sparse_coo() + s.to_sparse_coo().t()).coalesce().to_sparse_csr()
    shift = max(0.0, -lowest_eigenvalue(both)) if shifted else 0.0
    weight = WEIGHT * n * (1 - mass)
    q = torch.full_like(log_p, mass / (n * clusters))
    b = torch.full((clusters + 1,), 1 / (clusters + 1), dtype=torch.float64)
    before = math.inf
    for _ in range(100):
        cost = -log_p - weight * (both @ q + shift * q)
        q, b = scaled(cost, mass, b)
        reward = weight / 2 * (q * (both @ q + shift * q)).sum()
        objective = float((q * -log_p).sum() - reward + EPSILON * torch.xlogy(q, q).sum())
        if abs(objective - before) < 1e-6:
            break
        before = objective
    return n * q


def scaled(cost: Tensor, mass: float, b: Tensor) -> tuple[Tensor, Tensor]:
    """The plan (N, K) of one P2OT problem, and its column scalings (K + 1,)."""
    n, clusters = cost.shape
    full = torch.cat([cost, cost.new_zeros(n, 1)], 1)
    kernel = torch.exp(-(full - full.amin(1, keepdim=True)) / EPSILON)  # a row's constant goes into its scaling
    target = torch.full((clusters + 1,), mass / clusters, dtype=cost.dtype)
    target[-1] = 1 - mass
    power = torch.full_like(target, PENALTY / (PENALTY + EPSILON))
    power[-1] = 1
    for _ in range(1000):
        a = (1 / n) / (kernel @ b)
        last, b = b, (target / (a @ kernel)) ** power
        if float((b - last).norm()) < 1e-10:
            break
    a = (1 / n) / (kernel @ b)
    return (a[:, None] * kernel * b)[:, :clusters], b


def ours(logits: Tensor, affinity: Tensor, mass: float, shifted: bool) -> Tensor:
    options = {"epsilon": EPSILON, "penalty": PENALTY, "semantic_weight": WEIGHT}
    return sp2ot_labels(logits, affinity, mass=mass, psd_shift=shifted, **options).labels


def objective(labels: Tensor, logits: Tensor, affinity: Tensor, mass: float, shifted: bool) -> float:
    """The whole objective, the KL term and the virtual cluster's entropy included."""
    options = {"semantic_weight": WEIGHT, "psd_shift": shifted, "mm_max_iterations": 1}
    return float(sp2ot_labels(logits, affinity, mass=mass, start=labels, **options).objective[0])


def timed(job: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    found = job()
    return time.process_time() - start, found


def line(rows: int, clusters: int, mass: float, shifted: bool, rounds: int) -> str:
    """One comparison: times, the ratio of the interleaved rounds, and the whole objective where each ends."""
    given = (*problem(rows, clusters), mass, shifted)
    sides = (lambda: ours(*given), lambda: transcribed(*given))
    times: list[list[float]] = [[], []]
    ends = [math.nan, math.nan]
    for i in range(rounds):
        for side in (0, 1) if i % 2 else (1, 0):
            seconds, labels = timed(sides[side])
            times[side].append(seconds)
            ends[side] = objective(labels, *given)
    medians = [statistics.median(side) for side in times]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, median, high = min(ratios), statistics.median(ratios), max(ratios)
    return (
        f"| {'convex' if shifted else 'as it is'} | {mass} | "
        f"{medians[0]:.2f}, {medians[1]:.2f} s | {median:.3f} ({low:.3f} to {high:.3f}) | "
        f"{ends[0]:.4f}, {ends[1]:.4f} |"
    )


def report(rows: int, clusters: int, rounds: int) -> str:
    head = [
        f"SP2OT labels of {rows:,} x {clusters} logits, {NEIGHBORS} neighbours, against a plain transcription of the",
        "published algorithm (1000 iterations at most, sparse affinity):",
        "",
        "| affinity | mass | CPU time, ours, theirs | ratio | objective, ours, theirs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines = [line(rows, clusters, mass, shifted, rounds) for shifted in (True, False) for mass in MASSES]
    notes = [
        f"Medians of {rounds} interleaved rounds, with the smallest and largest ratio. The objective is the whole one,",
        "the less the better; the published steps may cycle without descent.",
        environment().replace(", forward and backward", "") + ".",
    ]
    return "\n".join([*head, *lines, "", *notes])


def main() -> None:
    """Prints the table, and writes it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pseudo_labels", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = report(options.rows, options.clusters, options.rounds)
    print(found)
    if options.write:
        marked = re.compile(r"(<!-- pseudo-labels -->).*?(<!-- /pseudo-labels -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{found}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
