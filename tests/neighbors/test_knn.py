"""Votes of neighbours: those of scikit-learn, and those of instance discrimination; the graph of neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from torch.testing import assert_close

from counterpoise.neighbors import KNNClassifier, knn_graph
from tests.neighbors.brute import neighbors_of, values_of
from tests.neighbors.test_exact import METRICS, bits, normal
from tests.neighbors.test_index import BACKENDS


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test features and labels; real numbers, so that distances do not tie."""
    data, target = load_digits(return_X_y=True)
    x = torch.from_numpy(data).float() + 0.01 * normal(len(data), 64)
    y = torch.from_numpy(target)
    return x[:1000], y[:1000], x[1000:], y[1000:]


# Votes


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_votes_are_those_of_scikit_learn(metric: str, backend: str) -> None:
    x, y, queries, labels = digits()
    ours = KNNClassifier(7, votes="uniform", metric=metric, backend=backend).fit(x, y)
    theirs = KNeighborsClassifier(7, metric=metric, algorithm="brute").fit(x.double().numpy(), y.numpy())
    scores = ours.predict(queries)
    assert_close(scores.double(), torch.from_numpy(theirs.predict_proba(queries.double().numpy())), atol=1e-6, rtol=0)
    assert float((scores.argmax(1) == labels).float().mean()) > 0.93


def test_weights_are_those_of_instance_discrimination() -> None:
    x, y, queries, _ = digits()
    similarity, at = normalize(queries).mm(normalize(x).T).topk(20)
    votes = (similarity / 0.07).exp()[:, :, None] * one_hot(y[at], 10)
    scores = KNNClassifier(20, temperature=0.07).fit(x, y).predict(queries)
    assert_close(scores, votes.sum(1) / votes.sum((1, 2))[:, None], rtol=1e-4, atol=1e-6)


def test_distances_vote_with_their_negative() -> None:
    x, y, queries, _ = digits()
    distance = values_of(queries[:50], x, "euclidean")
    near, at = distance.topk(5, largest=False)
    expected = ((-near / 2).softmax(1)[:, :, None] * one_hot(y[at], 10)).sum(1)
    scores = KNNClassifier(5, temperature=2.0, metric="euclidean").fit(x, y).predict(queries[:50])
    assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_limits_of_the_temperature_are_the_nearest_and_uniform_votes() -> None:
    x, y, queries, _ = digits()
    cold = KNNClassifier(9, temperature=1e-6).fit(x, y).predict(queries)
    nearest = KNNClassifier(1).fit(x, y).predict(queries)
    hot = KNNClassifier(9, temperature=1e6).fit(x, y).predict(queries)
    uniform = KNNClassifier(9, votes="uniform").fit(x, y).predict(queries)
    assert torch.equal(cold.argmax(1), nearest.argmax(1))
    assert_close(hot, uniform, atol=1e-5, rtol=0)


@pytest.mark.parametrize("votes", ["softmax", "uniform"])
def test_shares_sum_to_one_even_where_there_are_fewer_than_k(votes: str) -> None:
    classifier = KNNClassifier(200, votes=votes).fit(normal(6), torch.tensor([0, 1, 2, 0, 1, 2]), num_classes=5)
    scores = classifier.predict(normal(4, seed=1))
    assert scores.shape == (4, 5)
    assert_close(scores.sum(1), torch.ones(4))
    assert bool((scores[:, 3:] == 0).all())


def test_an_example_can_be_left_out_of_its_own_vote() -> None:
    x, y = normal(40), torch.arange(40)
    classifier = KNNClassifier(1).fit(x, y)
    assert torch.equal(classifier.predict(x).argmax(1), y)
    assert bool((classifier.predict(x, exclude=y).argmax(1) != y).all())
    alone = KNNClassifier(1).fit(x[:1], y[:1])
    assert alone.predict(x[:1], exclude=y[:1]).tolist() == [[0.0]]


def test_half_precision_features_vote() -> None:
    x, y, queries, _ = digits()
    scores = KNNClassifier(5).fit(x.half(), y).predict(queries.half())
    assert bool(scores.isfinite().all())


# The graph


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [normal(150), bits(150, 8)])
def test_the_graph_links_each_example_to_the_others(metric: str, backend: str, rows: Tensor) -> None:
    values = values_of(rows, rows, metric).to(rows.dtype)
    values = (-values if metric != "euclidean" else values).fill_diagonal_(torch.inf)
    order = values.argsort(dim=1, stable=True)[:, :6]
    indices, found = knn_graph(rows, 6, metric, backend=backend)
    assert torch.equal(indices, order)
    assert_close(found, values.gather(1, order) * (1 if metric == "euclidean" else -1), rtol=1e-5, atol=1e-6)


def test_a_graph_of_few_has_padding() -> None:
    indices, values = knn_graph(normal(3), 4)
    assert indices[:, 2:].tolist() == [[-1, -1]] * 3
    assert torch.equal(indices[:, :2], neighbors_of(normal(3), normal(3), 3, "cosine")[1][:, 1:])
    assert bool((values[:, 2:] == -torch.inf).all())


# What is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"k": 0}, "k is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"votes": "soft"}, "votes is 'soft', expected one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        KNNClassifier(**settings)


def test_labels_that_do_not_fit_are_refused() -> None:
    classifier = KNNClassifier()
    with pytest.raises(RuntimeError, match="predict was called before fit"):
        classifier.predict(normal(2))
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), expected \(4,\)"):
        classifier.fit(normal(4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="labels holds 7, expected class indices in"):
        classifier.fit(normal(2), torch.tensor([0, 7]), num_classes=3)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) and dtype torch.float32, expected class indices"):
        classifier.fit(normal(2), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"features has shape \(5,\), expected \(N, d\)"):
        knn_graph(torch.zeros(5), 2)
