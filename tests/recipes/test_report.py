"""Reports of whole, partial, failed and broken run folders: self-contained, escaped, written in one step."""

from __future__ import annotations

import html
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from counterpoise.recipes.evaluation import classification_metrics
from counterpoise.recipes.report import Section, results_table, write_report
from counterpoise.recipes.report_data import RunFolder
from counterpoise.recipes.report_sections import Items

NAMES = ["T-shirt", "$ & <script>alert(1)</script>", 'quoted "boot"', "дом 家"]
COUNTS = [400, 120, 40, 8]
COMMAND = "counterpoise-train recipe=long_tailed data=digits_lt loss=logit_adjusted 'model.name=\"<b>\"' seed=3"
CONFIG = """
recipe: long_tailed
data: {_target_: counterpoise.recipes.data.LongTailed, name: digits_lt}
loss: {_target_: counterpoise.losses.LogitAdjustedLoss, _partial_: true, tau: 1.5}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
sampler: null
seed: 3
"""
HISTORY = """epoch,step,train/loss,val/loss,val/balanced_accuracy,val/accuracy,lr
0,10,1.9,,0.31,0.30,0.1
1,20,1.2,,0.52,0.50,0.1
2,30,0.9,,0.6"""
PLOTS = {"Class counts and recall", "Confusion matrix", "Reliability diagram", "Learning curves"}


class Reader(HTMLParser):
    """Collects what a browser would load, the roles of pictures and whether every element is closed."""

    void = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.alternatives: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.resources += [attributes[key] or "" for key in ("src", "href", "xlink:href") if key in attributes]
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        if attributes.get("role") == "img":
            self.alternatives.append(attributes.get("aria-label") or "")
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make_metrics() -> dict:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(200) % 4
    logits = torch.randn(200, 4, generator=generator) + 2 * torch.eye(4)[target]
    evaluation = classification_metrics(logits, target, COUNTS, class_names=NAMES)
    return {
        "schema_version": 1,
        "recipe": "long_tailed",
        "config_hash": "0123456789abcdef",
        "status": "completed",
        "error": None,
        "notes": ["the prior is that of the training split"],
        "command": COMMAND,
        "environment": {"counterpoise": "0.1.0", "torch": torch.__version__, "threads": 2},
        "class_names": NAMES,
        "class_counts": COUNTS,
        "splits": {"val": evaluation.scalars | {"nll": None}, "test": evaluation.scalars},
        "bands": evaluation.bands,
        "per_class": evaluation.per_class,
        "confusion": evaluation.confusion,
        "cost": {"train_seconds": 75.2, "epochs": 3, "parameters": 1234, "examples_per_second": 5123.4},
        "predictions": {"target": target.numpy(), "logits": logits.numpy()},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metrics = make_metrics()
    np.savez(tmp_path / "predictions.npz", index=np.arange(200), **metrics.pop("predictions"))
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "history.csv").write_text(HISTORY)
    return tmp_path


def change(folder: Path, **entries: object) -> None:
    path = folder / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def read(folder: Path) -> str:
    page = write_report(folder).read_text(encoding="utf-8")
    assert Reader(page).open == []
    return page


def missing(page: str) -> set[str]:
    return set(re.findall(r'<p class="missing"><strong>(.*?)</strong> not available: \S', page))


def test_full_report(folder: Path) -> None:
    page = read(folder)
    assert missing(page) == set()
    for text in ("digits_lt", "LogitAdjustedLoss (tau 1.5)", "completed", "3 epochs in 1 min 15 s", "0123456789ab"):
        assert text in page
    assert html.escape(COMMAND, quote=False) in page.replace("&#39;", "'").replace("&#34;", '"')
    assert "This run failed" not in page
    assert page.count("<svg") == 4
    assert "<details>" in page


def test_loads_nothing_from_outside(folder: Path) -> None:
    page = read(folder)
    reader = Reader(page)
    assert all(link.startswith(("#", "data:")) for link in reader.resources)
    assert not set(reader.tags) & {"script", "link", "iframe", "object", "base"}
    assert not re.search(r"@import|url\((?!#)", page)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses


def test_names_and_errors_are_escaped(folder: Path) -> None:
    change(folder, status="failed", error="<img src=x onerror=alert(2)>", notes=["</ul><script>"])
    page = read(folder)
    assert "<script>" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in page


def test_every_plot_has_an_alternative_and_ids_of_its_own(folder: Path) -> None:
    reader = Reader(read(folder))
    assert len(reader.alternatives) == 4
    assert all(len(text) > 30 for text in reader.alternatives)
    assert len(reader.ids) == len(set(reader.ids))


def test_classes_are_sorted_by_training_count(folder: Path) -> None:
    change(folder, class_names=["fourth", "first", "third", "second"], per_class={"train_count": [1, 90, 7, 30]})
    rows = re.findall(r'<th scope="row">(first|second|third|fourth)</th>', read(folder))
    assert rows == ["first", "second", "third", "fourth"]


def test_failed_run_without_results(folder: Path) -> None:
    for name in ("predictions.npz", "history.csv"):
        (folder / name).unlink()
    nothing = dict.fromkeys(("splits", "per_class", "confusion", "bands", "cost"))
    change(folder, status="failed", error="RuntimeError: train/loss is nan", **nothing)
    page = read(folder)
    assert "This run failed" in page
    assert "RuntimeError: train/loss is nan" in page
    assert missing(page) == {"Table of results", "Table of classes", *PLOTS} - {"Class counts and recall"}
    assert "there is no predictions.npz" in page


def test_running_run_says_so(folder: Path) -> None:
    change(folder, status="running")
    assert "This run has not finished" in read(folder)


def test_empty_folder(tmp_path: Path) -> None:
    page = read(tmp_path)
    assert missing(page) == {"Table of results", "Table of classes", "Command", "Configuration", "Environment", *PLOTS}
    assert "there is no metrics.json" in page


@pytest.mark.parametrize("name", ["metrics.json", "config.yaml", "history.csv", "predictions.npz"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"a: [", b"PK\x03\x04"])
def test_broken_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert missing(read(tmp_path)) >= PLOTS


@pytest.mark.parametrize(
    "entries",
    [
        {"splits": {"test": {"accuracy": "high", "worst_group": [1]}, "val": 3}},
        {"per_class": {"recall": ["x"] * 4, "train_count": COUNTS, "band": 5}},
        {"per_class": {"recall": [None] * 4, "train_count": COUNTS, "band": [None] * 4}},
        {"class_names": ["a"], "confusion": [[1, 2]], "environment": [], "bands": "thirds"},
        {"class_counts": [0, 0, 0, 0], "per_class": None, "cost": {"train_seconds": float("nan")}},
        {"command": None, "status": None, "recipe": None, "notes": 3, "config_hash": 7},
    ],
)
def test_entries_of_the_wrong_kind(folder: Path, entries: dict) -> None:
    change(folder, **entries)
    read(folder)


@pytest.mark.parametrize("classes", [1, 2, 40])
def test_few_and_many_classes(folder: Path, classes: int) -> None:
    target = torch.arange(80) % classes
    logits = torch.randn(80, classes, generator=torch.Generator().manual_seed(1))
    counts = [1000 // (1 + i) for i in range(classes)]
    evaluation = classification_metrics(logits, target, counts)
    parts = {"per_class": evaluation.per_class, "confusion": evaluation.confusion, "bands": evaluation.bands}
    change(folder, class_names=evaluation.class_names, class_counts=counts, **parts)
    np.savez(folder / "predictions.npz", target=target.numpy(), logits=logits.numpy())
    assert missing(read(folder)) == set()


def test_predictions_that_are_not_finite(folder: Path) -> None:
    logits = np.full((3, 4), np.nan, dtype=np.float32)
    np.savez(folder / "predictions.npz", target=np.zeros(3, dtype=np.int64), logits=logits)
    assert missing(read(folder)) == {"Reliability diagram"}


def test_written_in_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "report.html").write_text("the one before")

    def refuse(source: str, target: str) -> None:
        assert Path(source).parent == Path(target).parent
        assert Path(source).read_text(encoding="utf-8").rstrip().endswith("</html>")
        raise OSError("disk full")

    before = set(folder.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="disk full"):
            write_report(folder)
    assert (folder / "report.html").read_text() == "the one before"
    assert set(folder.iterdir()) == before
    assert write_report(folder) == folder / "report.html"
    assert set(folder.iterdir()) == before


def test_same_folder_same_page(folder: Path) -> None:
    assert read(folder) == read(folder)


def test_sections_of_another_recipe(folder: Path) -> None:
    def broken(run: RunFolder) -> Items:
        raise KeyError("groups")

    page = write_report(folder, [Section("Groups", {"Worst group": broken})]).read_text()
    assert "Worst group</strong> not available: KeyError" in page


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an existing run folder"):
        write_report(tmp_path / "nowhere")


def test_results_table() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    splits = {"test": {"accuracy": 0.5, "nll": 1.25}, "val": {"accuracy": None, "worst[red]group": 3}}
    console.print(results_table({"recipe": "long_tailed", "splits": splits}))
    text = console.export_text()
    assert re.search(r"metric\W+val\W+test", text)
    assert re.search(r"Accuracy\W+n/a\W+50.0%", text)
    assert re.search(r"log-likelihood.*n/a\W+1.250", text)
    assert "[red]" in text
    console.print(results_table({}))
