r"""The iteration that all entropic solvers share: alternating scalings of a kernel, with potentials absorbed into it.

.. math:: K_{ij} = e^{(f_i + g_j - C_{ij}) / \epsilon}, \qquad
          R = K V,\quad U = U(R), \qquad S = K^\top U,\quad V = V(S)

An iteration is two products of a matrix and a vector; what U(R) and V(S) are is the sides' affair. The offsets f, g are
what keeps K in the range of its floating type:

- They start as f_i = min_j C_ij, g_j = min_i (C_ij - f_i), after which every row and every column of K holds a one.
- Every ten iterations, with the test of convergence, the scalings are looked at. Beyond e^20 (float32) or e^100
  (float64) they are absorbed into f and g, and K is built anew.
- Should a scaling overflow or a sum vanish within ten iterations, these are done again from the last good g, with a
  kernel that is built anew for every iteration, in tiles, each row divided by its largest entry: the log domain at the
  price of two exponentials an entry and iteration. There a column sum that underflows counts as the smallest number,
  which only makes that step shorter.
- Where iterations go on to a tolerance, each ten of them are a step of Anderson's acceleration: the next start at
  a mixture of the last logarithms of V. Near-ties of costs take thousands of plain iterations otherwise. A fixed number
  of iterations is plain.

Points are always taken in tiles, their rows divided by the largest entry; offsets of columns are absorbed as above.
With rows split over ranks, R and U are local and only sums over rows are reduced, so that all ranks stop together.

Source: Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, 2013; absorption and the scaling of
epsilon: Schmitzer, Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems, 2019, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoise.kernels import transport as fused
from counterpoise.ot._anderson import Anderson
from counterpoise.ot._kernels import DenseKernel, Problem, TiledKernel
from counterpoise.ot._sides import Ranks, largest, safe_log
from counterpoise.ot.costs import rows_of, tiles

CHECK_EVERY = 10
ABSORB_BEYOND = {torch.float32: 20.0, torch.float64: 100.0}  # of a scaling, in logarithms
ALONE = Ranks(sync=False)
SMALL = 500  # times epsilon: a larger spread of the costs is come down to in steps


@dataclass
class Solution:
    """Potentials f (..., N) and g (..., K); scalings of ``kernel``; how good they are.

    Attributes:
        s: (..., K) sums of the kernel's columns with ``u``.
        error: (...) how much mass the next update would change on either side, relative to the problem's total.
        mass: (...) of the plan.
    """

    f: Tensor
    g: Tensor
    kernel: DenseKernel | TiledKernel
    u: Tensor
    v: Tensor
    s: Tensor
    error: Tensor
    mass: Tensor
    iterations: int = 0
    converged: bool = False


@torch.no_grad()
def solve(problem: Problem, max_iterations: int, tolerance: float, scaling: float | str | None) -> Solution:
    """Iterates to the tolerance.

    Args:
        problem: what to solve.
        max_iterations: all of them, those of larger entropies included.
        tolerance: of the error, no less than rounding allows; 0 = run ``max_iterations``.
        scaling: factor in (0, 1) by which the entropy decreases to the problem's, "auto", or None.
    """
    f, g, spread = start_of(problem)
    done = 0
    for epsilon in larger_entropies(problem.epsilon, spread, scaling, max_iterations):
        found = iterate(problem.at(epsilon), f, g, CHECK_EVERY, 0.0)
        f, g, done = found.f, found.g, done + found.iterations
    found = iterate(problem, f, g, max_iterations - done, tolerance)
    found.iterations += done
    found.f, found.g = beyond_mass(problem, found.f, found.g)
    return found


def larger_entropies(epsilon: float, spread: float, scaling: float | str | None, max_iterations: int) -> list[float]:
    """From the spread of the costs down towards epsilon, as many as leave half of the iterations for epsilon itself."""
    if scaling == "auto":
        scaling = 0.5 if spread > SMALL * epsilon else None
    if scaling is None or isinstance(scaling, str) or spread <= epsilon:
        return []
    count = math.ceil(math.log(spread / epsilon) / -math.log(scaling))
    count = min(count, max_iterations // (2 * CHECK_EVERY))
    return [epsilon * scaling**-power for power in range(count, 0, -1)]


def start_of(problem: Problem) -> tuple[Tensor, Tensor, float]:
    """f_i = min_j C_ij, g_j = min_i (C_ij - f_i) over entries with mass, and the largest C_ij - f_i that is finite."""
    rows, columns = problem.rows, problem.columns
    if isinstance(problem.cost, Tensor) and fused.takes(problem.cost, "transport_start"):
        f, g, spread = fused.start(problem.cost, rows.mass, columns.mass)
    else:
        f, g, spread = start_in_tiles(problem)
    g = -problem.ranks.max(-g)
    wrong = [
        (x.isnan() | (x == -torch.inf) | ((x == torch.inf) & (side.mass > 0))).any().to(g.dtype)
        for x, side in ((f, rows), (g, columns))
    ]
    reach, *refused = problem.ranks.max(torch.stack([spread.nan_to_num(), *wrong])).tolist()
    if any(refused):
        raise ValueError(
            "cost holds NaN, -inf, or no finite entry in a row or column with mass, expected numbers, and inf for "
            "pairs that are forbidden"
        )
    f, g = f.nan_to_num(posinf=0.0), g.nan_to_num(posinf=0.0)
    c = problem.shift(f, g) if problem.shift is not None else 0.0
    return f + c, g - c, reach


def start_in_tiles(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The same of this rank's rows, not checked."""
    rows, columns = problem.rows, problem.columns
    f, g = torch.zeros_like(rows.mass), torch.full_like(columns.mass, torch.inf)
    spread = g.new_zeros(())
    nowhere = -columns.without_void(torch.zeros_like(g))[..., None, :]  # inf where a column has no mass, else 0
    for start, stop in tiles(problem.cost):
        cost = rows_of(problem.cost, start, stop)
        f[..., start:stop] = (cost if columns.void is None else cost + nowhere).amin(-1)
        above = cost - rows.part(start, stop).without_void(f[..., start:stop])[..., None]
        g = torch.minimum(g, above.amin(-2))
        spread = torch.maximum(spread, above.amax())
    if spread == torch.inf:  # pairs that are forbidden, or masses of zero
        spread = torch.stack([largest_finite(problem, f, *span) for span in tiles(problem.cost)]).amax()
    return f, g, spread


def largest_finite(problem: Problem, f: Tensor, start: int, stop: int) -> Tensor:
    """The largest C_ij - f_i of a tile that is finite, 0-d, at least 0."""
    above = rows_of(problem.cost, start, stop) - f[..., start:stop, None]
    return torch.where(above.abs() < torch.inf, above, 0).amax()


def iterate(problem: Problem, f: Tensor, g: Tensor, max_iterations: int, tolerance: float) -> Solution:
    """At one entropy, from potentials that a kernel can hold."""
    one, sides = problem.columns.reference, (problem.rows, problem.columns)
    kernel, v, path = problem.kernel(f, g), one, Anderson()
    limit = max(tolerance, 8 * torch.finfo(g.dtype).eps)
    done = 0
    while True:
        count = min(CHECK_EVERY, max_iterations - done)
        done += count
        ceilings = [(x.ceiling.value, x.ceiling.value.clone()) for x in sides if x.ceiling is not None]
        found = advance(problem, kernel, v, count)
        error, moved = look(problem, found, measure=tolerance > 0 or done >= max_iterations)
        lost = not math.isfinite(error + moved)
        if lost:
            for ceiling, before in ceilings:
                ceiling.copy_(before)
            found = in_logarithms(problem, g, count)
            error, _ = look(problem, found, measure=True)
        found.iterations, found.converged = done, tolerance > 0 and error <= limit
        if found.converged or done >= max_iterations:
            return found
        g = found.g
        if lost or moved > ABSORB_BEYOND[g.dtype]:
            kernel, v, path = problem.kernel(found.f, g), one, Anderson()
        else:
            v = found.v if tolerance == 0 else accelerated(path, one, v, found.v)


def accelerated(path: Anderson, one: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """V to go on with, from those before and after some iterations; ``one`` is V where nothing is scaled."""
    logs = [torch.where(one > 0, (v / one).log(), 0).flatten() for v in (before, after)]
    if not bool(torch.stack(logs).isfinite().all()):
        return after
    return one * path.next(*logs).reshape(one.shape).exp()


def advance(problem: Problem, kernel: DenseKernel | TiledKernel, v: Tensor, count: int) -> Solution:
    """``count`` iterations with one kernel."""
    rows, columns, epsilon = problem.rows, problem.columns, problem.epsilon
    unknown = torch.zeros_like(problem.total)
    dense = kernel if isinstance(kernel, DenseKernel) and not problem.ranks.several else None
    if dense is not None and fused.takes(dense.matrix, "transport_scale"):
        numbers = None if problem.shift is None else problem.shift.numbers
        f, g, u, v, s = fused.scale(dense.matrix, dense.f, dense.g, v, rows, columns, numbers, epsilon, count)
        return Solution(f, g, kernel, u, v, s, unknown, unknown)
    for i in range(count):
        r, u, s = kernel.sweep(v) if rows.ceiling is None else level_sweep(problem, kernel, v)
        s = problem.ranks.sum(s)
        if columns.ceiling is not None:
            columns.raise_ceiling(columns.divisor(s).log(), kernel.g, ALONE)
        v = columns.scaled(s, kernel.g)
        if problem.shift is None and i < count - 1:
            continue
        f, g = rows.potential(r, kernel.f), columns.potential(s, kernel.g)
        if problem.shift is not None:
            c = problem.shift(f, g)
            f, g, up = f + c, g - c, (c / epsilon).exp()
            u, v, s = u * up, v / up, s * up
    return Solution(f, g, kernel, u, v, s, unknown, unknown)


def level_sweep(problem: Problem, kernel: DenseKernel | TiledKernel, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V to R, U and this rank's part of S, where the ceiling of the rows must be known before U is."""
    rows, r = problem.rows, kernel.row_sums(v)
    rows.raise_ceiling(rows.divisor(r).log(), kernel.f, problem.ranks)
    u = rows.scaled(r, kernel.f)
    return r, u, kernel.column_sums(u)


def in_logarithms(problem: Problem, g: Tensor, count: int) -> Solution:
    """``count`` iterations with a kernel for each, and scalings divided by the largest."""
    rows, columns, ranks, one = problem.rows, problem.columns, problem.ranks, problem.columns.reference
    for _ in range(count):
        kernel = TiledKernel(problem, g)
        both = None if ranks.several else kernel.log_sweep(one)
        moved, log_s = both if both is not None else log_sweep(problem, kernel, one)
        log_s = log_s if columns.void is None else log_s.masked_fill(columns.void > 0, 0.0)
        columns.raise_ceiling(log_s, g, ALONE)
        f, g = kernel.f + problem.epsilon * moved, g + problem.epsilon * columns.log_scaling(log_s, g)
        c = problem.shift(f, g) if problem.shift is not None else 0.0
        f, g = f + c, g - c
    kernel = TiledKernel(problem, g)
    kernel.row_sums(one)
    u = rows.reference * rows.without_void((f - kernel.f) / problem.epsilon).exp()
    unknown = torch.zeros_like(problem.total)
    return Solution(f, g, kernel, u, one, ranks.sum(kernel.column_sums(u)), unknown, unknown)


def log_sweep(problem: Problem, kernel: TiledKernel, one: Tensor) -> tuple[Tensor, Tensor]:
    """V = ``one`` to logarithms of U / alpha and of S."""
    rows, ranks = problem.rows, problem.ranks
    log_r = rows.divisor(kernel.row_sums(one)).log()
    rows.raise_ceiling(log_r, kernel.f, ranks)
    moved = rows.log_scaling(log_r, kernel.f)
    with_mass = rows.without_void(moved)
    top = ranks.max(largest(with_mass)[..., None])
    s = ranks.sum(kernel.column_sums(rows.reference * (with_mass - top).exp()))
    return moved, s.clamp_min(torch.finfo(s.dtype).tiny).log() + top


def look(problem: Problem, found: Solution, *, measure: bool) -> tuple[float, float]:
    """Error and mass of a solution, where wanted, and how far it is from its kernel's offsets, in epsilons."""
    kernel, rows, columns = found.kernel, problem.rows, problem.columns
    if measure:
        r = kernel.row_sums(found.v)
        row_mass = found.u * r
        change = (row_mass - rows.best_mass(r, kernel.f)).abs()
        found.error, found.mass = problem.ranks.sum(torch.stack([change.sum(-1), row_mass.sum(-1)]))
        if problem.shift is not None:
            change = (found.v * found.s - columns.best_mass(found.s, kernel.g)).abs()
            found.error = found.error + change.sum(-1)
        if rows.ceiling is not None:
            found.error = found.error + (found.mass - problem.total).abs()
        found.error = found.error / problem.total
    distances = [((found.f - kernel.f) / problem.epsilon).abs(), ((found.g - kernel.g) / problem.epsilon).abs()]
    figures = torch.stack([largest(x.flatten()) for x in (found.error, *distances)])
    figures = problem.ranks.max(figures.nan_to_num(nan=torch.inf, posinf=torch.inf))
    error, of_rows, of_columns = figures.tolist()
    return error, max(of_rows, of_columns)


def beyond_mass(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The potentials, with those of entries without mass as the next update would have them."""
    rows, columns, epsilon, cost = problem.rows, problem.columns, problem.epsilon, problem.cost
    void = torch.stack([f.new_tensor(float(side.void is not None)) for side in (rows, columns)])
    if not problem.ranks.max(void).any():
        return f, g
    along, across = torch.empty_like(f), torch.full_like(g, -torch.inf)
    log_columns, log_rows = safe_log(columns.reference) + g / epsilon, safe_log(rows.reference) + f / epsilon
    for start, stop in tiles(cost):
        exponents = rows_of(cost, start, stop) / -epsilon
        along[..., start:stop] = (exponents + log_columns[..., None, :]).logsumexp(-1)
        across = torch.logaddexp(across, (exponents + log_rows[..., start:stop, None]).logsumexp(-2))
    across = problem.ranks.logsumexp(across[..., None, :])
    potentials = []
    for side, known, log_sums in ((rows, f, along), (columns, g, across)):
        found = (epsilon * side.log_scaling(log_sums)).nan_to_num(posinf=0.0)
        potentials.append(known if side.void is None else torch.where(side.void > 0, found, known))
    return potentials[0], potentials[1]


def plan_of(problem: Problem, found: Solution) -> Tensor:
    """The plan (..., N, K), in the kernel's memory; of a cost that is a matrix."""
    if isinstance(found.kernel, DenseKernel):
        return found.kernel.plan(found.u, found.v)
    return DenseKernel(problem, found.f, found.g).plan(problem.rows.reference, problem.columns.reference)
