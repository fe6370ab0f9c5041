"""``python -m benchmarks``: interleaved timings as ratios; ``--write`` puts the table into docs/performance.md."""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from benchmarks.losses import Pair, Step, pairs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
ROUNDS = 25
SECONDS_A_TURN = 0.02  # a turn repeats its step until about this long


def seconds(step: Step, repeats: int) -> float:
    """Time of one step, averaged over ``repeats``."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def ratios(pair: Pair, rounds: int) -> list[float]:
    """Our time over theirs, one a round; who goes first changes from round to round."""
    steps = [pair.our_step, pair.their_step]
    repeats = [max(1, round(SECONDS_A_TURN / seconds(s, 5))) for s in steps for _ in range(2)][1::2]  # after a warm-up
    found = []
    for i in range(rounds):
        times = [0.0, 0.0]
        for side in (0, 1) if i % 2 else (1, 0):
            times[side] = seconds(steps[side], repeats[side])
        found.append(times[0] / times[1])
    return found


def environment() -> str:
    """What the ratios were measured with."""
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, one thread, CPU, float32, forward and backward"
    )


def table(rounds: int) -> str:
    """The markdown table, with the environment below."""
    lines = ["| ours | against | size | ratio | quartiles |", "| --- | --- | --- | ---: | ---: |"]
    for pair in pairs():
        low, median, high = statistics.quantiles(ratios(pair, rounds), n=4)
        lines.append(f"| {pair.ours} | {pair.theirs} | {pair.shape} | {median:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join([*lines, "", f"{environment()}; medians of {rounds} interleaved rounds."])


def main() -> None:
    """Prints the table, and writes it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds a pair, at least 2 (default {ROUNDS})")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads of two sides that wait for a busy core would be what is measured
    found = table(options.rounds)
    print(found)
    if options.write:
        marked = re.compile(r"(<!-- bench -->).*?(<!-- /bench -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda m: f"{m[1]}\n\n{found}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
