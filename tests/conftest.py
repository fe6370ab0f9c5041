"""Options and outcomes of the whole suite: the folder of reference vectors, and how golden cases are counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.pool import Pool

GOLDEN = Path(__file__).parent / "golden"
NOT_COVERED, NOT_MAPPED = "not covered", "not mapped by choice"

# The suite is a gate: the same draws every time. `make test-slow` explores beyond them, and an example found is kept.
hypothesis.settings.register_profile("gate", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", max_examples=400, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
_golden: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=GOLDEN, help="folder of reference vectors, *.json")


def _reason(report: pytest.TestReport) -> str:
    return str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Two outcomes of their own: a vector without an implementation is neither passed nor merely skipped."""
    for outcome in (NOT_COVERED, NOT_MAPPED):
        if _reason(report).startswith(f"Skipped: {outcome}"):
            return outcome, "-", outcome.upper()
    return None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts golden cases by outcome."""
    if "golden/test_golden.py::test_case" not in report.nodeid:
        return
    if report.failed:
        _golden["failed"] += 1
    elif report.skipped:
        status = pytest_report_teststatus(report)
        _golden[status[0] if status else "skipped"] += 1
    elif report.when == "call":
        _golden["passed"] += 1


def pytest_unconfigure(config: pytest.Config) -> None:
    """The four counts of golden cases, last."""
    if _golden and not hasattr(config, "workerinput"):
        counts = ", ".join(f"{_golden[name]} {name}" for name in ("passed", "failed", NOT_COVERED, NOT_MAPPED))
        print(f"golden cases: {counts}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many exemptions from the contracts are declared, each with its reason."""
    from tests.contracts.parts import PARTS

    exemptions = [(p.__name__, name, why) for p in PARTS for name, why in p.spec.exemptions.items()]
    terminalreporter.write_line(f"contract exemptions: {len(exemptions)} of {len(PARTS)} parts' promises")
    for part, name, why in exemptions:
        terminalreporter.write_line(f"  {part}: {name}: {why}")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Three gloo processes that stay up for the whole session."""
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two, likewise."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pools(pair: Pool, ranks: Pool) -> dict[int, Pool]:
    """Both, by their number of processes."""
    return {2: pair, 3: ranks}
