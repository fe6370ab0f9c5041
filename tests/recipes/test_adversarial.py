"""The adversarial recipe: attacks do harm and stay where they may be; what is trained against them stands better."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from counterpoise.contrastive import BarlowTwinsLoss
from counterpoise.losses import CrossEntropyLoss, LogitAdjustedLoss
from counterpoise.recipes import MLP, Adversarial, LongTailed, SmallCNN, fit
from counterpoise.recipes.attacks import Attacked, projected_gradient_attack, strongest_attack
from counterpoise.recipes.data import InMemory, LabelledData, digits_lt
from counterpoise.recipes.robustness import input_bounds, pictures_of, robustness_metrics
from counterpoise.samplers import KLDRO, GroupDRO
from tests.recipes.launching import launch

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
SMALL: dict[str, Any] = {"steps": 2, "validation_steps": 1, "test_steps": 2, "test_restarts": 1, "curve": [0.5]}


def data() -> LabelledData:
    return digits_lt(batch_size=64)


def recipe(model: nn.Module | None = None, loss: nn.Module | None = None, **options: Any) -> Adversarial:
    torch.manual_seed(0)
    return Adversarial(
        model or MLP(64, 10, hidden=(32,)),
        loss or CrossEntropyLoss(),
        num_classes=10,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
        **{"input_range": (0.0, 1.0), **SMALL, **options},
    )


def trained(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def images(rows: int = 12, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images in [0, 1], labels and draws."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(rows, channels, 8, 8, generator=g)
    return x, torch.randint(10, (rows,), generator=g), torch.rand(x.shape, generator=g)


def network(channels: int = 1) -> SmallCNN:
    """Untrained, its batch normalisation with statistics of its own."""
    torch.manual_seed(0)
    model = SmallCNN(channels, 10, width=4).train()
    for _ in range(30):
        model(torch.rand(16, channels, 8, 8))
    return model


@pytest.mark.parametrize("inner", ["projection", "barrier"])
@pytest.mark.parametrize("started", [False, True], ids=["from the input", "from a random point"])
def test_an_attack_raises_every_loss_inside_the_ball_and_the_range(inner: str, started: bool) -> None:
    (x, y, draws), model = images(), network().eval()
    options = {"radius": 0.1, "step_size": 0.05, "steps": 10, "low": 0.0, "high": 1.0, "inner": inner}
    moved = projected_gradient_attack(model, x, y, draws=draws if started else None, **options)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert (moved == 0).any()
    assert (moved == 1).any()
    before, after = (cross_entropy(model(z), y, reduction="none") for z in (x, moved))
    assert bool((after > before).all())


def test_a_radius_a_channel_and_a_range_a_channel() -> None:
    (x, y, draws), model = images(channels=3), network(channels=3)
    radius = torch.tensor([0.0, 0.05, 0.2])[:, None, None]
    low, high = torch.tensor([0.0, 0.2, 0.0])[:, None, None], torch.tensor([1.0, 0.8, 1.0])[:, None, None]
    moved = projected_gradient_attack(
        model, x, y, radius=radius, step_size=radius, steps=3, draws=draws, low=low, high=high
    )
    assert torch.equal(moved[:, 0], x[:, 0])
    assert ((moved - x).abs() <= radius + 1e-6).all()
    inside = (x[:, 1] >= 0.2) & (x[:, 1] <= 0.8)
    assert bool(((moved[:, 1] >= 0.2) & (moved[:, 1] <= 0.8))[inside].all())
    outside = (x[:, 1] < 0.2) & ~inside
    assert bool((moved[:, 1] >= x[:, 1])[outside].all()), "what lies outside of the range moves towards it only"


@pytest.mark.parametrize("inner", ["projection", "barrier"])
def test_one_step_solves_a_linear_model_exactly(inner: str) -> None:
    """Two classes, logits (0, w x): the loss rises with -y w x, whose largest value in the ball is at a corner."""
    w = torch.tensor([0.5, -2.0, 0.0, 1.0], dtype=torch.float64)

    def linear(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x), dtype=x.dtype), x @ w], 1)

    model = nn.Module()
    model.forward = linear  # type: ignore[method-assign]
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    direction = torch.where(y == 1, -1.0, 1.0)[:, None] * w.sign()
    options: dict[str, Any] = {"radius": 0.3, "step_size": 0.3, "steps": 1, "inner": inner, "barrier": 1e-12}
    moved = projected_gradient_attack(model, x, y, **options)
    torch.testing.assert_close(moved, x + 0.3 * direction, rtol=0, atol=1e-10)


def test_the_barrier_balances_the_gradient() -> None:
    """At the solution of max g d + c log(r - |d|) the derivative is zero: |g| = c / (r - |d|), or d is zero."""
    g, r, c = torch.tensor([[2.0, -0.5, 0.01]], dtype=torch.float64), 0.1, 0.01
    p = torch.full((1, 3), 0.5, dtype=torch.float64)

    class Slope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Logits whose cross-entropy has the gradient g wherever x is."""
            z = (x - p) @ g.T
            return torch.cat([torch.zeros_like(z), z - z.detach()], 1) * 2  # derivative 2 g softmax = g

    moved = projected_gradient_attack(
        Slope(), p, torch.tensor([0]), radius=r, step_size=r, steps=1, inner="barrier", barrier=c
    )
    d = (moved - p)[0]
    torch.testing.assert_close(c / (r - d[:2].abs()), g[0, :2].abs())
    assert torch.equal(d.sign(), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))


def test_an_attack_leaves_no_trace_in_the_model() -> None:
    (x, y, draws), model = images(), network()
    model.encoder[0].eval()  # a part that is frozen stays frozen, and the rest in training mode
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    projected_gradient_attack(model, x, y, radius=0.1, step_size=0.1, steps=3, draws=draws)
    strongest_attack(model, Attacked(x, model.eval()(x)), x, y, [draws], radius=0.1, step_size=0.1, steps=2)
    model.train()
    model.encoder[0].eval()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not x.requires_grad


def test_a_row_is_attacked_the_same_in_any_batch() -> None:
    (x, y, draws), model = images(), network()
    options: dict[str, Any] = {"radius": 0.1, "step_size": 0.03, "steps": 5}
    whole = projected_gradient_attack(model, x, y, draws=draws, **options)
    part = projected_gradient_attack(model, x[3:5], y[3:5], draws=draws[3:5], **options)
    torch.testing.assert_close(part, whole[3:5])


def test_without_radius_or_steps_nothing_moves() -> None:
    (x, y, draws), model = images(), network()
    still = projected_gradient_attack(model, x, y, radius=0.0, step_size=0.1, steps=3, draws=draws, low=-1.0, high=0.25)
    assert torch.equal(still, x)
    assert torch.equal(projected_gradient_attack(model, x, y, radius=0.1, step_size=0.1, steps=0), x)
    made = recipe(radius=0.0)
    assert made.attacked(x, {"target": y, "index": torch.arange(12)}) is x


def test_more_starts_and_larger_radii_never_help_the_model() -> None:
    (x, _, draws), model = images(60), network().eval()
    y = model(x).argmax(1)
    found, right = Attacked(x, model(x)), [60]
    for radius, starts in ((0.01, [draws]), (0.01, [1 - draws]), (0.02, [draws]), (0.05, [None, draws])):
        found = strongest_attack(model, found, x, y, starts, radius=radius, step_size=radius / 2, steps=3)
        right.append(int((found.logits.argmax(1) == y).sum()))
        assert float((found.inputs - x).abs().max()) <= radius + 1e-6
        torch.testing.assert_close(model(found.inputs), found.logits)
    assert right == sorted(right, reverse=True)
    assert right[-1] < 30


def test_gradients_work_in_inference_mode_and_under_autocast() -> None:
    """Validation and prediction run in it; weights cast there by autocast are no use for a gradient."""
    (x, y, draws), model = images(), network().eval()
    options: dict[str, Any] = {"radius": 0.1, "step_size": 0.05, "steps": 3}
    expected = projected_gradient_attack(model, x, y, draws=draws, **options)
    with torch.inference_mode():
        inside = projected_gradient_attack(model, x.clone(), y.clone(), draws=draws.clone(), **options)
    assert torch.equal(inside, expected)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = Attacked(x.clone(), model(x).float())
        found = strongest_attack(model, found, x.clone(), found.logits.argmax(1), [draws], **options)
    assert float((found.inputs - x).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"radius": -0.1}, "radius is -0.1"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"steps": -1}, "steps is -1"),
        ({"inner": "penalty"}, "inner is 'penalty'"),
        ({"barrier": 0.0}, "barrier is 0.0"),
        ({"x": torch.zeros(12, 1, 8, 8, dtype=torch.uint8)}, "x is of type torch.uint8"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "target has shape"),
        ({"draws": torch.zeros(12, 1, 8, 9)}, "draws has shape"),
    ],
)
def test_an_attack_refuses_what_it_cannot_do(change: dict[str, Any], said: str) -> None:
    x, y, _ = images()
    options = {"x": x, "target": y, "radius": 0.1, "step_size": 0.1, "steps": 2, **change}
    with pytest.raises(ValueError, match=said):
        projected_gradient_attack(network(), **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"radius": -1.0}, "radius"),
        ({"steps": -1}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"inner": "x"}, "inner"),
        ({"beta": -0.5}, "beta"),
        ({"worst_group": -0.5}, "worst_group is -0.5"),
        ({"worst_group": 1.0}, r"worst_group needs a reweighter: KLDRO\(math.inf\)"),
        ({"validation_steps": 0}, "validation_steps"),
        ({"test_restarts": 0}, "test_restarts"),
        ({"curve": [0.5, 0.0]}, "curve"),
        ({"input_range": (1.0, 0.0)}, "input_range"),
        ({"input_range": (0.0, 0.5, 1.0)}, "input_range has 3 entries"),
        ({"loss": BarlowTwinsLoss()}, "BarlowTwinsLoss is a two_view objective"),
        ({"loss": LogitAdjustedLoss([1, 2, 3])}, r"class_counts has shape \(3,\)"),
    ],
)
def test_the_recipe_refuses_before_training(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(**change)


def test_the_range_of_the_inputs_is_known_where_the_data_can_tell_it() -> None:
    assert data().splits.train.input_range == ([0.0], [1.0])
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(6)[:, None, None, None].expand(12, 2, 1, 1)
    normalised = InMemory(pixels, torch.zeros(12, dtype=torch.long), mean=(0.2, 0.5), std=(0.5, 0.25))
    low, high = normalised.input_range or ([], [])
    assert low == pytest.approx(normalised[0]["input"].flatten().tolist())
    assert high == pytest.approx(normalised[1]["input"].flatten().tolist())
    assert InMemory(torch.rand(4, 3), torch.zeros(4, dtype=torch.long)).input_range is None
    changed = InMemory(pixels, torch.zeros(12, dtype=torch.long), transform=lambda x: 3 * x)
    assert changed.input_range is None


def test_the_radius_is_a_fraction_of_the_range() -> None:
    """Inputs normalised by mean and std are attacked as the pixels that they were."""
    x, y, _ = images()
    batch = {"target": y, "index": torch.arange(12)}
    plain = recipe(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), radius=0.1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data = 0.25 * plain.model[1].weight.data
    model[1].bias.data = plain.model[1].bias.data + 0.5 * plain.model[1].weight.data.sum(1)
    scaled = recipe(model, radius=0.1, input_range=([-2.0], [2.0]))
    expected = plain.attacked(x, batch)
    torch.testing.assert_close(scaled.attacked((x - 0.5) / 0.25, batch), (expected - 0.5) / 0.25, atol=1e-5, rtol=0)
    assert not torch.equal(expected, x)


def test_scores_of_classes_and_radii() -> None:
    target = torch.tensor([0] * 4 + [1] * 4 + [2] * 2)
    robust = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 1, 1])
    hits = torch.stack([torch.ones(10), robust, torch.zeros(10)], 1).bool()
    scalars, details = robustness_metrics(hits, target, 4, [0.0, 0.1, 0.2], 0.1)
    assert scalars["robust_accuracy"] == pytest.approx(0.6)
    assert scalars["robust_balanced_accuracy"] == pytest.approx((0.75 + 0.25 + 1) / 3)
    assert scalars["worst_class_robust_accuracy"] == 0.25
    assert scalars["worst_30_percent_robust_accuracy"] == 0.25, "one of three classes, rounded up"
    assert details["per_class"] == {"clean": [1, 1, 1, None], "robust": [0.75, 0.25, 1, None]}
    assert details["curve"] == {"radius": [0.0, 0.1, 0.2], "accuracy": [1.0, pytest.approx(0.6), 0.0]}


def test_pictures_are_of_images_only() -> None:
    x, y, _ = images(channels=3)
    low, high = input_bounds((0.0, 2.0))
    pictures, rows = pictures_of(x, x + 0.5, y, low, high)
    assert torch.equal(pictures[:, 0], x[rows] / 2)
    torch.testing.assert_close(pictures[:, 1], x[rows] / 2 + 0.25)
    assert len(y[rows].unique()) == len(rows) == min(6, len(y.unique()))
    assert len(pictures_of(x.flatten(1), x.flatten(1), y, low, high)[0]) == 0


def test_training_on_attacked_inputs_stands_the_attack_better(tmp_path: Path) -> None:
    found = {}
    for name, steps in (("clean", 0), ("attacked", 5)):
        torch.manual_seed(0)
        made = recipe(MLP(64, 10, hidden=(64,)), steps=steps, radius=0.15, test_steps=10)
        found[name] = fit(made, data(), folder=tmp_path / name, max_epochs=20, **QUIET)
    assert found["attacked"]["robust_accuracy"] > found["clean"]["robust_accuracy"] + 0.1
    assert found["clean"]["accuracy"] > 0.7
    result = found["attacked"]
    assert result["worst_class_robust_accuracy"] <= result["worst_30_percent_robust_accuracy"]
    assert result["worst_30_percent_robust_accuracy"] <= result["robust_balanced_accuracy"] <= result["accuracy"]
    robustness = result.metrics["robustness"]
    assert robustness["curve"]["radius"] == pytest.approx([0.0, 0.075, 0.15])
    assert robustness["curve"]["accuracy"][0] == pytest.approx(result["accuracy"])
    assert robustness["curve"]["accuracy"][2] == pytest.approx(result["robust_accuracy"])
    with np.load(result.folder / "predictions.npz") as stored:
        robust = (stored["robust_logits"].argmax(1) == stored["target"]).mean()
        assert stored["hits"].shape == (400, 3)
        assert stored["pictures"].shape[1:] == (2, 1, 8, 8)
    assert robust == pytest.approx(result["robust_accuracy"])
    assert result.report is not None
    page = result.report.read_text()
    assert "not available" not in page
    for said in ("Worst class under attack", "Accuracy against radius", "until they are attacked", "Robust: correct"):
        assert said in page


def test_without_a_radius_it_is_plain_training(tmp_path: Path) -> None:
    plain = LongTailed(
        MLP(64, 10, hidden=(32,)),
        CrossEntropyLoss(),
        num_classes=10,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
    )
    made = recipe(radius=0.0)
    plain.model.load_state_dict(made.model.state_dict())
    ours = fit(made, data(), folder=tmp_path / "ours", max_epochs=1, **QUIET)
    theirs = fit(plain, data(), folder=tmp_path / "theirs", max_epochs=1, **QUIET)
    assert torch.equal(trained(made), trained(plain))
    assert ours["robust_accuracy"] == ours["accuracy"] == theirs["accuracy"]


def test_an_infinite_temperature_is_plain_adversarial_training(tmp_path: Path) -> None:
    weights = []
    for name, reweighter in (("plain", None), ("robust", KLDRO(temperature=1e9, momentum=0.2))):
        made = recipe(reweighter=reweighter)
        fit(made, data(), folder=tmp_path / name, max_epochs=1, **QUIET)
        weights.append(trained(made))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_the_training_loss_is_that_of_the_sheet() -> None:
    """sum w l(attacked) + beta mean l(clean), w from KL-DRO with its moving average."""
    x, y, _ = images()
    batch = {"input": x, "target": y, "index": torch.arange(12)}
    reweighter = KLDRO(temperature=0.5, momentum=0.25)
    made = recipe(reweighter=reweighter, beta=0.3)
    made.log_training = lambda *_: None  # type: ignore[method-assign]
    made.training_step(batch, 0)
    u = float(reweighter.log_u.exp())
    batch = {"input": x.flip(0), "target": y, "index": torch.arange(12)}
    attacked, clean = (
        cross_entropy(made.model(z), y, reduction="none").detach()
        for z in (made.attacked(batch["input"], batch), batch["input"])
    )
    u = 0.75 * u + 0.25 * float((attacked / 0.5).exp().mean())
    w = (attacked / 0.5).exp() / (12 * u)
    expected = (w * attacked).sum() + 0.3 * clean.mean()
    assert made.training_step(batch, 0).item() == pytest.approx(float(expected), rel=1e-5)
    assert float(reweighter.log_u.exp()) == pytest.approx(u, rel=1e-5)


@pytest.mark.parametrize("grouped", [False, True], ids=["by class", "by group"])
def test_the_worst_group_is_a_term_of_its_own(grouped: bool) -> None:
    x, y, _ = images()
    groups = torch.arange(12) % 3 if grouped else y
    batch = {"input": x, "target": y, "index": torch.arange(12), **({"group": groups} if grouped else {})}
    without, with_term = (recipe(reweighter=KLDRO(math.inf), worst_group=weight) for weight in (0.0, 0.7))
    for made in (without, with_term):
        made.log_training = lambda *_: None  # type: ignore[method-assign]
    losses = cross_entropy(without.model(without.attacked(x, batch)), y, reduction="none").detach()
    worst = max(float(losses[groups == g].mean()) for g in groups.unique())
    plain = float(without.training_step(batch, 0))
    assert plain == pytest.approx(float(losses.mean()), rel=1e-5)
    assert float(with_term.training_step(batch, 0)) == pytest.approx(plain + 0.7 * worst, rel=1e-5)


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    x, y, _ = images()
    made = recipe(radius=0.2)
    whole = made.attacked(x, {"target": y, "index": torch.arange(12)})
    part = made.attacked(x[4:6], {"target": y[4:6], "index": torch.tensor([4, 5])})
    torch.testing.assert_close(part, whole[4:6])
    other = recipe(radius=0.2, seed=1).attacked(x, {"target": y, "index": torch.arange(12)})
    assert not torch.allclose(other, whole)


@pytest.mark.parametrize("inner", ["projection", "barrier"])
def test_a_stopped_run_resumes_exactly(tmp_path: Path, inner: str) -> None:
    def made() -> Adversarial:
        torch.manual_seed(0)
        model = SmallCNN(1, 10, width=4)
        return recipe(model, reweighter=KLDRO(temperature=2.0, momentum=0.1), beta=0.5, inner=inner)

    class Killed(RuntimeError):
        pass

    def killing(*_: Any) -> None:
        if stopped.current_epoch == 2:
            raise Killed

    whole = made()
    fit(whole, data(), folder=tmp_path / "whole", max_epochs=3, **QUIET)
    stopped = made()
    stopped.on_train_batch_start = killing  # type: ignore[method-assign]
    with pytest.raises(Killed):
        fit(stopped, data(), folder=tmp_path / "run", max_epochs=3, **QUIET)
    again = made()
    fit(again, data(), folder=tmp_path / "run", max_epochs=3, resume=True, **QUIET)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "run")
    ]
    assert "reweighter.log_u" in states[0]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_it_composes_with_a_reweighter_by_class_and_a_prior_based_loss(tmp_path: Path) -> None:
    counts = data().class_counts
    dro = GroupDRO(counts, step_size=0.1, by="target")
    made = recipe(loss=LogitAdjustedLoss(counts), reweighter=dro)
    result = fit(made, data(), folder=tmp_path, max_epochs=2, **QUIET)
    assert result.metrics["status"] == "completed"
    assert float(dro.group_weights.std()) > 0


def test_the_doubly_robust_experiment_runs_in_half_precision(tmp_path: Path) -> None:
    settings = ("trainer.max_epochs=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
    small = ("recipe.test_steps=2", "recipe.steps=2", "model.width=4", "trainer.precision=bf16-mixed")
    outcome = launch(tmp_path, "experiment=doubly_robust", *settings, *small)
    assert outcome.code == 0, outcome.err
    assert "Robust accuracy" in outcome.out
    assert "momentum: 0.1" in (outcome.runs[0] / "config.yaml").read_text()


def test_data_of_another_kind_are_refused(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "recipe=adversarial", "data=digits_canvas", "trainer.enable_progress_bar=false")
    assert outcome.code == 2
    assert "one class an example" in outcome.err
