"""P2OT: its optimum by its conditions and limits, what leaves it alone, extremes, and rows over ranks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.ot import P2OTResult, mass_schedule, p2ot_labels
from counterpoise.ot._anderson import Anderson
from tests.pool import Pool

EPSILON = 0.1


def logits_of(rows: int = 40, clusters: int = 5, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, clusters, generator=generator, dtype=torch.float64)


def solved(logits: Tensor, mass: float = 0.3, **options: Any) -> P2OTResult:
    return p2ot_labels(logits, mass=mass, **{"tolerance": 1e-13, **options})


PRIOR = torch.tensor([5.0, 1.0, 2.0, 1.0, 1.0])
SETTINGS = [
    {"mass": 0.02},
    {"mass": 0.3, "penalty": 100.0},
    {"mass": 0.3, "prior": PRIOR},
    {"mass": 0.9, "penalty": 0.1},
    {"mass": 1.0},
    {"mass": 0.4, "penalty": math.inf, "prior": PRIOR},
]
RELAXED = [s for s in SETTINGS if s.get("penalty") != math.inf]


# The optimum


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rows_hold_at_most_one_and_all_of_them_the_mass(setting: dict[str, Any]) -> None:
    found = solved(logits_of(), **setting)
    assert found.converged
    assert float(found.labels.min()) >= 0
    assert float(found.row_mass.max()) <= 1 + 1e-12
    assert_close(float(found.column_mass.sum()), setting["mass"], rtol=1e-12, atol=1e-12)
    assert_close(found.row_mass, found.labels.sum(1))
    assert_close(found.column_mass, found.labels.mean(0))


@pytest.mark.parametrize("setting", RELAXED, ids=str)
def test_cluster_masses_balance_their_penalty(setting: dict[str, Any]) -> None:
    """The condition of optimality: eps log b_k + lambda log(q_k / beta_k) = 0."""
    found = solved(logits_of(), **setting)
    prior = setting.get("prior", torch.ones(5)).double()
    beta = setting["mass"] * prior / prior.sum()
    gap = EPSILON * found.scaling[:5] + setting.get("penalty", 1.0) * (found.column_mass / beta).log()
    assert_close(gap, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mass", [0.3, 1.0])
def test_no_plan_nearby_is_better(mass: float) -> None:
    z = logits_of(12, 3)
    labels = solved(z, mass).labels

    def objective(y: Tensor) -> float:
        rest, q, beta = (1 - y.sum(1)).clamp_min(0), y.mean(0), torch.full((3,), mass / 3, dtype=torch.float64)
        entropy = torch.xlogy(y, y).sum() + torch.xlogy(rest, rest).sum()
        return float((-(y * z.log_softmax(1)).sum() + EPSILON * entropy) / 12 + (q * (q / beta).log() - q + beta).sum())

    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = solved(z + torch.randn(z.shape, generator=generator, dtype=torch.float64), mass).labels
        assert objective(torch.lerp(labels, other, 0.01)) > objective(labels)


# Limits


def test_a_strong_penalty_gives_clusters_of_the_prior() -> None:
    share = PRIOR.double() / PRIOR.sum()
    for penalty, within in ((1e6, 1e-6), (math.inf, 1e-12)):
        found = solved(logits_of(), penalty=penalty, prior=PRIOR)
        assert_close(found.column_mass, 0.3 * share, rtol=within, atol=within)


def test_no_penalty_takes_the_surest_rows() -> None:
    z = logits_of()
    kernel = z.softmax(1) ** (1 / EPSILON)

    def labels_at(tau: float) -> Tensor:
        return kernel / (kernel.sum(1, keepdim=True) + tau)

    low, high = -100.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(labels_at(math.exp(middle)).sum()) / 40 > 0.3 else (low, middle)
    assert_close(solved(z, penalty=1e-9).labels, labels_at(math.exp(low)), rtol=1e-6, atol=1e-9)


def test_much_entropy_makes_rows_equal() -> None:
    labels = solved(logits_of(), epsilon=1e6).labels
    assert_close(labels, labels[:1].expand_as(labels), rtol=1e-4, atol=0)


def test_all_mass_and_exact_columns_are_sinkhorns() -> None:
    z = logits_of()
    g = torch.zeros(5, dtype=torch.float64)
    for _ in range(5000):
        f = -(z / EPSILON + g).logsumexp(1, keepdim=True)
        g = math.log(1 / 5) - (z / EPSILON + f).logsumexp(0) + math.log(40)
    plan = (z / EPSILON + f + g).exp()
    assert_close(solved(z, 1.0, penalty=math.inf).labels, plan, rtol=1e-9, atol=1e-12)


# What leaves it alone


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_constant_in_a_row_changes_nothing(setting: dict[str, Any]) -> None:
    z = logits_of()
    assert_close(solved(z + torch.linspace(-50, 50, 40)[:, None], **setting).labels, solved(z, **setting).labels)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rows_and_clusters_can_be_named_anew(setting: dict[str, Any]) -> None:
    z, rows, columns = logits_of(), torch.randperm(40), torch.tensor([2, 0, 4, 1, 3])
    moved = setting | ({"prior": setting["prior"][columns]} if "prior" in setting else {})
    assert_close(solved(z[rows][:, columns], **moved).labels, solved(z, **setting).labels[rows][:, columns])


def test_a_warm_start_saves_iterations_and_changes_nothing() -> None:
    z = logits_of(200)
    near = z + 0.01 * logits_of(200, seed=1)
    cold, warm = solved(near), solved(near, scaling=solved(z).scaling)
    assert_close(warm.labels, cold.labels)
    assert solved(z, scaling=solved(z).scaling).iterations < cold.iterations
    for other in (solved(z, 1.0).scaling, torch.full((6,), torch.inf), 500 * torch.randn(6)):
        assert_close(solved(near, scaling=other).labels, cold.labels)


def test_a_scale_of_the_prior_is_none() -> None:
    assert_close(solved(logits_of(), prior=PRIOR).labels, solved(logits_of(), prior=7 * PRIOR).labels)


@pytest.mark.parametrize("mass", [0.3, 1.0])
def test_a_cluster_of_prior_zero_stays_empty(mass: float) -> None:
    z, prior = logits_of(), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    found, kept = solved(z, mass, prior=prior), prior > 0
    assert not found.labels[:, ~kept].any()
    z[:, ~kept] = -torch.inf  # what is left is the problem of three clusters, at the costs of five
    shift = logits_of().logsumexp(1) - z.logsumexp(1)
    assert bool((shift > 0).all())
    assert found.scaling.isneginf().tolist() == [False, True, False, False, True, mass == 1]
    assert_close(solved(logits_of(), mass, prior=prior, scaling=found.scaling).labels, found.labels)


# Speed


@pytest.mark.parametrize("penalty", [0.1, 1.0, 100.0, 1e8, math.inf])
@pytest.mark.parametrize("mass", [0.02, 0.1, 0.9, 1.0])
def test_few_iterations_at_any_mass_and_penalty(mass: float, penalty: float) -> None:
    """The uncorrected iteration takes thousands at a small mass, and more the stronger the penalty."""
    found = p2ot_labels(logits_of(500, 10), mass=mass, penalty=penalty)
    assert found.converged
    assert found.iterations <= 60


def test_acceleration_gives_up_a_point_that_is_worse() -> None:
    path = Anderson()
    first = path.next(torch.tensor([0.0]), torch.tensor([1.0]))
    assert first.tolist() == [1.0]
    assert path.next(first, torch.tensor([5.0])).tolist() == [1.0]  # residual 4 after 1: back to the plain step


def test_what_has_not_converged_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="have not converged after 3 iterations"):
        found = p2ot_labels(logits_of(), mass=0.3, max_iterations=3)
    assert (found.iterations, found.converged) == (3, False)
    assert found.error > 1e-6


# Extremes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_labels_are_float32_at_least(dtype: torch.dtype) -> None:
    z = logits_of().to(dtype)
    found = p2ot_labels(z, mass=0.3)
    assert found.labels.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found.labels.double(), solved(z.double()).labels, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_large_logits_give_finite_labels(setting: dict[str, Any], scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = p2ot_labels(logits_of(scale=scale), **setting)
    assert bool(found.labels.isfinite().all())
    assert float(found.row_mass.max()) <= 1 + 1e-9


def test_a_cluster_that_no_row_wants_needs_no_kernel() -> None:
    z = torch.zeros(4, 3, dtype=torch.float64)
    z[:, 0] = torch.tensor([900.0, 900.0, 800.0, 850.0])  # e^-9000 has no float64
    found = solved(z, 0.5)
    assert found.converged
    assert_close(float(found.column_mass.sum()), 0.5, rtol=1e-12, atol=0)


def test_single_rows_clusters_and_ties() -> None:
    assert_close(solved(logits_of(1, 3)).row_mass, torch.tensor([0.3], dtype=torch.float64))
    assert_close(solved(torch.zeros(6, 1)).labels, torch.full((6, 1), 0.3))
    assert_close(solved(logits_of(1, 4).expand(6, 4)).row_mass, torch.full((6,), 0.3, dtype=torch.float64))
    assert_close(solved(torch.zeros(6, 4), 1.0).labels, torch.full((6, 4), 0.25))


def test_logits_that_are_not_finite_give_labels_that_are_not() -> None:
    z = logits_of()
    z[3, 2] = torch.nan
    found = p2ot_labels(z, mass=0.3)
    assert bool(found.labels.isnan().any())
    assert not found.converged


def test_no_gradient_flows() -> None:
    assert not p2ot_labels(logits_of().requires_grad_(), mass=0.3).labels.requires_grad


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.zeros(3)}, r"logits has shape \(3,\)"),
        ({"logits": torch.zeros(0, 3)}, "at least one row and one cluster"),
        ({"mass": 0.0}, r"mass is 0.0, expected a number in \(0, 1\]"),
        ({"mass": 1.1}, "mass is 1.1"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"penalty": 0.0}, "penalty is 0.0"),
        ({"prior": torch.ones(2)}, r"prior has shape \(2,\), expected \(5,\)"),
        ({"prior": torch.zeros(5)}, "at least one of them above 0"),
        ({"prior": torch.tensor([1, -1, 1, 1, 1])}, "expected finite numbers >= 0"),
        ({"scaling": torch.zeros(5)}, r"scaling has shape \(5,\), expected \(6,\)"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        p2ot_labels(**{"logits": logits_of(), "mass": 0.3, **change})


# Several ranks


def labels_of_rank(rank: int, z: Tensor, split: tuple[int, ...], setting: dict[str, Any]) -> tuple[Any, ...]:
    start = sum(split[:rank])
    return tuple(p2ot_labels(z[start : start + split[rank]], sync=True, tolerance=1e-13, **setting))


@pytest.mark.parametrize("setting", [*SETTINGS[:1], *SETTINGS[-2:]], ids=str)
@pytest.mark.parametrize("split", [(20, 20), (1, 39), (0, 40), (13, 13, 14), (0, 39, 1)], ids=str)
def test_rows_may_be_split_over_ranks(split: tuple[int, ...], setting: dict[str, Any], pools: dict[int, Pool]) -> None:
    for scale in (2.0, 300.0):  # with a kernel, and in logarithms
        z = logits_of(scale=scale)
        expected = solved(z, **setting)
        parts = pools[len(split)].run(labels_of_rank, z, split, setting)
        assert_close(torch.cat([part[0] for part in parts]), expected.labels, rtol=1e-9, atol=1e-11)
        assert_close(torch.cat([part[1] for part in parts]), expected.row_mass, rtol=1e-9, atol=1e-11)
        for part in parts:
            assert_close(part[2], expected.column_mass, rtol=1e-9, atol=1e-11)
            assert part[3] == parts[0][3]


# The schedule


def test_the_mass_rises_from_start_to_end() -> None:
    linear = [mass_schedule(t, 100, 0.2, 0.8, "linear") for t in range(101)]
    sigmoid = [mass_schedule(t, 100, 0.2, 0.8) for t in range(101)]
    assert_close(linear[::50], [0.2, 0.5, 0.8])
    assert_close([sigmoid[0], sigmoid[50], sigmoid[100]], [0.2 + 0.6 * math.exp(-5), 0.2 + 0.6 * math.exp(-1.25), 0.8])
    assert sigmoid == sorted(sigmoid)
    assert mass_schedule(-3, 100) == mass_schedule(0, 100)
    assert mass_schedule(1000, 100) == 1.0


@pytest.mark.parametrize("change", [{"total": 0}, {"start": 0.0}, {"end": 1.5}, {"kind": "cosine"}])
def test_a_schedule_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        mass_schedule(**{"step": 0, "total": 10, **change})
