"""The fair recipe: what it equals in its limits, what it buys, and that a killed run goes on as it was."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterpoise.losses import CrossEntropyLoss
from counterpoise.recipes import MLP, Checkpoints, Fair, GroupRobust, fit
from counterpoise.recipes.build import make
from counterpoise.recipes.data import LabelledData, diabetes, digits_lt
from counterpoise.recipes.data.splits import AsDict, InMemory, Splits
from counterpoise.recipes.errors import ConfigError
from counterpoise.recipes.fairness_evaluation import (
    FairnessCounts,
    equalized_odds_gap,
    fair_score,
    fairness_metrics,
    p_rule,
)
from counterpoise.samplers import BROAD
from tests.recipes.launching import launch, launch_process

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
QUIETLY = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
ADAM = partial(torch.optim.Adam, lr=3e-3)


def leaky(noise_of_class: float = 0.3) -> LabelledData:
    """Class from a signal and, in part, from the group, which another entry gives away; a third entry is noise."""
    g = torch.Generator().manual_seed(0)
    group = torch.randint(2, (900,), generator=g)
    signal, noise = torch.randn(2, 900, generator=g)
    leak = 2.0 * group - 1 + 0.5 * torch.randn(900, generator=g)
    target = (signal + 1.2 * (group - 0.5) + noise_of_class * torch.randn(900, generator=g) > 0).long()
    pool = AsDict(InMemory(torch.stack([signal, leak, noise], 1), target, group))
    train, val, test = (pool.subset(rows) for rows in torch.arange(900).split([500, 200, 200]))
    splits = Splits(train, val, test, ["no", "yes"], train.class_counts, (3,), group_counts=[1, 1])
    return LabelledData(splits, batch_size=64)


def recipe(features: int = 3, **options: Any) -> Fair:
    torch.manual_seed(0)
    options = {"group_counts": [250, 250], "adversary_steps": 3, "ratio_steps": 2, "optimizer": ADAM, **options}
    model = MLP(features, 2, hidden=(16,))
    return Fair(model, CrossEntropyLoss(), num_classes=2, in_features=features, **options)


def trained(made: Any, folder: Path, max_epochs: int = 3, data: LabelledData | None = None, **options: Any) -> Any:
    return fit(made, data or leaky(), folder=folder, max_epochs=max_epochs, **QUIET, **options)


def last(folder: Path) -> dict[str, Tensor]:
    """The weights behind the last epoch: ``fit`` leaves the best."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], prefix: str = "") -> None:
    names = [name for name in theirs if name.startswith(prefix)]
    assert names
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name


def test_at_an_infinite_temperature_broad_is_plain_debiasing(tmp_path: Path) -> None:
    trained(recipe(weights="none"), tmp_path / "plain")
    trained(recipe(weights="broad", temperature=math.inf), tmp_path / "broad")
    assert_same(last(tmp_path / "broad"), last(tmp_path / "plain"))


def test_a_finite_temperature_is_not(tmp_path: Path) -> None:
    trained(recipe(weights="none"), tmp_path / "plain", max_epochs=1)
    trained(recipe(weights="broad", temperature=0.2), tmp_path / "broad", max_epochs=1)
    one, other = (last(tmp_path / name)["model.head.weight"] for name in ("plain", "broad"))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("weights", ["none", "broad", "road"])
def test_without_the_adversarys_weight_it_is_plain_training(weights: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = GroupRobust(
        MLP(3, 2, hidden=(16,)), CrossEntropyLoss(), num_classes=2, group_counts=[250, 250], optimizer=ADAM
    )
    trained(plain, tmp_path / "plain")
    trained(recipe(weights=weights, adversary_weight=0.0), tmp_path / "fair")
    assert_same(last(tmp_path / "fair"), last(tmp_path / "plain"), "model.")


@pytest.fixture(scope="module")
def undebiased(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(recipe(adversary_weight=0.0, adversary_steps=1), tmp_path_factory.mktemp("plain"), max_epochs=12)


@pytest.mark.parametrize("weights", ["none", "broad", "road"])
def test_debiasing_narrows_the_gap(weights: str, undebiased: Any, tmp_path: Path) -> None:
    found = trained(recipe(weights=weights, adversary_steps=5), tmp_path, max_epochs=12)
    assert undebiased["positive_rate_gap"] > 0.3
    assert found["positive_rate_gap"] < 0.5 * undebiased["positive_rate_gap"]
    assert found["p_rule"] > undebiased["p_rule"] + 0.2
    assert found["accuracy"] > 0.65


def test_equalized_odds_narrows_its_own_gap(tmp_path: Path) -> None:
    """Where the class is uncertain, so that a predictor leans on the group."""
    found = {}
    for name, weight in (("plain", 0.0), ("fair", 1.0)):
        made = recipe(criterion="equalized_odds", adversary_weight=weight, adversary_steps=5)
        found[name] = trained(made, tmp_path / name, max_epochs=12, data=leaky(noise_of_class=1.0))
    assert found["plain"]["equalized_odds_gap"] > 0.2
    assert found["fair"]["equalized_odds_gap"] < 0.6 * found["plain"]["equalized_odds_gap"]
    assert found["fair"]["accuracy"] > 0.65


@pytest.mark.parametrize("weights", ["none", "road"])
@pytest.mark.parametrize("kill_at", [11, 16])
def test_a_killed_run_goes_on_exactly(weights: str, kill_at: int, tmp_path: Path) -> None:
    """Eight batches an epoch, a checkpoint every three: killed inside an epoch and just behind one."""

    class Killed(RuntimeError):
        pass

    def killing(*_: Any) -> None:
        if stopped.trainer.global_step == kill_at:
            raise Killed

    def run(made: Fair, folder: Path, **options: Any) -> None:
        every = Checkpoints(folder / "checkpoints", monitor=made.monitor, every_n_steps=3)
        trained(made, folder, callbacks=[every], **options)

    options: dict[str, Any] = {"weights": weights, "scheduler": _halving}
    run(recipe(**options), tmp_path / "whole")
    stopped = recipe(**options)
    stopped.on_train_batch_start = killing  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run(stopped, tmp_path / "run")
    steps = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert steps == {11: 9, 16: 16}[kill_at]  # batches, whatever adversary and ratio network do in between
    run(recipe(**options), tmp_path / "run", resume=True)
    for file in ("last.ckpt", "best.ckpt"):
        ours, theirs = (
            torch.load(tmp_path / name / "checkpoints" / file, weights_only=True) for name in ("run", "whole")
        )
        assert ours["global_step"] == theirs["global_step"]
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        assert_same(ours["state_dict"], theirs["state_dict"])
    assert any(name.startswith("adversary.") for name in theirs["state_dict"])


def _halving(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=max(1, total_steps // 2), gamma=0.5)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    common = ("recipe=fair", "recipe.weights=road", "recipe.adversary_steps=3", "recipe.ratio_steps=2", *QUIETLY)
    common = (*common, "trainer.max_epochs=3", "+trainer.limit_train_batches=3")  # whole batches only
    two = ("data.batch_size=32", "trainer=ddp", "trainer.strategy=ddp_find_unused_parameters_true")
    states = []
    for name, options in (("one", ("data.batch_size=64",)), ("two", two)):
        (tmp_path / name).mkdir()
        done = launch_process(tmp_path / name, *common, *options)
        assert done.code == 0, done.err
        states.append(last(done.runs[0]))
    for name, x in states[0].items():
        if name.startswith(("model.", "adversary.")):
            torch.testing.assert_close(states[1][name], x, rtol=1e-4, atol=1e-6)


def test_steps_are_those_of_the_predictor(tmp_path: Path) -> None:
    found = trained(recipe(scheduler=_halving), tmp_path, max_epochs=2)
    assert found.metrics["cost"]["steps"] == 16
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert [s["last_epoch"] for s in state["lr_schedulers"]] == [16, 16]
    assert [int(next(iter(o["state"].values()))["step"]) for o in state["optimizer_states"]] == [16, 48]


@pytest.mark.parametrize("weights", ["none", "broad", "road"])
@pytest.mark.parametrize("criterion", ["demographic_parity", "equalized_odds"])
def test_batches_of_one_group_stay_finite(weights: str, criterion: str, tmp_path: Path) -> None:
    data = leaky()
    rows = data.splits.train
    in_order = rows.groups.argsort(stable=True)  # type: ignore[union-attr]
    data.train_sampler = in_order.tolist()
    made = recipe(weights=weights, criterion=criterion, temperature=0.01, adversary_weight=3.0)
    trained(made, tmp_path, max_epochs=2, data=data)
    for name, x in last(tmp_path).items():
        assert x.isfinite().all(), name


def test_three_groups_do(tmp_path: Path) -> None:
    data = leaky()
    for part in (data.splits.train, data.splits.val, data.splits.test):
        part.groups = torch.arange(len(part)) % 3
    made = recipe(weights="road", group_counts=[167, 167, 166], group_names=["a", "b", "c"])
    found = trained(made, tmp_path, data=data)
    groups = found.metrics["fairness"]["groups"]
    assert groups["name"] == ["a", "b", "c"]
    assert sum(groups["count"]) == 200
    rates = groups["positive_rate"]
    assert found["p_rule"] == pytest.approx(min(rates) / max(rates))


@pytest.mark.parametrize("weights", ["broad", "road"])
def test_it_launches_and_reports(weights: str, tmp_path: Path) -> None:
    done = launch(tmp_path, "recipe=fair", f"recipe.weights={weights}", "trainer.max_epochs=3", *QUIETLY)
    assert done.code == 0, done.err
    (run,) = done.runs
    page = (run / "report.html").read_text()
    assert "not available" not in page
    assert "Share predicted positive, test split" in page
    assert "Mean weight by subgroup" in page
    assert "(chosen)" in page


def test_a_table_of_ones_own_with_subgroups(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    age, x, sex = 20 + 60 * torch.rand(300, generator=g), torch.randn(300, generator=g), torch.arange(300) % 2
    lines = [f"{a:.1f},{v:.4f},{'fm'[s]},{int(v + s > 0.5)}" for a, v, s in zip(age, x, sex, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(["age,value,sex,label", *lines]))
    table = ("data=csv", "data.path=table.csv", "data.label=label", "data.group=sex")
    subgroups = ("+recipe.subgroup_feature=0", "+recipe.subgroup_edges=[0.0]")
    done = launch(tmp_path, "recipe=fair", *table, *subgroups, "trainer.max_epochs=2", *QUIETLY)
    assert done.code == 0, done.err
    from counterpoise.recipes.run import load_result

    found = load_result(done.runs[0]).metrics["fairness"]
    assert found["subgroups"]["name"] == ["to 0", "above 0"]
    assert sum(map(sum, found["subgroups"]["count"])) == 60


def test_without_groups_it_says_so() -> None:
    node = {"_target_": "counterpoise.recipes.Fair", "_partial_": True}
    facts = {"model": nn.Linear(3, 2), "loss": CrossEntropyLoss(), "num_classes": 2, "in_features": 64}
    assert digits_lt().splits.group_counts is None
    with pytest.raises(ConfigError, match=r"recipe\.group_counts is missing.*the data has no groups"):
        make("recipe", node, facts)


def test_a_batch_without_groups_is_refused(tmp_path: Path) -> None:
    data = leaky()
    for part in (data.splits.train, data.splits.val, data.splits.test):
        part.groups = part.dataset.groups = None
    with pytest.raises(ValueError, match="the batch has no group"):
        trained(recipe(), tmp_path, data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_counts": [5]}, "group_counts has length 1, expected at least 2"),
        ({"group_names": ["a"]}, "group_names has length 1, expected 2"),
        ({"weights": "bread"}, "weights"),
        ({"criterion": "parity"}, "criterion"),
        ({"adversary_weight": -1.0}, "adversary_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"weights": "road", "temperature": math.inf}, "temperature"),
        ({"adversary_steps": 0}, "adversary_steps"),
        ({"ratio_steps": 0}, "ratio_steps"),
        ({"subgroup_feature": 3, "subgroup_edges": [0.0]}, "subgroup_feature"),
        ({"subgroup_feature": 0}, "subgroup_edges is None, expected ascending thresholds"),
        ({"subgroup_feature": 0, "subgroup_edges": [1.0, 0.0]}, "expected ascending"),
        ({"subgroup_edges": [0.0]}, "without subgroup_feature"),
        ({"subgroup_feature": 0, "subgroup_edges": [0.0], "subgroup_names": ["a"]}, "subgroup_names has length 1"),
        ({"reweighter": BROAD([1, 1])}, "BROAD is for the adversary's losses"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_more_than_two_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is 3, expected 2"):
        Fair(nn.Linear(3, 3), CrossEntropyLoss(), num_classes=3, in_features=3, group_counts=[1, 1])


# What is measured.


def counts_of(predicted: list[int], target: list[int], group: list[int], subgroup: list[int], k: int = 2) -> Tensor:
    metric = FairnessCounts(k, 2)
    rows = [torch.tensor(x) for x in (predicted, target, group, subgroup)]
    for part in (slice(0, 3), slice(3, None)):
        metric.update(*(x[part] for x in rows))
    return metric.compute()


def test_rates_are_those_of_the_cells() -> None:
    predicted, target = [1, 1, 0, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 1, 0, 0]
    group, subgroup = [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]
    counts = counts_of(predicted, target, group, subgroup)
    assert int(counts.sum()) == 8
    found = fairness_metrics(counts, group_names=["a", "b"], subgroup_names=["u", "v"])
    assert found.scalars["p_rule"] == 1.0  # 2 of 4 each
    assert found.details["subgroups"]["positive_rate"] == [[1.0, 0.5], [0.0, 0.5]]
    assert found.details["subgroups"]["p_rule"] == [0.5, 0.0]
    assert found.scalars["worst_local_p_rule"] == 0.0  # fair as a whole, and nowhere in particular
    assert found.scalars["worst_local_positive_rate_gap"] == 0.5
    assert found.details["groups"]["accuracy"] == [0.5, 0.5]
    assert any("fewer than 30" in note for note in found.notes)


def test_opposite_gaps_do_not_cancel_in_equalized_odds() -> None:
    counts = torch.tensor([[[8, 2], [6, 4]], [[6, 4], [8, 2]]])  # FPR 0.2 and 0.4, TPR 0.4 and 0.2
    assert equalized_odds_gap(counts) == pytest.approx(0.2)


def test_what_is_undefined_is_none_with_a_note() -> None:
    nobody = torch.zeros(2, 2, 2, 2, dtype=torch.int64)
    nobody[..., 0] = 3
    found = fairness_metrics(nobody, group_names=["a", "b"], subgroup_names=["u", "v"])
    assert found.scalars["p_rule"] is None
    assert found.scalars["worst_local_p_rule"] is None
    assert found.scalars["positive_rate_gap"] == 0.0
    assert found.scalars["fair_score"] == 0.0
    assert any("nobody is predicted positive" in note for note in found.notes)

    one_group = nobody.clone()
    one_group[0, 1] = 0
    one_group[0, 0, :, 1] = one_group[1, :, :, 1] = 3
    found = fairness_metrics(one_group, group_names=["a", "b"], subgroup_names=["u", "v"])
    assert found.scalars["worst_local_p_rule"] == found.details["subgroups"]["p_rule"][1] == 1.0
    assert found.details["subgroups"]["p_rule"][0] is None
    assert found.details["subgroups"]["accuracy"][0][1] is None
    assert any("undefined in subgroup u" in note for note in found.notes)

    found = fairness_metrics(one_group[:1], group_names=["a", "b"], subgroup_names=["all"])
    assert found.scalars["p_rule"] is found.scalars["equalized_odds_gap"] is None
    assert any("no evaluated example of group b" in note for note in found.notes)
    assert any("no subgroups" in note for note in found.notes)


def test_p_rule_is_smallest_over_largest_rate() -> None:
    assert p_rule(torch.tensor([1, 2, 3, 0]), torch.tensor([10, 10, 10, 0])) == pytest.approx(1 / 3)
    assert p_rule(torch.tensor([0, 2]), torch.tensor([10, 10])) == 0.0


def test_one_answer_for_everybody_scores_nothing() -> None:
    always = torch.tensor([[[0, 10], [0, 10]], [[0, 10], [0, 10]]])
    assert p_rule(always[:, :, 1].sum(1), always.sum((1, 2))) == 1.0
    assert fair_score(always, "demographic_parity") == 0.0
    perfect = torch.tensor([[[10, 0], [0, 10]], [[10, 0], [0, 10]]])
    for criterion in ("demographic_parity", "equalized_odds"):
        assert fair_score(perfect, criterion) == 1.0
    perfect[1] = torch.tensor([[15, 0], [0, 5]])  # right everywhere, at unequal rates
    assert fair_score(perfect, "equalized_odds") == 1.0
    assert fair_score(perfect, "demographic_parity") == 0.5


# The diabetes patients.


def test_diabetes_splits_hold_both_sexes_in_both_classes() -> None:
    splits = diabetes().splits
    sizes = [len(part) for part in (splits.train, splits.val, splits.test)]
    assert sum(sizes) == 442
    for part in (splits.train, splits.val, splits.test):
        cells = (2 * part.targets + part.groups).bincount(minlength=4)  # type: ignore[operator]
        assert int(cells.min()) >= 10
    assert splits.group_counts == splits.train.groups.bincount().tolist()  # type: ignore[union-attr]
    seen = torch.stack([item["input"] for item in splits.train])
    torch.testing.assert_close(seen.mean(0), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(9), atol=1e-5, rtol=0)


def test_diabetes_subgroups_are_thirds_by_age_whatever_the_columns() -> None:
    for keep_sex, width in ((False, 9), (True, 10)):
        splits = diabetes(keep_sex=keep_sex).splits
        assert splits.input_shape == (width,)
        facts = splits.facts
        made = recipe(width, **facts)
        x = torch.stack([item["input"] for item in splits.train])
        sizes = made.subgroup_of(x).bincount(minlength=3)
        assert len(facts["subgroup_names"]) == 3
        assert int(sizes.min()) > 0.3 * len(x)


def test_the_sex_column_is_kept_on_demand() -> None:
    kept = diabetes(keep_sex=True).splits.train
    x = torch.stack([item["input"] for item in kept])
    columns = [bool((x[:, i] > 0).long().eq(kept.groups).all()) for i in range(10)]
    assert columns.count(True) == 1
