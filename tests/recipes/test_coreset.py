"""The coreset recipe: what is kept, what is trained on, and how a stopped run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from counterpoise.losses import CrossEntropyLoss, LogitAdjustedLoss
from counterpoise.recipes import MLP, Coreset, fit
from counterpoise.recipes.data import LabelledData, digits_lt
from counterpoise.recipes.meta_weights import learn_meta_weights
from counterpoise.recipes.selecting import read_selection

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


def data() -> LabelledData:
    return digits_lt(imbalance_factor=4, batch_size=64)


def recipe(loss: Any = None, **options: Any) -> Coreset:
    torch.manual_seed(0)
    settings = {"proxy_epochs": 2, "meta_epochs": 2, **options}
    sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    return Coreset(MLP(64, 10, hidden=(32,)), loss or CrossEntropyLoss(), num_classes=10, optimizer=sgd, **settings)


def weights(made: Coreset) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


@pytest.mark.parametrize("method", ["el2n", "forgetting", "k_center"])
def test_only_the_kept_are_trained_on(method: str, tmp_path: Path) -> None:
    seen: set[int] = set()
    made = recipe(method=method, fraction=0.2)
    inputs = made.inputs
    made.inputs = lambda batch: (seen.update(batch["index"].tolist()), inputs(batch))[1]  # type: ignore
    result = fit(made, data(), folder=tmp_path / "run", max_epochs=2, **QUIET)
    kept = read_selection(tmp_path / "run" / "selection.npz")["indices"]
    assert seen == set(kept.tolist())
    found = result.metrics["selection"]
    assert found["kept"] == len(kept) == round(0.2 * found["of"])
    assert result.metrics["cost"]["steps"] == 2 * -(-len(kept) // 64)
    page = result.report.read_text()  # type: ignore[union-attr]
    assert "Kept and dropped" not in page  # the name of a block that failed
    assert "Share of each class" in page


def test_everything_kept_is_plain_training(tmp_path: Path) -> None:
    from counterpoise.recipes import LongTailed

    made = recipe(method="random", fraction=1.0)
    fit(made, data(), folder=tmp_path / "all", max_epochs=2, **QUIET)
    kept = read_selection(tmp_path / "all" / "selection.npz")["indices"]
    assert sorted(kept.tolist()) == list(range(len(data().splits.train)))
    assert made.example_weight is None
    assert isinstance(made, LongTailed)


def test_the_weights_of_a_selection_multiply_the_losses(tmp_path: Path) -> None:
    made = recipe(method="k_center", fraction=0.2, weighted=True)
    seen: dict[int, float] = {}
    weigh = made.weight_of

    def watched(batch: Any) -> Any:
        weight = weigh(batch)
        seen.update(zip(batch["index"].tolist(), weight.tolist(), strict=True))
        return weight

    made.weight_of = watched  # type: ignore[method-assign]
    fit(made, data(), folder=tmp_path / "run", max_epochs=1, **QUIET)
    found = read_selection(tmp_path / "run" / "selection.npz")
    expected = found["weights"] / found["weights"].mean()
    assert [seen[i] for i in found["indices"].tolist()] == pytest.approx(expected.tolist(), rel=1e-6)
    assert len(set(seen.values())) > 3


def test_a_prior_based_loss_is_told_what_is_kept(tmp_path: Path) -> None:
    made = recipe(LogitAdjustedLoss(data().class_counts), method="random", fraction=0.3, balanced=False)
    result = fit(made, data(), folder=tmp_path / "run", max_epochs=1, **QUIET)
    kept = torch.tensor(result.metrics["selection"]["kept_per_class"], dtype=torch.float64)
    torch.testing.assert_close(made.loss.statistics.seen_prior(), kept / kept.sum(), check_dtype=False)


def test_reweighting_trains_on_everything_with_weights_of_mean_one(tmp_path: Path) -> None:
    made = recipe(method="moderate", fraction=0.3, use="reweight")
    result = fit(made, data(), folder=tmp_path / "run", max_epochs=2, **QUIET)
    assert made.example_weight is not None
    assert made.example_weight.shape == (len(data().splits.train),)
    assert float(made.example_weight.mean()) == pytest.approx(1, abs=1e-5)
    assert float(made.example_weight.std()) > 0
    assert 0 < result.metrics["selection"]["effective_share"] <= 1


@pytest.mark.parametrize("use", ["prune", "reweight"])
def test_a_stopped_run_goes_on_with_its_selection(use: str, tmp_path: Path) -> None:
    class Killed(RuntimeError):
        pass

    def killing(*_: Any) -> None:
        if stopped.current_epoch == 2:
            raise Killed

    options = {"method": "moderate" if use == "reweight" else "el2n", "use": use}
    whole = recipe(**options)
    fit(whole, data(), folder=tmp_path / "whole", max_epochs=3, **QUIET)
    stopped = recipe(**options)
    stopped.on_train_batch_start = killing  # type: ignore[method-assign]
    with pytest.raises(Killed):
        fit(stopped, data(), folder=tmp_path / "run", max_epochs=3, **QUIET)
    before = (tmp_path / "run" / "selection.npz").stat().st_mtime_ns
    again = recipe(**options)
    fit(again, data(), folder=tmp_path / "run", max_epochs=3, resume=True, **QUIET)
    assert (tmp_path / "run" / "selection.npz").stat().st_mtime_ns == before
    assert torch.equal(weights(again), weights(whole))


def test_weights_favour_what_helps_the_clean_set() -> None:
    """Half of the labels of one half are wrong: its examples end with smaller weights."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    x = torch.randn(400, 8, generator=g) + 1.5 * (2 * y[:, None] - 1)
    noisy = y.clone()
    noisy[:120] = 1 - y[:120]
    torch.manual_seed(0)
    learned = learn_meta_weights(
        MLP(8, 2, hidden=(16,)),
        CrossEntropyLoss(),
        (x, noisy),
        (x[300:], y[300:]),
        batch_size=50,
        epochs=20,
        step_size=0.05,
        weight_rate=0.01,
    )
    assert learned.shape == (400,)
    assert float(learned[:120].mean()) < 0.8 * float(learned[120:300].mean())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "kcenter"}, "method"),
        ({"fraction": 0}, "fraction"),
        ({"use": "drop"}, "use"),
        ({"keep": "best"}, "keep"),
    ],
)
def test_settings_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is"):
        recipe(**options)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="counterpoise-select"):
        recipe().prepare(data(), tmp_path, resume=False, world_size=2)
