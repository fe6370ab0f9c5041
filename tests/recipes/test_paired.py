"""Pairs of images and rows of a table: what is measured, drawn, trained, retrieved, reported, and resumed."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from counterpoise.contrastive import (
    BYOLLoss,
    CLIPLoss,
    ConVIRTLoss,
    ImageTabularCLIPLoss,
    NTXentLoss,
    SigLIPLoss,
    clip_loss,
)
from counterpoise.recipes import Checkpoints, Paired, SmallCNN, TableCorruption, Views, fit
from counterpoise.recipes.data import LabelledData, digits_attributes, paired_csv
from counterpoise.recipes.data.image_attributes import ATTRIBUTES, image_attributes
from counterpoise.recipes.data.paired import WithTable, standardised
from counterpoise.recipes.data.splits import InMemory
from counterpoise.recipes.retrieval import pair_ranks, recall_at, retrieval_scores
from counterpoise.samplers import CVaR
from tests.recipes.launching import QUICK, launch
from tests.recipes.test_self_supervised import Stop

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


# What is measured


def measured(*rows: str) -> dict[str, float]:
    """The attributes of a picture drawn with # and other characters."""
    image = torch.tensor([[float(c == "#") for c in row] for row in rows])
    return dict(zip(ATTRIBUTES, image_attributes(image[None, None])[0].tolist(), strict=True))


def test_a_ring_has_a_hole_and_is_symmetric_about_its_middle() -> None:
    ring = measured(".....", ".###.", ".#.#.", ".###.", ".....")
    assert (ring["holes"], ring["parts"]) == (1, 1)
    assert ring["ink"] == ring["filled"] == pytest.approx(8 / 25)
    for name in ("centre_x", "centre_y", "tilt", "skew_x", "skew_y", "aspect"):
        assert ring[name] == pytest.approx(0, abs=1e-12), name
    assert ring["mirror_x"] == ring["mirror_y"] == pytest.approx(1)
    assert ring["width"] == ring["height"] == pytest.approx(3 / 5)


def test_moments_say_where_ink_lies_and_how_it_leans() -> None:
    falling = measured("#....", ".#...", "..#..", ".....", ".....")
    assert falling["tilt"] == pytest.approx(1)
    assert (falling["centre_x"], falling["centre_y"]) == (pytest.approx(-0.5), pytest.approx(-0.5))
    wide = measured(".....", "####.", ".....", ".....", ".....")
    assert wide["aspect"] == pytest.approx(np.log(4))
    assert wide["spread_x"] > wide["spread_y"] == pytest.approx(0)
    assert measured("#....", ".....", "#####")["skew_x"] > 0


def test_parts_and_holes_are_counted_as_one_sees_them() -> None:
    assert measured("#.#", "...", "#.#")["parts"] == 4
    assert measured("#..", ".#.", "..#")["parts"] == 1, "diagonal neighbours hang together"
    assert measured(".#.", "#.#", ".#.")["holes"] == 1, "and enclose what is between them"
    assert measured("###..", "#.#..", "#####", "..#.#", "..###")["holes"] == 2
    assert measured("##.", "#..", "###")["holes"] == 0, "open to the border"


def test_a_black_image_has_zeros_and_nothing_is_undefined() -> None:
    assert set(measured("...", "...").values()) == {0.0}
    assert bool(image_attributes(torch.ones(1, 1, 4, 4)).isfinite().all())
    with pytest.raises(ValueError, match=r"images has shape \(2, 3, 4, 4\), expected \(N, 1, H, W\)"):
        image_attributes(torch.zeros(2, 3, 4, 4))


def test_the_built_in_pairs_are_standardised_by_training_and_know_nothing_of_the_class() -> None:
    data = digits_attributes(noise_columns=3, batch_size=64)
    train, test = data.splits.train, data.splits.test
    assert isinstance(train, WithTable)
    assert train.columns == [*ATTRIBUTES, "noise_0", "noise_1", "noise_2"]
    assert_close(train.table.mean(0), torch.zeros(21), atol=1e-5, rtol=0)
    assert_close(train.table.std(0, correction=0), torch.ones(21), atol=1e-5, rtol=0)
    assert not torch.equal(test.table.mean(0), torch.zeros(21))
    raw = torch.stack([test[i]["input"]["image"] for i in range(50)])
    expected = image_attributes(raw)[:, 0]
    assert float(torch.corrcoef(torch.stack([expected, test.table[:50, 0].double()]))[0, 1]) == pytest.approx(1)
    item = train[5]
    assert item["input"]["image"].shape == (1, 8, 8)
    assert torch.equal(item["input"]["table"], train.table[5])
    batch = next(iter(data.val_dataloader()))
    assert batch["input"]["image"].shape == (64, 1, 8, 8)
    assert batch["input"]["table"].shape == (64, 21)


def test_a_constant_column_is_only_centred() -> None:
    assert standardised([torch.tensor([[3.0], [3.0]]), torch.tensor([[5.0]])])[1].tolist() == [[2.0]]


def test_a_table_of_another_length_is_refused() -> None:
    images = InMemory(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"table has shape \(3, 2\), expected \(4, 2\)"):
        WithTable(images, torch.zeros(3, 2), ["a", "b"])


# What is drawn


def rows(n: int = 200, d: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_share_of_the_columns_holds_what_training_rows_have_there() -> None:
    table, x, index = rows(), rows(64, seed=1), torch.arange(64)
    corrupted = TableCorruption(table, fraction=0.3)(x, index, 0)
    changed = corrupted != x
    assert changed.sum(1).tolist() == [3] * 64
    for i, j in changed.nonzero().tolist():
        assert corrupted[i, j] in table[:, j]
    counts = changed.sum(0)
    assert int(counts.min()) > 8, "every column is drawn"
    taken = torch.stack([(table[:, j] == corrupted[i, j]).nonzero()[0, 0] for i, j in changed.nonzero()])
    assert len(taken.unique()) > 100, "each column from a row of its own"


def test_entries_of_one_column_are_replaced_together() -> None:
    table = torch.eye(4)[torch.arange(80) % 4]
    table = torch.cat([table, rows(80, 2)], 1)
    corrupt = TableCorruption(table, [0, 0, 0, 0, 1, 2], fraction=0.34)
    corrupted = corrupt(table, torch.arange(80), 3)
    assert bool((corrupted[:, :4].sum(1) == 1).all()), "still one word a row"
    assert bool((corrupted[:, :4] != table[:, :4]).any())


def test_the_draws_are_a_function_of_seed_epoch_and_index() -> None:
    corrupt, x = TableCorruption(rows(), fraction=0.5), rows(64, seed=1)
    whole = corrupt(x, torch.arange(64), 2)
    assert torch.equal(corrupt(x[10:20], torch.arange(10, 20), 2), whole[10:20])
    assert not torch.equal(corrupt(x, torch.arange(64), 3), whole)
    assert not torch.equal(TableCorruption(rows(), fraction=0.5, seed=1)(x, torch.arange(64), 2), whole)
    assert torch.equal(TableCorruption(rows(), fraction=0.0)(x, torch.arange(64), 2), x)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fraction": 1.2}, "fraction is 1.2"),
        ({"column_of": [0, 1]}, r"column_of has shape \(2,\), expected \(10,\)"),
        ({"table": torch.zeros(0, 3)}, r"table has shape \(0, 3\)"),
    ],
)
def test_corruptions_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TableCorruption(**{"table": rows(), **settings})


# What is retrieved


def test_ranks_count_what_is_nearer_than_the_partner() -> None:
    queries, keys = rows(300, 6), rows(300, 6) + rows(300, 6, seed=1)
    similarity = normalize(queries.double(), dim=1) @ normalize(keys.double(), dim=1).T
    expected = 1 + (similarity > similarity.diagonal()[:, None]).sum(1)
    assert torch.equal(pair_ranks(queries, keys), expected.double())
    assert pair_ranks(keys, 3 * keys).tolist() == [1.0] * 300


def test_ties_count_half_so_that_collapse_is_no_success() -> None:
    assert pair_ranks(torch.ones(9, 4), torch.ones(9, 4)).tolist() == [5.0] * 9
    twins = torch.eye(3).repeat(2, 1)
    assert pair_ranks(twins, twins).tolist() == [1.5] * 6


def test_scores_are_means_of_both_directions() -> None:
    there, back = torch.tensor([1.0, 2.0, 6.0, 20.0]), torch.tensor([1.0, 1.0, 1.0, 11.0])
    found = retrieval_scores(there, back, ("a", "b"))
    assert [found[f"a_recall_at_{k}"] for k in (1, 5, 10)] == [0.25, 0.5, 0.75]
    assert [found[f"b_recall_at_{k}"] for k in (1, 5, 10)] == [0.75, 0.75, 0.75]
    assert found["recall_at_5"] == 0.625
    assert (found["a_median_rank"], found["b_median_rank"]) == (2.0, 1.0)
    assert recall_at(there, 6) == 0.75


# What is trained


def made(loss: nn.Module | None = None, **options: Any) -> Paired:
    torch.manual_seed(0)
    options = {"num_classes": 10, "train_table": rows(), "dim": 6, "hidden": 8, "table_hidden": (12,), **options}
    recipe = Paired(SmallCNN(1, 10, width=4), loss or CLIPLoss(), **options)
    recipe.log_training = lambda *_: None  # type: ignore[method-assign]
    return recipe


def batch(n: int = 8) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    pairs = {"image": torch.rand(n, 1, 8, 8, generator=g), "table": torch.randn(n, 10, generator=g)}
    return {"input": pairs, "target": torch.randint(3, (n,), generator=g), "index": torch.arange(n)}


def test_a_step_is_the_objective_of_image_and_corrupted_row() -> None:
    recipe = made(ConVIRTLoss(), views=Views(num_views=1, noise=0.1), seed=3)
    twin = copy.deepcopy(recipe)
    image = twin.views(batch()["input"]["image"], torch.arange(8), 0)[0]
    table = TableCorruption(rows(), fraction=0.3, seed=3)(batch()["input"]["table"], torch.arange(8), 0)
    z = twin.image_projection(twin.model(image))
    u = twin.table_projection(twin.table_model(table))
    expected = clip_loss(z, u, temperature=0.1, direction_weight=0.75)
    assert_close(recipe.training_step(batch(), 0), expected)


def test_weights_and_masks_of_pairs_reach_the_objective() -> None:
    recipe, given = made(SigLIPLoss(), corruption=0.0), batch()
    given["mask"] = torch.arange(8) < 5
    given["weight"] = torch.arange(8.0)
    twin = copy.deepcopy(recipe)
    expected = twin.loss(*twin(given["input"]), mask=given["mask"], weight=given["weight"])
    assert_close(recipe.training_step(given, 0), expected)


def test_a_reweighter_weighs_pairs() -> None:
    recipe = made(CLIPLoss(), reweighter=CVaR(alpha=0.5), corruption=0.0).eval()
    per_pair = clip_loss(*recipe(batch()["input"]), reduction="none")
    worst = per_pair.topk(4).values.mean()
    assert_close(recipe.training_step(batch(), 0), worst)


def test_the_temperature_is_trained_without_weight_decay() -> None:
    recipe = made()
    recipe._make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.1)
    groups = recipe.configure_optimizers().param_groups
    (spared,) = [g["params"] for g in groups if g["weight_decay"] == 0]
    assert spared == [recipe.loss.logit_scale]


@pytest.mark.parametrize(
    ("loss", "options", "told"),
    [
        (BYOLLoss(), {}, "loss BYOLLoss is a teacher_views objective, expected one of paired, two_view"),
        (CLIPLoss(), {"views": Views(num_views=2)}, "views has num_views 2, expected 1"),
        (CLIPLoss(), {"corruption": 2}, "corruption is 2"),
        (CLIPLoss(), {"dim": 0}, "dim is 0"),
        (CLIPLoss(), {"table_hidden": ()}, "table_hidden is 0"),
        (CLIPLoss(), {"column_of": [0]}, r"column_of has shape \(1,\), expected \(10,\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(loss: nn.Module, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        made(loss, **options)


def digits() -> LabelledData:
    return digits_attributes(noise_columns=2, batch_size=64)


def trained(folder: Path, epochs: int = 3, resume: bool = False, loss: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    data = digits()
    recipe = Paired(
        SmallCNN(1, 10, width=8), loss or CLIPLoss(), num_classes=10, views=Views(num_views=1, noise=0.05),
        **data.splits.facts, **options,
    )  # fmt: skip
    callbacks = [Checkpoints(folder / "checkpoints", monitor=recipe.monitor)]
    result = fit(recipe, data, folder=folder, max_epochs=epochs, resume=resume, callbacks=callbacks, **QUIET)
    return recipe, result


def test_it_learns_and_the_report_shows_what_was_retrieved(tmp_path: Path) -> None:
    _, result = trained(tmp_path, epochs=4)
    scores = result.metrics["splits"]["test"]
    assert scores["recall_at_5"] > 0.3, "by chance 1 %"
    assert scores["table_to_image_recall_at_10"] > 0.5
    assert scores["image_to_table_median_rank"] < 15
    assert scores["balanced_linear_accuracy"] > 0.85
    assert scores["balanced_knn_accuracy"] > 0.6
    arrays = np.load(tmp_path / "embeddings.npz")
    assert arrays["features"].shape == (len(digits().splits.train), 32)
    assert len(arrays["test_targets"]) == 400
    predictions = np.load(tmp_path / "predictions.npz")
    ranks = pair_ranks(*(torch.from_numpy(predictions[name]) for name in ("image", "table")))
    assert recall_at(ranks, 5) == pytest.approx(scores["image_to_table_recall_at_5"])
    assert sum(result.metrics["similarities"]["negative"]) == pytest.approx(1)
    assert result.metrics["recalls"]["table_to_image"]["recall"][-1] == 1
    html = result.report.read_text()
    history = (tmp_path / "history.csv").read_text().splitlines()[0].split(",")
    signs = (
        "std",
        "effective_rank",
        "alignment",
        "uniformity",
        "table_std",
        "table_effective_rank",
        "table_uniformity",
    )
    assert {f"val/{name}" for name in signs} <= set(history)
    assert "val/table_alignment" not in history
    for shown in (
        "400 test images and their rows, 60 of them joined, coloured by modality, and below by class",
        *("Signs of collapse", "alignment (0 = partners coincide)", "spread of rows", "Directions in use"),
        "Small images",
        "Among the best 5 of 400",
        "image and its row",
        "Recall at 5",
        "Linear probe",
    ):
        assert shown in html
    assert "could not be" not in html


@pytest.mark.parametrize("loss", [SigLIPLoss, ConVIRTLoss, ImageTabularCLIPLoss, NTXentLoss])
def test_other_objectives_learn_too(tmp_path: Path, loss: Any) -> None:
    _, result = trained(tmp_path, loss=loss())
    assert result["recall_at_10"] > 0.25, "by chance 2.5 %"


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    recipe, whole = trained(tmp_path / "whole")
    data, folder = digits(), tmp_path / "cut"
    torch.manual_seed(0)
    cut = Paired(
        SmallCNN(1, 10, width=8), CLIPLoss(), num_classes=10, views=Views(num_views=1, noise=0.05), **data.splits.facts
    )
    steps = [Checkpoints(folder / "checkpoints", monitor=cut.monitor, every_n_steps=4)]
    with pytest.raises(RuntimeError, match="by force"):
        fit(cut, data, folder=folder, max_epochs=3, callbacks=[*steps, Stop(at=30)], **QUIET)
    resumed, result = trained(folder, resume=True)
    for (name, a), b in zip(recipe.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert result.metrics["splits"] == whole.metrics["splits"]


# A table of one's own


def write_pairs(folder: Path, n: int = 120) -> Path:
    """Red and green squares; the table knows hue and size, and misses some."""
    g = torch.Generator().manual_seed(0)
    (folder / "pictures").mkdir()
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "size", "colour", "batch", "kind", "remark"])
        for i in range(n):
            side, green = int(torch.randint(2, 12, (1,), generator=g)), i % 2
            pixels = np.zeros((12, 12, 3), np.uint8)
            pixels[:side, :side, green] = 255
            Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
            size = "" if i % 10 == 3 else str(side)
            writer.writerow([f"pictures/{i}.png", size, ["red", "green"][green], "7", ["a", "b"][green], f"no {i}"])
    return folder / "pairs.csv"


def test_a_csv_of_images_and_columns_becomes_pairs(tmp_path: Path) -> None:
    data = paired_csv(path=str(write_pairs(tmp_path)), image="file", label="kind", image_size=12)
    train, val, test = data.splits.train, data.splits.val, data.splits.test
    assert train.columns == ["size", "colour=green", "colour=red", "batch"]
    assert data.splits.facts["column_of"] == [0, 1, 1, 2]
    assert data.splits.notes == ["Columns left out: remark."]
    assert (len(train), len(val), len(test)) == (76, 20, 24)
    assert data.splits.class_names == ["a", "b"]
    for part in (train, val, test):
        for i in range(len(part)):
            item = part[i]
            image, row = item["input"]["image"], dict(zip(part.columns, item["input"]["table"].tolist(), strict=True))
            green = bool(image[1].max() > image[0].max())
            assert (row["colour=green"], row["colour=red"]) == (float(green), float(not green))
            assert item["target"] == int(green)
            assert row["batch"] == 0
    known = train.table[:, 0][train.table[:, 0] != 0]
    assert abs(float(known.mean())) < 1e-5
    assert float(known.std(correction=0)) == pytest.approx(1, abs=1e-5)
    sides = torch.tensor([float((train[i]["input"]["image"].amax(0)[0] > 0).sum()) for i in range(len(train))])
    there = train.table[:, 0] != 0
    assert float(torch.corrcoef(torch.stack([sides[there], train.table[there, 0]]))[0, 1]) > 0.999


def test_without_a_label_pairs_are_trained_and_judged_by_retrieval_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    arguments = ["recipe=paired", "data=paired_csv", "data.path=pairs.csv", "data.image=file", "data.image_size=12"]
    outcome = launch(tmp_path, *arguments, "data.columns=[size,colour]", *QUICK)
    assert outcome.code == 0, outcome.err
    assert "Recall at 5" in outcome.out
    assert "Linear probe" not in outcome.out
    html = (outcome.runs[0] / "report.html").read_text()
    assert "could not be" not in html
    assert "Table of classes" not in html


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image": "photo"}, "image is 'photo', expected a column of pairs.csv"),
        ({"columns": ["file"]}, "columns holds 'file', the image or label column"),
        ({"columns": ["size", "remark"]}, "columns has 'remark', expected numbers, or 2 to 50 words"),
        ({"label": "batch"}, "label 'batch' has the class '7' alone, expected at least 2 classes"),
        ({"columns": ["colour"], "max_categories": 1}, "max_categories is 1"),
    ],
)
def test_csv_settings_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        paired_csv(**{"path": str(write_pairs(tmp_path)), "image": "file", **options})


def test_an_image_that_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_pairs(tmp_path)
    (tmp_path / "pictures" / "4.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs.csv, line 6: .*4.png does not exist, expected an image"):
        paired_csv(path=str(path), image="file")


def test_other_data_are_refused_in_one_sentence(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "recipe=paired", "data=digits_lt")
    assert outcome.code != 0
    assert "recipe paired trains on an image and a row of a table an example" in outcome.err
