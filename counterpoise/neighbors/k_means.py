r"""k-means: C centres, each the mean of the points that are nearest to it.

.. math:: \min_{c_1, \dots, c_C} \sum_i \min_j \lVert x_i - c_j \rVert^2, \qquad
    \text{spherical:} \quad \min_{\lVert c_j \rVert = 1} \sum_i \min_j \, (1 - \cos(x_i, c_j))

Lloyd's alternation from k-means++ centres, drawn greedily: of 2 + log C candidates, each with a probability
proportional to its cost so far, the one that lowers the sum most is taken. Points meet centres in tiles; means are
summed in float64. The sum never rises. A cluster left without points takes the point that costs most; scikit-learn does
so too, FAISS splits its largest cluster. FAISS starts from random points, and trains on 256 points a cluster unless
told otherwise; here it sees all.

Source: Lloyd, Least Squares Quantization in PCM, 1982; Arthur and Vassilvitskii, k-means++: The Advantages of Careful
Seeding, 2007; spherical: Dhillon and Modha, Concept Decompositions for Large Sparse Text Data using Clustering, 2001.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_number, generator_for, without_autocast
from counterpoise.neighbors.exact import TILE, check_finite, full_precision, prepare
from counterpoise.neighbors.faiss_stores import as_array, load_faiss, threads_of_torch


class KMeans:
    """Clusters of points.

    Args:
        num_clusters: C >= 1.
        metric: "euclidean", or "cosine" for spherical k-means, which sees directions only.
        restarts: runs from other centres, of which the best is kept (n_init elsewhere).
        max_iterations: of one run.
        tolerance: stop where the sum falls by no more than this share of itself; 0 stops where no point changes.
        backend: "torch", deterministic on a CPU; or "faiss", with its own start.
        seed: >= 0, of the first centres.

    Attributes:
        centroids: (C, d), after :meth:`fit`; of unit length for the cosine.
        assignment: (N,) int64, the cluster of every point.
        inertia: the sum over points, of squared distances or of 1 - cosine.
        history: the sum at every iteration of the best run, not rising ("torch").

    Raises:
        ValueError, TypeError: a setting out of range. ImportError: FAISS is wanted and missing.
    """

    centroids: Tensor
    assignment: Tensor
    inertia: float
    history: list[float]

    def __init__(
        self,
        num_clusters: int,
        *,
        metric: str = "euclidean",
        restarts: int = 1,
        max_iterations: int = 100,
        tolerance: float = 1e-4,
        backend: str = "torch",
        seed: int = 0,
    ) -> None:
        for name, value in {
            "num_clusters": num_clusters,
            "restarts": restarts,
            "max_iterations": max_iterations,
        }.items():
            check_number(name, value, 1)
        check_number("tolerance", tolerance, 0)
        check_number("seed", seed, 0)
        check_choice("metric", metric, ("euclidean", "cosine"))
        check_choice("backend", backend, ("torch", "faiss"))
        if backend == "faiss":
            load_faiss()
        self.num_clusters, self.metric, self.restarts = num_clusters, metric, restarts
        self.max_iterations, self.tolerance, self.backend, self.seed = max_iterations, tolerance, backend, seed

    @torch.no_grad()
    def fit(self, features: Tensor, *, generator: torch.Generator | None = None) -> KMeans:
        """Places the centres.

        Args:
            features: (N, d), finite, N >= C.
            generator: a CPU generator that draws the start in place of ``seed`` ("torch").

        Raises:
            ValueError, TypeError: features that do not fit, or fewer than clusters.
        """
        check_finite("features", features)
        if len(features) < self.num_clusters:
            raise ValueError(f"features has {len(features)} rows, expected at least num_clusters = {self.num_clusters}")
        points = _Points(prepare(features, self.metric), self.metric)
        draws = generator_for(self.seed) if generator is None else generator
        with without_autocast(features), full_precision():
            if self.backend == "faiss":
                runs = [self._run_faiss(points)]
            else:
                runs = [self._run(points, draws) for _ in range(self.restarts)]
        self._centred, self.assignment, self.history = min(runs, key=lambda run: run[2][-1])
        self._middle, self.inertia = points.middle, self.history[-1]
        self.centroids = self._centred + self._middle
        return self

    def _run(self, points: _Points, draws: torch.Generator) -> tuple[Tensor, Tensor, list[float]]:
        centroids = points.x[points.seeds(self.num_clusters, draws)]
        assignment, costs = points.assign(centroids)
        history = [float(costs.sum())]
        for _ in range(self.max_iterations):
            centroids = points.means(centroids, assignment, costs)
            before = assignment
            assignment, costs = points.assign(centroids)
            history.append(float(costs.sum()))
            if bool((assignment == before).all()) or history[-2] - history[-1] < self.tolerance * history[-2]:
                break
        return centroids, assignment, history

    def _run_faiss(self, points: _Points) -> tuple[Tensor, Tensor, list[float]]:
        settings = {"niter": self.max_iterations, "nredo": self.restarts, "seed": self.seed}
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points.x)}
        spherical = self.metric == "cosine"
        with threads_of_torch():
            faiss = load_faiss()
            found = faiss.Kmeans(points.x.shape[1], self.num_clusters, spherical=spherical, **settings, **limits)
            found.train(as_array(points.x))
        centroids = torch.from_numpy(found.centroids.copy()).to(points.x)
        assignment, costs = points.assign(centroids)
        return centroids, assignment, [float(costs.sum())]

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """(N,) int64, the nearest centre of each row of ``features`` (N, d).

        Raises:
            RuntimeError: before :meth:`fit`. ValueError, TypeError: features that do not fit.
        """
        if not hasattr(self, "centroids"):
            raise RuntimeError("predict was called before fit")
        check_finite("features", features, width=self.centroids.shape[1])
        with without_autocast(features), full_precision():
            points = _Points(prepare(features, self.metric).to(self.centroids), self.metric, self._middle)
            return points.assign(self._centred)[0]


class _Points:
    """Prepared points (N, d) less their mean (products lose fewer digits so), and what k-means asks of them."""

    def __init__(self, x: Tensor, metric: str, middle: Tensor | None = None) -> None:
        self.metric = metric
        self.middle = middle if middle is not None else x.mean(0) if metric == "euclidean" else x.new_zeros(x.shape[1])
        self.x = x - self.middle if metric == "euclidean" else x
        self.squares = torch.cat([tile.square().sum(1) for tile in self.x.split(4096)])

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centre of every point, which a product finds, and its cost, by differences."""
        squares = centroids.square().sum(1)
        found, costs = [], []
        for tile in self.x.split(max(1, TILE // max(centroids.shape))):
            at = torch.addmm(squares, tile, centroids.T, alpha=-2).argmin(1)
            found.append(at)
            costs.append((tile - centroids[at]).square_().sum(1, dtype=torch.float64))
        return torch.cat(found), torch.cat(costs) * (1 if self.metric == "euclidean" else 0.5)

    def means(self, centroids: Tensor, assignment: Tensor, costs: Tensor) -> Tensor:
        """The new centres; a cluster without points first takes one that costs most, or else stays where it is."""
        assignment = _without_empty(assignment, costs, len(centroids))
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=centroids.device)
        for tile, at in zip(self.x.split(4096), assignment.split(4096), strict=True):
            _add_rows(sums, at, tile.double())
        counts = assignment.bincount(minlength=len(centroids))[:, None]
        sizes = counts if self.metric == "euclidean" else sums.square().sum(1, keepdim=True).sqrt()
        return torch.where((counts > 0) & (sizes > 0), sums / sizes, centroids.double()).to(centroids)

    def seeds(self, num_clusters: int, draws: torch.Generator) -> Tensor:
        """(C,) rows of the first centres, by greedy k-means++."""
        n, trials = len(self.x), 2 + int(math.log(num_clusters))
        chosen = [int(torch.randint(n, (1,), generator=draws))]
        costs = self._costs_to(torch.tensor(chosen, device=self.x.device))[0]
        while len(chosen) < num_clusters:
            upto = costs.cumsum(0)
            drawn = torch.rand(trials, dtype=torch.float64, generator=draws).to(upto.device) * upto[-1]
            rows = torch.searchsorted(upto, drawn, right=True).clamp_max(n - 1)
            lowered = torch.minimum(self._costs_to(rows), costs)
            best = int(lowered.sum(1).argmin())
            chosen.append(int(rows[best]))
            costs = lowered[best]
        return torch.tensor(chosen, device=self.x.device)

    def _costs_to(self, rows: Tensor) -> Tensor:
        """(R, N) squared distances in float64; what rounding alone may have left counts as none."""
        lengths = self.squares[rows, None] + self.squares
        costs = torch.addmm(lengths, self.x[rows], self.x.T, alpha=-2)
        return torch.where(costs > 16 * torch.finfo(costs.dtype).eps * lengths, costs, 0).double()


def _without_empty(assignment: Tensor, costs: Tensor, num_clusters: int) -> Tensor:
    """Moves the points that cost most, each of its own, into the clusters that have none."""
    empty = (assignment.bincount(minlength=num_clusters) == 0).nonzero().flatten()
    if len(empty) == 0:
        return assignment
    dearest = costs.argsort(descending=True, stable=True)[: len(empty)]
    dearest = dearest[costs[dearest] > 0]
    assignment = assignment.clone()
    assignment[dearest] = empty[: len(dearest)]
    return assignment


def _add_rows(sums: Tensor, at: Tensor, rows: Tensor) -> None:
    """Adds ``rows`` to the ``sums`` that they belong to, in an order that does not change from run to run."""
    if sums.is_cpu:
        sums.index_add_(0, at, rows)
    else:
        sums.addmm_(_one_hot(at, len(sums), rows).T, rows)


def _one_hot(at: Tensor, num_clusters: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(at, num_clusters).to(like)
