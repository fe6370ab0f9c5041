"""``python -m benchmarks.kernels_gpu``: fused losses on a GPU beside eager PyTorch and ``torch.compile``; ``--write``.

A step is a forward and a backward pass. Some steps in a row are timed with device events, so that the host runs ahead
of the device as it does in training; the sides take turns, and a ratio is the median over the rounds of their time over
ours. Memory is what one step allocates at its peak, its gradient included.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from counterpoise import kernels
from counterpoise.contrastive import ASCLLoss, CACRLoss, NTXentLoss, SigLIPLoss, SupConLoss
from counterpoise.losses import AsymmetricLoss, CrossEntropyLoss, LogitAdjustedLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from counterpoise.memory import MemoryBank
from counterpoise.neighbors import nearest_neighbors
from counterpoise.ot import partial_sinkhorn, sinkhorn
from counterpoise.samplers import facility_location, k_center_greedy

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
ROUNDS = 15
STEPS = 5  # in a row
LONG = 50.0  # milliseconds from which on a side takes one step at a time, and three rounds
Step = Callable[[], object]
Row = tuple[str, str, Step, dict[str, Step]]


def step(loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Forward and backward."""
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(loss(*inputs), leaves)


def plainly(job: Step) -> Step:
    """The same on the plain reference."""

    def run() -> object:
        with kernels.disabled():
            return job()

    return run


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").requires_grad_()


def plain_focal(x: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """torchvision's form."""
    p = torch.sigmoid(x)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    return ((alpha * t + (1 - alpha) * (1 - t)) * entropy * (1 - p_t) ** gamma).mean()


def plain_asymmetric(x: Tensor, t: Tensor) -> Tensor:
    """timm's form."""
    p = torch.sigmoid(x)
    not_p = (1 - p + 0.05).clamp(max=1)
    base = t * torch.log(p.clamp(min=1e-8)) + (1 - t) * torch.log(not_p.clamp(min=1e-8))
    return -(base * torch.pow(1 - p * t - not_p * (1 - t), t + 4 * (1 - t))).sum()


def plain_softmax_focal(x: Tensor, y: Tensor) -> Tensor:
    log_p = torch.log_softmax(x, 1).gather(1, y[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def plain_ntxent(z: Tensor, other: Tensor) -> Tensor:
    rows = normalize(torch.cat([z, other]), dim=1)
    similarity = (rows @ rows.T / 0.5).fill_diagonal_(-torch.inf)
    return cross_entropy(similarity, torch.arange(2 * len(z), device=z.device).roll(len(z)))


def rows() -> Iterator[Row]:
    """Every job."""
    z, t = normal(16_000_000), (torch.rand(16_000_000, device="cuda") < 0.1).float()
    both = {"eager": step(plain_focal, z, t), "compiled": step(torch.compile(plain_focal), z, t)}
    yield "SigmoidFocalLoss", "16,000,000", step(SigmoidFocalLoss(alpha=0.25), z, t), both
    z, t = normal(16_384, 1000), (torch.rand(16_384, 1000, device="cuda") < 0.05).float()
    asymmetric = AsymmetricLoss(gamma_pos=1, eps=1e-8, inner="sum", reduction="sum")
    both = {"eager": step(plain_asymmetric, z, t), "compiled": step(torch.compile(plain_asymmetric), z, t)}
    yield "AsymmetricLoss", "16,384 x 1,000", step(asymmetric, z, t), both
    for n, c in ((1_000_000, 10), (65_536, 1000), (16_384, 10_000), (4096, 128_000)):
        z, y = normal(n, c), torch.randint(c, (n,), device="cuda")
        counts = torch.linspace(1000, 10, c).long()
        prior = torch.log(counts / counts.sum()).cuda()

        def adjusted(x: Tensor, y: Tensor, prior: Tensor = prior) -> Tensor:
            return cross_entropy(x + prior, y)

        losses = [
            (CrossEntropyLoss(), cross_entropy),
            (LogitAdjustedLoss(counts).cuda(), adjusted),
            (SoftmaxFocalLoss(), plain_softmax_focal),
        ]
        for loss, plain in losses if c >= 10_000 else losses[:1]:
            both = {"eager": step(plain, z, y), "compiled": step(torch.compile(plain), z, y)}
            yield type(loss).__name__, f"{n:,} x {c:,}", step(loss, z, y), both
    z, y = normal(16_384, 10_000), torch.softmax(torch.randn(16_384, 10_000, device="cuda"), 1)
    both = {"eager": step(cross_entropy, z, y), "compiled": step(torch.compile(cross_entropy), z, y)}
    yield "CrossEntropyLoss, probabilities", "16,384 x 10,000", step(CrossEntropyLoss(), z, y), both
    z = torch.randn(16_384, 32_000, device="cuda").bfloat16().requires_grad_()
    y = torch.randint(32_000, (16_384,), device="cuda")
    both = {"eager": step(cross_entropy, z, y), "compiled": step(torch.compile(cross_entropy), z, y)}
    yield "CrossEntropyLoss, bfloat16", "16,384 x 32,000", step(CrossEntropyLoss(), z, y), both
    n, d = 8192, 128
    a, b = normal(n, d), normal(n, d)
    size = f"{n:,} pairs x {d}"
    both = {"eager": step(plain_ntxent, a, b), "compiled": step(torch.compile(plain_ntxent), a, b)}
    yield "NTXentLoss", size, step(NTXentLoss(temperature=0.5), a, b), both
    labels = torch.randint(100, (n,), device="cuda")
    bank = MemoryBank(65_536, d, init="random").cuda()
    for name, job in (
        ("SupConLoss", step(partial(SupConLoss(temperature=0.1), labels=labels), a, b)),
        ("CACRLoss", step(CACRLoss(), a, b)),
        ("SigLIPLoss", step(SigLIPLoss().cuda(), a, b)),
        ("ASCLLoss, bank of 65,536", step(partial(ASCLLoss(), bank=bank), a, b.detach())),
    ):
        yield name, size, job, {"plain": plainly(job)}
    a, b = normal(65_536, d), normal(65_536, d)
    yield "NTXentLoss", f"65,536 pairs x {d}", step(NTXentLoss(temperature=0.5), a, b), {}
    fifty = {"epsilon": 0.05, "max_iterations": 50, "tolerance": 0.0}
    for shape in ((20_000, 100), (4096, 4096), (64, 64, 64)):
        cost, size = torch.rand(shape, device="cuda"), " x ".join(f"{n:,}" for n in shape)
        balanced = partial(sinkhorn, cost, **fifty)
        yield "sinkhorn, 50 iterations", size, balanced, {"plain": plainly(balanced)}
    cost = torch.rand(20_000, 100, device="cuda")
    some = partial(partial_sinkhorn, cost, mass=0.7, **fifty)
    yield "partial_sinkhorn, 50 iterations", "20,000 x 100", some, {"plain": plainly(some)}
    x = torch.randn(200_000, 128, device="cuda")
    pick = partial(k_center_greedy, x, 500, first=0)
    yield "k_center_greedy, 500 picks", "200,000 x 128", pick, {"plain": plainly(pick)}
    x = torch.randn(20_000, 64, device="cuda")
    pick = partial(facility_location, x, 100)
    yield "facility_location, 100 picks", "20,000 x 64", pick, {"plain": plainly(pick)}
    x = torch.randn(100_000, 64, device="cuda")
    near = partial(nearest_neighbors, x[:4096], x, 50)
    yield "nearest_neighbors, 50 of 100,000", "4,096 x 64", near, {"plain": plainly(near)}


def milliseconds(job: Step, steps: int = 1) -> float:
    """Device time of a step, of some in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def peak(job: Step) -> float:
    """MiB that one step allocates at its peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def line(name: str, size: str, ours: Step, others: dict[str, Step], rounds: int) -> str:
    """One row of the table."""
    sides = {"": ours, **others}
    slowest = 0.0
    for job in sides.values():
        job()
        slowest = max(slowest, milliseconds(job))
    long = slowest > LONG
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(min(rounds, 3) if long else rounds):
        for side, job in sides.items():
            times[side].append(milliseconds(job, 1 if long else STEPS))
    cells = []
    for side in ("eager", "compiled", "plain"):
        found = [theirs / mine for theirs, mine in zip(times.get(side, []), times[""], strict=False)]
        cells.append(f"{statistics.median(found):.2f}" if found else "-")
    memories = [f"{peak(job):,.1f}" for side, job in sides.items() if side != "compiled"]
    return f"| {name} | {size} | {' | '.join(cells)} | {'; '.join(memories)} |"


def main() -> None:
    """Prints the table, and writes it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds a row (default {ROUNDS})")
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        "| job | size | eager, times ours | compiled, times ours | own plain form, times ours | MiB, ours; theirs |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows():
        try:
            lines.append(line(*row, options.rounds))
        except torch.cuda.OutOfMemoryError as error:
            lines.append(f"| {row[0]} | {row[1]} | out of memory: {str(error)[:60]} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, float32 where nothing "
        f"else is said; medians of {options.rounds} rounds of {STEPS} steps, or of three where a step takes long.",
    ]
    print(lines[-1])
    if options.write:
        marked = re.compile(r"(<!-- kernels-gpu -->).*?(<!-- /kernels-gpu -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n" + "\n".join(lines) + f"\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
