"""counterpoise-select: three kinds of sources, what is written, and mistakes told in a sentence."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoise.recipes.select_cli import logits_of, select
from counterpoise.recipes.selecting import METHODS, Pool, choose, coverage_curve


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    x = torch.randn(90, 5, generator=g) + 2 * labels[:, None]
    np.savez(tmp_path / "e.npz", embeddings=x.numpy(), labels=np.array(["a", "b", "c"])[labels.numpy()])
    return tmp_path / "e.npz"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        select(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


@pytest.mark.parametrize("method", [m for m in METHODS if m != "forgetting"])
def test_every_method_keeps_the_fraction_of_every_class(method: str, embeddings: Path, tmp_path: Path) -> None:
    select([str(embeddings), "--method", method, "--fraction", "0.2", "--out", str(tmp_path / "out")])
    with np.load(tmp_path / "out" / "selection.npz") as found:
        indices, weights, targets = found["indices"], found["weights"], found["targets"]
    assert len(set(indices.tolist())) == len(indices) == len(weights) == 18
    if method != "coverage":  # stratified by score, not by class
        assert np.bincount(targets[indices]).tolist() == [6, 6, 6]
        assert weights.sum() == pytest.approx(90)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Share of each class" in page
    assert "Error" not in page


def test_a_row_for_every_kept_example(embeddings: Path, tmp_path: Path) -> None:
    select([str(embeddings), "--fraction", "0.1", "--out", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "selection.csv").open()))
    assert len(rows) == 9
    assert {row["class"] for row in rows} == {"a", "b", "c"}
    scores = [float(row["score"]) for row in rows if row["class"] == "a"]
    assert scores == sorted(scores, reverse=True)


def test_a_table_needs_its_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i % 7},{i % 5},{i % 2}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *rows]))
    assert "--label" in refusal(capsys, str(tmp_path / "t.csv"))
    select([str(tmp_path / "t.csv"), "--label", "y", "--method", "k_center", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "selection.csv").read_text().startswith("index,class,weight")


def test_a_folder_of_images_is_shown(tmp_path: Path) -> None:
    for label, shade in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (12, 12), (shade + i, shade, shade)).save(tmp_path / "images" / label / f"{i}.png")
    arguments = ["--image-size", "16", "--epochs", "1", "--fraction", "0.5", "--out", str(tmp_path / "out")]
    select([str(tmp_path / "images"), *arguments])
    rows = list(csv.DictReader((tmp_path / "out" / "selection.csv").open()))
    assert sorted(row["file"].split("/")[0] for row in rows) == ["dark"] * 4 + ["light"] * 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not available" not in page
    for told in (
        "Scores (larger = harder)",
        "Share of each class",
        "Mean distance to the nearest kept",
        "Small images of",
    ):
        assert told in page
    assert "image_size: 16" in page


def test_mistakes_are_told(embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fraction is 1.5" in refusal(capsys, str(embeddings), "--fraction", "1.5")
    assert "SOURCE is 'nothing'" in refusal(capsys, "nothing")
    np.savez(tmp_path / "bad.npz", x=np.zeros(3))
    assert "'embeddings'" in refusal(capsys, str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "bad.npz", embeddings=np.zeros((3, 2)), labels=np.zeros(4))
    assert "(N, D) and (N,)" in refusal(capsys, str(tmp_path / "bad.npz"))
    assert not (tmp_path / "selected").exists()


def test_scores_keep_the_hardest_or_the_easiest() -> None:
    targets = torch.arange(20) % 2
    logits = torch.linspace(-3, 3, 20)[:, None] * torch.tensor([[1.0, -1.0]])
    pool = Pool(targets, torch.randn(20, 3), logits)
    hard, easy = (choose(pool, "el2n", 0.3, keep=keep).selection.indices for keep in ("hardest", "easiest"))
    scores = choose(pool, "el2n", 1.0).scores
    assert scores is not None
    for k in (0, 1):
        of_class = scores[targets == k]
        assert scores[hard[targets[hard] == k]].sort().values.tolist() == of_class.sort().values[-3:].tolist()
        assert scores[easy[targets[easy] == k]].sort().values.tolist() == of_class.sort().values[:3].tolist()


def test_an_example_never_learned_is_the_hardest() -> None:
    events = torch.tensor([0.0, 2, torch.inf, 1])
    found = choose(Pool(torch.zeros(4, dtype=torch.long), torch.zeros(4, 1), forgetting=events), "forgetting", 0.5)
    assert found.selection.indices.tolist() == [2, 1]


def test_covering_only_gets_better() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    sizes, means = coverage_curve(x, torch.arange(40))
    assert means == sorted(means, reverse=True)
    assert (sizes[-1], means[-1]) == (40, pytest.approx(0, abs=1e-9))


def test_linear_logits_separate_what_is_linear() -> None:
    g = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    x = torch.randn(60, 4, generator=g) * 0.1 + torch.eye(4)[targets]
    assert torch.equal(logits_of(x, targets).argmax(1), targets)
    assert torch.equal(logits_of(x[targets < 2], targets[targets < 2]).argmax(1), targets[targets < 2])
