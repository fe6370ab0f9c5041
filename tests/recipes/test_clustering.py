"""The clustering recipe: clusters without classes, judged with them; its evaluation, data and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from counterpoise.losses import BalancedSoftmaxLoss, CrossEntropyLoss
from counterpoise.ot import two_view_label_loss
from counterpoise.recipes import MLP, Clustering, SmallCNN, Views, fit
from counterpoise.recipes.clustering import LABELS
from counterpoise.recipes.clustering_evaluation import (
    class_bands,
    clustering_metrics,
    label_free_metrics,
    shared_information,
)
from counterpoise.recipes.data import LabelledData, digits_lt, embeddings_npz
from counterpoise.recipes.encoders import load_encoder
from counterpoise.samplers import CVaR
from tests.recipes.launching import QUICK, launch

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
SIZES = (300, 60, 30, 15)


def blobs(seed: int = 0, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Four Gaussian classes of unequal size in 8 dimensions."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(4, 8)) * 2
    targets = np.repeat(np.arange(4), SIZES)
    return (centres[targets] + spread * generator.normal(size=(len(targets), 8))).astype(np.float32), targets


@pytest.fixture
def file(tmp_path: Path) -> Path:
    features, targets = blobs()
    np.savez(tmp_path / "embeddings.npz", features=features, targets=targets)
    return tmp_path / "embeddings.npz"


def recipe(data: LabelledData, labels: str = "p2ot", model: nn.Module | None = None, **options: Any) -> Clustering:
    torch.manual_seed(0)
    return Clustering(
        model or MLP(int(np.prod(data.splits.input_shape)), data.num_classes, hidden=[]),
        CrossEntropyLoss(),
        num_classes=data.num_classes,
        num_examples=len(data.splits.train),
        labels=labels,
        optimizer=lambda p: torch.optim.Adam(p, lr=5e-3),
        **{"views": Views(crop=(0.8, 1.0), noise=0.3), "labelled": data.splits.facts.get("labelled", True), **options},
    )


def weights(made: Clustering) -> Tensor:
    return torch.cat([x.detach().flatten().double() for x in made.state_dict().values()])


# The recipe


@pytest.mark.parametrize("labels", LABELS)
def test_it_finds_clusters_of_unequal_size(labels: str, file: Path, tmp_path: Path) -> None:
    data = embeddings_npz(path=str(file), batch_size=32)
    found = fit(recipe(data, labels, init="k_means"), data, folder=tmp_path / "run", max_epochs=8, **QUIET)
    training = found.metrics["clusters"]["training"]
    assert training["mutual_information"] > 0.6
    assert found["mutual_information"] > 0.5
    page = found.report.read_text()
    assert "Table of clusters" not in page  # the name of a block that failed
    assert "Each row is a class" in page
    assert "test examples, coloured by cluster, and below by class" in page
    predictions = np.load(found.folder / "predictions.npz")
    assert predictions["embedding"].shape == (len(predictions["logits"]), 8)
    assert ("largest of 4 clusters" in page) == (labels != "k_means")
    saved = np.load(tmp_path / "run" / "clusters.npz")
    assert saved["cluster"].shape == (len(data.splits.train),)
    assert np.bincount(saved["cluster"], minlength=4).tolist() == found.metrics["clusters"]["size"]


def gaussians(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten overlapping classes in 24 dimensions, the largest fifty times the smallest."""
    generator = np.random.default_rng(seed)
    sizes = [max(8, int(600 * 0.02 ** (k / 9))) for k in range(10)]
    targets = np.repeat(np.arange(10), sizes)
    noise = 0.9 * generator.normal(size=(len(targets), 24))
    return (generator.normal(size=(10, 24))[targets] + noise).astype(np.float32), targets


@pytest.mark.slow
def test_the_more_sizes_may_differ_the_more_clusters_tell(tmp_path: Path) -> None:
    """Mutual information: equal clusters < semi-relaxed < P2OT, in the mean over five random states."""
    told: dict[str, list[float]] = {"uniform": [], "semi_relaxed": [], "p2ot": []}
    for seed in range(100, 105):
        features, targets = gaussians(seed)
        np.savez(tmp_path / "x.npz", features=features, targets=targets)
        for labels, values in told.items():
            data = embeddings_npz(path=str(tmp_path / "x.npz"), batch_size=256, seed=seed)
            made = recipe(data, labels, bank_size=1024)
            found = fit(made, data, folder=tmp_path / labels, max_epochs=25, seed=seed, **QUIET)
            values.append(found.metrics["clusters"]["training"]["mutual_information"])
    uniform, semi_relaxed, p2ot = (np.mean(values) for values in told.values())
    assert uniform + 0.03 < semi_relaxed < p2ot


def test_images_and_several_heads(tmp_path: Path) -> None:
    data = digits_lt(batch_size=64)
    made = recipe(data, model=SmallCNN(1, 10, width=8), heads=2, num_clusters=12)
    result = fit(made, data, folder=tmp_path / "run", max_epochs=3, **QUIET)
    clusters = result.metrics["clusters"]
    assert len(clusters["size"]) == 12
    assert len(clusters["mass_by_epoch"]) == 3
    assert np.sum(clusters["mass_by_epoch"], axis=1) == pytest.approx(history(result.folder)["train/mass"], rel=1e-3)
    assert "surest training examples" in result.report.read_text()


def history(folder: Path) -> dict[str, list[float]]:
    lines = (folder / "history.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    return {name: [float(row[i]) for row in rows[1:]] for i, name in enumerate(rows[0])}


def test_the_head_of_the_lowest_loss_over_the_mass_is_kept(file: Path) -> None:
    data = embeddings_npz(path=str(file))
    made = recipe(data, heads=3)
    made._trainer = type("T", (), {"sanity_checking": False})()  # type: ignore[assignment]
    made.head_loss.copy_(torch.tensor([3.0, 1.0, 2.0]))
    made.head_mass[1] = 6.0
    made.head_steps.fill_(2)
    made._choose_head()
    assert int(made.best_head) == 1
    assert made.mass_by_epoch == [[3.0] * 4]
    assert int(made.head_steps) == 0


def test_a_step_is_the_two_view_loss_of_each_head(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = embeddings_npz(path=str(file), batch_size=32)
    made, twin = recipe(data, heads=2), recipe(data, heads=2)
    batch = next(iter(data.train_dataloader()))
    monkeypatch.setattr(Clustering, "log_training", lambda *_: None)
    monkeypatch.setattr(Clustering, "current_epoch", 0)
    views = twin.views(batch["input"], batch["index"], 0)
    expected = 0.0
    for head, engine in zip(twin.heads, twin.engines, strict=True):
        z = 10 * torch.stack([head(twin.embed(view)) for view in views])
        expected = expected + two_view_label_loss(z[0], z[1], *engine(z, batch["index"]))
    torch.testing.assert_close(made.training_step(batch, 0), expected)


@pytest.mark.parametrize("labels", ["p2ot", "sp2ot"])
@pytest.mark.parametrize("stop", [(1, 0), (2, 3)], ids=["between epochs", "in one"])
def test_it_resumes_exactly(labels: str, stop: tuple[int, int], file: Path, tmp_path: Path) -> None:
    class Killed(RuntimeError):
        pass

    def killing(batch: Any, batch_idx: int) -> None:
        if (stopped.current_epoch, batch_idx) == stop:
            raise Killed

    def run(made: Clustering, folder: str, **options: Any) -> Any:
        from counterpoise.recipes import Checkpoints

        data = embeddings_npz(path=str(file), batch_size=32)
        saved = Checkpoints(tmp_path / folder / "checkpoints", monitor=made.monitor, every_n_steps=2)
        return fit(made, data, folder=tmp_path / folder, max_epochs=4, callbacks=[saved], **QUIET, **options)

    data = embeddings_npz(path=str(file), batch_size=32)
    whole, stopped, again = (recipe(data, labels, heads=2, bank_size=50, init="k_means") for _ in range(3))
    expected = run(whole, "whole")
    stopped.on_train_batch_start = killing  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run(stopped, "run")
    result = run(again, "run", resume=True)
    assert torch.equal(weights(again), weights(whole))
    assert result.metrics["clusters"] == expected.metrics["clusters"]


def test_no_class_is_read_in_training(file: Path, tmp_path: Path) -> None:
    """Other classes, the same clusters."""
    features, targets = blobs()
    results = []
    for name, classes in (("a", targets), ("b", (targets + np.arange(len(targets))) % 4)):
        np.savez(
            tmp_path / f"{name}.npz",
            features=features,
            targets=classes,
            val_features=features[::9],
            val_targets=classes[::9],
            test_features=features[::7],
            test_targets=classes[::7],
        )
        data = embeddings_npz(path=str(tmp_path / f"{name}.npz"), batch_size=32)
        fit(recipe(data, num_clusters=4), data, folder=tmp_path / name, max_epochs=3, **QUIET)
        results.append(np.load(tmp_path / name / "clusters.npz")["cluster"].tolist())
    assert results[0] == results[1]


def test_data_without_classes_are_clustered_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", embeddings=blobs()[0])
    done = launch(
        tmp_path, "recipe=clustering", "data=embeddings_npz", "data.path=plain.npz", "recipe.num_clusters=5", *QUICK
    )
    assert done.code == 0, done.err
    metrics = json.loads((done.runs[0] / "metrics.json").read_text())
    assert set(metrics["splits"]["test"]) == {"confidence", "effective_clusters", "empty_clusters", "largest_share"}
    assert sum(metrics["clusters"]["size"]) == metrics["class_counts"][0]
    page = (done.runs[0] / "report.html").read_text()
    assert "The data have no classes" in page
    assert "coloured by cluster; near points" in page
    assert "metrics.json has no" not in page


def test_an_encoder_of_another_run_is_taken(tmp_path: Path) -> None:
    donor = SmallCNN(1, 10, width=8)
    torch.save({"state_dict": {f"model.{name}": x for name, x in donor.state_dict().items()}}, tmp_path / "x.ckpt")
    data = digits_lt(batch_size=64)
    made = recipe(
        data, model=SmallCNN(1, 10, width=8), encoder_checkpoint=str(tmp_path / "x.ckpt"), train_encoder=False
    )
    before = {name: x.clone() for name, x in made.model.state_dict().items()}
    assert torch.equal(before["encoder.0.0.weight"], donor.encoder[0][0].weight)
    fit(made, data, folder=tmp_path / "run", max_epochs=1, **QUIET)
    assert all(torch.equal(x, before[name]) for name, x in made.model.state_dict().items())
    with pytest.raises(ValueError, match=r"encoder_checkpoint has no .* of the model's shape"):
        load_encoder(SmallCNN(1, 10, width=16), str(tmp_path / "x.ckpt"))
    with pytest.raises(FileNotFoundError, match="encoder_checkpoint"):
        load_encoder(donor, str(tmp_path / "none.ckpt"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": "p2t"}, "labels is 'p2t'"),
        ({"heads": 0}, "heads is 0"),
        ({"init": "kmeans"}, "init is 'kmeans'"),
        ({"num_clusters": 100_000}, "num_clusters is 100000"),
        ({"labelled": False}, "the data have no classes"),
        ({"reweighter": CVaR()}, "reweighter is a CVaR"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"mass_start": 0.0}, "start is 0.0"),
    ],
)
def test_settings_are_refused_before_training(change: dict[str, Any], said: str, file: Path) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(embeddings_npz(path=str(file)), **change)


def test_a_loss_that_knows_class_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="needs class counts, and classes are not read"):
        Clustering(MLP(4, 2, hidden=[]), BalancedSoftmaxLoss([3, 4]), num_classes=2, num_examples=7)


def test_views_share_information_where_they_agree_and_clusters_differ() -> None:
    sure = 40 * torch.eye(4).repeat(5, 1)
    assert float(shared_information(sure, sure)) == pytest.approx(1, abs=1e-4)
    assert float(shared_information(sure, torch.zeros(20, 4))) == pytest.approx(0, abs=1e-6)
    assert float(shared_information(sure[:1].expand(20, 4), sure[:1].expand(20, 4))) == pytest.approx(0, abs=1e-6)
    merged = 40 * torch.eye(4)[[0, 1, 2, 2]].repeat(5, 1)
    assert float(shared_information(merged, merged)) == pytest.approx(0.75, abs=1e-4)
    assert float(shared_information(torch.zeros(5, 1), torch.zeros(5, 1))) == 0


# The evaluation


def test_clusters_are_matched_so_that_most_examples_agree() -> None:
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    found = clustering_metrics(torch.tensor([2, 2, 2, 0, 0, 1]), target, num_clusters=3, num_classes=3)
    assert found.per_class["cluster"] == [2, 0, 1]
    assert all(found.scalars[name] == 1 for name in ("accuracy", "balanced_accuracy", "macro_f1", "mutual_information"))


def test_accuracy_over_examples_and_over_classes_differ() -> None:
    target = torch.tensor([0] * 8 + [1] * 2)
    found = clustering_metrics(torch.tensor([0] * 8 + [0, 1]), target, num_clusters=2, num_classes=2)
    assert found.scalars["accuracy"] == pytest.approx(0.9)
    assert found.scalars["balanced_accuracy"] == pytest.approx(0.75)
    assert found.scalars["macro_f1"] == pytest.approx((16 / 17 + 2 / 3) / 2)


@pytest.mark.parametrize("num_clusters", [2, 5])
def test_clusters_and_classes_may_differ_in_number(num_clusters: int) -> None:
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    clusters = torch.tensor([0, 0, 1, 1, 1, num_clusters - 1])
    found = clustering_metrics(clusters, target, num_clusters=num_clusters, num_classes=3)
    assert found.per_class["cluster"].count(None) == max(3 - num_clusters, 0)
    assert found.matched == (4 if num_clusters == 2 else 5)
    assert np.shape(found.contingency) == (num_clusters, 3)


def test_a_class_without_example_is_left_out_of_the_means() -> None:
    target = torch.tensor([0, 0, 2])
    found = clustering_metrics(
        torch.tensor([0, 0, 1]), target, num_clusters=3, num_classes=4, class_counts=[9, 8, 7, 6]
    )
    assert found.scalars["balanced_accuracy"] == 1
    assert found.per_class["recall"][1] is None
    assert found.scalars["tail_accuracy"] is None


@pytest.mark.parametrize(
    ("counts", "bands"),
    [
        ([5], "m"),
        ([5, 9], "th"),
        ([1, 9, 5], "thm"),
        ([9, 5, 3, 1], "hmmt"),
        (list(range(10)), "tttmmmmhhh"),
        ([4, 4, 4], "mmm"),
    ],
)
def test_bands_are_thirds_of_the_sorted_classes(counts: list[int], bands: str) -> None:
    assert "".join(band[0] for band in class_bands(counts)) == bands


def test_bands_by_thresholds_and_refusals() -> None:
    assert class_bands([200, 100, 20, 19], thresholds=(100, 20)) == ["head", "medium", "medium", "tail"]
    assert class_bands(list(range(100))).count("head") == 30
    with pytest.raises(ValueError, match="fractions is"):
        class_bands([1, 2], fractions=(0.5, 0.2))
    with pytest.raises(ValueError, match="few is 30"):
        class_bands([1, 2], thresholds=(20, 30))


@pytest.mark.parametrize(
    ("clusters", "target", "said"),
    [
        (torch.tensor([0, 3]), torch.tensor([0, 1]), "clusters holds 3"),
        (torch.tensor([0, 1]), torch.tensor([0, 2]), "target holds 2"),
        (torch.tensor([0, 1]), torch.tensor([0]), "target has shape"),
        (torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), "at least one example"),
    ],
)
def test_clusters_that_do_not_fit_are_refused(clusters: Tensor, target: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        clustering_metrics(clusters, target, num_clusters=2, num_classes=2)


def test_clusters_by_themselves() -> None:
    p = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0]])
    found = label_free_metrics(p)
    assert found["confidence"] == pytest.approx(0.85)
    assert found["effective_clusters"] == pytest.approx(2)
    assert (found["empty_clusters"], found["largest_share"]) == (1, 0.5)


# The data


def test_embeddings_are_cut_and_standardised(file: Path) -> None:
    splits = embeddings_npz(path=str(file)).splits
    counts = torch.tensor([part.class_counts for part in (splits.train, splits.val, splits.test)])
    assert counts.sum(0).tolist() == list(SIZES)
    x = torch.stack([item["input"] for item in splits.train])
    assert x.mean(0).abs().max() < 1e-5
    assert float(x.std()) == pytest.approx(1, abs=1e-2)
    assert splits.facts == {"labelled": True}


def test_splits_of_the_file_are_kept(tmp_path: Path) -> None:
    features, targets = blobs()
    arrays = {"features": features, "targets": targets, "class_names": np.array(list("abcd"))}
    arrays |= {"test_features": features[:9] + 1, "test_targets": targets[:9]}
    np.savez(tmp_path / "x.npz", **arrays)
    splits = embeddings_npz(path=str(tmp_path / "x.npz"), standardize=False).splits
    torch.testing.assert_close(splits.test[0]["input"], torch.from_numpy(features[0] + 1))
    assert len(splits.train) + len(splits.val) == len(features)
    assert splits.class_names == list("abcd")
    assert "The test split has no example of class b, c, d." in splits.notes


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros(3)}, r"path holds the arrays \['x'\], expected features"),
        ({"features": np.zeros(3)}, r"features has shape \(3,\)"),
        ({"features": np.full((9, 2), np.nan)}, "not finite"),
        ({"features": np.zeros((9, 2)), "targets": np.zeros(8, int)}, r"targets has shape \(8,\)"),
        ({"features": np.zeros((9, 2)), "targets": np.full(9, -1)}, "targets holds -1"),
        ({"features": np.zeros((9, 2)), "test_features": np.zeros((9, 3))}, "test_features has shape"),
        (
            {"features": np.zeros((9, 2)), "targets": np.zeros(9, int), "test_features": np.zeros((9, 2))},
            "no test_targets",
        ),
        ({"features": np.zeros((2, 2))}, "expected at least 3"),
        ({"features": np.zeros((9, 2)), "targets": np.arange(9), "class_names": np.array(["a"])}, "class_names has 1"),
    ],
)
def test_files_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        embeddings_npz(path=str(tmp_path / "x.npz"))


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        embeddings_npz(path=str(tmp_path / "none.npz"))
    (tmp_path / "x.npz").write_text("no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        embeddings_npz(path=str(tmp_path / "x.npz"))


# From the command line


def test_an_encoder_of_another_recipe_goes_on_from_the_command_line(tmp_path: Path) -> None:
    small = ("model=small_cnn", "model.width=4", *QUICK)
    first = launch(tmp_path, "recipe=self_supervised", "recipe.dim=8", *small)
    assert first.code == 0, first.err
    checkpoint = first.runs[0] / "checkpoints" / "last.ckpt"
    second = launch(tmp_path, "recipe=clustering", f"recipe.encoder_checkpoint={checkpoint}", *small)
    assert second.code == 0, second.err
