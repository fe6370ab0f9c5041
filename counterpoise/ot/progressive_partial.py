r"""P2OT: soft pseudo-labels for clusters of unknown, unequal size, of which the surest share comes first.

.. math:: \min_{Q \ge 0}\ \langle Q, C \rangle + \lambda\, \mathrm{KL}(Q^\top 1 \,\|\, \beta) \quad
          \text{s.t.}\quad Q 1 \le \tfrac{1}{N} 1, \quad 1^\top Q\, 1 = \rho, \qquad
          C = -\log \mathrm{softmax}(Z), \quad \beta = \rho\, \pi

with mass rho, entropy epsilon (sum Q (log Q - 1)) and prior pi, uniform by default. A *virtual cluster* of cost 0
and of mass 1 - rho exactly takes what is not labelled, which leaves exact rows 1 / N. Labels are N Q: a row sums to
at most one, and its sum is the weight of that example. rho = 1 is semi-relaxed transport, a penalty of infinity makes
column masses exact, both together are ordinary Sinkhorn labels.

Rows are exact at any column scalings g (in logarithms), so only g is iterated:

.. math:: N Q = \mathrm{softmax}([-C / \epsilon,\ 0] + g), \qquad
          g_k \leftarrow \frac{\lambda}{\lambda + \epsilon} \Big(\log \beta_k - \log \sum_i a_i e^{-C_{ik} / \epsilon}
          \Big), \qquad g \leftarrow g + \frac{\lambda}{\epsilon} \log \sum_k \pi_k e^{-\epsilon g_k / \lambda}

with a_i the row scalings; the virtual column has factor 1. The last step is what the released iteration lacks: of the
common shift (f + c, g - c) only 1 - rho epsilon / (lambda + epsilon) is left an iteration otherwise (thousands of
iterations, and with its cap of 1000 a wrong total mass); its best value is known in closed form.

The solver is its own, apart from the unbalanced Sinkhorn of this package: penalties differ by column, one column is
exact, the shift has the form above, and g is short enough to accelerate. It runs in float64 on kernels with g absorbed,
and with log-sum-exps while a column of the kernel would underflow. Unlike the release, -log softmax stays finite where
a probability underflows.

Source: Zhang, Ren, He, P2OT: Progressive Partial Optimal Transport for Deep Imbalanced Clustering, 2024, algorithm 1
and section 4; the shift is derived here, along the dual rho c - lambda sum_k beta_k exp(-(epsilon g_k - c) / lambda).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from counterpoise._core import check_choice, check_embeddings, check_number
from counterpoise.distributed import rank, sum_over_ranks, world_size
from counterpoise.ot._anderson import Anderson

ABSORB_AT = 50.0  # a scaling moves by at most this much, in logarithms, before the kernel takes it over
LOG_SMALLEST = -460.0  # of a column's largest kernel entry: below it, logarithms


class P2OTResult(NamedTuple):
    """Labels and how they were found.

    Attributes:
        labels: (N, K) N Q, in the dtype of the logits, at least float32.
        row_mass: (N,) in [0, 1], sums of the labels' rows: the weight of each example.
        column_mass: (K,) float64, share of all examples that each cluster gets; sums to the mass.
        iterations: of the solver.
        error: largest change of a log scaling in the last of them.
        converged: whether that is at most the tolerance.
        scaling: (K + 1,) float64 log scalings, the virtual cluster's last: the start of the next call.
    """

    labels: Tensor
    row_mass: Tensor
    column_mass: Tensor
    iterations: int
    error: float
    converged: bool
    scaling: Tensor


@torch.no_grad()
def p2ot_labels(
    logits: Tensor,
    *,
    mass: float,
    epsilon: float = 0.1,
    penalty: float = 1.0,
    prior: Tensor | None = None,
    scaling: Tensor | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    sync: bool = False,
) -> P2OTResult:
    """Labels of the logits without gradient; the problem is at the top of this file.

    Args:
        logits: (N, K), N and K >= 1; any floating type. NaN and +inf give NaN labels.
        mass: rho in (0, 1], share of the examples that is labelled.
        epsilon: entropic regularisation > 0.
        penalty: lambda > 0 of cluster sizes that differ from the prior; infinity = no difference.
        prior: (K,) numbers >= 0 in proportion to which the mass is expected; 0 leaves a cluster empty. None = equal.
        scaling: (K + 1,) ``scaling`` of an earlier result; changes how many iterations it takes, not the labels.
        max_iterations: >= 1.
        tolerance: >= 0, of the largest change of a log scaling.
        sync: the rows are those of one problem, split over the ranks in any way, none included.

    Returns:
        a :class:`P2OTResult` of this rank's rows. Without convergence it says so, and a RuntimeWarning does.

    Raises:
        ValueError, TypeError: a shape or setting that does not fit.
    """
    check_embeddings("logits", logits)
    columns = Columns.of(logits, mass, epsilon, penalty, prior, sync)
    check_number("max_iterations", max_iterations, 1)
    check_number("tolerance", tolerance, 0)
    log_kernel = precise(logits).log_softmax(1) / epsilon
    return solve(log_kernel, columns, scaling, max_iterations, tolerance, like=logits)


def mass_schedule(step: int, total: int, start: float = 0.1, end: float = 1.0, kind: str = "sigmoid") -> float:
    r"""The mass at a step of training: rises from ``start`` to ``end``.

    .. math:: \rho_t = \rho_0 + (\rho_1 - \rho_0)\, e^{-5 (1 - t / T)^2} \quad \text{or} \quad
              \rho_0 + (\rho_1 - \rho_0)\, t / T

    Args:
        step: t; outside [0, T] it counts as the nearer end. The sigmoid starts at e^-5 of the way, not at ``start``.
        total: T >= 1, steps of the whole training.
        start, end: in (0, 1].
        kind: "sigmoid" or "linear".

    Raises:
        ValueError, TypeError: a setting out of range.
    """
    check_number("total", total, 1)
    check_number("start", start, 0, 1, open_low=True)
    check_number("end", end, 0, 1, open_low=True)
    check_choice("kind", kind, ("sigmoid", "linear"))
    done = min(max(step / total, 0.0), 1.0)
    risen = math.exp(-5 * (1 - done) ** 2) if kind == "sigmoid" else done
    return start + (end - start) * risen


def precise(x: Tensor) -> Tensor:
    """``x`` in float64, or in float32 where the device has nothing more."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class Columns:
    """What is asked of the columns that can hold mass; the virtual one is last, and missing at mass 1.

    Attributes:
        log_target: (C,) logarithms of beta, and of 1 - rho.
        kept: (K,) bool, clusters of a prior above 0: the others have no column here.
        rows: N over all ranks.
        mass, epsilon, penalty, sync: as of :func:`p2ot_labels`.
    """

    log_target: Tensor
    kept: Tensor
    rows: int
    mass: float
    epsilon: float
    penalty: float
    sync: bool

    @classmethod
    def of(
        cls, logits: Tensor, mass: float, epsilon: float, penalty: float, prior: Tensor | None, sync: bool
    ) -> Columns:
        """Checked; ValueError or TypeError for what does not fit."""
        check_number("mass", mass, 0, 1, open_low=True)
        check_number("epsilon", epsilon, 0, open_low=True)
        check_number("penalty", penalty, 0, open_low=True)
        rows = precise(torch.tensor(float(len(logits)), device=logits.device))
        total = int(sum_over_ranks(rows) if sync else rows)
        if total == 0 or logits.shape[1] == 0:
            raise ValueError(f"logits has shape {tuple(logits.shape)}, expected at least one row and one cluster")
        share = _shares(prior, logits)
        log_target = (share[share > 0] * mass).log()
        if mass < 1:
            log_target = torch.cat([log_target, log_target.new_full((1,), math.log1p(-mass))])
        return cls(log_target, share > 0, total, float(mass), float(epsilon), float(penalty), sync)

    @property
    def real(self) -> int:
        """Columns less the virtual one."""
        return len(self.log_target) - (self.mass < 1)

    def update(self, log_sums: Tensor) -> Tensor:
        """(C,) log scalings g from the logarithms of the columns' sums before g, shifted to where the dual is best."""
        g = self.log_target - log_sums
        if math.isinf(self.penalty):
            return g
        g[: self.real] *= self.penalty / (self.penalty + self.epsilon)
        ratio = self.epsilon / self.penalty
        share, x = self.log_target[: self.real] - math.log(self.mass), -ratio * g[: self.real]
        if bool(x.abs().max() < 0.1):  # a strong penalty: no cancellation
            return g + torch.log1p((share.exp() * torch.expm1(x)).sum()) / ratio
        return g + (share + x).logsumexp(0) / ratio

    def over_ranks(self, x: Tensor) -> Tensor:
        """(R, C) the vector of every rank, (1, C) without sync."""
        if not self.sync or world_size() == 1:
            return x[None]
        slots = x.new_zeros(world_size(), len(x))
        slots[rank()] = x
        return sum_over_ranks(slots)

    def widen(self, log_kernel: Tensor) -> Tensor:
        """(N, K) to (N, C): empty clusters dropped, the virtual one added."""
        kept = log_kernel[:, self.kept]
        return kept if self.mass == 1 else torch.cat([kept, kept.new_zeros(len(kept), 1)], 1)

    def start(self, scaling: Tensor | None) -> Tensor:
        """(C,) log scalings to start from; an entry that is not finite starts at zero."""
        if scaling is None:
            return torch.zeros_like(self.log_target)
        if scaling.shape != (len(self.kept) + 1,):
            raise ValueError(f"scaling has shape {tuple(scaling.shape)}, expected ({len(self.kept) + 1},)")
        g = scaling.to(self.log_target)
        g = torch.cat([g[:-1][self.kept], g[-1:]])[: len(self.log_target)]
        return torch.where(g.isfinite(), g, 0)

    def spread(self, g: Tensor) -> Tensor:
        """(K + 1,) of (C,): -inf for columns that hold nothing."""
        scaling = g.new_full((len(self.kept) + 1,), -torch.inf)
        scaling[:-1][self.kept] = g[: self.real]
        scaling[-1:] = g[self.real :] if self.mass < 1 else scaling[-1:]
        return scaling


def _shares(prior: Tensor | None, logits: Tensor) -> Tensor:
    """(K,) the prior, which sums to one."""
    clusters = logits.shape[1]
    if prior is None:
        return precise(logits.new_full((clusters,), 1.0)) / clusters
    given = precise(torch.as_tensor(prior, device=logits.device))
    if given.shape != (clusters,):
        raise ValueError(f"prior has shape {tuple(given.shape)}, expected ({clusters},)")
    if not bool((given >= 0).all() and given.sum() > 0 and given.isfinite().all()):
        raise ValueError(f"prior is {given.tolist()}, expected finite numbers >= 0, at least one of them above 0")
    return given / given.sum()


def solve(
    log_kernel: Tensor,
    columns: Columns,
    scaling: Tensor | None,
    max_iterations: int,
    tolerance: float,
    *,
    like: Tensor,
) -> P2OTResult:
    """The result of a kernel exp(-C / epsilon), (N, K) in logarithms; labels in the dtype of ``like``."""
    full = columns.widen(log_kernel)
    g, iterations, error = scale_columns(full, columns, columns.start(scaling), max_iterations, tolerance)
    plan = (full + g).softmax(1)[:, : columns.real]
    labels = plan.new_zeros(log_kernel.shape)
    labels[:, columns.kept] = plan
    column_mass = columns.over_ranks(labels.sum(0) / columns.rows).sum(0)
    if error > tolerance:
        warnings.warn(
            f"pseudo-labels have not converged after {iterations} iterations: a log scaling still moved by {error:.2g}",
            RuntimeWarning,
            stacklevel=3,
        )
    dtype = torch.promote_types(like.dtype, torch.float32)
    labels = labels.to(dtype)
    return P2OTResult(labels, labels.sum(1), column_mass, iterations, error, error <= tolerance, columns.spread(g))


def scale_columns(
    full: Tensor, columns: Columns, g: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int, float]:
    """Iterates the log scalings ``g`` (C,) to their fixed point: the best seen, iterations, its change.

    Ranks may round differently; all take the numbers of the first, so that they decide alike and stop together.
    """
    kernel, absorbed, found, least, path = None, g, g, math.inf, Anderson()
    iterations = 0
    while iterations < max_iterations and least > tolerance:
        iterations += 1
        if kernel is None or bool((g - absorbed).abs().max() > ABSORB_AT):
            kernel, absorbed = _kernel(full + g, columns), g
        if kernel is None:
            log_sums = _log_sums(full, g, columns)
        else:
            rows = (kernel @ (g - absorbed).exp()).reciprocal()
            log_sums = columns.over_ranks(rows @ kernel).sum(0).log() - math.log(columns.rows) - absorbed
        new = columns.update(log_sums)
        numbers = torch.cat([new, path.next(g, new), (new - g).abs().amax(0, keepdim=True)])
        new, g, change = columns.over_ranks(numbers)[0].split([len(new), len(new), 1])
        if not float(change) >= least:  # NaN stops
            found, least = new, float(change)
    return found, iterations, least


def _kernel(scores: Tensor, columns: Columns) -> Tensor | None:
    """exp of the scores less their row maxima, or None where a column would underflow on all ranks."""
    scores = scores - scores.amax(1, keepdim=True)
    peaks = scores.amax(0) if len(scores) else scores.new_full(scores.shape[1:], -torch.inf)
    peaks = columns.over_ranks(peaks).amax(0)
    return scores.exp() if bool((peaks > LOG_SMALLEST).all()) else None


def _log_sums(full: Tensor, g: Tensor, columns: Columns) -> Tensor:
    """Logarithms of the columns' sums before ``g``, rows exact, without forming a kernel."""
    rows = (full + g).logsumexp(1, keepdim=True)
    return columns.over_ranks((full - rows).logsumexp(0)).logsumexp(0) - math.log(columns.rows)
