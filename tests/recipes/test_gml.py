"""The GML recipe: a step as it is written, the momentum network, the queue, its limit, exact resumption."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn

from counterpoise._core import second_pass
from counterpoise.contrastive import GMLLoss, gml_loss
from counterpoise.losses import CosineLinear, LogitAdjustedLoss, logit_adjusted_loss
from counterpoise.recipes import GML, MLP, BatchAugment, Checkpoints, SmallCNN, fit
from counterpoise.recipes.build import build
from counterpoise.recipes.composition import resolved
from counterpoise.recipes.data import LabelledData, digits_lt
from counterpoise.recipes.errors import ConfigError
from counterpoise.recipes.module import parameter_groups
from counterpoise.samplers import CVaR
from tests.recipes.launching import launch_process

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
COUNTS = [60, 30, 10]


def model(num_classes: int = 3, width: int = 8) -> SmallCNN:
    return SmallCNN(1, num_classes, width=width, head="cosine")


def views() -> dict[str, BatchAugment]:
    return {"augment": BatchAugment(shift=1), "contrast_augment": BatchAugment(shift=1, seed=1)}


def made(**options: Any) -> GML:
    """A recipe of three classes outside of a Trainer."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"queue_size": 24, "dim": 4, "momentum": 0.9, **views(), **options}
    recipe = GML(model(), GMLLoss(COUNTS), num_classes=3, **given)
    recipe.log_training = lambda *_: None  # type: ignore[method-assign]
    return recipe


def batch(n: int = 8, start: int = 0, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=g)
    return {"input": x, "target": torch.randint(3, (n,), generator=g), "index": torch.arange(start, start + n)}


def for_digits(data: LabelledData, width: int = 8) -> GML:
    torch.manual_seed(0)
    network = model(data.num_classes, width)
    return GML(network, GMLLoss(data.class_counts), num_classes=data.num_classes, **views())


def test_a_step_is_the_objective_of_the_queue_with_the_batch_in_it() -> None:
    recipe, given = made(), batch()
    twin = copy.deepcopy(recipe)
    loss = recipe.training_step(given, 0)

    x, index, y = given["input"], given["index"], given["target"]
    both = torch.cat([BatchAugment(1)(x, index, 0), BatchAugment(1, seed=1)(x, index, 0)])
    features = twin.model.encoder(both)
    key_features = twin.key_model.encoder(both[:8])  # the key network has not moved: nothing has been learned yet
    twin.queue.enqueue(key_features, y, index)
    expected = gml_loss(
        twin.projection(features[8:]),
        y,
        class_counts=COUNTS,
        logits=twin.model.head(features[:8]),
        keys=twin.key_projection(twin.queue.features),
        key_labels=twin.queue.labels,
        index=index,
        key_index=twin.queue.index,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(recipe.queue.features, twin.queue.features)


def test_the_key_network_is_an_average_of_the_query_network_and_gets_no_gradient() -> None:
    recipe = made(momentum=0.9)
    optimizer = torch.optim.SGD(parameter_groups(recipe), lr=0.1)
    pairs = [(recipe.key_model, recipe.model), (recipe.key_projection, recipe.projection)]
    for step in range(3):
        before = [(dict(copy.deepcopy(k).named_parameters()), dict(q.named_parameters())) for k, q in pairs]
        expected = [{name: 0.9 * p + 0.1 * query[name].detach() for name, p in key.items()} for key, query in before]
        optimizer.zero_grad()
        recipe.training_step(batch(seed=step), 0).backward()
        for (key, _), known in zip(pairs, expected, strict=True):
            assert {name for name, _ in key.named_parameters()} == known.keys()
            for name, p in key.named_parameters():
                torch.testing.assert_close(p, known[name])
                assert p.grad is None
        optimizer.step()
    assert not any(
        torch.equal(k[n], q[n])
        for k, q in [(dict(a.named_parameters()), dict(b.named_parameters())) for a, b in pairs]
        for n in k
    )


def test_every_trained_parameter_gets_a_gradient_and_the_temperature_no_weight_decay() -> None:
    recipe = made()
    recipe.training_step(batch(), 0).backward()
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in recipe.parameters() if p.requires_grad)
    decayed, spared = parameter_groups(recipe)
    assert [p is recipe.loss.log_temperature for p in spared["params"]] == [True]
    assert spared["weight_decay"] == 0.0
    key = {id(p) for p in (*recipe.key_model.parameters(), *recipe.key_projection.parameters())}
    assert not key & {id(p) for p in decayed["params"]}


def test_the_queue_holds_the_newest_features_of_each_class_in_its_own_slots() -> None:
    recipe = made(queue_size=12)
    label_of: dict[int, int] = {}
    for step in range(6):
        given = batch(start=8 * step, seed=step)
        label_of |= dict(zip(given["index"].tolist(), given["target"].tolist(), strict=True))
        recipe.training_step(given, 0)
    held = recipe.queue.index.tolist()
    assert min(held) >= 0  # nothing random is left
    assert [label_of[i] for i in held] == recipe.queue.labels.tolist()
    for c, slots in enumerate(recipe.queue.slots_per_class.tolist()):
        newest = [i for i, label in label_of.items() if label == c][-slots:]
        of_class = [i for i in held if label_of[i] == c]
        assert len(of_class) == slots
        assert set(of_class) == set(newest)


def test_the_queue_does_not_depend_on_the_order_of_a_batch() -> None:
    """So it does not depend on how the batch is divided among ranks either."""
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    one, other = made(queue_size=6), made(queue_size=6)
    for step in range(2):
        given = batch(start=8 * step, seed=step)
        one.training_step(given, 0)
        other.training_step({name: x[shuffled] for name, x in given.items()}, 0)
    assert torch.equal(one.queue.index, other.queue.index)
    torch.testing.assert_close(one.queue.features, other.queue.features)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    common = ("recipe=gml", "model=mlp", "optimizer.lr=0.05", "recipe.queue_size=256", "trainer.max_epochs=2")
    common += ("sampler=class_balanced", "sampler.num_samples=384", "trainer.accelerator=cpu")
    states = []
    for name, options in (("one", ("data.batch_size=64",)), ("two", ("data.batch_size=32", "trainer=ddp"))):
        (tmp_path / name).mkdir()
        done = launch_process(tmp_path / name, *common, *options, "trainer.enable_progress_bar=false")
        assert done.code == 0, done.err
        states.append(torch.load(done.runs[0] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    expected, state = states
    kept = [name for name in expected if not name.startswith("val_")]
    assert torch.equal(state["queue.index"], expected["queue.index"])
    for name in kept:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_masked_row_is_not_queued() -> None:
    recipe, given = made(), batch()
    mask = torch.arange(8) % 2 == 0
    loss = recipe.training_step({**given, "mask": mask}, 0)
    held = [i for i in recipe.queue.index.tolist() if i >= 0]
    assert sorted(held) == [0, 2, 4, 6]
    assert bool(loss.isfinite())


def test_a_second_pass_and_evaluation_change_nothing() -> None:
    recipe = made()
    recipe.training_step(batch(), 0)
    with torch.no_grad():
        recipe.model.head.weight.add_(1)
        recipe.model.encoder[0][0].weight.add_(1)
    kept = ("queue.", "key_projection.", "key_model.encoder.0.0.")
    before = {name: x.clone() for name, x in recipe.state_dict().items() if name.startswith(kept)}
    with second_pass():
        recipe.training_step(batch(start=8, seed=1), 0)
    recipe.eval().predict_step(batch(), 0)
    assert len(before) > 6
    assert all(torch.equal(recipe.state_dict()[name], x) for name, x in before.items())


@pytest.mark.parametrize("kind", ["one view", "table"])
def test_without_a_contrast_view_queries_and_logits_are_of_the_same_inputs(kind: str) -> None:
    recipe = made(contrast_augment=None)
    given = batch()
    if kind == "table":
        recipe.model = MLP(64, 3, head="cosine")
        given["input"] = given["input"].flatten(1)
        recipe.contrast_augment = BatchAugment(1, seed=1)
    (only,) = recipe.views(given)
    assert torch.equal(only, given["input"]) == (kind == "table")


def test_the_two_views_are_a_function_of_epoch_and_index() -> None:
    recipe, given = made(), batch()
    first, second = recipe.views(given)
    assert not torch.equal(first, second)
    part = {name: x[2:5] for name, x in given.items()}
    for whole, alone in zip((first, second), recipe.views(part), strict=True):
        assert torch.equal(whole[2:5], alone)


def test_without_the_contrast_it_is_logit_adjustment_of_thirty_cosines_step_for_step() -> None:
    torch.manual_seed(0)
    network = MLP(64, 3, hidden=(16,), head="cosine").double()
    alone = copy.deepcopy(network)
    loss = GMLLoss(COUNTS, contrast_weight=0.0)
    recipe = GML(network, loss, num_classes=3, queue_size=24, **views()).double()
    recipe.log_training = lambda *_: None  # type: ignore[method-assign]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    ours, theirs = (torch.optim.SGD(parameter_groups(m), **options) for m in (recipe, alone))
    for step in range(10):
        given = batch(seed=step)
        given["input"] = given["input"].double()
        ours.zero_grad()
        value = recipe.training_step(given, 0)
        value.backward()
        ours.step()
        theirs.zero_grad()
        x = BatchAugment(1)(given["input"], given["index"], 0)
        expected = logit_adjusted_loss(30 * alone(x), given["target"], class_counts=COUNTS)
        expected.backward()
        theirs.step()
        torch.testing.assert_close(value, expected)
    for p, q in zip(network.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_predictions_are_thirty_cosines_without_the_prior() -> None:
    recipe, given = made().eval(), batch()
    cosines = recipe.model(given["input"])
    assert float(cosines.detach().abs().max()) <= 1
    torch.testing.assert_close(recipe.predict_step(given, 0)["logits"], 30 * cosines)
    torch.testing.assert_close(recipe(given["input"]), 30 * cosines)


def test_it_learns_and_its_report_shows_the_temperature(tmp_path: Path) -> None:
    data = digits_lt(batch_size=64)
    found = fit(for_digits(data, width=32), data, folder=tmp_path, max_epochs=12, **QUIET)
    assert found["balanced_accuracy"] > 0.7
    assert found["tail_accuracy"] > 0.5
    assert found.metrics["recipe"] == "gml"
    page = found.report.read_text()  # type: ignore[union-attr]
    assert "Learned temperature of the keys" in page
    temperatures = [row.split(",") for row in (tmp_path / "history.csv").read_text().splitlines()]
    column = temperatures[0].index("train/temperature")
    assert float(temperatures[-1][column]) != pytest.approx(0.1, rel=1e-3)


def test_a_reweighter_composes() -> None:
    recipe = made(reweighter=CVaR(0.5))
    loss = recipe.training_step(batch(), 0)
    loss.backward()
    assert float(loss.detach()) > float(made().training_step(batch(), 0).detach())
    assert recipe.queue.index.max() >= 0


def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    """From a checkpoint within an epoch: weights, key network, queue and temperature as of one never stopped."""

    class Killed(RuntimeError):
        pass

    def killing(*_: Any) -> None:
        if stopped.global_step == 9:
            raise Killed

    def run(recipe: GML, folder: str, **options: Any) -> None:
        data = digits_lt(batch_size=64)
        kept = Checkpoints(tmp_path / folder / "checkpoints", every_n_steps=4)
        fit(recipe, data, folder=tmp_path / folder, max_epochs=3, callbacks=[kept], **options, **QUIET)

    whole, stopped, again = (for_digits(digits_lt(batch_size=64)) for _ in range(3))
    run(whole, "whole")
    stopped.on_train_batch_start = killing  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run(stopped, "run")
    run(again, "run", resume=True)
    expected, actual = whole.state_dict(), again.state_dict()
    assert {
        "queue.features",
        "queue.index",
        "queue.pointers",
        "queue.labels",
        "loss.log_temperature",
    } <= expected.keys()
    assert any(name.startswith("key_model.") for name in expected)
    assert any(name.startswith("key_projection.") for name in expected)
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(queue_size=5), r"queue_size is 5, expected a number in \[6, inf\]"),
        (lambda: made(keys_per_class=0), r"keys_per_class is 0"),
        (lambda: made(momentum=1.5), r"momentum is 1.5, expected a number in \[0, 1\]"),
        (lambda: made(dim=0), "dim is 0"),
        (lambda: made(contrast_augment=BatchAugment(1)), "contrast_augment has seed 0, expected another"),
        (
            lambda: GML(SmallCNN(1, 3), GMLLoss(COUNTS), num_classes=3),
            'no cosine head, expected one made with head="cos',
        ),
        (lambda: GML(CosineLinear(4, 3), GMLLoss(COUNTS), num_classes=3), "no cosine head"),
        (
            lambda: GML(model(), LogitAdjustedLoss(COUNTS), num_classes=3),
            "loss is a LogitAdjustedLoss, expected GMLLoss",
        ),
        (lambda: GML(model(4), GMLLoss(COUNTS), num_classes=4), r"class_counts has shape \(3,\), expected \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], GML], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def built(folder: Path, *overrides: str) -> Any:
    """The recipe that ``counterpoise-train`` would launch."""
    with initialize_config_module("counterpoise.recipes.conf", version_base="1.3"):
        config = resolved(compose("train", overrides=list(overrides)), folder)
    return build(config, folder).recipe


def test_the_configuration_gives_it_a_cosine_head_and_two_views(tmp_path: Path) -> None:
    recipe = built(tmp_path, "recipe=gml")
    assert isinstance(recipe, GML)
    assert isinstance(recipe.model.head, CosineLinear)
    assert isinstance(recipe.key_model.head, nn.Identity)
    assert recipe.augment is not None
    assert recipe.contrast_augment is not None
    assert recipe.augment.seed != recipe.contrast_augment.seed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=gml", "loss=ldam"], "recipe: loss is a LDAMLoss, expected GMLLoss"),
        (["loss=gml"], "loss GMLLoss is a labelled_embeddings objective, expected one of multiclass"),
        (["recipe=gml", "model.head=linear"], "model.head is 'linear', and the loss needs cosines"),
        (["recipe=gml", "recipe.queue_size=10"], "queue_size is 10, expected a number in"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(tmp_path, *overrides)
