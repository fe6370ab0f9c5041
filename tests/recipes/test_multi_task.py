"""The multi-task recipe: scales, missing targets, noise levels in the optimiser, resumption, a table of one's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from sklearn.metrics import mean_absolute_error, r2_score, recall_score
from torch import nn

from counterpoise.losses import CrossEntropyLoss, EqualWeighting, StaticWeighting, UncertaintyWeighting
from counterpoise.losses.uncertainty_weighting import KINDS, uncertainty_regularizers, uncertainty_weights
from counterpoise.recipes import MLP, Heads, MultiTask, ResNet32, SmallCNN, fit
from counterpoise.recipes.build import build
from counterpoise.recipes.composition import settle
from counterpoise.recipes.data import InMemory, LabelledData, multi_task_csv, rotated_digits, splits_of_tasks
from counterpoise.recipes.data.rotated import rotated
from counterpoise.recipes.errors import ConfigError
from counterpoise.recipes.models import with_heads
from counterpoise.recipes.task_evaluation import TaskPredictions, mean_score, task_metrics
from counterpoise.recipes.tasks import Task, starting_noise, tasks_of
from counterpoise.samplers import GroupDRO

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


def data(**options: Any) -> LabelledData:
    return rotated_digits(**{"batch_size": 32, **options})


def uncertainty(of: LabelledData, **options: Any) -> UncertaintyWeighting:
    return UncertaintyWeighting(of.splits.facts["kinds"], **options)


def recipe(loss: nn.Module, of: LabelledData, **options: Any) -> MultiTask:
    torch.manual_seed(0)
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01), **options}
    return MultiTask(SmallCNN(1, 2, width=16), loss, tasks=of.splits.facts["tasks"], **settings)


def first_batch(of: LabelledData) -> dict[str, Any]:
    return next(iter(of.train_dataloader()))


@pytest.fixture(scope="module")
def digits() -> LabelledData:
    return data(missing=0.2)


def test_it_learns_and_reports(digits: LabelledData, tmp_path: Path) -> None:
    result = fit(
        recipe(uncertainty(digits), digits), digits, folder=tmp_path, max_epochs=8, notes=digits.splits.notes, **QUIET
    )
    assert result["score"] > 0.8
    assert result["class_balanced_accuracy"] > 0.7  # a guess is right in 0.1
    assert result["angle_r2"] > 0.7
    assert result["angle_rmse"] < 20  # degrees; 35 is that of the mean
    score = np.mean([result["class_balanced_accuracy"], result["angle_r2"], result["ink_r2"]])
    assert result["score"] == pytest.approx(score)
    page = (tmp_path / "report.html").read_text()
    told = ("Table of tasks", "Effective weights", "Predicted and true", "Learning curves", "Loss", "Table of results")
    for name in told:
        assert f"<strong>{name}</strong> not available" not in page
    for said in ("What each task", "Predicted against true", "Score of each task", "classification, 10 classes"):
        assert said in page
    assert "training targets of task &#39;class&#39; are missing" in page
    header = (tmp_path / "history.csv").read_text().splitlines()[0].split(",")
    expected = {"val/score", "val/score_class", "val/rmse_angle", "weight/ink", "train/unweighted", "train/loss"}
    assert expected <= set(header)


def test_a_target_in_other_units_leaves_uncertainty_weighting_and_ruins_equal_weighting(tmp_path: Path) -> None:
    found = {}
    for scale in (1 / 60, 100 / 60):
        turned = data(scale=scale)
        for name, loss in (("uncertainty", uncertainty(turned)), ("equal", EqualWeighting())):
            made = recipe(loss, turned)
            found[name, scale > 1] = fit(made, turned, folder=tmp_path / f"{name}{scale}", max_epochs=6, **QUIET)
    near, far = found["uncertainty", False], found["uncertainty", True]
    assert far["score"] == pytest.approx(near["score"], abs=0.05)
    lost = found["equal", False]["class_balanced_accuracy"] - found["equal", True]["class_balanced_accuracy"]
    assert lost > 0.15


def test_the_first_gradient_does_not_know_the_units() -> None:
    gradients = []
    for scale in (1.0, 100.0):
        turned = data(scale=scale)
        made = recipe(uncertainty(turned), turned).double()
        batch = first_batch(turned)
        batch["input"] = batch["input"].double()
        made.composed(made.model(batch["input"]), batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", [0.01, 2.3, 1200.0])
def test_noise_starts_at_its_optimum(kind: str, cost: float) -> None:
    s = torch.tensor([starting_noise(kind, cost)], dtype=torch.float64, requires_grad=True)
    (uncertainty_weights(s, [kind]) * cost + uncertainty_regularizers(s, [kind])).sum().backward()
    assert float(s.grad) == pytest.approx(0, abs=1e-9)  # type: ignore[arg-type]


def test_noise_starts_where_it_was_put() -> None:
    turned = data()
    at_spread = recipe(uncertainty(turned), turned).loss.log_variance
    variance = turned.splits.facts["tasks"]["angle"]["std"][0] ** 2
    assert at_spread.tolist()[:2] == pytest.approx([math.log(2 * math.log(10)), math.log(variance)])
    assert recipe(uncertainty(turned, initial=1.5), turned).loss.log_variance.tolist() == [1.5] * 3
    assert recipe(uncertainty(turned), turned, noise_from_targets=False).loss.log_variance.tolist() == [0.0] * 3


def test_missing_targets_are_masked() -> None:
    """Losses and gradients are those of the rows that are there; what is missing has neither."""
    turned = data()
    made = recipe(uncertainty(turned), turned).eval()
    batch = first_batch(turned)
    x, target = batch["input"], batch["target"]
    gone = {"class": torch.arange(32) < 5, "angle": torch.arange(32) >= 20, "ink": torch.zeros(32, dtype=torch.bool)}
    holes = {
        "class": torch.where(gone["class"], -100, target["class"]),
        "angle": torch.where(gone["angle"], torch.nan, target["angle"]),
        "ink": target["ink"],
    }
    total = made.composed(made.model(x), {**batch, "target": holes})
    outputs = made.model(x)
    means = {n: made.named[k].costs(outputs[n], target[n])[~gone[n]].mean() for k, n in enumerate(gone)}
    assert total.item() == pytest.approx(made.loss(means).item(), rel=1e-6)
    total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in made.parameters() if p.grad is not None)


def test_a_task_that_a_batch_lacks_does_not_move_its_noise() -> None:
    turned = data()
    made = recipe(uncertainty(turned), turned)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
    batch = first_batch(turned)
    before = made.loss.log_variance.detach().clone()
    batch["target"]["angle"] = torch.full((32,), torch.nan)
    made.composed(made.model(batch["input"]), batch).backward()
    optimizer.step()
    moved = made.loss.log_variance.detach() != before
    assert moved.tolist() == [True, False, True]


def test_noise_is_trained_without_decay_at_a_rate_of_its_own() -> None:
    turned = data()
    made = recipe(uncertainty(turned), turned, weighting_lr_factor=5.0)
    groups = made.configure_optimizers().param_groups
    own = [group for group in groups if any(p is made.loss.log_variance for p in group["params"])]
    assert [(group["weight_decay"], group["lr"], len(group["params"])) for group in own] == [(0.0, 0.015, 1)]
    assert {group["lr"] for group in groups if group is not own[0]} == {0.003}


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    weights = []
    for name, plan in (("at once", [3]), ("in two", [1, 3])):
        for epochs in plan:
            turned = data(missing=0.3)
            made = recipe(uncertainty(turned), turned)
            fit(made, turned, folder=tmp_path / name, max_epochs=epochs, resume=True, **QUIET)
        last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(torch.cat([x.flatten().double() for x in last["state_dict"].values()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("loss", [EqualWeighting(), StaticWeighting({"ink": 100.0, "class": 1.0, "angle": 1e-3})])
def test_fixed_weights_do_and_are_logged(loss: nn.Module, digits: LabelledData, tmp_path: Path) -> None:
    made = recipe(loss, digits, errors="absolute")
    assert fit(made, digits, folder=tmp_path, max_epochs=1, **QUIET).metrics["status"] == "completed"
    expected = [100.0, 1.0, 1e-3] if isinstance(loss, StaticWeighting) else [1.0] * 3
    assert [made.effective_weights[n] for n in ("ink", "class", "angle")] == expected


def test_parts_that_do_not_fit_are_refused(digits: LabelledData) -> None:
    kinds = digits.splits.facts["kinds"]
    with pytest.raises(ValueError, match="CrossEntropyLoss is a multiclass objective, expected one of multi_task"):
        recipe(CrossEntropyLoss(), digits)
    with pytest.raises(ValueError, match="EqualWeighting has no value per row, so no reweighter composes with it"):
        recipe(EqualWeighting(), digits, reweighter=GroupDRO([1, 1]))
    with pytest.raises(ValueError, match=r"EqualWeighting has the tasks \['class', 'depth'\]"):
        recipe(EqualWeighting(["class", "depth"]), digits)
    with pytest.raises(ValueError, match="UncertaintyWeighting has 2 tasks, expected 3"):
        recipe(UncertaintyWeighting(["gaussian", "gaussian"]), digits)
    with pytest.raises(ValueError, match="kind of task 'angle' is 'classification'"):
        recipe(UncertaintyWeighting({**kinds, "angle": "classification"}), digits)
    with pytest.raises(ValueError, match="kind of task 'class' is 'gaussian'"):
        recipe(UncertaintyWeighting({**kinds, "class": "gaussian"}), digits)
    with pytest.raises(ValueError, match="'absolute', and its kind 'gaussian' is of squared errors"):
        recipe(UncertaintyWeighting(kinds), digits, errors={"ink": "absolute"})
    with pytest.raises(ValueError, match="errors names 'inc', expected one of"):
        recipe(EqualWeighting(), digits, errors={"inc": "absolute"})
    with pytest.raises(ValueError, match="errors of task 'angle' is 'cubed'"):
        recipe(EqualWeighting(), digits, errors="cubed")
    made, classes = recipe(EqualWeighting(), digits), {"target": torch.zeros(2), "index": torch.arange(2)}
    with pytest.raises(ValueError, match="target is Tensor, expected a dict with class, angle, ink"):
        made.composed(made.model(torch.zeros(2, 1, 8, 8)), classes)


def test_laplace_noise_takes_absolute_errors(digits: LabelledData) -> None:
    made = recipe(UncertaintyWeighting({**digits.splits.facts["kinds"], "angle": "laplace"}), digits)
    assert made.errors == {"angle": "absolute", "ink": "squared"}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "tasks is empty"),
        ({"a": {"kind": "ranking", "size": 2}}, "kind of task 'a' is 'ranking', expected one of"),
        ({"a": {"kind": "classification", "size": 1}}, "size of task 'a' is 1"),
        ({"a": {"kind": "regression"}}, "task 'a' has no size"),
        ({"a": {"kind": "regression", "sise": 1}}, "task 'a' has the field 'sise'.*size"),
        ({"a": {"kind": "regression", "size": 2, "mean": [0.0]}}, "mean of task 'a' has 1 numbers"),
    ],
)
def test_unknown_tasks_are_refused(tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks_of(tasks)


def parts_of(train: torch.Tensor, val: torch.Tensor) -> list[InMemory]:
    return [InMemory(torch.randn(len(y), 3), {"y": y}) for y in (train, val, val)]


def test_a_task_without_targets_or_with_a_strange_class_is_refused() -> None:
    some, none, nothing = torch.tensor([1, 0, -100, 2]), torch.full((4,), -100), torch.full((4,), torch.nan)
    tasks = {"y": {"kind": "classification", "size": 3}}
    assert splits_of_tasks(*parts_of(some, some), tasks=tasks).notes == [
        "1 of 4 training targets of task 'y' are missing."
    ]
    with pytest.raises(ValueError, match="train has no target of task 'y', expected at least one"):
        splits_of_tasks(*parts_of(none, some), tasks=tasks)
    with pytest.raises(ValueError, match="val has no target of task 'y'"):
        splits_of_tasks(*parts_of(some, none), tasks=tasks)
    with pytest.raises(ValueError, match=r"val holds the class 3 of task 'y', expected \[0, 2\], or -100"):
        splits_of_tasks(*parts_of(some, torch.tensor([3, -100])), tasks=tasks)
    with pytest.raises(ValueError, match="train has no target of task 'y'"):
        splits_of_tasks(*parts_of(nothing, nothing), tasks={"y": {"kind": "regression", "size": 1}})


def test_data_of_another_kind_are_refused(tmp_path: Path) -> None:
    with initialize_config_module("counterpoise.recipes.conf", version_base="1.3"):
        config = compose("train", overrides=["recipe=multi_task", "data=digits_lt", f"output_dir={tmp_path}"])
    with pytest.raises(
        ConfigError, match="multi_task trains on several targets an example, and the data have one class"
    ):
        build(settle(config)[0], tmp_path)


def test_metrics_are_those_of_scikit_learn_over_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(80, 2, generator=generator)
    z = y + 0.5 * torch.randn(80, 2, generator=generator)
    holes = y.clone()
    holes[:20, 1] = torch.nan  # one dimension missing: the row is
    found = task_metrics(Task("y", "regression", 2), z, holes)
    assert found["count"] == 60
    assert found["r2"] == pytest.approx(r2_score(y[20:], z[20:]), abs=1e-6)
    assert found["mae"] == pytest.approx(mean_absolute_error(y[20:], z[20:]), abs=1e-6)
    assert found["rmse"] == pytest.approx(float((y - z)[20:].square().mean().sqrt()), abs=1e-6)
    logits, target = torch.randn(80, 4, generator=generator), torch.randint(3, (80,), generator=generator)
    found = task_metrics(Task("c", "classification", 4), logits, torch.where(torch.arange(80) < 10, -100, target))
    predicted = logits[10:].argmax(1)
    expected = recall_score(target[10:], predicted, labels=[0, 1, 2], average="macro")
    assert found["balanced_accuracy"] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx(float((predicted == target[10:]).double().mean()))


def test_metrics_over_batches_are_those_of_all_and_undefined_is_said() -> None:
    tasks = [Task("y", "regression", 1), Task("c", "classification", 3)]
    z, y = {"y": torch.randn(9, 1), "c": torch.randn(9, 3)}, {"y": torch.randn(9), "c": torch.arange(9) % 3}
    metric = TaskPredictions(tasks)
    for rows in (slice(0, 4), slice(4, 9)):
        metric.update({n: x[rows] for n, x in z.items()}, {n: x[rows] for n, x in y.items()})
    found = metric.compute()
    assert found == {task.name: task_metrics(task, z[task.name], y[task.name]) for task in tasks}
    constant = task_metrics(tasks[0], z["y"], torch.ones(9))
    assert constant["r2"] is None
    assert mean_score({**found, "y": constant}) is None
    assert task_metrics(tasks[0], z["y"] * torch.nan, y["y"])["rmse"] is None
    assert task_metrics(tasks[1], z["c"][:0], y["c"][:0])["accuracy"] is None
    worse = task_metrics(tasks[0], z["y"] + 100, y["y"])
    assert worse["r2"] < 0  # type: ignore[operator]
    assert mean_score({"y": worse}) == 0


@pytest.mark.parametrize("body", [SmallCNN(1, 2, width=8), ResNet32(1, 2), MLP(256, 2), SmallCNN(1, 2, head="cosine")])
def test_the_last_layer_becomes_a_head_a_task_in_the_units_of_the_targets(body: nn.Module) -> None:
    tasks = [Task("keys", "classification", 4), Task("far", "regression", 2, mean=(1000.0, -5.0), std=(20.0, 0.1))]
    model = with_heads(body, tasks)
    outputs = model(torch.zeros(3, 1, 16, 16))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {"keys": (3, 4), "far": (3, 2)}
    assert (outputs["far"][0] - torch.tensor([1000.0, -5.0])).abs().lt(torch.tensor([60.0, 0.3])).all()
    assert with_heads(model, tasks) is model
    assert sum(isinstance(m, Heads) for m in model.modules()) == 1
    with pytest.raises(ValueError, match="model has Heads of"):
        with_heads(model, tasks[:1])


def test_a_model_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="model is a Flatten without a linear layer"):
        with_heads(nn.Flatten(), [Task("a", "regression", 1)])


def test_images_are_turned_once_and_for_all() -> None:
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    turned = rotated(images, torch.tensor([0.0, 90.0, 180.0, -90.0]))
    for k, quarters in enumerate((0, 1, 2, -1)):
        assert torch.equal(turned[k], images[k].rot90(quarters, (1, 2)))
    first, again, other = (data(seed=seed).splits for seed in (3, 3, 4))
    assert torch.equal(first.train.inputs, again.train.inputs)  # type: ignore[attr-defined]
    assert not torch.equal(first.train.targets["angle"], other.train.targets["angle"])
    assert float(first.train.targets["angle"].abs().max()) <= 60
    assert torch.equal(data(seed=3, scale=8).splits.val.targets["angle"], 8 * first.val.targets["angle"])
    item = first.test[0]
    assert item["target"]["ink"] == pytest.approx(float(item["input"].mean()), abs=1e-6)


def test_only_training_targets_go_missing() -> None:
    splits = data(missing=0.25).splits
    n = len(splits.train)
    gone = torch.stack(
        [splits.train.targets["class"] == -100, *(splits.train.targets[k].isnan() for k in ("angle", "ink"))]
    )
    assert gone.sum(1).tolist() == [round(0.25 * n)] * 3
    assert not torch.equal(gone[0], gone[1])
    assert splits.notes[0] == f"{round(0.25 * n):,} of {n:,} training targets of task 'class' are missing."
    assert not splits.val.targets["angle"].isnan().any()
    with pytest.raises(ValueError, match=r"missing is 1\.0"):
        data(missing=1.0)
    with pytest.raises(ValueError, match="scale is 0"):
        data(scale=0)


def table(folder: Path, rows: list[str], header: str = "x,z,word,kind,y") -> str:
    (folder / "table.csv").write_text("\n".join([header, *rows]))
    return str(folder / "table.csv")


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    kinds, numbers = ["", "b", "a", "b"] * 23, ["" if i % 3 == 0 else str(2 * (i % 7)) for i in range(90)]
    rows = [f"{i % 7},{i % 5},w,{kinds[i]},{numbers[i]}" for i in range(90)]
    made = multi_task_csv(path=table(tmp_path, rows), classifications=["kind"], regressions=["y"], batch_size=16)
    splits = made.splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [63, 9, 18]
    assert splits.input_shape == (2,)
    assert "word" in splits.notes[-1]
    assert splits.facts["kinds"] == {"kind": "classification", "y": "gaussian"}
    assert splits.facts["tasks"]["kind"]["class_names"] == ["a", "b"]
    settings = {"tasks": splits.facts["tasks"], "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)}
    recipe = MultiTask(MLP(2, 2, hidden=(32,)), UncertaintyWeighting(splits.facts["kinds"]), **settings)
    assert fit(recipe, made, folder=tmp_path / "run", max_epochs=15, **QUIET)["y_r2"] > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "classifications and regressions are empty"),
        ({"classifications": ["kind"], "regressions": ["kind"]}, "'kind' twice"),
        ({"classifications": ["knd"]}, "classifications is 'knd', expected a column .*did you mean 'kind'"),
        ({"classifications": ["word"]}, "column 'word' of table.csv has the classes"),
        ({"regressions": ["kind"]}, "line 2, column 'kind': 'a' is not a finite number"),
        ({"regressions": ["y"], "features": ["x", "y"]}, "features holds 'y'"),
    ],
)
def test_an_unusable_table_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = table(tmp_path, [f"{i},1,w,{'ab'[i % 2]},{i}" for i in range(20)])
    with pytest.raises(ValueError, match=message):
        multi_task_csv(path=path, **options)
