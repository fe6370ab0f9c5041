r"""The same iteration as plain torch operations in the log domain, with a graph through all of it.

.. math:: \frac{f_i}{\epsilon} = F\Big(\log \sum_j \beta_j\, e^{(g_j - C_{ij}) / \epsilon}\Big), \qquad
          \frac{g_j}{\epsilon} = G\Big(\log \sum_i \alpha_i\, e^{(f_i - C_{ij}) / \epsilon}\Big), \qquad g = 0
          \text{ at first}

For deliberately few iterations: the gradient is that of the truncated algorithm, and the graph keeps two N x K tensors
an iteration.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from counterpoise.ot._iterations import CHECK_EVERY
from counterpoise.ot._kernels import Problem
from counterpoise.ot._sides import Ranks, Side, safe_log


def unroll(problem: Problem, max_iterations: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    """f (..., N), g (..., K), error (...), iterations and whether the tolerance was reached."""
    rows, columns, epsilon, cost = problem.rows, problem.columns, problem.epsilon, problem.matrix
    log_alpha, log_beta = safe_log(rows.reference), safe_log(columns.reference)
    limit = max(tolerance, 8 * torch.finfo(cost.dtype).eps)
    g = torch.zeros_like(columns.mass)
    for done in range(1, max_iterations + 1):
        f = updated(rows, row_log_sums(cost, log_beta, g, epsilon), problem.ranks)
        log_s = problem.ranks.logsumexp(log_alpha[..., None] + (f[..., None] - cost) / epsilon)
        g = updated(columns, log_s, Ranks(sync=False))
        if problem.shift is not None:
            c = problem.shift(f, g)
            f, g = f + c, g - c
        if done == max_iterations or (tolerance > 0 and done % CHECK_EVERY == 0):
            error = error_of(problem, f, g, log_alpha, log_beta)
            if tolerance > 0 and float(error.max()) <= limit:
                return f, g, error, done, True
    return f, g, error, max_iterations, False


def updated(side: Side, log_sums: Tensor, ranks: Ranks) -> Tensor:
    """The side's potential, 0 where it would be inf."""
    if side.ceiling is not None:
        side.ceiling = replace(side.ceiling, value=side.level(side.ceiling, log_sums, 0.0, ranks))
    return side.epsilon * side.log_scaling(log_sums).nan_to_num(posinf=0.0)


def row_log_sums(cost: Tensor, log_beta: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """log sum_j beta_j exp((g_j - C_ij) / epsilon), (..., N)."""
    return (log_beta[..., None, :] + (g[..., None, :] - cost) / epsilon).logsumexp(-1)


@torch.no_grad()
def error_of(problem: Problem, f: Tensor, g: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """(...) how much mass the next update of the rows would change, relative to the total."""
    log_sums = row_log_sums(problem.matrix, log_beta, g, problem.epsilon)
    now = (log_alpha + f / problem.epsilon + log_sums).exp()
    after = (log_alpha + problem.rows.log_scaling(log_sums) + log_sums).exp()
    return problem.ranks.sum((now - after).nan_to_num().abs().sum(-1)) / problem.total


def unrolled_plan(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """alpha_i beta_j exp((f_i + g_j - C_ij) / epsilon), (..., N, K); 0 without mass, however large the exponential."""
    rows, columns = problem.rows.without_void(f), problem.columns.without_void(g)
    exponents = (rows[..., None] + columns[..., None, :] - problem.matrix) / problem.epsilon
    return problem.rows.reference[..., None] * problem.columns.reference[..., None, :] * exponents.exp()
