"""Coresets: what each selector optimises, against brute force and the naive greedy, and what its weights sum to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.samplers import (
    Selection,
    coverage_centric,
    craig,
    facility_location,
    grand_scores,
    herding,
    k_center_greedy,
    moderate_coreset,
    propagate_weights,
)
from counterpoise.samplers.ccs import stratum_budgets, stratum_of
from counterpoise.samplers.selection import class_budgets


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clustered(n: int = 600, d: int = 5, clusters: int = 12, seed: int = 0) -> Tensor:
    centres = normal(clusters, d, seed=seed + 1) * 6
    return centres[torch.arange(n) % clusters] + 0.2 * normal(n, d, seed=seed)


def grid(side: int = 7) -> Tensor:
    """Integer points: nothing but ties."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side), torch.arange(3)).double()


def low_dimensional() -> Tensor:
    return torch.cat([normal(800, 1), torch.zeros(800, 3, dtype=torch.float64)], 1)


SETS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(700, 6),
    "float32": lambda: normal(700, 6, dtype=torch.float32),
    "clustered": clustered,
    "grid": grid,
    "line": low_dimensional,
    "far from the origin": lambda: normal(700, 6) + 1e4,
    "with copies": lambda: normal(40, 3)[torch.arange(400) % 40],
}
every_set = pytest.mark.parametrize("features", [make() for make in SETS.values()], ids=SETS)


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")


def plain_k_center(x: Tensor, budget: int, start: list[int]) -> list[int]:
    d, picks = distances(x), list(start)
    while len(picks) < budget:
        least = d[:, picks].amin(1)
        picks.append(int((least == least.max()).nonzero()[0]))
    return picks


def naive_greedy(similarity: Tensor, budget: int) -> tuple[list[int], list[float]]:
    """Evaluates every gain at every pick."""
    best, picks, gains = torch.zeros(len(similarity), dtype=torch.float64), [], []
    for _ in range(budget):
        gain = (similarity - best[:, None]).clamp_min(0).sum(0)
        gain[picks] = -1
        pick = int((gain >= gain.max() - 1e-9 * len(similarity)).nonzero()[0])
        picks.append(pick)
        gains.append(float(gain[pick]))
        best = torch.maximum(best, similarity[:, pick])
    return picks, gains


def similarity_of(x: Tensor) -> Tensor:
    d = distances(x)
    return d.max() - d


# What every selector returns


SELECTORS: dict[str, Callable[[Tensor, int], Selection]] = {
    "k_center": lambda x, b: k_center_greedy(x, b, first=0),
    "facility_location": facility_location,
    "facility_location cosine": lambda x, b: facility_location(x, b, metric="cosine"),
    "facility_location stochastic": lambda x, b: facility_location(x, b, method="stochastic"),
    "herding": herding,
    "herding inner product": lambda x, b: herding(x, b, rule="inner_product"),
}
every_selector = pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)


@every_selector
@pytest.mark.parametrize("budget", [1, 7, 50])
def test_indices_are_distinct_and_weights_sum_to_the_number_of_examples(select: Any, budget: int) -> None:
    found = select(normal(50, 4), budget)
    assert len(found) == budget
    assert len(set(found.indices.tolist())) == budget
    assert found.indices.dtype == torch.int64
    assert_close(found.weights.sum().item(), 50.0)


@every_selector
def test_a_larger_budget_goes_on_where_a_smaller_one_stopped(select: Any) -> None:
    if select is SELECTORS["facility_location stochastic"]:
        pytest.skip("how many candidates are drawn depends on the budget")
    x = normal(60, 4)
    assert select(x, 20).indices[:8].tolist() == select(x, 8).indices.tolist()


@every_selector
def test_the_order_of_the_examples_does_not_matter(select: Any) -> None:
    if select in (SELECTORS["facility_location stochastic"], SELECTORS["k_center"]):
        pytest.skip("starts from, or draws, indices")
    x, order = normal(60, 4), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert order[select(x[order], 12).indices].tolist() == select(x, 12).indices.tolist()


@every_selector
def test_features_need_no_gradient_and_leave_none(select: Any) -> None:
    found = select(normal(20, 3).requires_grad_(), 4)
    assert not found.weights.requires_grad


@pytest.mark.parametrize("select", [facility_location, herding, k_center_greedy])
def test_with_targets_every_class_gets_its_share(select: Any) -> None:
    targets = torch.tensor([0] * 60 + [2] * 30 + [3] * 2)
    found = select(normal(92, 4), 23, targets=targets)
    assert torch.bincount(targets[found.indices], minlength=4).tolist() == [15, 0, 7, 1]
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, targets[found.indices], found.weights)
    assert_close(sums.tolist(), [60.0, 0.0, 30.0, 2.0])


@pytest.mark.parametrize("select", [facility_location, k_center_greedy])
def test_with_targets_an_example_is_assigned_within_its_class(select: Any) -> None:
    targets = torch.arange(40) % 3
    found = select(normal(40, 4), 9, targets=targets)
    assert (targets[found.indices][found.assignment] == targets).all()
    assert torch.bincount(found.assignment, minlength=9).double().tolist() == found.weights.tolist()


def test_class_budgets_are_proportional_and_use_the_whole_budget() -> None:
    assert class_budgets(torch.tensor([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert class_budgets(torch.tensor([97, 2, 1]), 10).tolist() == [8, 1, 1]
    assert class_budgets(torch.tensor([5, 0, 5]), 3).tolist() == [2, 0, 1]
    assert class_budgets(torch.tensor([1, 1, 98]), 100).tolist() == [1, 1, 98]


# k-center


@every_set
def test_k_center_picks_what_the_plain_loop_picks(features: Tensor) -> None:
    found = k_center_greedy(features, 60, first=3)
    expected = plain_k_center(features, len(found), [3])
    assert found.indices.tolist() == expected
    d = distances(features)[:, expected]
    assert_close(found.value, float(d.amin(1).max()))
    assert_close(distances(features)[torch.arange(len(features)), found.indices[found.assignment]], d.amin(1))


def test_k_center_is_within_twice_the_best_covering_radius() -> None:
    for seed in range(5):
        x = normal(11, 2, seed=seed)
        d = distances(x)
        best = min(float(d[:, subset].amin(1).max()) for subset in itertools.combinations(range(11), 3))
        assert all(k_center_greedy(x, 3, first=i).value <= 2 * best for i in range(11))


def test_gains_fall_to_the_covering_radius() -> None:
    found = k_center_greedy(normal(300, 5), 40)
    assert found.gains[0] == math.inf
    assert (found.gains[1:-1] >= found.gains[2:]).all()
    assert found.gains[-1] >= found.value


def test_k_center_stops_where_all_is_covered() -> None:
    x = normal(5, 3)[torch.arange(40) % 5] * 1e3
    found = k_center_greedy(x, 12, first=0)
    assert sorted(i % 5 for i in found.indices.tolist()) == [0, 1, 2, 3, 4]
    assert found.value == 0.0
    assert found.notes == ("every example coincides with one of 5 picks, fewer than 12",)
    assert found.weights.tolist() == [8.0] * 5


def test_k_center_goes_on_from_what_was_selected_before() -> None:
    x = normal(200, 4)
    start = torch.tensor([17, 4, 99])
    found = k_center_greedy(x, 20, already_selected=start)
    assert found.indices.tolist() == plain_k_center(x, 20, [17, 4, 99])
    assert found.gains[:3].tolist() == [math.inf] * 3


def test_the_medoid_is_nearest_to_the_mean_and_the_random_start_is_seeded() -> None:
    x = normal(100, 3)
    assert k_center_greedy(x, 1, first="medoid").indices.item() == int((x - x.mean(0)).norm(dim=1).argmin())
    starts = {int(k_center_greedy(x, 1, seed=seed).indices) for seed in range(20)}
    assert len(starts) > 10
    assert int(k_center_greedy(x, 1, seed=3).indices) == int(k_center_greedy(x, 1, seed=3).indices)


# Facility location


@every_set
def test_the_lazy_greedy_picks_what_the_naive_one_picks(features: Tensor) -> None:
    s = similarity_of(features)
    picks, gains = naive_greedy(s, 40)
    found = facility_location(features, 40)
    assert_close(found.gains.tolist(), gains, rtol=1e-7, atol=1e-4)
    assert_close(found.value, float(s[:, found.indices].amax(1).sum()))
    if features.dtype == torch.float64 and features.abs().max() < 1e3:
        assert found.indices.tolist() == picks


def test_a_dense_similarity_gives_the_same_as_the_features_it_was_made_of() -> None:
    x = clustered(150)
    by_matrix, by_features = facility_location(similarity=similarity_of(x), budget=30), facility_location(x, 30)
    assert by_matrix.indices.tolist() == by_features.indices.tolist()
    assert_close(by_matrix.gains, by_features.gains)
    assert by_matrix.weights.tolist() == by_features.weights.tolist()


def test_a_similarity_need_not_be_symmetric() -> None:
    s = torch.rand(80, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = facility_location(similarity=s, budget=25)
    picks, gains = naive_greedy(s, 25)
    assert found.indices.tolist() == picks
    assert_close(found.gains.tolist(), gains)
    assert_close(found.value, float(s[:, picks].amax(1).sum()))


def test_cosine_similarity_is_between_zero_and_one() -> None:
    x = normal(90, 4)
    unit = torch.nn.functional.normalize(x)
    picks, gains = naive_greedy((1 + unit @ unit.T) / 2, 15)
    found = facility_location(x, 15, metric="cosine")
    assert found.indices.tolist() == picks
    assert_close(found.gains.tolist(), gains)


def test_the_greedy_reaches_its_share_of_the_best_value() -> None:
    for seed in range(5):
        x = normal(11, 2, seed=seed)
        s = similarity_of(x)
        best = max(float(s[:, subset].amax(1).sum()) for subset in itertools.combinations(range(11), 3))
        assert facility_location(x, 3).value >= (1 - 1 / math.e) * best


def test_gains_add_up_to_the_value_and_never_rise() -> None:
    found = facility_location(normal(300, 5), 60)
    assert_close(float(found.gains.sum()), found.value)
    assert (found.gains[:-1] >= found.gains[1:] - 1e-8).all()


def test_weights_count_whom_a_pick_stands_for_ties_to_the_earlier_pick() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    found = facility_location(x, 2)
    assert found.indices.tolist() == [2, 4]
    assert found.weights.tolist() == [3.0, 3.0]
    twins = torch.zeros(4, 2)
    tied = facility_location(twins, 3)
    assert tied.indices.tolist() == [0, 1, 2]
    assert tied.weights.tolist() == [4.0, 0.0, 0.0]


def test_the_stochastic_greedy_is_seeded_and_comes_close() -> None:
    x = normal(400, 5)
    exact = facility_location(x, 30).value
    found = [facility_location(x, 30, method="stochastic", seed=seed) for seed in (0, 0, 1)]
    assert found[0].indices.tolist() == found[1].indices.tolist() != found[2].indices.tolist()
    assert all(0.98 * exact < f.value <= exact for f in found)


def test_the_stochastic_greedy_with_every_candidate_is_the_greedy() -> None:
    x = normal(60, 4)
    found = facility_location(x, 10, method="stochastic", delta=1e-9)
    assert found.indices.tolist() == facility_location(x, 10).indices.tolist()


def test_facility_location_goes_on_from_what_was_selected_before() -> None:
    x = normal(120, 4)
    first = facility_location(x, 6)
    again = facility_location(x, 15, already_selected=first.indices)
    straight = facility_location(x, 15)
    assert again.indices.tolist() == straight.indices.tolist()
    assert_close(again.gains, straight.gains)


# CRAIG


def gradients(logits: Tensor, targets: Tensor, h: Tensor) -> Tensor:
    errors = logits.softmax(1) - torch.nn.functional.one_hot(targets, logits.shape[1])
    inputs = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
    return (errors[:, :, None] * inputs[:, None, :]).flatten(1)


def test_craig_is_facility_location_on_last_layer_gradients_class_by_class() -> None:
    logits, targets, h = normal(90, 3), torch.arange(90) % 3, normal(90, 5, seed=1)
    explicit = gradients(logits, targets, h)
    found = craig(logits, targets, 18, features=h)
    assert found.indices.tolist() == facility_location(explicit, 18, targets=targets).indices.tolist()
    assert_close(explicit.norm(dim=1), grand_scores(logits, targets, h))


def test_craig_without_features_reads_the_bias_gradient() -> None:
    logits, targets = normal(60, 4), torch.arange(60) % 4
    errors = logits.softmax(1) - torch.nn.functional.one_hot(targets, 4)
    expected = facility_location(errors, 12, targets=targets)
    found = craig(logits, targets, 12)
    assert found.indices.tolist() == expected.indices.tolist()
    assert found.weights.tolist() == expected.weights.tolist()


def test_craig_weights_make_the_subset_gradient_follow_that_of_all() -> None:
    logits, targets, h = normal(400, 3), torch.arange(400) % 3, normal(400, 4, seed=1)
    g = gradients(logits, targets, h)
    found = craig(logits, targets, 60, features=h)
    error = (g.sum(0) - (found.weights[:, None] * g[found.indices]).sum(0)).norm()
    unweighted = (g.sum(0) - 400 / 60 * g[found.indices].sum(0)).norm()
    assert error < unweighted


# Herding


def test_the_whole_set_has_its_own_mean() -> None:
    x = normal(30, 4) + 5
    assert herding(x, 30).value < 1e-12


def test_herding_follows_the_mean_much_closer_than_chance() -> None:
    x = normal(400, 6)
    g = torch.Generator().manual_seed(3)
    random = [float((x[torch.randperm(400, generator=g)[:40]].mean(0) - x.mean(0)).norm()) for _ in range(20)]
    assert herding(x, 40).value < 0.25 * min(random)


def test_each_pick_is_the_nearest_to_the_residual() -> None:
    x, picks = normal(50, 3) + 2, []
    for t in range(10):
        residual = (t + 1) * x.mean(0) - x[picks].sum(0)
        gap = (x - residual).norm(dim=1)
        gap[picks] = math.inf
        picks.append(int(gap.argmin()))
    assert herding(x, 10).indices.tolist() == picks


def test_both_rules_coincide_on_unit_features() -> None:
    x = torch.nn.functional.normalize(normal(80, 5))
    assert herding(x, 20).indices.tolist() == herding(x, 20, rule="inner_product").indices.tolist()


# Moderate coresets and propagation


def test_the_whole_fraction_keeps_everything_and_propagates_as_the_identity() -> None:
    x, targets = normal(40, 3), torch.arange(40) % 4
    found = moderate_coreset(x, targets, 1.0)
    assert found.indices.tolist() == list(range(40))
    assert found.weights.tolist() == [1.0] * 40
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert_close(propagate_weights(weights, x, x, coreset_targets=targets, targets=targets), weights)


def test_a_moderate_coreset_leaves_out_the_centre_and_the_outliers() -> None:
    x = torch.tensor([[-9.0], [-2.0], [-1.1], [-0.1], [0.1], [1.1], [2.0], [9.0]])
    found = moderate_coreset(x, torch.zeros(8, dtype=torch.int64), 0.5)
    assert found.indices.tolist() == [1, 2, 5, 6]
    assert found.weights.tolist() == [2.0] * 4


def test_every_class_keeps_at_least_one() -> None:
    targets = torch.tensor([0] * 50 + [1] * 3 + [4])
    found = moderate_coreset(normal(54, 2), targets, 0.02)
    assert targets[found.indices].tolist() == [0, 1, 4]
    assert found.weights.tolist() == [50.0, 3.0, 1.0]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("neighbors", [1, 3])
def test_constant_weights_propagate_to_constants(metric: str, neighbors: int) -> None:
    weights = torch.full((9,), 0.37)
    found = propagate_weights(weights, normal(9, 4), normal(70, 4, seed=1), neighbors=neighbors, metric=metric)
    assert_close(found, torch.full((70,), 0.37))


def test_a_neighbour_of_another_class_is_not_asked() -> None:
    keys, x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    weights, own = torch.tensor([0.2, 0.8]), torch.tensor([0, 1])
    targets = torch.tensor([0, 1, 2])  # the coreset lacks class 2
    assert_close(propagate_weights(weights, keys, x).tolist(), [0.2] * 3)
    found = propagate_weights(weights, keys, x, coreset_targets=own, targets=targets, neighbors=2)
    assert_close(found.tolist(), [0.2, 0.8, 0.5])


# Coverage-centric selection


def test_strata_share_the_budget_from_the_smallest_up() -> None:
    assert stratum_budgets(torch.tensor([5, 12, 9, 11, 3]), 12).tolist() == [2, 3, 2, 3, 2]
    assert stratum_budgets(torch.tensor([1, 100, 2]), 50).tolist() == [1, 47, 2]


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_the_last_stratum_is_closed_whatever_the_sign(shift: float) -> None:
    assert stratum_of(torch.linspace(0, 1, 11) + shift, 5).tolist()[-1] == 4
    assert stratum_of(torch.full((4,), 3.0), 5).tolist() == [0] * 4


def test_coverage_drops_the_hardest_and_spends_the_budget() -> None:
    scores = torch.rand(500, generator=torch.Generator().manual_seed(0))
    found = coverage_centric(scores, 60, drop_hardest=0.2)
    assert len(set(found.indices.tolist())) == 60
    assert scores[found.indices].max() <= scores.sort().values[399]
    assert_close(found.weights.sum().item(), 400.0)
    assert found.indices.tolist() == coverage_centric(scores, 60, drop_hardest=0.2).indices.tolist()
    assert found.indices.tolist() != coverage_centric(scores, 60, drop_hardest=0.2, seed=1).indices.tolist()


# Bad input


X = normal(6, 2)
Y = torch.arange(6) % 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: k_center_greedy(X, 7), r"budget is 7, expected a number in \[1, 6\]"),
        (lambda: k_center_greedy(X, 2, first=6), r"first is 6, expected an index in \[0, 5\]"),
        (lambda: k_center_greedy(X, 2, first="centre"), r"first is 'centre', expected one of"),
        (lambda: k_center_greedy(X[0], 1), r"features has shape \(2,\) .*, expected a floating \(N, D\) tensor"),
        (lambda: k_center_greedy(X / 0, 1), r"features holds NaN or infinity"),
        (
            lambda: k_center_greedy(X, 2, already_selected=torch.tensor([1, 1])),
            r"expected distinct indices",
        ),
        (lambda: k_center_greedy(X, 1, already_selected=torch.tensor([1, 2])), r"budget is 1, expected at least the 2"),
        (lambda: k_center_greedy(X, 2, first=1, targets=Y), r"targets was given with indices to start from"),
        (lambda: facility_location(X, 1, targets=Y), r"budget is 1, expected a number in \[2, 6\]"),
        (lambda: facility_location(X, 2, targets=Y[:4]), r"targets has shape \(4,\), expected \(6,\)"),
        (lambda: facility_location(X, 2, similarity=X), r"expected exactly one of them"),
        (lambda: facility_location(budget=2), r"expected exactly one of them"),
        (lambda: facility_location(similarity=-torch.eye(3), budget=2), r"expected \(N, N\) with entries >= 0"),
        (lambda: facility_location(X, 2, method="naive"), r"method is 'naive', expected one of"),
        (lambda: facility_location(X, 2.5), r"budget is 2.5, expected a whole number"),  # type: ignore[arg-type]
        (lambda: craig(X, Y, 2, features=X[:3]), r"features has shape \(3, 2\), expected \(6, D\)"),
        (lambda: craig(X, Y + 5, 2), r"targets holds 5, expected class indices in \[0, 1\]"),
        (lambda: herding(X, 2, rule="farthest"), r"rule is 'farthest', expected one of"),
        (lambda: moderate_coreset(X, Y, 0.0), r"fraction is 0.0, expected a number in \(0, 1\]"),
        (lambda: propagate_weights(X[:, 0], X, X[:, :1]), r"features has shape \(6, 1\), expected \(N, 2\)"),
        (lambda: propagate_weights(X[:, 0], X, X, targets=Y), r"targets and coreset_targets go together"),
        (lambda: propagate_weights(X[:4, 0], X, X), r"weights has shape \(4,\), expected \(6,\)"),
        (lambda: coverage_centric(X, 2), r"scores has shape \(6, 2\), expected \(N,\)"),
        (lambda: coverage_centric(X[:, 0], 5, drop_hardest=0.5), r"budget is 5, expected a number in \[1, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
