"""The group-robust recipe: colours that mislead, judged by the worst group; and training twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoise.losses import CrossEntropyLoss
from counterpoise.recipes import GroupRobust, JustTrainTwice, SmallCNN, fit
from counterpoise.recipes.data import LabelledData, coloured_digits, digits_lt
from counterpoise.recipes.group_robust import GroupAccuracy
from counterpoise.samplers import GroupDRO

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


def data(**options: Any) -> LabelledData:
    return coloured_digits(batch_size=64, **options)


def recipe(reweighter: Any = None, lr: float = 0.05) -> GroupRobust:
    torch.manual_seed(0)
    return GroupRobust(
        SmallCNN(3, 2, width=8),
        CrossEntropyLoss(),
        num_classes=2,
        group_counts=data().splits.group_counts or [],
        reweighter=reweighter,
        optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
    )


def weights(made: GroupRobust) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def test_colour_goes_with_the_class_in_training_only() -> None:
    splits = data(correlation=0.9).splits
    of_class = [sum(splits.group_counts[2 * c : 2 * c + 2]) for c in range(2)]
    for c in range(2):
        assert splits.group_counts[3 * c] == of_class[c] - round(0.1 * of_class[c])
    for part, per_group in ((splits.val, 20), (splits.test, 100)):
        assert part.groups.bincount().tolist() == [per_group] * 4
    item = splits.train[0]
    colour = item["group"] % 2
    assert item["input"][colour].sum() > 0
    assert item["input"][1 - colour].sum() == item["input"][2].sum() == 0
    assert item["group"] // 2 == item["target"]


@pytest.mark.parametrize(("setting", "value"), [("correlation", 1.0), ("correlation", 0.4), ("val_per_group", 2)])
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=setting):
        data(**{setting: value})


def test_group_accuracy_is_that_of_each_group_over_batches() -> None:
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(50, 3, generator=g), torch.randint(3, (50,), generator=g)
    group = torch.randint(3, (50,), generator=g)
    metric = GroupAccuracy(4)
    for rows in (slice(0, 20), slice(20, 50)):
        metric.update(logits[rows], target[rows], group[rows])
    right = (logits.argmax(1) == target).double()
    expected = [float(right[group == k].mean()) for k in range(3)]
    assert metric.compute()[:3].tolist() == pytest.approx(expected)
    assert metric.compute()[3].isnan()


def test_group_dro_lifts_the_worst_group(tmp_path: Path) -> None:
    found = {}
    for name, reweighter in (("plain", None), ("dro", GroupDRO(data().splits.group_counts, step_size=0.05))):
        found[name] = fit(recipe(reweighter), data(), folder=tmp_path / name, max_epochs=8, **QUIET)
    assert found["dro"]["worst_group_accuracy"] > found["plain"]["worst_group_accuracy"] + 0.1
    groups = found["dro"].metrics["groups"]
    assert min(groups["accuracy"]) == pytest.approx(found["dro"]["worst_group_accuracy"])
    page = found["dro"].report.read_text()
    assert "Table of groups" not in page  # the name of a block that failed
    assert "Worst group:" in page


def test_training_twice_starts_again_with_the_errors_weighted_up(tmp_path: Path) -> None:
    made, callback = recipe(), JustTrainTwice(identify_at=0.5, up_weight=7)
    before = weights(made)
    seen = []

    def look(*_: Any) -> None:
        if callback.wrong is not None and not seen:
            seen.append(weights(made))

    made.on_train_epoch_start = look  # type: ignore[method-assign]  # runs behind the callbacks
    fit(made, data(), folder=tmp_path / "run", max_epochs=4, callbacks=[callback], **QUIET)
    assert torch.equal(seen[0], before)
    assert callback.wrong is not None
    assert 0 < int(callback.wrong.sum()) < len(callback.wrong)
    assert made.example_weight is not None
    expected = torch.where(callback.wrong, 7.0, 1.0)
    torch.testing.assert_close(made.example_weight, expected / expected.mean())


@pytest.mark.parametrize("stop", [1, 3])
def test_training_twice_resumes_exactly(tmp_path: Path, stop: int) -> None:
    """Stopped before the second training and in it: the same weights as one that was never stopped."""

    class Killed(RuntimeError):
        pass

    def killing(*_: Any) -> None:
        if stopped.current_epoch == stop:
            raise Killed

    whole = recipe()
    fit(whole, data(), folder=tmp_path / "whole", max_epochs=4, callbacks=[JustTrainTwice(0.5)], **QUIET)
    stopped = recipe()
    stopped.on_train_batch_start = killing  # type: ignore[method-assign]
    with pytest.raises(Killed):
        fit(stopped, data(), folder=tmp_path / "run", max_epochs=4, callbacks=[JustTrainTwice(0.5)], **QUIET)
    again = recipe()
    fit(again, data(), folder=tmp_path / "run", max_epochs=4, resume=True, callbacks=[JustTrainTwice(0.5)], **QUIET)
    assert torch.equal(weights(again), weights(whole))


def test_training_twice_needs_epochs_for_two(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_epochs is 1"):
        fit(recipe(), data(), folder=tmp_path / "run", max_epochs=1, callbacks=[JustTrainTwice()], **QUIET)


def test_data_without_groups_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from counterpoise.recipes.build import make
    from counterpoise.recipes.errors import ConfigError

    node = {"_target_": "counterpoise.recipes.GroupRobust", "_partial_": True}
    facts = {"model": SmallCNN(3, 2), "loss": CrossEntropyLoss(), "num_classes": 2}
    assert digits_lt().splits.group_counts is None
    with pytest.raises(ConfigError, match=r"recipe\.group_counts is missing.*the data has no groups"):
        make("recipe", node, facts)
