"""Writes the tables of methods into README.md and docs/methods.md, from what every part declares about itself.

``python docs/methods_table.py`` writes them, ``--check`` exits with 1 where they are not current.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import counterpoise

ROOT = Path(__file__).resolve().parents[1]
CONF = Path(counterpoise.__file__).parent / "recipes" / "conf"
ROOMS = {
    "losses": "Losses",
    "contrastive": "Contrastive objectives",
    "samplers": "Reweighters and samplers",
    "ot": "Optimal transport",
}
WORDS = {"verified": "verified", "derived": "derived", "from_memory": "from memory"}


def parts(room: str) -> list[type]:
    """The exported classes of a room that declare a Spec, by task and name."""
    exported = import_module(f"counterpoise.{room}")
    found = [getattr(exported, name) for name in exported.__all__]
    return sorted(
        (x for x in found if inspect.isclass(x) and hasattr(x, "spec")), key=lambda x: (x.spec.task, x.__name__)
    )


def functions(room: str) -> list[tuple[str, str]]:
    """Exported functions that belong to no part: name, and the source that their file gives."""
    exported = import_module(f"counterpoise.{room}")
    homes = {inspect.getmodule(part) for part in parts(room)}
    found = []
    for name in exported.__all__:
        function = getattr(exported, name)
        home = inspect.getmodule(function)
        source = re.search(r"^Source: (.*?)(?:\n\n|\Z)", (home and home.__doc__) or "", re.M | re.S)
        if inspect.isfunction(function) and home not in homes and source:
            found.append((name, " ".join(source[1].split()).rstrip(".")))
    return found


def configs() -> dict[str, str]:
    """Dotted target to the command-line choice that names it, such as ``loss=ldam``."""
    found = {}
    for file in sorted(CONF.glob("*/*.yaml")):
        target = re.match(r"^_target_: (\S+)", re.sub(r"^(#.*\n)+", "", file.read_text()))
        if target:
            found.setdefault(target[1], f"`{file.parent.name}={file.stem}`")
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def words(items: Any) -> str:
    """Code words, separated by commas; a dash for none."""
    return ", ".join(f"`{item}`" for item in items) or "-"


def short_table() -> str:
    """For the README: part, input, status and source of every method."""
    rows = [
        [f"`{room}.{part.__name__}`", part.spec.task, WORDS[part.spec.origin], part.spec.source]
        for room in ROOMS
        for part in parts(room)
    ]
    rows += [
        [f"`{room}.{name}()`", "function", "derived" if re.search("derived(?! here)", source) else "verified", source]
        for room in ROOMS
        for name, source in functions(room)
    ]
    return table(["part", "task", "status", "source"], rows)


def long_tables() -> str:
    """For docs/methods.md: a table a room, and the exemptions with their reasons."""
    named, blocks, exempt, sources = configs(), [], [], []
    for room, title in ROOMS.items():
        rows = []
        for part in parts(room):
            spec = part.spec
            config = named.get(f"counterpoise.{room}.{part.__name__}", "-")
            name = f"`{part.__name__}`"
            rows.append([name, spec.task, words(spec.needs), spec.distributed, WORDS[spec.origin], config])
            sources.append([name, spec.source])
            exempt += [[name, promise, reason] for promise, reason in spec.exemptions.items()]
        header = ["part", "task", "needs", "ranks", "status", "config"]
        if not rows:
            continue  # functions alone, which have a table of their own
        blocks.append(f"## {title}\n\n{table(header, rows)}")
    of_files = [[f"`{room}.{name}`", source] for room in ROOMS for name, source in functions(room)]
    blocks.append(f"## Functions\n\n{table(['function', 'source'], of_files)}")
    blocks.append(f"## Sources\n\n{table(['part', 'source'], sources)}")
    blocks.append("## Exemptions\n\n" + (table(["part", "from", "because"], exempt) if exempt else "None."))
    return "\n\n".join(blocks)


def between_markers(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- name -->`` and ``<!-- /name -->``; ValueError without the markers."""
    pattern = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the text has no <!-- {name} --> ... <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}\n\n{content}\n\n{match[2]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks both files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a table is not current")
    check = parser.parse_args(arguments).check
    stale = []
    for file, content in ((ROOT / "README.md", short_table()), (ROOT / "docs" / "methods.md", long_tables())):
        before = file.read_text()
        after = between_markers(before, "methods", content)
        if after == before:
            continue
        stale.append(file.name)
        if not check:
            file.write_text(after)
    if stale:
        print(f"{'not current' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
