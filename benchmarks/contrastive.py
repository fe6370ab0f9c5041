"""``python -m benchmarks.contrastive``: beside lightly and pytorch-metric-learning; ``--write`` fills the page.

Both sides get the same views and settings, and their losses are compared before anything is timed. A run is a forward
and a backward pass, and for a memory bank its update; the two sides take turns, and a ratio is the median over the
runs. Times are CPU times of one thread. Memory is what one pass adds to a process at its peak, measured in a process of
its own, whose allocator returns large blocks at once. (pytorch-metric-learning's NT-Xent is left out: it lists all
negative pairs of the batch for every positive pair, which at 512 pairs is a table of 4 GiB.)

The peers are the extra ``bench``. To leave an environment alone, put them into a folder:
``pip install --target peers --no-deps lightly lightly-utils pytorch-metric-learning``, then
``PYTHONPATH=peers python -m benchmarks.contrastive``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.__main__ import PAGE, environment
from benchmarks.selection import memory, seconds
from counterpoise.contrastive import (
    BarlowTwinsLoss,
    BYOLLoss,
    MemoryBank,
    NTXentLoss,
    SimSiamLoss,
    SupConLoss,
    SwAVLoss,
    VICRegLoss,
    WMSELoss,
)

try:
    import lightly.loss as lightly
    from pytorch_metric_learning import losses as metric_learning
except ImportError:
    sys.exit('lightly and pytorch-metric-learning are not there, expected them from: pip install "counterpoise[bench]"')

SIZES = (512, 1024, 2048)
WIDTH = 128
BANK = 4096
PROTOTYPES = 300
RUNS = 15
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """The same objective twice: each step is a forward and a backward pass, and returns the loss."""

    name: str
    against: str
    ours: Step
    theirs: Step
    same: bool = True
    """the losses agree, and not only their distribution over draws"""


def views(n: int) -> tuple[Tensor, Tensor]:
    """Two noisy views of normal examples of seed 0, with gradients."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, WIDTH, generator=g)
    first, second = (z + 0.5 * torch.randn(n, WIDTH, generator=g) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_()


def step(loss: Callable[[], Tensor], *leaves: Tensor, after: Callable[[], object] | None = None) -> Step:
    """Forward, backward, and what comes after."""

    def run() -> Tensor:
        value = loss()
        torch.autograd.grad(value, leaves)
        if after is not None:
            after()
        return value.detach()

    return run


def pairs(n: int) -> Iterator[Pair]:
    """All comparisons at n pairs."""
    a, b = views(n)
    labels = torch.randint(10, (n,), generator=torch.Generator().manual_seed(1))
    both = labels.repeat(2)

    def of_both(loss: Callable[..., Tensor], *rest: Tensor) -> Step:
        return step(lambda: loss(torch.cat([a, b]), *rest), a, b)

    def of_two(loss: Callable[..., Tensor]) -> Step:
        return step(lambda: loss(a, b), a, b)

    ntxent, supcon = NTXentLoss(temperature=0.5), SupConLoss(temperature=0.1)
    yield Pair("NTXentLoss", "lightly", of_two(ntxent), of_two(lightly.NTXentLoss(temperature=0.5)))
    yield with_banks(a, b.detach())
    ours = step(lambda: supcon(a, b, labels=labels), a, b)
    theirs = of_both(metric_learning.SupConLoss(temperature=0.1), both)
    yield Pair("SupConLoss", "pytorch-metric-learning", ours, theirs)
    barlow = BarlowTwinsLoss(off_diagonal_weight=5e-3)
    yield Pair("BarlowTwinsLoss", "lightly", of_two(barlow), of_two(lightly.BarlowTwinsLoss(lambda_param=5e-3)))
    yield Pair("VICRegLoss", "lightly", of_two(VICRegLoss()), of_two(lightly.VICRegLoss()))
    theirs = of_two(lambda z, other: metric_learning.VICRegLoss()(z, ref_emb=other))
    yield Pair("VICRegLoss", "pytorch-metric-learning", of_two(VICRegLoss()), theirs)
    wmse = WMSELoss(block_size=2 * WIDTH)
    theirs = of_both(lightly.WMSELoss(embedding_dim=WIDTH, w_size=2 * WIDTH))
    yield Pair("WMSELoss", "lightly", of_two(wmse), theirs, same=False)
    yield from with_predictions(a, b)
    yield with_prototypes(a, b)


def with_predictions(first: Tensor, second: Tensor) -> Iterator[Pair]:
    """Predictions of two views against embeddings of two views; lightly leaves directions and halving to the user."""
    both = torch.stack([first, second]).detach().requires_grad_()
    targets = both.detach().flip(1) + 0.1
    (t1, t2), cosine = targets.clone(), lightly.NegativeCosineSimilarity()

    def halved() -> Tensor:
        return 0.5 * (cosine(first, t2) + cosine(second, t1))

    def ours(loss: Callable[..., Tensor]) -> Step:
        return step(lambda: loss(both, targets), both)

    yield Pair("SimSiamLoss", "lightly", ours(SimSiamLoss()), step(halved, first, second))
    yield Pair("BYOLLoss", "lightly", ours(BYOLLoss()), step(lambda: 4 + 4 * halved(), first, second))


def with_prototypes(first: Tensor, second: Tensor) -> Pair:
    """SwAV; lightly takes scores, so that its side forms them."""
    ours = SwAVLoss(embedding_dim=WIDTH, num_prototypes=PROTOTYPES)
    leaves, theirs = (first, second, ours.prototypes), lightly.SwaVLoss()

    def scored() -> Tensor:
        c = normalize(ours.prototypes, dim=1)
        return theirs([normalize(z, dim=1) @ c.T for z in (first, second)], [])[0]

    name = f"SwAVLoss, {PROTOTYPES} prototypes"
    return Pair(name, "lightly", step(lambda: ours(first, second), *leaves), step(scored, *leaves))


def with_banks(queries: Tensor, keys: Tensor) -> Pair:
    """MoCo's loss against a full bank, which is then given the keys."""
    g = torch.Generator().manual_seed(2)
    bank = MemoryBank(BANK, WIDTH, init="random", generator=g)
    theirs = lightly.NTXentLoss(temperature=0.5, memory_bank_size=(BANK, WIDTH))
    theirs(queries, keys)  # it draws its bank now
    theirs.memory_bank.bank.copy_(bank.keys)
    theirs.memory_bank.bank_ptr.zero_()
    ours = NTXentLoss(temperature=0.5)
    return Pair(
        f"NTXentLoss, bank of {BANK:,}",
        "lightly",
        step(lambda: ours(queries, keys, bank=bank), queries, after=lambda: bank.enqueue(keys)),
        step(lambda: theirs(queries, keys), queries),
    )


def checked(pair: Pair) -> Pair:
    """The pair itself, once both sides have given the same loss (and are warm)."""
    found = [side() for side in (pair.ours, pair.theirs)]
    if pair.same:
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    return pair


def ratios(pair: Pair, runs: int) -> list[float]:
    """Our CPU time over theirs, one a run; who goes first changes from run to run."""
    found = []
    for i in range(runs):
        times = {side: seconds(side) for side in ((pair.ours, pair.theirs) if i % 2 else (pair.theirs, pair.ours))}
        found.append(times[pair.ours] / times[pair.theirs])
    return found


def peak(side: Step) -> float:
    """MiB that one step adds at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    side()
    return memory("VmHWM") - before


def peaks(n: int, runs: int) -> list[tuple[float, float]]:
    """(ours, theirs) in MiB, the median over the runs, one a pair."""
    found = []
    for pair in map(checked, pairs(n)):
        both = [(peak(pair.ours), peak(pair.theirs)) for _ in range(runs)]
        found.append((statistics.median(x for x, _ in both), statistics.median(y for _, y in both)))
    return found


def peaks_in_child(n: int) -> list[tuple[float, float]]:
    """:func:`peaks` in a process whose allocator maps every large block by itself."""
    command = [sys.executable, "-m", "benchmarks.contrastive", "--child", str(n)]
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout)


def lines(n: int, runs: int) -> Iterator[str]:
    """The rows of one size."""
    for pair, (ours, theirs) in zip(map(checked, pairs(n)), peaks_in_child(n), strict=True):
        low, median, high = statistics.quantiles(ratios(pair, runs), n=4)
        yield (
            f"| {pair.name} | {pair.against} | {n:,} | {median:.2f} | {low:.2f} to {high:.2f} "
            f"| {ours / theirs:.2f} | {ours:.1f} and {theirs:.1f} |"
        )


def report(sizes: list[int], runs: int) -> str:
    """The table, with the environment below."""
    found = [
        "| objective | against | pairs | time | quartiles | memory | peaks, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for n in sizes:
        found += lines(n, runs)
    versions = f"lightly {version('lightly')}, pytorch-metric-learning {version('pytorch_metric_learning')}"
    return "\n".join([*found, "", f"{environment()}; {versions}; medians of {runs} interleaved runs."])


def version(package: str) -> str:
    return str(sys.modules[package].__version__)


def main() -> None:
    """Prints the table, and writes it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contrastive", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of pairs")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(peaks(options.child, runs=5)))
        return
    found = report(options.sizes, options.runs)
    print(found)
    if options.write:
        marked = re.compile(r"(<!-- contrastive -->).*?(<!-- /contrastive -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{found}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
