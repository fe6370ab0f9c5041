"""``python -m benchmarks.neighbors``: nearest neighbours against plain torch and raw FAISS; ``--write`` into the page.

Vectors lie near a surface of 16 dimensions, as features of a network do; normal ones have no neighbours to speak of.
The raw search asks the very index that ours keeps, so that the ratio is what ours adds. Times are CPU times of one
thread; the sides take turns, and who goes first changes from round to round.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import faiss
import torch
from torch import Tensor

from benchmarks.__main__ import PAGE, environment
from counterpoise.neighbors import NeighborIndex

DIM, HIDDEN, K, QUERIES = 128, 16, 10, 1_000
PROBES = (4, 16, 64)

Search = Callable[[], Tensor]


def features(n: int, seed: int) -> Tensor:
    """A fixed random map of hidden normal variables, and some noise."""
    layers = torch.Generator().manual_seed(0)
    first = torch.randn(HIDDEN, 64, generator=layers) / HIDDEN**0.5
    second = torch.randn(64, DIM, generator=layers) / 8
    draws = torch.Generator().manual_seed(seed)
    x = torch.empty(n, DIM)
    for tile in x.split(100_000):
        hidden = torch.randn(len(tile), HIDDEN, generator=draws)
        tile.copy_((hidden @ first).tanh() @ second + 0.05 * torch.randn(len(tile), DIM, generator=draws))
    return x


def naive(queries: Tensor, keys: Tensor) -> Tensor:
    """As one would write it: all distances in memory, then the least of them."""
    squares = keys.square().sum(1)
    return torch.addmm(squares, queries, keys.T, alpha=-2).topk(K, largest=False).indices


def raw(index: NeighborIndex, queries: Tensor) -> Tensor:
    """FAISS itself, on the index that ours keeps."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    return torch.from_numpy(index._store.index.search(queries.numpy(), K)[1])


def definition(queries: Tensor, keys: Tensor) -> Tensor:
    """The nearest by differences in float64, which needs no product of matrices."""
    found = []
    for query in queries.double():
        distance = torch.cat([(tile.double() - query).square().sum(1) for tile in keys.split(100_000)])
        found.append(distance.topk(K, largest=False).indices)
    return torch.stack(found)


def seconds(job: Search) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def take_turns(ours: Search, theirs: Search, rounds: int) -> tuple[float, float, list[float]]:
    """Median seconds of both, and the ratio of each round."""
    times: list[tuple[float, float]] = []
    for i in range(rounds):
        first, second = (seconds(job) for job in ((ours, theirs) if i % 2 else (theirs, ours)))
        times.append((first, second) if i % 2 else (second, first))
    ours_median, theirs_median = (statistics.median(side) for side in zip(*times, strict=True))
    return ours_median, theirs_median, [a / b for a, b in times]


def recall(found: Tensor, truth: Tensor) -> float:
    return float((found[:, :, None] == truth[:, None]).any(2).float().mean())


def line(name: str, against: str, ours: Search, theirs: Search, truth: Tensor, rounds: int) -> str:
    """One comparison: times, the ratio of the interleaved rounds, and recalls."""
    hits = [recall(job(), truth) for job in (ours, theirs)]
    our_time, their_time, ratios = take_turns(ours, theirs, rounds)
    low, median, high = statistics.quantiles(ratios, n=4)
    ratio = f"{median:.3f} ({low:.3f} to {high:.3f})"
    return f"| {name} | {against} | {our_time:.2f}, {their_time:.2f} s | {ratio} | {hits[0]:.4f}, {hits[1]:.4f} |"


def against_raw(name: str, index: NeighborIndex, queries: Tensor, truth: Tensor, rounds: int) -> str:
    kind = type(index._store.index).__name__
    return line(name, f"raw {kind}", lambda: index.search(queries, K)[1], lambda: raw(index, queries), truth, rounds)


def exact_lines(keys: Tensor, queries: Tensor, rounds: int) -> tuple[list[str], Tensor]:
    """Both exact searches, and what they found."""
    by_torch, by_faiss = (NeighborIndex(DIM, "euclidean", backend=backend) for backend in ("torch", "faiss"))
    by_torch.add(keys)
    truth = by_torch.search(queries, K)[1]
    plain = line(
        "torch, exact",
        "addmm, topk",
        lambda: by_torch.search(queries, K)[1],
        lambda: naive(queries, keys),
        truth,
        rounds,
    )
    by_faiss.add(keys)
    return [plain, against_raw("FAISS, exact", by_faiss, queries, truth, rounds)], truth


def list_lines(keys: Tensor, queries: Tensor, truth: Tensor, rounds: int) -> tuple[list[str], float]:
    """Inverted lists at some numbers of probes, and the seconds that building them took."""
    index = NeighborIndex(DIM, "euclidean", kind="ivf")
    index.add(keys)
    built = seconds(index.rebuild)
    lines = []
    for probes in PROBES:
        index._store.settings = replace(index._store.settings, num_probes=probes)
        index._store.index.nprobe = probes
        name = f"IVF, {probes} of {index._store.index.nlist:,} lists"
        lines.append(against_raw(name, index, queries, truth, rounds))
    return lines, built


def report(rows: int, rounds: int) -> str:
    keys, queries = features(rows, seed=1), features(QUERIES, seed=2)
    exact, truth = exact_lines(keys, queries, rounds)
    lists, built = list_lines(keys, queries, truth, rounds)
    checked = recall(definition(queries[:20], keys), truth[:20])
    table = [
        f"{rows:,} x {DIM}, {QUERIES:,} queries, k = {K}, Euclidean:",
        "",
        "| ours | against | CPU time, ours, theirs | ratio | recall, ours, theirs |",
        "| --- | --- | ---: | ---: | ---: |",
        *exact,
        *lists,
    ]
    notes = [
        f"The lists took {built:.0f} s to build. Recall is against our exact search, which on 20 queries finds "
        f"{checked:.0%} of what",
        f"differences in float64 give. Medians of {rounds} interleaved rounds, with quartiles.",
        environment().replace(", forward and backward", "") + f", faiss {faiss.__version__}.",
    ]
    return "\n".join([*table, "", *notes])


def main() -> None:
    """Prints the table, and writes it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbors", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="vectors in the index (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds a line, at least 2 (default 7)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = report(options.rows, options.rounds)
    print(found)
    if options.write:
        marked = re.compile(r"(<!-- neighbors -->).*?(<!-- /neighbors -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{found}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
