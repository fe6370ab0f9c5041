"""The long-tailed recipe: what its parts are made to do together, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from counterpoise.contrastive import BarlowTwinsLoss
from counterpoise.losses import (
    ClassBalancedLoss,
    CrossEntropyLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    SigmoidFocalLoss,
    effective_number_weights,
)
from counterpoise.recipes import MLP, BatchAugment, Checkpoints, ConfigError, DeferredReweighting, LongTailed, fit
from counterpoise.recipes.data import LabelledData, digits_lt
from counterpoise.recipes.module import check_sampler
from counterpoise.recipes.run_folder import in_use, locked
from counterpoise.recipes.schedules import constant, cosine, multistep
from counterpoise.samplers import ClassBalancedSampler, GroupDRO, ProgressivelyBalancedSampler, ShuffleSampler

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def digits() -> LabelledData:
    return digits_lt(batch_size=64)


def recipe(loss: nn.Module, **options: Any) -> LongTailed:
    torch.manual_seed(0)
    return LongTailed(MLP(64, 10, hidden=(32,)), loss, num_classes=10, **options)


class Watch(pl.Callback):
    """Calls a function at the start of every epoch."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.seen.append(self.look(pl_module).clone())


def test_a_run_learns_and_leaves_everything_behind(digits: LabelledData, tmp_path: Path) -> None:
    loss = LogitAdjustedLoss(digits.class_counts)
    result = fit(recipe(loss, scheduler=cosine), digits, folder=tmp_path / "run", max_epochs=20, **QUIET)
    assert result["balanced_accuracy"] > 0.7
    left = {str(p.relative_to(result.folder)) for p in result.folder.rglob("*") if p.is_file()}
    assert left >= {
        "config.yaml",
        "metrics.json",
        "history.csv",
        "predictions.npz",
        "report.html",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }
    assert not any(name.endswith(".part") for name in left)


def test_two_runs_of_one_seed_are_the_same(digits: LabelledData, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        made = recipe(CrossEntropyLoss(), augment=BatchAugment(1))
        fit(made, digits_lt(batch_size=64), folder=tmp_path / name, max_epochs=2, **QUIET)
        weights.append(torch.cat([p.flatten() for p in made.parameters()]))
    assert torch.equal(*weights)


def test_a_prior_based_loss_follows_the_sampler(tmp_path: Path) -> None:
    data = digits_lt(batch_size=64)
    data.train_sampler = ProgressivelyBalancedSampler(data.train_targets, 3)
    loss = LogitAdjustedLoss(data.class_counts)
    watch = Watch(lambda module: module.loss.statistics.prior)
    fit(recipe(loss), data, folder=tmp_path, max_epochs=3, callbacks=[watch], **QUIET)
    counts = torch.tensor(data.class_counts, dtype=torch.float64)
    torch.testing.assert_close(watch.seen[0], counts / counts.sum())
    torch.testing.assert_close(watch.seen[2], torch.full((10,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(watch.seen[1], (watch.seen[0] + watch.seen[2]) / 2)


def test_a_sampled_prior_is_told_and_an_unknown_one_refused() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    loss = LogitAdjustedLoss([3, 1])
    assert "ClassBalancedSampler" in (check_sampler(loss, ClassBalancedSampler(targets)) or "")
    assert check_sampler(loss, ShuffleSampler(targets)) is None
    assert check_sampler(CrossEntropyLoss(), ClassBalancedSampler(targets)) is None
    with pytest.raises(ValueError, match="class_probabilities"):
        check_sampler(loss, torch.utils.data.WeightedRandomSampler([1.0] * 4, 4))


def test_deferred_reweighting_switches_late(digits: LabelledData, tmp_path: Path) -> None:
    watch = Watch(lambda module: module.loss.class_weight)
    drw = DeferredReweighting(digits.class_counts, switch_at=0.5, beta=0.99)
    fit(recipe(CrossEntropyLoss()), digits, folder=tmp_path, max_epochs=4, callbacks=[drw, watch], **QUIET)
    ones, late = torch.ones(10), effective_number_weights(digits.class_counts, 0.99).float()
    for seen, expected in zip(watch.seen, [ones, ones, late, late], strict=True):
        torch.testing.assert_close(seen, expected)


def test_deferred_reweighting_refuses_a_loss_with_weights_of_its_own(digits: LabelledData, tmp_path: Path) -> None:
    drw = [DeferredReweighting(digits.class_counts)]
    for loss in (CrossEntropyLoss(class_weight=[1.0] * 10), ClassBalancedLoss(digits.class_counts)):
        with pytest.raises(ValueError, match="class_weight"):
            fit(recipe(loss), digits, folder=tmp_path, max_epochs=1, callbacks=drw, **QUIET)


def test_a_reweighter_moves_weight_to_the_worst_group(digits: LabelledData, tmp_path: Path) -> None:
    dro = GroupDRO(digits.class_counts, step_size=0.5, by="target")
    fit(recipe(CrossEntropyLoss(), reweighter=dro), digits, folder=tmp_path, max_epochs=4, **QUIET)
    q = dro.group_weights
    assert q.argmax() in torch.tensor(digits.class_counts).argsort()[:4]
    assert float(q.max()) > 0.12


def test_a_multi_label_loss_gets_one_hot_targets(digits: LabelledData, tmp_path: Path) -> None:
    result = fit(recipe(SigmoidFocalLoss(inner="sum")), digits, folder=tmp_path, max_epochs=8, **QUIET)
    assert result["accuracy"] > 0.5


def test_a_loss_of_torch_itself_does(digits: LabelledData, tmp_path: Path) -> None:
    fit(recipe(nn.CrossEntropyLoss()), digits, folder=tmp_path, max_epochs=1, **QUIET)
    dro = GroupDRO(digits.class_counts, by="target")
    result = fit(recipe(nn.CrossEntropyLoss(), reweighter=dro), digits, folder=tmp_path, max_epochs=1, **QUIET)
    assert result.metrics["status"] == "completed"


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="BarlowTwinsLoss is a two_view objective"):
        recipe(BarlowTwinsLoss())
    dro = GroupDRO([1, 2], by="target")
    with pytest.raises(ValueError, match="class weights in both"):
        recipe(CrossEntropyLoss(class_weight=[1.0, 2.0]), reweighter=dro)
    with pytest.raises(ValueError, match="reduction"):
        recipe(nn.Identity(), reweighter=dro)


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    images = torch.rand(6, 1, 8, 8)
    augment, index = BatchAugment(shift=2, flip=True, seed=1), torch.arange(6)
    whole = augment(images, index, epoch=3)
    assert torch.equal(augment(images[2:4], index[2:4], epoch=3), whole[2:4])
    assert not torch.equal(augment(images, index, epoch=4), whole)
    assert whole.shape == images.shape
    assert torch.equal(BatchAugment(shift=0)(images, index, 0), images)


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        (constant, {"warmup": 0.2}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        (multistep, {"milestones": [0.5, 0.8], "factor": 0.1}, [1] * 5 + [0.1] * 3 + [0.01] * 2),
        (cosine, {}, [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * k / 10)))) for k in range(10)]),
    ],
)
def test_schedules_are_fractions_of_training(schedule: Any, options: dict[str, Any], expected: list[float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = schedule(optimizer, total_steps=10, **options), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


def test_a_checkpoint_killed_in_writing_leaves_the_previous_one(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"whole")

    def dies(path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"ha")
        raise KeyboardInterrupt

    trainer = SimpleNamespace(fast_dev_run=False, global_step=1, save_checkpoint=dies, is_global_zero=True)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path)._save(trainer, "last.ckpt")  # type: ignore[arg-type]
    assert (tmp_path / "last.ckpt").read_bytes() == b"whole"


def test_ldam_gets_a_cosine_head_from_the_configuration(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module

    from counterpoise.losses import CosineLinear
    from counterpoise.recipes.build import build
    from counterpoise.recipes.composition import resolved

    for loss, head in (("ldam", CosineLinear), ("cross_entropy", nn.Linear)):
        with initialize_config_module("counterpoise.recipes.conf", version_base="1.3"):
            config = resolved(compose("train", overrides=[f"loss={loss}"]), tmp_path)
        parts = build(config, tmp_path)
        assert isinstance(parts.recipe.model.head, head)
        assert isinstance(parts.recipe.loss, LDAMLoss) == (loss == "ldam")


def test_class_weights_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class_weight has shape \(3,\), expected \(10,\)"):
        recipe(CrossEntropyLoss(class_weight=[1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"class_counts has shape \(3,\)"):
        recipe(LogitAdjustedLoss([5, 3, 1]))


def test_a_monitor_that_is_not_logged_is_refused_before_training(digits: LabelledData, tmp_path: Path) -> None:
    wrong = Checkpoints(tmp_path / "checkpoints", monitor="val/balanced_acuracy")
    with pytest.raises(ConfigError, match="did you mean 'val/balanced_accuracy'"):
        fit(recipe(CrossEntropyLoss()), digits, folder=tmp_path, max_epochs=1, callbacks=[wrong], **QUIET)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_two_processes_never_train_into_one_folder(digits: LabelledData, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="in use"):
        fit(recipe(CrossEntropyLoss()), digits, folder=tmp_path, max_epochs=1, **QUIET)
    assert not in_use(tmp_path)


def test_head_and_tail_are_what_the_recipe_says(digits: LabelledData, tmp_path: Path) -> None:
    made = recipe(CrossEntropyLoss(), many=50, few=10)
    bands = fit(made, digits, folder=tmp_path, max_epochs=1, **QUIET).metrics
    assert bands["bands"]["rule"] == "thresholds"
    tail = [
        count for count, band in zip(digits.class_counts, bands["per_class"]["band"], strict=True) if band == "tail"
    ]
    assert sorted(tail) == sorted(count for count in digits.class_counts if count < 10)


def test_a_sampler_of_unknown_prior_is_refused_in_python_too(tmp_path: Path) -> None:
    data = digits_lt(batch_size=64)
    data.train_sampler = torch.utils.data.WeightedRandomSampler([1.0] * len(data.train_targets), 64)
    with pytest.raises(ValueError, match="class_probabilities"):
        fit(recipe(LogitAdjustedLoss(data.class_counts)), data, folder=tmp_path, max_epochs=1, **QUIET)


def test_a_new_run_never_uses_the_checkpoints_of_an_old_one(digits: LabelledData, tmp_path: Path) -> None:
    fit(recipe(CrossEntropyLoss()), digits, folder=tmp_path, max_epochs=1, **QUIET)
    fresh = recipe(CrossEntropyLoss())
    fit(fresh, digits, folder=tmp_path, max_epochs=1, limit_val_batches=0, limit_train_batches=1, **QUIET)
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(x, last[name]) for name, x in fresh.state_dict().items())


def test_more_epochs_go_on_where_a_finished_run_ended(tmp_path: Path) -> None:
    weights = []
    for name, plan in (("at once", [3]), ("in two", [1, 3])):
        for epochs in plan:
            made = recipe(CrossEntropyLoss())
            fit(made, digits_lt(batch_size=64), folder=tmp_path / name, max_epochs=epochs, resume=True, **QUIET)
        last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == 3 * 6
        weights.append(torch.cat([x.flatten().double() for x in last["state_dict"].values()]))
    assert torch.equal(*weights)


def test_a_run_that_stopped_early_stays_stopped(digits: LabelledData, tmp_path: Path) -> None:
    epochs = []
    for _ in range(2):
        stop = pl.callbacks.EarlyStopping("val/balanced_accuracy", patience=1, min_delta=1.0, mode="max")
        made = recipe(CrossEntropyLoss())
        result = fit(made, digits, folder=tmp_path, max_epochs=9, resume=True, callbacks=[stop], **QUIET)
        epochs.append(result.metrics["cost"]["epochs"])
    assert epochs == [2, 2]


def test_deferred_reweighting_and_a_reweighter_by_class_are_refused(digits: LabelledData, tmp_path: Path) -> None:
    drw, dro = DeferredReweighting(digits.class_counts), GroupDRO(digits.class_counts, by="target")
    made = recipe(CrossEntropyLoss(), reweighter=dro)
    with pytest.raises(ValueError, match="class weights in both"):
        fit(made, digits, folder=tmp_path, max_epochs=1, callbacks=[drw], **QUIET)


def test_a_recipe_without_metrics_is_refused_before_training(digits: LabelledData, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"LightningModule has no evaluate"):
        fit(pl.LightningModule(), digits, folder=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()
