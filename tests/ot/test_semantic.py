"""SP2OT: neighbours that agree, an objective that falls, and P2OT where nothing is left of the reward."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise.ot import PseudoLabels, SP2OTResult, knn_affinity, p2ot_labels, sp2ot_labels, sub_affinity
from counterpoise.ot.semantic import lowest_eigenvalue
from counterpoise.recipes import Clustering

N, K = 24, 4


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS = 2 * draws(N, K)
AFFINITY = knn_affinity(draws(N, 6, seed=1), 5)


def solved(logits: Tensor = LOGITS, affinity: Tensor = AFFINITY, mass: float = 0.3, **options: Any) -> SP2OTResult:
    return sp2ot_labels(logits, affinity, mass=mass, **{"tolerance": 1e-13, "mm_tolerance": 1e-14, **options})


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


# What is left without a reward


@pytest.mark.parametrize(
    "without",
    [{"semantic_weight": 0.0}, {"affinity": torch.zeros(N, N)}, {"affinity": torch.zeros(N, N).to_sparse_csr()}],
    ids=["weight 0", "no neighbours", "no neighbours, sparse"],
)
@pytest.mark.parametrize("momentum", [0.5, 1.0])
def test_without_a_reward_it_is_p2ot(without: dict[str, Any], momentum: float) -> None:
    found = solved(momentum=momentum, **without)
    expected = p2ot_labels(LOGITS, mass=0.3, tolerance=1e-13)
    assert_close(found.labels, expected.labels, rtol=0, atol=1e-14)
    assert (found.iterations, found.converged) == (1, True)


def test_at_full_mass_nothing_is_left_of_it() -> None:
    expected = p2ot_labels(LOGITS, mass=1.0, tolerance=1e-13).labels
    assert_close(solved(mass=1.0).labels, expected)
    assert not torch.allclose(solved(mass=1.0, decay=False, semantic_weight=1.0).labels, expected)


# The objective


@pytest.mark.parametrize("mass", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("weight", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("penalty", [0.1, 1.0, math.inf])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_objective_falls_at_every_step(mass: float, weight: float, penalty: float, shifted: bool) -> None:
    options = {"decay": False, "psd_shift": shifted, "max_iterations": 20_000}
    found = solved(mass=mass, semantic_weight=weight, penalty=penalty, **options)
    assert float(found.objective.diff().max()) <= 1e-12
    assert_close(float(found.labels.mean(0).sum()), mass, rtol=1e-6, atol=0)


def test_the_released_iteration_may_cycle_and_either_remedy_stops_that() -> None:
    """A reward that pays for differing from the neighbours: the best answer to either side is the other."""
    ring = torch.zeros(6, 6, dtype=torch.float64)
    ring[:3, 3:] = 1.0
    z = 0.1 * draws(6, 2)
    z[3:] = -z[:3]
    options = {"semantic_weight": 20.0, "decay": False, "mass": 0.5, "mm_max_iterations": 30}
    released = solved(z, ring, safeguard=False, psd_shift=False, **options)
    assert float(released.objective.diff().max()) > 0
    guarded = solved(z, ring, psd_shift=False, **options)
    assert float(guarded.objective.diff().max()) <= 1e-12
    assert float(guarded.objective[-1]) <= float(released.objective[-1]) + 1e-12
    shifted = solved(z, ring, safeguard=False, **options)
    assert float(shifted.objective.diff().max()) <= 1e-12
    both = solved(z, ring, **options)
    assert_close(both.labels, shifted.labels, rtol=1e-6, atol=1e-8)


def test_the_shift_is_on_by_default_everywhere() -> None:
    for part in (sp2ot_labels, PseudoLabels, Clustering):
        assert inspect.signature(part).parameters["psd_shift"].default is True, part
    assert_close(solved(semantic_weight=1.0).labels, solved(semantic_weight=1.0, psd_shift=True).labels)
    assert not torch.allclose(solved(semantic_weight=1.0).labels, solved(semantic_weight=1.0, psd_shift=False).labels)
    engine = PseudoLabels(K, "sp2ot")
    assert engine.options["psd_shift"] is True


@pytest.mark.parametrize("mass", [0.1, 0.6])
@pytest.mark.parametrize("weight", [0.1, 1.0, 3.0])
def test_with_a_shift_full_steps_fall(mass: float, weight: float) -> None:
    found = solved(mass=mass, semantic_weight=weight, safeguard=False)
    assert float(found.objective.diff().max()) <= 1e-12
    by_hand = AFFINITY.to_dense()
    by_hand = by_hand - torch.linalg.eigvalsh((by_hand + by_hand.T) / 2)[0] * torch.eye(N, dtype=torch.float64)
    expected = solved(affinity=by_hand, mass=mass, semantic_weight=weight, safeguard=False, psd_shift=False)
    assert_close(found.labels, expected.labels, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_the_lowest_eigenvalue_is_not_undercut_and_found_within_a_hundredth(n: int) -> None:
    matrix = draws(n, n).tril(-1)
    matrix = matrix + matrix.T
    true, found = float(torch.linalg.eigvalsh(matrix)[0]), lowest_eigenvalue(matrix)
    assert true - 1e-9 <= found <= true + 0.01 * abs(true)


def test_where_it_stops_another_step_changes_nothing() -> None:
    found = solved(mm_max_iterations=1000)
    again = solved(start=found.labels, scaling=found.scaling, mm_max_iterations=1)
    assert found.converged
    assert_close(again.labels, found.labels, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shifted", [True, False])
def test_the_objective_is_the_one_in_the_docstring(shifted: bool) -> None:
    options = {"mass": 0.4, "semantic_weight": 0.5, "psd_shift": shifted}
    labels = solved(**options).labels
    trace = solved(start=labels, mm_max_iterations=1, **options).objective
    s = AFFINITY.to_dense()
    if shifted:
        s = s - torch.linalg.eigvalsh((s + s.T) / 2)[0] * torch.eye(N, dtype=torch.float64)
    q, beta = labels / N, torch.full((K,), 0.4 / K, dtype=torch.float64)
    hat = torch.cat([q, (1 / N - q.sum(1, keepdim=True))], 1)
    column = q.sum(0)
    value = -(q * LOGITS.log_softmax(1)).sum() - 0.5 * 0.6 * N * (s * (q @ q.T)).sum()
    value = value + (column * (column / beta).log() - column + beta).sum() + 0.1 * (hat * (hat.log() - 1)).sum()
    assert_close(float(trace[0]), float(value))


def test_it_says_so_when_it_has_not_converged() -> None:
    with pytest.warns(RuntimeWarning, match="has not converged after 2 iterations"):
        found = solved(semantic_weight=1.0, mm_max_iterations=2)
    assert not found.converged


# What the reward does, and what leaves it alone


def test_duplicates_agree_more_the_more_it_pays() -> None:
    pairs = torch.zeros(N, N, dtype=torch.float64)
    first = torch.arange(0, N, 2)
    pairs[first, first + 1] = pairs[first + 1, first] = 1.0

    def apart(weight: float) -> float:
        labels = solved(affinity=pairs, semantic_weight=weight, mass=0.6).labels
        return float((labels[0::2] - labels[1::2]).norm(dim=1).mean())

    assert apart(0.0) > apart(1.0) > apart(4.0)


def test_rows_and_clusters_can_be_named_anew() -> None:
    rows, columns = torch.randperm(N), torch.randperm(K)
    moved = solved(LOGITS[rows][:, columns], sub_affinity(AFFINITY, rows), psd_shift=False)
    assert_close(moved.labels, solved(psd_shift=False).labels[rows][:, columns], rtol=1e-6, atol=1e-8)


def test_a_constant_in_a_row_changes_nothing() -> None:
    assert_close(
        solved(LOGITS + draws(N, 1, seed=5), psd_shift=False).labels,
        solved(psd_shift=False).labels,
        rtol=1e-6,
        atol=1e-8,
    )


def test_dense_and_sparse_affinities_are_the_same() -> None:
    assert_close(solved(affinity=AFFINITY.to_dense()).labels, solved().labels)


def test_the_weight_is_free_of_size() -> None:
    """Every example twice, with its neighbours shared between the copies: the labels stay."""
    twice = torch.arange(N).repeat(2)
    halved = sub_affinity(AFFINITY, twice).to_dense() / 2
    assert_close(solved(LOGITS[twice], halved).labels, solved().labels[twice], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("shifted", "apart"), [(True, 2e-3), (False, 1e-4)])  # more steps, which float32 cannot tell
def test_labels_come_in_the_dtype_of_the_logits(shifted: bool, apart: float) -> None:
    options = {"mass": 0.3, "psd_shift": shifted}
    found = sp2ot_labels(LOGITS.float(), AFFINITY.float(), mm_tolerance=1e-13, **options)
    assert found.labels.dtype == torch.float32
    assert_close(found.labels.double(), solved(**options).labels, rtol=1e-3, atol=apart)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_give_finite_labels(scale: float) -> None:
    assert bool(sp2ot_labels(scale * LOGITS, AFFINITY, mass=0.3).labels.isfinite().all())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"affinity": torch.zeros(3, 3)}, r"affinity has shape \(3, 3\), expected \(24, 24\)"),
        ({"semantic_weight": -1.0}, "semantic_weight is -1.0"),
        ({"momentum": 0.0}, "momentum is 0.0"),
        ({"mm_max_iterations": 0}, "mm_max_iterations is 0"),
        ({"mm_tolerance": -1.0}, "mm_tolerance is -1.0"),
        ({"start": torch.zeros(3, K)}, r"start has shape \(3, 4\)"),
        ({"mass": 0.0}, "mass is 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        solved(**change)


# The affinity


def test_the_affinity_holds_the_nearest_others() -> None:
    features = draws(30, 3)
    dense = knn_affinity(features, 4, 1.5).to_dense()
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(4, largest=False).indices
    expected = torch.zeros(30, 30, dtype=torch.float64)
    expected.scatter_(1, nearest, (-distances.gather(1, nearest).square() / (2 * 1.5**2 * 3)).exp())
    assert_close(dense, expected)


def test_of_few_examples_all_others_are_neighbours() -> None:
    assert knn_affinity(draws(3, 2), 20).to_dense().count_nonzero() == 6
    assert knn_affinity(draws(1, 2), 20).to_dense().tolist() == [[0.0]]


def test_part_of_an_affinity_may_repeat_an_example() -> None:
    index = torch.tensor([3, 3, 0, 7])
    dense = AFFINITY.to_dense()
    assert_close(sub_affinity(AFFINITY, index).to_dense(), dense[index][:, index])


@pytest.mark.parametrize(("k", "bandwidth", "said"), [(0, 2.0, "num_neighbors is 0"), (5, 0.0, "bandwidth is 0.0")])
def test_an_affinity_that_is_none_is_refused(k: int, bandwidth: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        knn_affinity(draws(5, 2), k, bandwidth)
