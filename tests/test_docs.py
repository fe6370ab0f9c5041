"""The documentation: its code blocks run, its commands compose, its links lead somewhere, its tables are current.

Blocks of a page run in order in one namespace and one temporary folder. On the line before a block,
``<!-- file: conf/loss/mine.yaml -->`` has it written to that file, and ``<!-- no-run: reason -->`` keeps it from
running; its ``counterpoise-train`` commands are composed and checked all the same.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from tests.recipes.launching import QUICK, Outcome, as_if_alone, launch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md"))]
LANGUAGES = ("python", "bash", "console", "yaml", "text")
FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>file|no-run):?(?P<value>.*?)-->\n)?^ *```(?P<language>[^\n`]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``mark`` is "file" or "no-run" with its ``value``, or None."""

    page: Path
    line: int
    language: str
    code: str
    mark: str | None
    value: str

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of its ``counterpoise-train`` commands, the program left out."""
        lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in self.code.splitlines()]
        return [words[1:] for words in lines if words[:1] == ["counterpoise-train"]]


def blocks_of(page: Path) -> list[Block]:
    text, blocks = page.read_text(), []
    for match in FENCE.finditer(text):
        if match["language"].startswith("{"):
            continue  # a MyST directive
        line, code = text.count("\n", 0, match.start("code")), textwrap.dedent(match["code"])
        blocks.append(Block(page, line, match["language"], code, match["mark"], (match["value"] or "").strip()))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    exec(compile("\n" * block.line + block.code, name(block.page), "exec"), namespace)


def run_command(folder: Path, arguments: list[str]) -> Outcome:
    """A launch of one short epoch; what only prints is left as it is."""
    prints = any(argument in arguments for argument in ("--cfg", "--info", "--help"))
    return launch(folder, *arguments, *([] if prints else QUICK))


def run_commands(block: Block, folder: Path) -> None:
    lines = [line for line in block.code.splitlines() if line and not line.startswith("#")]
    if block.language == "bash":
        assert len(block.commands) == len(lines), "an unmarked block holds counterpoise-train commands and nothing else"
        expected: list[str] = []
    else:
        expected = [line for line in lines if not line.startswith("$ ")]
    outcomes = [run_command(folder, arguments) for arguments in block.commands]
    told = "".join(outcome.out + outcome.err for outcome in outcomes)
    assert [line for line in expected if line not in told] == [], told
    if not any(line.startswith("error: ") for line in expected):
        assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), told


def check_commands(block: Block, folder: Path) -> None:
    """Composes, resolves and checks what is not run."""
    settled: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("counterpoise.recipes.cli.launch", lambda *parts: settled.append(parts))
        for arguments in block.commands:
            outcome = launch(folder, *arguments)
            assert outcome.code == 0, outcome.err
    assert len(settled) >= len(block.commands)
    for _, run, _ in settled:
        if not any(run.iterdir()):  # a fresh run folder; what comes later on the page looks for runs
            run.rmdir()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng(), as_if_alone(tmp_path, ["page"]):
        for block in blocks_of(page):
            if block.mark == "no-run":
                check_commands(block, tmp_path)
            elif block.mark == "file":
                file = tmp_path / block.value
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.code)
            elif block.language == "python":
                run_python(block, namespace)
            elif block.language in ("bash", "console"):
                run_commands(block, tmp_path)


def test_marks_have_values_and_languages_are_known() -> None:
    assert [f"{name(b.page)}:{b.line}" for b in BLOCKS if b.mark and not b.value] == []
    assert [f"{name(b.page)}:{b.line}" for b in BLOCKS if b.language not in LANGUAGES] == []
    for block in BLOCKS:
        if block.language == "yaml":
            yaml.safe_load(block.code)


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_relative_links_exist(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    relative = [t.partition("#")[0] for t in targets if "://" not in t and not t.startswith(("#", "mailto:"))]
    assert [target for target in relative if not (page.parent / target).exists()] == []


def methods_table() -> ModuleType:
    """docs/methods_table.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "docs" / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_method_tables_are_current() -> None:
    assert methods_table().main(["--check"]) == 0, "run python docs/methods_table.py"


def test_method_tables_list_every_part_with_a_config() -> None:
    tables = methods_table().long_tables()
    for part in ("LogitAdjustedLoss", "NTXentLoss", "GroupDRO", "ClassBalancedSampler"):
        assert f"| `{part}` |" in tables
    assert "`loss=ldam`" in tables
    assert "`reweighter=group_dro`" in tables


def test_every_option_of_a_group_is_told() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    options = (ROOT / "counterpoise" / "recipes" / "conf").glob("*/*.yaml")
    assert [f"{o.parent.name}={o.stem}" for o in options if f"`{o.stem}`" not in page] == []
