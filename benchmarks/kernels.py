"""``python -m benchmarks.kernels``: fused losses beside eager PyTorch, ``torch.compile`` and the libraries people use.

A step is a forward and a backward pass in float32 with two threads. The sides of a row take turns, one step each a
round, and a ratio is the median over the rounds of their time over ours: above 1 means that ours is faster. Values are
compared before anything is timed. Memory is what one step adds to a process at its peak, its gradient included,
measured in a process of its own. ``--only rows`` runs one table, ``--write`` puts them into docs/performance.md.
lightly comes from the extra ``bench``; without it its column is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from benchmarks.__main__ import PAGE
from benchmarks.selection import memory
from counterpoise import kernels
from counterpoise.contrastive import ASCLLoss, CACRLoss, NTXentLoss, SupConLoss
from counterpoise.losses import (
    AsymmetricLoss,
    CrossEntropyLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
)
from counterpoise.memory import MemoryBank

ROUNDS = 15
THREADS = 2
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One job: ours, and what it is timed against by column; each step returns the loss."""

    name: str
    size: str
    ours: Step
    others: dict[str, Step]
    same: bool = True
    """the values agree; of a bare matrix product they do not"""
    repeats: int = 1
    peaks: tuple[str, ...] = ()
    """columns whose memory is measured beside ours"""


def step(loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Forward and backward, with gradients of the inputs that want one."""
    leaves = [x for x in inputs if x.requires_grad]

    def run() -> Tensor:
        value = loss(*inputs)
        torch.autograd.grad(value, leaves)
        return value.detach()

    return run


def plainly(loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """The same loss on its plain reference."""
    fused = step(loss, *inputs)

    def run() -> Tensor:
        with kernels.disabled():
            return fused()

    return run


def in_bfloat16(job: Step) -> Step:
    """The same with torch's switch for matrix products in bfloat16, sums in float32."""

    def run() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return job()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal leaves."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def timm_asymmetric(x: Tensor, y: Tensor, gamma_neg: float = 4, gamma_pos: float = 1, clip: float = 0.05) -> Tensor:
    """The multi-label asymmetric loss as timm writes it."""
    eps, p = 1e-8, torch.sigmoid(x)
    not_p = (1 - p + clip).clamp(max=1)
    base = y * torch.log(p.clamp(min=eps)) + (1 - y) * torch.log(not_p.clamp(min=eps))
    p_t, gamma = p * y + not_p * (1 - y), gamma_pos * y + gamma_neg * (1 - y)
    return -(base * torch.pow(1 - p_t, gamma)).sum()


def element_rows() -> Iterator[Row]:
    """Losses of independent labels."""
    n = 4_000_000
    z, t = normal(n), (torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.1).float()

    def focal(x: Tensor, y: Tensor) -> Tensor:
        return torchvision_focal(x, y, reduction="mean")

    others = {"eager": step(focal, z, t), "compiled": step(torch.compile(focal), z, t)}
    yield Row(
        "SigmoidFocalLoss (torchvision)", f"{n:,}", step(SigmoidFocalLoss(alpha=0.25), z, t), others, peaks=("eager",)
    )
    z, t = normal(4096, 1000), (torch.rand(4096, 1000, generator=torch.Generator().manual_seed(1)) < 0.05).float()
    asymmetric = AsymmetricLoss(gamma_pos=1, eps=1e-8, inner="sum", reduction="sum")
    others = {"eager": step(timm_asymmetric, z, t), "compiled": step(torch.compile(timm_asymmetric), z, t)}
    yield Row("AsymmetricLoss (timm)", "4,096 x 1,000", step(asymmetric, z, t), others, peaks=("eager",))


def softmax_rows() -> Iterator[Row]:
    """Losses of exclusive classes, against what one writes."""
    n, c = 4096, 10_000
    z, y = normal(n, c), torch.randint(c, (n,), generator=torch.Generator().manual_seed(1))
    counts = torch.linspace(1000, 10, c).long()
    adjusted, ldam = LogitAdjustedLoss(counts), LDAMLoss(counts)
    log_prior = torch.log(counts / counts.sum() + 1e-12)
    margins = counts.float() ** -0.25
    margins = 0.5 * margins / margins.max()

    def plain_adjusted(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x + log_prior, y)

    def plain_ldam(x: Tensor, y: Tensor) -> Tensor:
        at = torch.zeros_like(x, dtype=torch.bool).scatter_(1, y[:, None], True)
        return cross_entropy(30 * torch.where(at, x - margins[y][:, None], x), y)

    def plain_focal(x: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log_softmax(x, 1).gather(1, y[:, None])[:, 0]
        return (-((1 - log_p.exp()) ** 2) * log_p).mean()

    cosines = (z.detach() / 5).clamp(-1, 1).requires_grad_()
    for loss, plain, x in (
        (CrossEntropyLoss(), cross_entropy, z),
        (adjusted, plain_adjusted, z),
        (ldam, plain_ldam, cosines),
        (SoftmaxFocalLoss(), plain_focal, z),
    ):
        others = {"eager": step(plain, x, y), "compiled": step(torch.compile(plain), x, y)}
        others["own plain form"] = plainly(loss, x, y)
        yield Row(type(loss).__name__, f"{n:,} x {c:,}", step(loss, x, y), others, peaks=("eager",))
    loss, t = CrossEntropyLoss(), torch.softmax(normal(n, c, seed=2).detach(), 1)
    others = {"eager": step(cross_entropy, z, t), "compiled": step(torch.compile(cross_entropy), z, t)}
    others["own plain form"] = plainly(loss, z, t)
    yield Row("CrossEntropyLoss, soft targets", f"{n:,} x {c:,}", step(loss, z, t), others, peaks=("eager",))


def plain_ntxent(z: Tensor, other: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent as tutorials write it: concatenate, multiply, mask the diagonal, cross-entropy."""
    n = len(z)
    rows = normalize(torch.cat([z, other]), dim=1)
    similarity = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return cross_entropy(similarity, torch.arange(2 * n).roll(n))


def pair_rows() -> Iterator[Row]:
    """Contrastive objectives."""
    n, d = 4096, 128
    a, b = normal(n, d), normal(n, d, seed=1)
    ntxent = NTXentLoss(temperature=0.5)
    both = torch.cat([a, b]).detach()

    def products() -> Tensor:
        return ((both @ both.T) @ both)[0, 0]

    others = {"eager": step(plain_ntxent, a, b), "compiled": step(torch.compile(plain_ntxent), a, b)}
    if find_spec("lightly"):
        from lightly.loss import NTXentLoss as LightlyNTXent

        others["lightly"] = step(LightlyNTXent(temperature=0.5), a, b)
    size = f"{n:,} pairs x {d}"
    yield Row("NTXentLoss", size, step(ntxent, a, b), others, peaks=("eager",))
    yield Row("NTXentLoss against (z @ z.T) @ z", size, step(ntxent, a, b), {"eager": products}, same=False)
    narrow = {"eager": in_bfloat16(step(plain_ntxent, a, b)), "our float32": step(ntxent, a, b)}
    yield Row("NTXentLoss, products in bfloat16", size, in_bfloat16(step(ntxent, a, b)), narrow, same=False)
    labels = torch.randint(100, (n,), generator=torch.Generator().manual_seed(2))
    supcon, cacr, ascl = SupConLoss(temperature=0.1), CACRLoss(), ASCLLoss()
    supervised = lambda x, y: supcon(x, y, labels=labels)  # noqa: E731
    yield Row("SupConLoss", size, step(supervised, a, b), {"plain": plainly(supervised, a, b)}, peaks=("plain",))
    yield Row("CACRLoss", size, step(cacr, a, b), {"plain": plainly(cacr, a, b)}, peaks=("plain",))
    bank = MemoryBank(16_384, d, init="random", generator=torch.Generator().manual_seed(3))
    keys = b.detach()
    banked = lambda x: ascl(x, keys, bank=bank)  # noqa: E731
    yield Row("ASCLLoss, bank of 16,384", size, step(banked, a), {"plain": plainly(banked, a)}, peaks=("plain",))


def large_rows() -> Iterator[Row]:
    """A batch whose similarity matrix would not fit: memory alone."""
    n, d = 32_768, 128
    a, b = normal(n, d), normal(n, d, seed=1)
    yield Row("NTXentLoss", f"{n:,} pairs x {d}", step(NTXentLoss(temperature=0.5), a, b), {})


def small_rows() -> Iterator[Row]:
    """Batches that only overhead is in: 32 x 10 logits, against torch's cross-entropy."""
    z, y = normal(32, 10), torch.randint(10, (32,), generator=torch.Generator().manual_seed(1))
    t = (torch.rand(32, 10, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    counts = torch.arange(10, 110, 10)
    theirs = step(cross_entropy, z, y)
    cosines = (z.detach() / 5).clamp(-1, 1).requires_grad_()
    for loss, x, target in (
        (CrossEntropyLoss(), z, y),
        (LogitAdjustedLoss(counts), z, y),
        (LDAMLoss(counts), cosines, y),
        (SoftmaxFocalLoss(), z, y),
        (SigmoidFocalLoss(), z, t),
        (AsymmetricLoss(), z, t),
    ):
        yield Row(type(loss).__name__, "32 x 10", step(loss, x, target), {"eager": theirs}, same=False, repeats=300)


TABLES = {"small": small_rows, "element": element_rows, "rows": softmax_rows, "pairs": pair_rows, "large": large_rows}


def seconds(job: Step, repeats: int) -> float:
    """Of one step."""
    start = time.perf_counter()
    for _ in range(repeats):
        job()
    return (time.perf_counter() - start) / repeats


def ratios(row: Row, rounds: int) -> dict[str, list[float]]:
    """Their time over ours by column, one a round; the order turns from round to round."""
    sides = {"": row.ours, **row.others}
    for job in sides.values():
        job()
    found: dict[str, list[float]] = {name: [] for name in row.others}
    for i in range(rounds):
        names = list(sides)
        order = names[i % len(names) :] + names[: i % len(names)]
        times = {name: seconds(sides[name], row.repeats) for name in order}
        for name in row.others:
            found[name].append(times[name] / times[""])
    return found


def check(row: Row) -> None:
    """Raises unless every side gives our value."""
    if row.same:
        for name, other in row.others.items():
            torch.testing.assert_close(row.ours(), other(), rtol=2e-4, atol=1e-5, msg=f"{row.name} and {name} differ")


def peak(job: Step) -> float:
    """MiB that one step adds at its peak, with nothing kept from the last."""
    kernels.empty_cache()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    job()
    return memory("VmHWM") - before


def peaks_of(table: str) -> list[dict[str, float]]:
    """Memory by column of each row of a table; "" is ours."""
    found = []
    for row in TABLES[table]():
        sides = {"": row.ours, **{name: row.others[name] for name in row.peaks}}
        found.append({name: statistics.median(peak(job) for _ in range(3)) for name, job in sides.items()})
    return found


def peaks_in_child(table: str) -> list[dict[str, float]]:
    """:func:`peaks_of` in a process whose allocator gives large blocks back at once."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--peaks", table]
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


def lines(table: str, rounds: int) -> list[str]:
    """A Markdown table."""
    rows = list(TABLES[table]())
    columns = list(dict.fromkeys(name for row in rows for name in row.others))
    found = [f"| loss | size | {' | '.join(f'{c}, times ours' for c in columns)} | memory, MiB |".replace("|  |", "|")]
    found.append(f"| --- | --- |{' ---: |' * len(columns)} ---: |")
    for row, memories in zip(rows, peaks_in_child(table), strict=True):
        check(row)
        cells = []
        timed = ratios(row, rounds) if row.others else {}
        for name in columns:
            if name not in timed:
                cells.append("-")
                continue
            low, median, high = statistics.quantiles(timed[name], n=4)
            cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        ours = memories.pop("")
        against = "".join(f"; {name} {value:,.1f}" for name, value in memories.items())
        found.append(f"| {' | '.join([row.name, row.size, *cells, f'{ours:,.1f}{against}'])} |")
        print(found[-1], flush=True)
    return [*found, ""]


def environment() -> str:
    """What the ratios were measured with."""
    kernel = f"{kernels.cpu_capability()} kernels"
    return f"torch {torch.__version__}, {kernel}, {THREADS} threads, float32, forward and backward"


def main() -> None:
    """Prints the tables, and writes them where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds a row, at least 2 (default {ROUNDS})")
    parser.add_argument("--only", choices=TABLES, help="one table")
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    parser.add_argument("--peaks", choices=TABLES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.peaks:
        print(json.dumps(peaks_of(options.peaks)))
        return
    if not options.only:  # each in a process of its own: none finds memory that another has left
        for name in TABLES:
            subprocess.run([sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:], "--only", name], check=True)
        return
    name, text = options.only, "\n".join(lines(options.only, options.rounds))
    if options.write:
        marked = re.compile(rf"(<!-- kernels-{name} -->).*?(<!-- /kernels-{name} -->)", re.DOTALL)
        found = f"{text}\n{environment()}; medians of {options.rounds} interleaved rounds, with quartiles."
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{found}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
