"""k-means: a sum that never rises, as low as scikit-learn's; empty clusters, directions, and the same answer twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans as TheirKMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from counterpoise.neighbors import KMeans, k_means
from tests.neighbors.brute import values_of
from tests.neighbors.test_exact import normal
from tests.neighbors.test_index import BACKENDS


def digits() -> Tensor:
    return torch.from_numpy(load_digits().data).float()


def blobs(num: int = 6, each: int = 40) -> tuple[Tensor, Tensor]:
    """Well separated clusters, and which point is of which."""
    centres = 30 * normal(num, 5, seed=9)
    return centres.repeat_interleave(each, 0) + normal(num * each, 5), torch.arange(num).repeat_interleave(each)


def cost_of(points: Tensor, found: KMeans) -> Tensor:
    """(N, C) by the definition."""
    values = values_of(points, found.centroids, found.metric)
    return values.square() if found.metric == "euclidean" else 1 - values


# The objective


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_points_are_with_their_nearest_centre_and_centres_amid_their_points(metric: str, backend: str) -> None:
    x = digits()
    found = KMeans(8, metric=metric, tolerance=0, backend=backend).fit(x)
    cost = cost_of(x, found)
    assert_close(cost.gather(1, found.assignment[:, None])[:, 0], cost.min(1).values, rtol=1e-5, atol=1e-5)
    assert found.inertia == pytest.approx(float(cost.min(1).values.sum()), rel=1e-5)
    assert torch.equal(found.predict(x), found.assignment)
    for j, centre in enumerate(found.centroids):
        own = x[found.assignment == j].double()
        middle = own.mean(0) if metric == "euclidean" else normalize(normalize(own).sum(0), dim=0)
        assert_close(centre.double(), middle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("num_clusters", [2, 10, 200])
def test_the_sum_never_rises(metric: str, num_clusters: int) -> None:
    found = KMeans(num_clusters, metric=metric, tolerance=0).fit(digits())
    assert len(found.history) > 3
    assert all(after <= before * (1 + 1e-7) for before, after in zip(found.history, found.history[1:], strict=False))
    assert found.inertia == found.history[-1]


@pytest.mark.parametrize("num_clusters", [10, 60])
def test_the_sum_is_as_low_as_that_of_scikit_learn(num_clusters: int) -> None:
    x = digits()
    theirs = TheirKMeans(num_clusters, n_init=3, random_state=0).fit(x.numpy()).inertia_
    assert KMeans(num_clusters, restarts=3).fit(x).inertia < 1.02 * theirs


def test_from_one_start_it_ends_where_scikit_learn_does() -> None:
    x = digits()
    found = KMeans(10, tolerance=0, max_iterations=300)
    points = k_means._Points(x, "euclidean")
    start = x[points.seeds(10, torch.Generator().manual_seed(0))]
    theirs = TheirKMeans(10, init=start.double().numpy(), n_init=1, tol=0, max_iter=300).fit(x.double().numpy())
    found.fit(x, generator=torch.Generator().manual_seed(0))
    assert found.inertia == pytest.approx(theirs.inertia_, rel=1e-6)
    assert_close(found.centroids.double(), torch.from_numpy(theirs.cluster_centers_), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_separated_clusters_are_found(backend: str) -> None:
    x, of = blobs()
    found = KMeans(6, restarts=4 if backend == "torch" else 40, backend=backend).fit(x)  # FAISS starts anywhere
    assert adjusted_rand_score(of.numpy(), found.assignment.numpy()) == 1
    assert torch.equal(found.predict(x[:40]), found.assignment[:40])


def test_seeds_spread_over_separated_clusters() -> None:
    x, of = blobs()
    for seed in range(10):
        rows = k_means._Points(x, "euclidean").seeds(6, torch.Generator().manual_seed(seed))
        assert of[rows].sort().values.tolist() == list(range(6))


def test_restarts_keep_the_best() -> None:
    draws = torch.Generator().manual_seed(0)
    single = [KMeans(40).fit(digits(), generator=draws).inertia for _ in range(4)]
    assert len(set(single)) > 1
    assert KMeans(40, restarts=4).fit(digits(), generator=torch.Generator().manual_seed(0)).inertia == min(single)


def test_directions_are_clustered_whatever_their_lengths() -> None:
    x, of = blobs()
    lengths = torch.linspace(0.1, 50, len(x))[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    found = KMeans(6, metric="cosine", restarts=4).fit(lengths[:, None] * x)
    assert adjusted_rand_score(of.numpy(), found.assignment.numpy()) == 1
    assert_close(found.centroids.norm(dim=1), torch.ones(6))


# Empty clusters and copies


def test_an_empty_cluster_takes_the_points_that_cost_most() -> None:
    costs = torch.tensor([0.0, 5.0, 1.0, 7.0, 5.0])
    assert k_means._without_empty(torch.tensor([0, 0, 0, 2, 2]), costs, 5).tolist() == [0, 3, 0, 1, 4]
    assert k_means._without_empty(torch.tensor([0, 0, 0, 0, 0]), 0 * costs, 3).tolist() == [0] * 5


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_fewer_distinct_points_than_clusters_cost_nothing(metric: str) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]).repeat(20, 1)
    found = KMeans(5, metric=metric).fit(x)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert bool(found.centroids.isfinite().all())


def test_every_cluster_of_distinct_points_has_one() -> None:
    x = normal(300)
    for seed in range(5):
        assert len(KMeans(250, seed=seed).fit(x).assignment.unique()) == 250


def test_one_cluster_is_the_mean() -> None:
    x = normal(100) + 1000
    found = KMeans(1).fit(x)
    assert_close(found.centroids[0], x.double().mean(0).float())
    assert found.inertia == pytest.approx(float((x.double() - x.double().mean(0)).square().sum()), rel=1e-4)


# The same again


def test_the_same_seed_gives_the_same_clusters_whatever_the_global_state() -> None:
    torch.manual_seed(1)
    first = KMeans(20, seed=4).fit(digits())
    torch.manual_seed(2)
    second = KMeans(20, seed=4).fit(digits())
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignment, second.assignment)
    assert not torch.equal(first.centroids, KMeans(20, seed=5).fit(digits()).centroids)


def test_tiles_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = KMeans(10).fit(digits())
    monkeypatch.setattr(k_means, "TILE", 2000)
    found = KMeans(10).fit(digits())
    assert_close(found.centroids, expected.centroids)
    assert torch.equal(found.assignment, expected.assignment)


def test_sums_by_product_are_the_sums_by_index() -> None:
    rows, at = normal(50, dtype=torch.float64), torch.arange(50) % 7
    sums = torch.zeros(7, 8, dtype=torch.float64)
    k_means._add_rows(sums, at, rows)
    assert_close(sums, k_means._one_hot(at, 7, rows).T @ rows)


def test_double_and_half_precision() -> None:
    x = digits()
    assert KMeans(5).fit(x.double()).centroids.dtype == torch.float64
    assert KMeans(5).fit(x.half()).centroids.dtype == torch.float32


# What is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"metric": "inner_product"}, "metric is 'inner_product', expected one of"),
        ({"restarts": 0}, "restarts is 0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"backend": "auto"}, "backend is 'auto', expected one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        KMeans(**{"num_clusters": 3, **settings})


def test_points_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="features has 3 rows, expected at least num_clusters = 4"):
        KMeans(4).fit(normal(3))
    with pytest.raises(ValueError, match="features holds NaN or infinity"):
        KMeans(2).fit(normal(3) / 0)
    with pytest.raises(RuntimeError, match="predict was called before fit"):
        KMeans(2).predict(normal(3))
    with pytest.raises(ValueError, match=r"features has shape \(3, 4\), expected \(N, 8\)"):
        KMeans(2).fit(normal(3)).predict(normal(3, 4))
