"""The multi-label recipe: canvases with known label sets, exact average precision, a table of one's own, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from torch import nn

from counterpoise.losses import AsymmetricLoss, CrossEntropyLoss, SigmoidFocalLoss
from counterpoise.recipes import MLP, MultiLabel, SmallCNN, fit
from counterpoise.recipes.data import LabelledData, digits_canvas, fashion_canvas, multi_label_csv
from counterpoise.recipes.data.canvas import compose
from counterpoise.recipes.data.multi_label_csv import shared_split
from counterpoise.recipes.label_evaluation import LabelAveragePrecision, label_metrics, label_precisions
from counterpoise.samplers import GroupDRO
from tests.recipes.test_data import labels
from tests.recipes.test_data_sources import write_idx

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
SMALL: dict[str, Any] = {"cells": 2, "max_labels": 2, "n_train": 600, "n_val": 100, "n_test": 200, "batch_size": 32}


@pytest.fixture(scope="module")
def canvases() -> LabelledData:
    return digits_canvas(**SMALL)


def recipe(loss: nn.Module, data: LabelledData, **options: Any) -> MultiLabel:
    torch.manual_seed(0)
    model = SmallCNN(1, data.num_classes, width=16)
    adam = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)}
    return MultiLabel(model, loss, num_classes=data.num_classes, **{**adam, **options})


def test_it_learns_and_reports(canvases: LabelledData, tmp_path: Path) -> None:
    result = fit(recipe(AsymmetricLoss(inner="sum"), canvases), canvases, folder=tmp_path, max_epochs=8, **QUIET)
    assert result["mean_average_precision"] > 0.35  # a guess has the share of positives, 0.15
    page = (tmp_path / "report.html").read_text()
    for told in ("Table of labels", "Labels per example", "Test examples", "Learning curves"):
        assert f"<strong>{told}</strong> not available" not in page
    assert "Training positives of each label" in page
    assert page.count("data:image/png;base64") == 12
    assert "The first 12 test images" in page
    assert result.metrics["per_class"]["train_count"] == canvases.class_counts


@pytest.mark.parametrize("loss", [SigmoidFocalLoss(gamma=0, inner="sum"), nn.BCEWithLogitsLoss()])
def test_binary_cross_entropy_of_ours_or_of_torch_does(loss: nn.Module, canvases: LabelledData, tmp_path: Path) -> None:
    result = fit(recipe(loss, canvases), canvases, folder=tmp_path, max_epochs=1, **QUIET)
    assert result.metrics["status"] == "completed"
    assert 0 < result["mean_average_precision"] < 1


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    weights = []
    for name, plan in (("at once", [3]), ("in two", [1, 3])):
        for epochs in plan:
            data = digits_canvas(**SMALL)
            made = recipe(AsymmetricLoss(), data)
            fit(made, data, folder=tmp_path / name, max_epochs=epochs, resume=True, **QUIET)
        last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(torch.cat([x.flatten().double() for x in last["state_dict"].values()]))
    assert torch.equal(*weights)


def test_parts_that_do_not_fit_are_refused(canvases: LabelledData) -> None:
    with pytest.raises(ValueError, match="CrossEntropyLoss is a multiclass objective, expected one of multilabel"):
        recipe(CrossEntropyLoss(), canvases)
    with pytest.raises(ValueError, match=r"class_weight has shape \(3,\), expected \(10,\)"):
        recipe(AsymmetricLoss(class_weight=[1.0, 2.0, 3.0]), canvases)
    with pytest.raises(ValueError, match="several labels"):
        recipe(AsymmetricLoss(), canvases, reweighter=GroupDRO(canvases.class_counts, by="target"))


def test_average_precision_is_exact_where_probabilities_saturate() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 60 * torch.randn(300, 4, generator=generator)
    logits[:, 1] = logits[:, 1].round(decimals=-1)  # ties
    target = (logits + 60 * torch.randn(300, 4, generator=generator) > 50).long()
    expected = [average_precision_score(target[:, c], logits[:, c]) for c in range(4)]
    assert label_precisions(logits, target).tolist() == pytest.approx(expected, abs=1e-7)
    batches = LabelAveragePrecision()
    for rows in torch.arange(300).split(70):
        batches.update(logits[rows], target[rows])
    assert torch.equal(batches.compute(), label_precisions(logits, target))
    twice = label_precisions(logits.repeat(2, 1), target.repeat(2, 1))
    assert twice.tolist() == pytest.approx(expected, abs=1e-7)


def test_scores_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 3, generator=generator)
    target = (logits + torch.randn(200, 3, generator=generator) > 0.7).long()
    found = label_metrics(logits, target, [200, 50, 5])
    assert found.scalars["micro_f1"] == pytest.approx(f1_score(target, logits > 0, average="micro"))
    assert found.scalars["macro_f1"] == pytest.approx(f1_score(target, logits > 0, average="macro"))
    ap = found.details["per_class"]["average_precision"]
    assert found.scalars["mean_average_precision"] == pytest.approx(sum(ap) / 3)
    assert [found.scalars[f"{band}_average_precision"] for band in ("head", "medium", "tail")] == pytest.approx(ap)
    assert sum(found.details["labels_per_example"]["true"]) == 200


def test_a_label_without_positives_or_with_nan_is_left_out() -> None:
    logits, target = torch.randn(6, 3), torch.tensor([[0, 1, 1], [0, 0, 1]] * 3)
    logits[2, 2] = torch.nan
    found = label_metrics(logits, target, [5, 5, 5])
    assert found.details["per_class"]["average_precision"][::2] == [None, None]
    assert found.scalars["mean_average_precision"] == found.details["per_class"]["average_precision"][1]
    assert any("'2'" in note for note in found.notes)
    assert label_metrics(logits[:0], target[:0], [5, 5, 5]).scalars["mean_average_precision"] is None
    with pytest.raises(ValueError, match=r"target has shape \(6, 2\), logits \(6, 3\)"):
        label_metrics(logits, target[:, :2], [5, 5, 5])


def test_canvases_repeat_by_seed_and_share_no_item() -> None:
    first, again, other = (digits_canvas(**SMALL, seed=seed).splits for seed in (3, 3, 4))
    assert torch.equal(first.train.inputs, again.train.inputs)  # type: ignore[attr-defined]
    assert not torch.equal(first.train.inputs, other.train.inputs)  # type: ignore[attr-defined]
    counts = first.class_counts
    assert max(counts) > 5 * min(counts)
    for part in (first.val, first.test):
        assert part.targets.sum(0).max() < 2.5 * part.targets.sum(0).min()
    assert set(first.train.targets.sum(1).tolist()) == {1, 2}
    assert first.input_shape == (1, 20, 20)


def test_a_canvas_holds_what_its_labels_say() -> None:
    images = torch.arange(1, 4, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 4, 4) * 80
    counts = torch.tensor([0, 1, 2, 3] * 5)
    made = compose(
        (images, torch.arange(3)), counts, torch.ones(3), cells=2, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(made.labels.sum(1), counts)
    assert torch.equal((made.images > 0).sum((1, 2, 3)), 16 * counts)
    for row in range(20):
        seen = made.images[row].unique().tolist()
        assert [c for c in range(3) if 80 * (c + 1) in seen] == torch.where(made.labels[row] == 1)[0].tolist()
        assert torch.equal(made.pixels[row], made.images[row, 0].long() // 80)
    again = compose((images, torch.arange(3)), counts + 1, torch.ones(3), 2, torch.Generator(), distinct=False)
    assert torch.equal((again.images > 0).sum((1, 2, 3)), 16 * (counts + 1))


def test_fashion_canvases_are_composed_of_its_files(tmp_path: Path) -> None:
    for name, each in (("train", 110), ("t10k", 3)):
        targets = labels(*[each] * 10)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", np.full((len(targets), 28, 28), 255 if each > 3 else 100))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", targets.numpy())
    splits = fashion_canvas(root=str(tmp_path), n_train=200, n_val=100, n_test=100).splits
    assert splits.input_shape == (1, 32, 32)
    for part, ink in ((splits.train, 255), (splits.val, 255), (splits.test, 100)):
        assert part.inputs.unique().tolist() == [0, ink]  # type: ignore[attr-defined]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="n_train is 20"):
        digits_canvas(n_train=20)
    with pytest.raises(ValueError, match=r"max_labels is 5, expected a number in \[1"):
        digits_canvas(cells=2, max_labels=5)


def write_table(folder: Path, header: str, rows: list[str]) -> str:
    (folder / "table.csv").write_text("\n".join([header, *rows]))
    return str(folder / "table.csv")


def test_columns_of_zeros_and_ones(tmp_path: Path) -> None:
    rows = [f"{i % 7},{i * i % 11},note,{int(i % 2 == 0)},{int(i % 10 == 0)}" for i in range(100)]
    data = multi_label_csv(path=write_table(tmp_path, "a,b,c,even,tenth", rows), labels=["even", "tenth"])
    splits = data.splits
    assert splits.class_names == ["even", "tenth"]
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [70, 10, 20]
    assert splits.class_counts == splits.train.targets.sum(0).tolist()
    assert splits.test.targets.sum(0).tolist() == [10, 2]
    assert any("c" in note for note in splits.notes)
    values = torch.stack([item["input"] for item in splits.train])
    torch.testing.assert_close(values.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    made = MultiLabel(MLP(2, 2, hidden=(8,)), SigmoidFocalLoss(gamma=0), num_classes=2)
    result = fit(made, data, folder=tmp_path / "run", max_epochs=1, **QUIET)
    assert "<strong>Test examples</strong> not available" in (result.folder / "report.html").read_text()


def test_one_column_that_lists_labels_and_one_of_images(tmp_path: Path) -> None:
    for i in range(40):
        Image.new("RGB", (12, 9), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{'cat;dog' if i % 4 == 0 else 'dog' if i % 2 else ''}" for i in range(40)]
    path = write_table(tmp_path, "file,tags", rows)
    splits = multi_label_csv(path=path, labels="tags", separator=";", image="file", image_size=8).splits
    assert splits.class_names == ["cat", "dog"]
    assert splits.input_shape == (3, 8, 8)
    assert splits.train.targets.dtype == torch.int64
    assert all(int(part.targets[:, 0].sum()) > 0 for part in (splits.train, splits.val, splits.test))
    first = splits.train[0]
    assert -1 <= float(first["input"].min()) <= float(first["input"].max()) <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": ["x"]}, "expected at least 2 columns"),
        ({"labels": ["x", "nix"]}, "labels is 'nix', expected a column"),
        ({"labels": ["x", "y"]}, "line 4, column 'y': '2', expected 0 or 1"),
        ({"labels": "x"}, "separator is empty"),
        ({"labels": "one"}, r"has the labels \['1'\], expected at least 2"),
        ({"labels": ["x", "zero"]}, "label 'zero' has no positive training example"),
        ({"labels": "y", "image": "zero"}, "0 cannot be read as an image"),
        ({"labels": ["x", "one"], "features": ["y", "x"]}, "features holds 'x'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    rows = [f"{i % 2},{2 if i == 2 else 1},0,1" for i in range(30)]
    separator = "" if said.startswith("separator") else "|"
    with pytest.raises(ValueError, match=said):
        multi_label_csv(path=write_table(tmp_path, "x,y,zero,one", rows), separator=separator, **options)


def test_every_part_gets_its_share_of_a_rare_label() -> None:
    sets = torch.zeros(200, 2, dtype=torch.int64)
    sets[:, 0], sets[:20, 1] = 1, 1
    held, rest = shared_split(sets, torch.arange(200), 0.2, seed=0)
    assert int(sets[held, 1].sum()) == 4
    assert len(held) == 40
    assert torch.equal(torch.cat([held, rest]).sort().values, torch.arange(200))
