"""What CVaR, chi-square DRO, KL-DRO and tilted ERM share: limits, symmetries, extremes, gradients, several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from counterpoise.samplers import (
    KLDRO,
    ChiSquareDRO,
    CVaR,
    TiltedERM,
    chi_square_value,
    chi_square_weights,
    cvar_value,
    cvar_weights,
    kl_ball_value,
    kl_ball_weights,
    tilted_value,
    tilted_weights,
)
from tests.pool import Pool

Value = Callable[[Tensor], Tensor]
INF = math.inf

PAIRS: dict[str, tuple[Value, Value]] = {
    "cvar": (partial(cvar_value, alpha=0.3), partial(cvar_weights, alpha=0.3)),
    "cvar, penalised": (partial(cvar_value, alpha=0.3, penalty=0.5), partial(cvar_weights, alpha=0.3, penalty=0.5)),
    "chi-square ball": (partial(chi_square_value, radius=0.7), partial(chi_square_weights, radius=0.7)),
    "chi-square penalty": (
        partial(chi_square_value, radius=INF, penalty=0.5),
        partial(chi_square_weights, radius=INF, penalty=0.5),
    ),
    "chi-square both": (
        partial(chi_square_value, radius=0.2, penalty=0.1),
        partial(chi_square_weights, radius=0.2, penalty=0.1),
    ),
    "kl ball": (partial(kl_ball_value, radius=0.4), partial(kl_ball_weights, radius=0.4)),
    "tilt": (partial(tilted_value, tilt=1.5), partial(tilted_weights, tilt=1.5)),
    "negative tilt": (partial(tilted_value, tilt=-1.5), partial(tilted_weights, tilt=-1.5)),
}
HOMOGENEOUS = ["cvar", "chi-square ball", "kl ball"]
MODULES: dict[str, Callable[[], nn.Module]] = {
    "cvar": lambda: CVaR(0.3),
    "cvar, penalised": lambda: CVaR(0.3, penalty=0.5),
    "chi-square ball": lambda: ChiSquareDRO(0.7),
    "chi-square penalty": lambda: ChiSquareDRO(INF, penalty=0.5),
    "chi-square both": lambda: ChiSquareDRO(0.2, penalty=0.1),
    "kl penalty": lambda: KLDRO(0.5),
    "kl average": lambda: KLDRO(0.5, momentum=0.1),
    "kl ball": lambda: KLDRO(radius=0.4),
    "tilt": lambda: TiltedERM(-2.0),
    "group tilt": lambda: TiltedERM(0.0, group_tilt=2.0),
    "nested tilt": lambda: TiltedERM(-1.0, group_tilt=2.0, by="target"),
}
pairs = pytest.mark.parametrize(("value", "weights"), PAIRS.values(), ids=PAIRS)
modules = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def draw(m: int = 9, seed: int = 0) -> Tensor:
    """Losses of both signs."""
    return torch.randn(m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def call(module: nn.Module, losses: Tensor) -> Tensor:
    rows = torch.arange(len(losses))
    return module(losses, group=rows % 3, target=rows % 2 + 5)


# Values and weights


@pairs
@pytest.mark.parametrize("seed", range(5))
def test_weights_are_a_distribution(value: Value, weights: Value, seed: int) -> None:
    p = weights(draw(seed=seed))
    assert (p >= 0).all()
    assert_close(p.sum().item(), 1.0, rtol=0, atol=1e-14)


@pairs
@pytest.mark.parametrize("seed", range(5))
def test_the_weights_are_the_derivative_of_the_value(value: Value, weights: Value, seed: int) -> None:
    """Danskin: against finite differences, not against autograd, which is told the weights."""
    losses = draw(seed=seed).requires_grad_()
    assert torch.autograd.gradcheck(value, (losses,))
    assert_close(torch.autograd.grad(value(losses), losses)[0], weights(losses))


@pairs
def test_a_constant_added_to_the_losses_is_added_to_the_value(value: Value, weights: Value) -> None:
    losses = draw()
    assert_close(value(losses + 17), value(losses) + 17)
    assert_close(weights(losses - 17), weights(losses), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", HOMOGENEOUS)
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e6])
def test_without_a_penalty_the_unit_of_the_losses_does_not_matter(name: str, scale: float) -> None:
    value, weights = PAIRS[name]
    assert_close(value(draw() * scale), value(draw()) * scale, rtol=1e-10, atol=0)
    assert_close(weights(draw() * scale), weights(draw()), rtol=1e-9, atol=1e-12)


@pairs
def test_the_order_of_rows_does_not_matter(value: Value, weights: Value) -> None:
    losses, order = draw(), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    assert_close(value(losses[order]), value(losses))
    assert_close(weights(losses[order]), weights(losses)[order])


@pairs
def test_a_batch_repeated_has_the_same_value(value: Value, weights: Value) -> None:
    assert_close(value(draw().repeat(3)), value(draw()))


@pairs
def test_the_value_lies_between_the_mean_and_the_largest_or_the_smallest(value: Value, weights: Value) -> None:
    losses = draw()
    negative_tilt = value is PAIRS["negative tilt"][0]
    low, high = (losses.min(), losses.mean()) if negative_tilt else (losses.mean(), losses.max())
    assert low <= value(losses) <= high


@pairs
@pytest.mark.parametrize("constant", [0.0, -3.0, 0.7, 1e4])
def test_equal_losses_have_equal_weights(value: Value, weights: Value, constant: float) -> None:
    losses = torch.full((6,), constant, dtype=torch.float64)
    assert_close(value(losses).item(), constant)
    if "cvar" not in str(weights.func.__name__):  # type: ignore[attr-defined]
        assert_close(weights(losses), torch.full((6,), 1 / 6, dtype=torch.float64))


@pairs
def test_a_single_row_has_weight_one(value: Value, weights: Value) -> None:
    losses = torch.tensor([-4.0], dtype=torch.float64)
    assert weights(losses).tolist() == [1.0]
    assert_close(value(losses).item(), -4.0)


@pairs
def test_no_rows_have_no_weights_and_a_value_of_zero(value: Value, weights: Value) -> None:
    losses = torch.zeros(0, requires_grad=True)
    assert weights(losses).shape == (0,)
    value(losses).backward()
    assert value(losses).item() == 0
    assert losses.grad is not None


@pairs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_solved_in_float64_and_given_back_in_float32(
    value: Value, weights: Value, dtype: torch.dtype
) -> None:
    losses = (draw() * 30_000 / draw().abs().max()).to(dtype)
    assert weights(losses).dtype == value(losses).dtype == torch.float32
    assert_close(weights(losses), weights(losses.double()).float(), rtol=0, atol=0)
    assert_close(value(losses), value(losses.double()).float())


@pairs
@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-12, 1e4, 1e150])
def test_extremes_stay_finite(value: Value, weights: Value, scale: float) -> None:
    losses = draw() * scale
    assert weights(losses).isfinite().all()
    assert_close(weights(losses).sum().item(), 1.0)
    assert value(losses).isfinite()


@pairs
def test_nan_is_not_repaired(value: Value, weights: Value) -> None:
    losses = draw()
    losses[4] = math.nan
    assert value(losses).isnan()
    assert weights(losses)[4].isnan()


# Modules


@modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_modules_give_detached_weights_that_sum_to_one(module: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    weights = call(module(), draw().to(dtype).requires_grad_())
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not weights.requires_grad
    assert_close(weights.sum().item(), 1.0)


@modules
def test_modules_take_a_single_row_and_none(module: Callable[[], nn.Module]) -> None:
    assert call(module(), torch.tensor([3.0])).tolist() == [1.0]
    assert call(module(), torch.zeros(0)).shape == (0,)


@modules
@pytest.mark.filterwarnings("ignore")
def test_modules_compile_to_one_graph(module: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    plain, compiled = module(), torch.compile(module(), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        assert_close(call(compiled, draw(seed=seed)), call(plain, draw(seed=seed)))


SPLITS = [(4, 4, 4), (5, 1, 6), (7, 0, 5), (0, 12, 0), (0, 0, 0)]


def share_of_steps(rank: int, name: str, split: tuple[int, ...]) -> Any:
    module, rows = MODULES[name](), slice(sum(split[:rank]), sum(split[: rank + 1]))
    group = torch.arange(12)
    weights = [
        module(draw(12, seed)[: sum(split)][rows], group=group[rows] % 3, target=group[rows] % 2) for seed in range(3)
    ]
    return weights, {key: x.clone() for key, x in module.state_dict().items()}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_three_ranks_give_the_weights_and_the_state_of_one(name: str, split: tuple[int, ...], ranks: Pool) -> None:
    expected, state = share_of_steps(0, name, (sum(split),))
    answers = ranks.run(share_of_steps, name, split)
    for step, whole in enumerate(expected):
        assert_close(torch.cat([weights[step] for weights, _ in answers]), whole, rtol=0, atol=0)
    for _, here in answers:
        assert here == state


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: CVaR(0.0), r"alpha is 0.0, expected a number in \(0, 1\]"),
        (lambda: CVaR(1.5), r"alpha is 1.5, expected"),
        (lambda: CVaR(0.5, penalty=-1.0), r"penalty is -1.0, expected a number in \[0, inf\]"),
        (lambda: ChiSquareDRO(-0.1), r"radius is -0.1, expected a number in \[0, inf\]"),
        (lambda: ChiSquareDRO(1.0, penalty=math.nan), r"penalty is nan, expected"),
        (lambda: KLDRO(0.0), r"temperature is 0.0, expected a number in \(0, inf\]"),
        (lambda: KLDRO(radius=-1.0), r"radius is -1.0, expected"),
        (lambda: KLDRO(momentum=0.0), r"momentum is 0.0, expected a number in \(0, 1\]"),
        (lambda: KLDRO(radius=0.1, momentum=0.5), r"momentum is 0.5, expected 1 with a radius"),
        (lambda: TiltedERM(math.nan), r"tilt is nan, expected a number"),
        (lambda: TiltedERM(by="label"), r"by is 'label', expected one of"),
        (lambda: TiltedERM(group_tilt=1.0)(torch.ones(2)), r"TiltedERM got no group: give the batch one"),
        (lambda: TiltedERM(group_tilt=1.0)(torch.ones(2), group=torch.ones(3)), r"group has shape \(3,\), expected"),
        (lambda: tilted_weights(torch.ones(2), 1.0, group_tilt=1.0), r"group is None, expected \(N,\) groups"),
        (lambda: CVaR()(torch.ones(2, 2)), r"losses has shape \(2, 2\), expected \(N,\)"),
        (lambda: chi_square_value(torch.ones(2, 2), 1.0), r"losses has shape \(2, 2\), expected \(N,\)"),
    ],
)
def test_what_does_not_fit_is_refused(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()


def test_losses_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(TypeError, match=r"losses is a list, expected a tensor of shape \(N,\)"):
        cvar_weights([1.0, 2.0], 0.5)  # type: ignore[arg-type]
