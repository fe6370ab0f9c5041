"""Transport family: the iterations of entropic transport, with a matrix read as seldom as may be.

Only what needs no gradient is here: those of the solutions are found behind the iterations. On the CPU a kernel in
memory gives both of its sums from one pass, for as many iterations as are asked for, and a kernel that exists in rows
only gives them from one pass over the cost. On a GPU each sum is a pass of its own, a small matrix stays in the cache
of the block that does all its iterations, and none of them waits for the host. Blocks of rows have a size of their own,
whatever the number of threads, and what they sum up is added in order: the same result on every run.

Batches are of any leading shape; a matrix (..., N, K) is contiguous.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from counterpoise.kernels._library import LIBRARY, define, runs_on

_TILE = "Tensor cost, Tensor? of_row, Tensor? of_column, Tensor g"
_SIDE = (
    "Tensor {0}_mass, Tensor {0}_reference, Tensor {0}_log_ratio, Tensor? {0}_penalty, Tensor? {0}_pull, "
    "Tensor? {0}_amount, Tensor? {0}_ceiling, Tensor? {0}_log_exact"
)

define(f"transport_rows({_TILE}, Tensor v, float epsilon) -> (Tensor, Tensor)")
define(f"transport_columns({_TILE}, Tensor f, Tensor u, float epsilon, bool logs) -> Tensor")
define(
    f"transport_sweep({_TILE}, Tensor v, Tensor mass, Tensor reference, Tensor log_ratio, Tensor? pull, "
    "float epsilon, bool logs) -> (Tensor, Tensor, Tensor, Tensor)"
)
define("transport_kernel(Tensor cost, Tensor f, Tensor g, float epsilon) -> Tensor")
define("transport_plan_(Tensor(a!) kernel, Tensor u, Tensor v) -> ()")
define("transport_start(Tensor cost, Tensor row_mass, Tensor column_mass) -> (Tensor, Tensor, Tensor)")
define(
    f"transport_scale(Tensor kernel, Tensor f, Tensor g, Tensor v, {_SIDE.format('row')}, {_SIDE.format('column')}, "
    "float shift_length, float epsilon, int count) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_ops = torch.ops.counterpoise
_TYPES = (torch.float32, torch.float64)


class Ceiling(Protocol):
    """Upper bound of a side's potentials."""

    amount: Tensor
    value: Tensor


class Side(Protocol):
    """Rows or columns of a problem; ``counterpoise.ot`` says what the numbers are."""

    mass: Tensor
    reference: Tensor
    log_ratio: Tensor
    penalty: Tensor | None
    pull: Tensor | None

    @property
    def ceiling(self) -> Ceiling | None:
        """None where the masses are no bounds."""
        ...


class Shift(NamedTuple):
    """What the best common shift of the potentials needs: logarithms of exact masses (...), and its length."""

    log_exact_rows: Tensor
    log_exact_columns: Tensor
    length: float


class Scaled(NamedTuple):
    """Behind some iterations: potentials, scalings and the columns' sums."""

    f: Tensor
    g: Tensor
    u: Tensor
    v: Tensor
    s: Tensor


def takes(matrix: Tensor, name: str = "transport_rows") -> bool:
    """Whether an operator takes this cost or kernel (..., N, K)."""
    return matrix.dtype in _TYPES and matrix.is_contiguous() and matrix.numel() > 0 and runs_on(matrix, name)


def start(cost: Tensor, row_mass: Tensor, column_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f_i = min_j C_ij, g_j = min_i C_ij - f_i over entries with mass, and the largest C_ij - f_i that is finite.

    f is NaN or -inf where the cost holds one of these.
    """
    f, g, spread = _ops.transport_start(_flat(cost, 2), _flat(row_mass), _flat(column_mass))
    return f.view(row_mass.shape), g.view(column_mass.shape), spread.amax().to(cost.dtype)


def kernel(cost: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """exp((f_i + g_j - C_ij) / epsilon), 0 where it would be subnormal; f and g may be -inf."""
    return _ops.transport_kernel(_flat(cost, 2), _flat(f), _flat(g), epsilon).view(cost.shape)


def plan_(matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """diag(u) K diag(v) in place."""
    _ops.transport_plan_(_flat(matrix, 2), _flat(u), _flat(v))
    return matrix


def scale(
    matrix: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    rows: Side,
    columns: Side,
    shift: Shift | None,
    epsilon: float,
    count: int,
) -> Scaled:
    """``count`` iterations V to U to V with a kernel in memory that f and g are absorbed in; moves the ceilings.

    Args:
        matrix: (..., N, K).
        f, g, v: (..., N), (..., K) and (..., K).
        rows, columns: the sides; a penalty needs a ``shift``.
        shift: the common shift of the potentials behind every iteration, None = none.
    """
    exact = (None, None) if shift is None else shift[:2]
    sides = (_side(side, log_exact) for side, log_exact in zip((rows, columns), exact, strict=True))
    *found, _, row_ceiling, column_ceiling = _ops.transport_scale(
        _flat(matrix, 2),
        *(_flat(x) for x in (f, g, v)),
        *(x for side in sides for x in side),
        0.0 if shift is None else shift.length,
        epsilon,
        count,
    )
    for side, moved in ((rows, row_ceiling), (columns, column_ceiling)):
        if side.ceiling is not None:
            side.ceiling.value.copy_(moved.view(side.ceiling.value.shape))
    return Scaled(*(x.view(like.shape) for x, like in zip(found, (f, g, f, g, g), strict=True)))


class Tile:
    """Rows of a cost, or of products of points with what has to be added to them, and the columns' offsets g.

    Args:
        cost: (..., n, K).
        g: (..., K), -inf where a column has no mass.
        epsilon: of the entropy.
        squares: (..., n) and (..., K) that are added to ``cost``, and the sum taken to be at least 0; None = nothing.
    """

    def __init__(self, cost: Tensor, g: Tensor, epsilon: float, squares: tuple[Tensor, Tensor] | None = None) -> None:
        self.rows, self.columns, self.epsilon = cost.shape[:-1], g.shape, epsilon
        added = (None, None) if squares is None else tuple(_flat(x) for x in squares)
        self.arguments = (_flat(cost, 2), *added, _flat(g))

    def row_sums(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """f_i = min_j C_ij - g_j and sum_j v_j exp((f_i + g_j - C_ij) / epsilon)."""
        f, r = _ops.transport_rows(*self.arguments, _flat(v), self.epsilon)
        return f.view(self.rows), r.view(self.rows)

    def column_sums(self, f: Tensor, u: Tensor, *, logs: bool = False) -> Tensor:
        """sum_i u_i exp((f_i + g_j - C_ij) / epsilon); of logarithms of u its logarithm."""
        return _ops.transport_columns(*self.arguments, _flat(f), _flat(u), self.epsilon, logs).view(self.columns)

    def sweep(self, v: Tensor, rows: Side, *, logs: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f and the sums of rows, the u that ``rows``, without a ceiling, make of them, and the sums of columns."""
        if not runs_on(v, "transport_sweep"):
            raise TypeError(f"transport_sweep does not run on {v.device}, expected a call of its two halves")
        side = (
            _flat(rows.mass),
            _flat(rows.reference),
            _flat(rows.log_ratio),
            None if rows.pull is None else rows.pull.contiguous(),
        )
        f, r, u, s = _ops.transport_sweep(*self.arguments, _flat(v), *side, self.epsilon, logs)
        return f.view(self.rows), r.view(self.rows), u.view(self.rows), s.view(self.columns)


def _flat(x: Tensor, kept: int = 1) -> Tensor:
    """Leading dimensions as one, the last ``kept`` as they are."""
    return x.contiguous().view(-1, *x.shape[-kept:])


def _side(side: Side, log_exact: Tensor | None) -> tuple[Tensor | None, ...]:
    ceiling = (None, None) if side.ceiling is None else (side.ceiling.amount, side.ceiling.value)
    return (
        _flat(side.mass),
        _flat(side.reference),
        _flat(side.log_ratio),
        None if side.penalty is None else side.penalty.contiguous(),
        None if side.pull is None else side.pull.contiguous(),
        *(None if x is None else x.reshape(-1).contiguous() for x in ceiling),
        None if log_exact is None else log_exact.reshape(-1).contiguous(),
    )


def _rows(cost: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[:2])


def _columns(cost: Tensor) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]))


@torch.library.impl(LIBRARY, "transport_rows", "Meta")
def _(cost: Tensor, *_: Any) -> Any:
    return _rows(cost), _rows(cost)


@torch.library.impl(LIBRARY, "transport_columns", "Meta")
def _(cost: Tensor, *_: Any) -> Any:
    return _columns(cost)


@torch.library.impl(LIBRARY, "transport_sweep", "Meta")
def _(cost: Tensor, *_: Any) -> Any:
    return _rows(cost), _rows(cost), _rows(cost), _columns(cost)


@torch.library.impl(LIBRARY, "transport_kernel", "Meta")
def _(cost: Tensor, *_: Any) -> Any:
    return torch.empty_like(cost)


@torch.library.impl(LIBRARY, "transport_plan_", "Meta")
def _(*_: Any) -> None:
    return None


@torch.library.impl(LIBRARY, "transport_start", "Meta")
def _(cost: Tensor, *_: Any) -> Any:
    return _rows(cost), _columns(cost), cost.new_empty((len(cost),), dtype=torch.float64)


@torch.library.impl(LIBRARY, "transport_scale", "Meta")
def _(kernel: Tensor, f: Tensor, g: Tensor, v: Tensor, *arguments: Any) -> Any:
    ceilings = [kernel.new_empty(0) if x is None else torch.empty_like(x) for x in (arguments[6], arguments[14])]
    made = [torch.empty_like(x) for x in (f, g, f, g, g, f)]
    return *made, *ceilings
