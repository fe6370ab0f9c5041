"""Uncertainty weighting: its optima and scale invariance, tasks that are absent, noise levels recovered, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from counterpoise._core import sum_over_ranks, world_size
from counterpoise.losses import (
    EqualWeighting,
    StaticWeighting,
    UncertaintyWeighting,
    cross_entropy_loss,
    softmax_likelihood,
    task_means,
    uncertainty_weighted_loss,
)
from counterpoise.losses.uncertainty_weighting import KINDS
from tests.pool import Pool

OPTIMUM: dict[str, Callable[[float], float]] = {
    "gaussian": math.log,
    "laplace": math.log,
    "classification": lambda loss: math.log(2 * loss),
    # L = 2 c^4 / (1 + c^2), solved for c^2
    "liebel_korner": lambda loss: math.log((loss + math.sqrt(loss**2 + 8 * loss)) / 4),
}
optimised = pytest.mark.parametrize("kind", OPTIMUM)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_one(loss: Tensor | float, s: Tensor | float, kind: str, **options: Any) -> Tensor:
    """The combined loss of a single task with a single row."""
    losses = torch.as_tensor(loss, dtype=torch.float64).reshape(1, 1)
    scale = torch.as_tensor(s, dtype=torch.float64).reshape(1)
    return uncertainty_weighted_loss(losses, log_variance=scale, kinds=[kind], **options)


# The formulas


def test_at_zero_a_gaussian_counts_half_and_the_others_fully() -> None:
    assert of_one(3.0, 0.0, "gaussian") == 1.5
    assert of_one(3.0, 0.0, "laplace") == 3
    assert of_one(3.0, 0.0, "classification") == 3
    assert_close(of_one(3.0, 0.0, "liebel_korner").item(), 1.5 + math.log(2))
    assert of_one(3.0, 7.0, "likelihood") == 3


@optimised
@pytest.mark.parametrize("loss", [0.01, 0.5, 1.0, 40.0])
def test_the_optimum_is_where_the_table_says(kind: str, loss: float) -> None:
    best = OPTIMUM[kind](loss)
    s = double(best).requires_grad_()
    (slope,) = torch.autograd.grad(of_one(loss, s, kind), s)
    assert abs(slope.item()) < 1e-12
    value = of_one(loss, best, kind)
    assert all(of_one(loss, best + step, kind) > value for step in (-1.0, -0.1, 0.1, 1.0))


@pytest.mark.parametrize("loss", [0.01, 40.0])
def test_the_gaussian_optimum_is_worth_half_of_one_plus_log_loss(loss: float) -> None:
    assert_close(of_one(loss, math.log(loss), "gaussian").item(), 0.5 + 0.5 * math.log(loss))


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
def test_liebel_korner_is_stationary_at_its_equation(c: float) -> None:
    s = double(2 * math.log(c)).requires_grad_()
    (slope,) = torch.autograd.grad(of_one(2 * c**4 / (1 + c**2), s, "liebel_korner"), s)
    assert abs(slope.item()) < 1e-12


@pytest.mark.parametrize("s", [-30.0, -1.0, 0.0, 5.0])
def test_liebel_korner_is_never_negative_and_the_paper_can_be(s: float) -> None:
    assert of_one(1e-9, s, "liebel_korner") >= 0
    assert of_one(1e-9, -5.0, "gaussian") < 0


def test_the_constants_make_densities_exact() -> None:
    error, s = 1.7, 0.6
    gaussian = torch.distributions.Normal(0.0, math.exp(s / 2)).log_prob(torch.tensor(error, dtype=torch.float64))
    assert_close(of_one(error**2, s, "gaussian", constants=True), -gaussian)
    laplace = torch.distributions.Laplace(0.0, math.exp(s)).log_prob(torch.tensor(error, dtype=torch.float64))
    assert_close(of_one(error, s, "laplace", constants=True), -laplace)


def test_the_softmax_likelihood_is_cross_entropy_at_a_temperature() -> None:
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    s = torch.tensor(0.8, dtype=torch.float64)
    rows = softmax_likelihood(logits, target, s)
    assert_close(rows, cross_entropy_loss(logits / s.exp(), target, reduction="none"))
    assert_close(softmax_likelihood(logits, target, s, reduction="mean"), rows.mean())
    plain = cross_entropy_loss(logits, target)
    assert_close(of_one(plain, 0.0, "classification"), softmax_likelihood(logits, target, 0 * s).mean())


def test_a_likelihood_passes_through_and_its_scale_learns_through_it() -> None:
    weighting = UncertaintyWeighting({"kind": "likelihood", "depth": "gaussian"})
    logits, target = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    rows = softmax_likelihood(logits, target, weighting.log_variance[0])
    total = weighting({"kind": rows, "depth": torch.ones(5)})
    assert_close(total, rows.mean() + 0.5)
    total.backward()
    assert weighting.log_variance.grad[0] != 0


# What it is for


def gradient_at_the_optimum(scale: float, kind: str) -> Tensor:
    """Of a model's parameter, through its task's loss times ``scale``, with s at its optimum."""
    theta = double(0.3, -1.2).requires_grad_()
    loss = scale * (theta - double(1.0, 2.0)).square().sum()
    total = of_one(loss, OPTIMUM[kind](loss.item()), kind)
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "classification"])
@pytest.mark.parametrize("scale", [1e-6, 10.0, 1e5])
def test_at_the_optimum_a_tasks_scale_does_not_reach_the_model(kind: str, scale: float) -> None:
    assert_close(gradient_at_the_optimum(scale, kind), gradient_at_the_optimum(1.0, kind))


@pytest.mark.parametrize(("kind", "factor"), [("gaussian", 2), ("classification", 2), ("laplace", 1)])
def test_at_the_optimum_the_models_gradient_is_that_of_the_log_loss(kind: str, factor: int) -> None:
    theta = double(0.3, -1.2).requires_grad_()
    log_loss = (theta - double(1.0, 2.0)).square().sum().log()
    assert_close(gradient_at_the_optimum(1.0, kind), torch.autograd.grad(log_loss / factor, theta)[0])


def test_equal_losses_give_equal_weights() -> None:
    weighting = UncertaintyWeighting(["gaussian"] * 3)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        weighting(torch.full((4, 3), 2.5)).backward()
        optimizer.step()
    assert weighting.effective_weights.unique().numel() == 1
    assert weighting.effective_weights[0] != 0.5


def test_noise_levels_are_recovered_on_linear_data() -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=g, dtype=torch.float64)
    noise = torch.randn(2000, 2, generator=g, dtype=torch.float64) * double(10.0, 1.0)
    y = x @ double(2.0, 3.0)[None] + double(8.0, 3.0) + noise
    model, weighting = nn.Linear(1, 2).double(), UncertaintyWeighting({"wide": "gaussian", "narrow": "gaussian"})
    optimizer = torch.optim.Adam([*model.parameters(), *weighting.parameters()], lr=0.1)
    for _ in range(2000):
        errors = (model(x) - y).square()
        optimizer.zero_grad()
        weighting({"wide": errors[:, 0], "narrow": errors[:, 1]}).backward()
        optimizer.step()
    sigma = (weighting.log_variance.detach() / 2).exp()
    assert_close(sigma.double(), double(10.0, 1.0), rtol=0.05, atol=0)
    assert_close(sigma.double(), errors.detach().mean(0).sqrt(), rtol=1e-3, atol=0)


# Tasks


def test_a_task_is_averaged_over_its_own_rows() -> None:
    losses = torch.tensor([[1.0, torch.nan], [3.0, 8.0], [5.0, torch.nan]])
    mean, present = task_means(losses, mask=losses.isfinite())
    assert mean.tolist() == [3.0, 8.0]
    assert present.tolist() == [True, True]


def test_a_loss_that_counts_and_is_nan_is_not_dropped() -> None:
    losses = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    for weighting in (EqualWeighting(), StaticWeighting([1.0, 0.0]), UncertaintyWeighting(["gaussian"] * 2)):
        assert weighting(losses).isnan()
        assert weighting(losses, mask=~losses.isnan()).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_task_neither_counts_nor_moves_its_scale(kind: str) -> None:
    weighting = UncertaintyWeighting(["gaussian", kind], initial=[0.2, 0.7])
    losses = torch.tensor([[1.0, torch.nan], [3.0, torch.nan]], requires_grad=True)
    total = weighting(losses, mask=torch.tensor([True, False]).expand(2, 2))
    alone = UncertaintyWeighting(["gaussian"], initial=0.2)
    assert_close(total, alone(losses[:, :1]))
    total.backward()
    assert weighting.log_variance.grad[1] == 0
    assert weighting.log_variance.grad[0] != 0
    assert losses.grad[:, 1].tolist() == [0.0, 0.0]


def test_a_task_whose_rows_all_weigh_nothing_is_absent() -> None:
    weighting = UncertaintyWeighting(["gaussian"], initial=0.7)
    total = weighting(torch.ones(3, 1), weight=torch.zeros(3))
    total.backward()
    assert total == 0
    assert weighting.log_variance.grad.tolist() == [0.0]


def test_a_mapping_is_the_matrix_by_name() -> None:
    weighting = UncertaintyWeighting({"depth": "laplace", "kind": "classification"}, initial=[0.3, -0.4])
    losses, weight = torch.rand(5, 2), torch.rand(5)
    by_name = {"kind": losses[:, 1], "depth": losses[:, 0]}
    assert_close(weighting(by_name), weighting(losses))
    assert_close(weighting(by_name, weight=weight), weighting(losses, weight=weight))
    assert_close(weighting({name: x.mean() for name, x in by_name.items()}), weighting(losses))


def test_a_name_that_is_missing_or_empty_is_an_absent_task() -> None:
    weighting = UncertaintyWeighting({"depth": "laplace", "kind": "classification"}, initial=[0.3, -0.4])
    depth = torch.rand(5)
    alone = weighting({"depth": depth})
    assert_close(alone, weighting({"depth": depth, "kind": torch.zeros(0)}))
    assert_close(alone, depth.mean() * math.exp(-0.3) + 0.3)


def test_tasks_may_have_rows_of_their_own() -> None:
    mean, _ = task_means({"a": torch.tensor([1.0, 2.0, 6.0]), "b": torch.tensor([4.0]), "c": torch.tensor(7.0)})
    assert mean.tolist() == [3.0, 4.0, 7.0]


def test_equal_and_static_weights_are_sums_of_the_means() -> None:
    losses = torch.rand(6, 3)
    assert_close(EqualWeighting()(losses), losses.mean(0).sum())
    static = StaticWeighting({"a": 1.0, "b": 0.5, "c": 2.0})
    assert_close(static(losses), (losses.mean(0) * torch.tensor([1.0, 0.5, 2.0])).sum())
    assert_close(static({"b": losses[:, 1]}), 0.5 * losses[:, 1].mean())
    assert static.half().task_weights.dtype == torch.float64
    assert static.effective_weights.tolist() == [1.0, 0.5, 2.0]


def test_what_cannot_work_is_said() -> None:
    weighting = UncertaintyWeighting({"a": "gaussian", "b": "laplace"})
    for losses, message in (
        (torch.rand(4, 3), r"losses has shape \(4, 3\), expected \(N, 2\)"),
        ({"d": torch.rand(4)}, "losses holds 'd'"),
        ({}, "losses is empty"),
        ({"a": torch.rand(4, 2)}, r"losses\['a'\] has shape \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            weighting(losses)
    with pytest.raises(ValueError, match=r"losses\['b'\] has shape \(\), expected \(4,\)"):
        weighting({"a": torch.rand(4), "b": torch.tensor(1.0)}, weight=torch.ones(4))
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        UncertaintyWeighting(["gausian"])
    with pytest.raises(ValueError, match="kinds is empty"):
        UncertaintyWeighting([])
    with pytest.raises(ValueError, match="initial has shape"):
        UncertaintyWeighting(["gaussian"], initial=[0.0, 1.0])
    with pytest.raises(ValueError, match="task_weights is -1"):
        StaticWeighting([1.0, -1.0])


# Training


def test_a_scale_outside_its_bounds_is_projected_and_comes_back() -> None:
    weighting = UncertaintyWeighting(["gaussian"], bounds=(-3, 3))
    optimizer = torch.optim.SGD(weighting.parameters(), lr=100.0)
    for loss in (0.0, 0.0, 1.0):
        optimizer.zero_grad()
        total = weighting(torch.full((2, 1), loss))
        assert total.isfinite()
        total.backward()
        assert weighting.log_variance.grad.isfinite().all()
        assert -3 <= weighting.log_variance.item() <= 3
        optimizer.step()
    weighting(torch.ones(2, 1))
    assert weighting.log_variance.item() == 3  # a large loss against s = -3 pushed it to the other end


def test_without_bounds_a_loss_of_zero_drives_the_weight_up() -> None:
    weighting = UncertaintyWeighting(["gaussian"])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        weighting(torch.zeros(2, 1)).backward()
        optimizer.step()
    assert weighting.effective_weights > 1e3


def test_projection_leaves_two_graphs_of_one_step_intact() -> None:
    weighting = UncertaintyWeighting(["liebel_korner"], initial=2.0, bounds=(-3, 3))
    (weighting(torch.ones(2, 1)) + weighting(torch.ones(2, 1))).backward()
    assert weighting.log_variance.grad.isfinite().all()


def test_evaluation_does_not_project() -> None:
    weighting = UncertaintyWeighting(["gaussian"], bounds=(-3, 3)).eval()
    weighting.log_variance.data.fill_(5.0)
    assert_close(weighting(torch.ones(2, 1)).item(), 0.5 * math.exp(-3) + 1.5)
    assert weighting.log_variance.item() == 5


def test_an_optimizer_without_the_scales_is_refused() -> None:
    weighting, model = UncertaintyWeighting(["gaussian"]), nn.Linear(2, 1)
    weighting.check_in_optimizer(torch.optim.SGD([*model.parameters(), *weighting.parameters()], lr=0.1))
    with pytest.raises(ValueError, match="log_variance is not trained by the optimizer"):
        weighting.check_in_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"log_variance has weight_decay 0\.01"):
        weighting.check_in_optimizer(torch.optim.AdamW(weighting.parameters(), weight_decay=0.01))


def test_half_precision_models_keep_the_scales_precise() -> None:
    weighting = UncertaintyWeighting(["gaussian"], initial=0.1).half()
    parameter = weighting.log_variance
    assert parameter.dtype == torch.float32
    assert weighting.double().log_variance.dtype == torch.float64
    assert weighting.log_variance is parameter


# Several ranks

ROWS = 9
SPLITS = {"even": (3, 3, 3), "a task on one rank only": (2, 6, 1), "an empty rank": (4, 0, 5)}


def weighted_step(rank: int, part: str, split: tuple[int, ...], by_name: bool) -> Any:
    """Mean over ranks of the loss and of the gradients of model and scales."""
    start = sum(split[:rank])
    rows = slice(start, start + split[rank])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=g, dtype=torch.float64)
    weight = torch.rand(ROWS, generator=g, dtype=torch.float64)[rows]
    mask = torch.ones(ROWS, 3, dtype=torch.bool)
    mask[:, 1] = torch.arange(ROWS) < 2  # absent on all ranks but the first
    mask[:, 2] = False  # absent everywhere
    kinds = {"a": "gaussian", "b": "classification", "c": "laplace"}
    made: dict[str, Callable[[], nn.Module]] = {
        "equal": lambda: EqualWeighting(names=list(kinds), sync=True),
        "static": lambda: StaticWeighting({"a": 1.0, "b": 3.0, "c": 2.0}, sync=True),
        "uncertainty": lambda: UncertaintyWeighting(kinds, initial=[0.3, -0.6, 1.0], sync=True).double(),
    }
    weighting = made[part]()
    theta = torch.eye(3, dtype=torch.float64).requires_grad_()
    losses = (x @ theta).square()[rows]
    losses = torch.where(mask[rows], losses, torch.nan)
    given: Any = {"a": losses[:, 0], "b": losses[:, 1], "c": losses[:, 2]} if by_name else losses
    loss = weighting(given, weight=weight, mask=mask[rows])
    loss.backward()
    return [sum_over_ranks(t) / world_size() for t in (loss, theta.grad, *(p.grad for p in weighting.parameters()))]


@pytest.mark.parametrize("part", ["equal", "static", "uncertainty"])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_ranks_equal_one_process(part: str, by_name: bool, split: tuple[int, ...], ranks: Pool) -> None:
    expected = weighted_step(0, part, (ROWS,), by_name)
    assert all(x.isfinite().all() for x in expected)
    for got in ranks.run(weighted_step, part, split, by_name):
        assert_close(got, expected, rtol=1e-9, atol=1e-12)
