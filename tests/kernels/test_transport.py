"""Fused iterations of entropic transport against the plain ones, and the CUDA kernels on threads of the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import counterpoise.ot._iterations as iterations
from counterpoise import kernels
from counterpoise.kernels import transport as fused
from counterpoise.ot import SquaredEuclidean, partial_sinkhorn, sinkhorn, unbalanced_sinkhorn
from counterpoise.ot._kernels import DenseKernel, Problem, TiledKernel
from counterpoise.ot._sides import Ceiling, Ranks, Side
from counterpoise.ot.unbalanced import Shift
from tests.kernels import emulation

compiled = pytest.mark.skipif(
    not kernels.available()["transport_scale"]["cpu"], reason="no compiled kernels of the transport family"
)
DTYPES = (torch.float32, torch.float64)
# Rows and columns that no block, no group of rows and no vector divides; one row, one column, many blocks.
SHAPES = ((1, 1), (1, 40), (37, 1), (5, 3), (131, 17), (70, 515), (900, 101), (2, 2, 65, 33))
KINDS = ("balanced", "unbalanced", "half", "ones", "partial")


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str = "balanced", epsilon: float = 0.05, zeros: bool = False
) -> Problem:
    """A cost with a forbidden pair, marginals of which some are 0."""
    *batch, n, k = shape
    cost = draw(*shape, dtype=dtype)
    a, b = (0.5 + draw(*batch, size, dtype=dtype, seed=size) for size in (n, k))
    if zeros and n > 2 and k > 2:
        a[..., 1], b[..., -1] = 0, 0
        cost[..., 0, 0] = torch.inf
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    if kind == "partial":
        amount = torch.full((*batch, 1), 0.7, dtype=dtype)
        sides = [
            Side(x, (x > 0).to(dtype), epsilon, ceiling=Ceiling(amount, torch.full_like(amount, -torch.inf)))
            for x in (a, b)
        ]
        return Problem(cost, *sides, Ranks(sync=False), amount[..., 0], product=False)
    if kind == "balanced":
        return Problem(cost, Side(a, a, epsilon), Side(b, b, epsilon), Ranks(sync=False), a.sum(-1))
    sigma = 0.3 + draw(k, dtype=dtype, seed=9)
    rho = None if kind == "half" else 0.2 + draw(n, dtype=dtype, seed=8)
    if rho is not None and n > 2:
        rho[0] = torch.inf
    alpha, beta = ((x > 0).to(dtype) if kind == "ones" else x for x in (a, b))
    shift = Shift(a, b, rho, sigma, Ranks(sync=False))
    return Problem(
        cost, Side(a, alpha, epsilon, rho), Side(b, beta, epsilon, sigma), Ranks(sync=False), a.sum(-1), shift
    )


def assert_near(found: Tensor, wanted: Tensor, exact: Tensor | None = None, *, slack: float = 2e-6) -> None:
    """To 1e-10 of ``wanted``; or no farther from ``exact`` than twice ``wanted`` is, or ``slack`` of the largest."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    truth = wanted if exact is None else exact
    finite = truth.isfinite()
    assert torch.equal(found.isfinite(), finite)
    if not bool(finite.any()):
        return
    found, wanted, truth = (x[finite].double() for x in (found, wanted, truth))
    scale = max(float(truth.abs().max()), 0.05)  # potentials near 0 are as exact as those near epsilon
    limit = 1e-10 if exact is None else max(2 * float((wanted - truth).abs().max()), slack * scale)
    assert float((found - truth).abs().max()) <= limit


def plainly(make: object, *arguments: object) -> object:
    with kernels.disabled():
        return make(*arguments)  # type: ignore[operator]


def wide(p: Problem) -> Problem:
    """The same numbers in float64."""

    def side(s: Side) -> Side:
        ceiling = None if s.ceiling is None else Ceiling(s.ceiling.amount.double(), s.ceiling.value.double())
        penalty = None if s.penalty is None else s.penalty.double()
        mass = s.mass.double()
        return Side(mass, mass if s.reference is s.mass else s.reference.double(), s.epsilon, penalty, ceiling)

    rows, columns = side(p.rows), side(p.columns)
    shift = None
    if p.shift is not None:
        shift = Shift(rows.mass, columns.mass, rows.penalty, columns.penalty, Ranks(sync=False))
    return replace(p, cost=p.matrix.double(), rows=rows, columns=columns, total=p.total.double(), shift=shift)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_start_kernel_and_plan(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = problem(shape, dtype, zeros=True)
    f, g, reach = iterations.start_of(p)
    plain_f, plain_g, plain_reach = plainly(iterations.start_of, p)  # type: ignore[misc]
    assert reach == plain_reach
    assert torch.equal(f, plain_f)
    assert torch.equal(g, plain_g)
    found, wanted = DenseKernel(p, f, g), plainly(DenseKernel, p, f, g)
    exact = plainly(DenseKernel, wide(p), f.double(), g.double()).matrix  # type: ignore[attr-defined]
    assert_near(found.matrix, wanted.matrix, exact if dtype == torch.float32 else None)  # type: ignore[attr-defined]
    u, v = draw(*p.rows.mass.shape, dtype=dtype, seed=3), draw(*p.columns.mass.shape, dtype=dtype, seed=4)
    product = u[..., None] * found.matrix * v[..., None, :]
    torch.testing.assert_close(found.plan(u, v), product)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_iterations(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    def advanced(p: Problem) -> iterations.Solution:
        f, g, _ = iterations.start_of(p)
        return iterations.advance(p, p.kernel(f, g), p.columns.reference, 10)

    p = [problem(shape, dtype, kind, zeros=True) for _ in range(3)]
    found, wanted, exact = advanced(p[0]), plainly(advanced, p[1]), plainly(advanced, wide(p[2]))
    for name in ("f", "g", "u", "v", "s"):
        x, y, z = (getattr(solution, name) for solution in (found, wanted, exact))
        some = p[0].rows.mass > 0 if name in "fu" else p[0].columns.mass > 0
        assert_near(x[some], y[some], z[some] if dtype == torch.float32 else None, slack=2e-6)
    for side, plain_side in ((p[0].rows, p[1].rows), (p[0].columns, p[1].columns)):
        if side.ceiling is not None:
            values = side.ceiling.value, plain_side.ceiling.value  # type: ignore[union-attr]
            torch.testing.assert_close(*values, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-6)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "partial"])
@pytest.mark.parametrize("shape", SHAPES)
def test_iterations_in_logarithms(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    """Also where epsilon is far too small for a kernel."""
    for epsilon in (0.05, 1e-4):

        def found_by(p: Problem) -> iterations.Solution:
            return iterations.in_logarithms(p, iterations.start_of(p)[1], 4)

        found = found_by(problem(shape, dtype, kind, epsilon, zeros=True))
        wanted = plainly(found_by, problem(shape, dtype, kind, epsilon, zeros=True))
        exact = plainly(found_by, wide(problem(shape, dtype, kind, epsilon, zeros=True)))
        p = problem(shape, dtype, zeros=True)
        for name, side in (("f", p.rows), ("g", p.columns)):
            x, y, z = (getattr(solution, name)[side.mass > 0] for solution in (found, wanted, exact))
            assert_near(x, y, z if dtype == torch.float32 else None)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_points_in_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoise.ot.costs.TILE", 1000)
    x, y = draw(150, 3, dtype=dtype), draw(41, 3, dtype=dtype, seed=1)
    p, g = problem((150, 41), dtype), draw(41, dtype=dtype, seed=2)
    v, u = p.columns.mass, p.rows.mass
    found = TiledKernel(replace(p, cost=SquaredEuclidean(x, y)), g)
    wanted = TiledKernel(replace(p, cost=SquaredEuclidean(x, y)), g)
    exact = TiledKernel(replace(wide(p), cost=SquaredEuclidean(x.double(), y.double())), g.double())
    assert len(found.parts) > 3
    for name, argument in (("row_sums", v), ("column_sums", u), ("sweep", v)):
        ours = getattr(found, name)(argument)
        theirs, true = (plainly(getattr(k, name), x) for k, x in ((wanted, argument), (exact, argument.double())))
        for a, b, c in zip(*((o,) if isinstance(o, Tensor) else o for o in (ours, theirs, true)), strict=True):
            assert_near(a, b, c if dtype == torch.float32 else None)


@compiled
def test_a_column_that_no_row_is_near_keeps_its_digits() -> None:
    """Its sum would underflow beside the largest entries of the rows."""
    cost = torch.zeros(4, 3)
    cost[:, 2] = torch.tensor([300.0, 301, 302, 303])
    tile = fused.Tile(cost, torch.zeros(3), 1.0)
    f, _ = tile.row_sums(torch.ones(3))
    log_s = tile.column_sums(f, torch.zeros(4), logs=True)
    assert float(log_s[2]) == pytest.approx(float((-cost[:, 2]).logsumexp(0)))


@compiled
def test_bad_costs_are_refused_as_ever() -> None:
    for bad in (torch.nan, -torch.inf):
        cost = draw(5, 4, dtype=torch.float32)
        cost[2, 1] = bad
        with pytest.raises(ValueError, match="cost holds NaN"):
            sinkhorn(cost, epsilon=0.1)
    cost = draw(5, 4, dtype=torch.float32)
    cost[2] = torch.inf
    with pytest.raises(ValueError, match="no finite entry"):
        sinkhorn(cost, epsilon=0.1)


@compiled
@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    cost = draw(1500, 400, dtype=torch.float32)
    solvers = (
        lambda: sinkhorn(cost, epsilon=0.02, max_iterations=30, tolerance=0),
        lambda: unbalanced_sinkhorn(cost, epsilon=0.02, penalty_a=1.0, penalty_b=0.3, max_iterations=30, tolerance=0),
        lambda: partial_sinkhorn(cost, mass=0.6, epsilon=0.02, max_iterations=30, tolerance=0),
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [solve() for solve in solvers]
        torch.set_num_threads(threads)
        for one, solve in zip(alone, solvers, strict=True):
            several = solve()
            assert torch.equal(one.f, several.f)
            assert torch.equal(one.g, several.g)
            assert torch.equal(one.plan, several.plan)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


@compiled
def test_costs_that_are_not_contiguous_take_the_plain_path() -> None:
    cost = draw(40, 30, dtype=torch.float64).T
    found = sinkhorn(cost, epsilon=0.1, tolerance=1e-10)
    wanted = sinkhorn(cost.contiguous(), epsilon=0.1, tolerance=1e-10)
    torch.testing.assert_close(found.plan, wanted.plan, rtol=0, atol=1e-10)


@compiled
def test_operators_are_what_torch_expects() -> None:
    ops = torch.ops.counterpoise
    cost, p = draw(2, 7, 5, dtype=torch.float64), problem((2, 7, 5), torch.float64, "unbalanced")
    a, b = p.rows.mass, p.columns.mass
    torch.library.opcheck(ops.transport_rows, (cost, None, None, b, b, 0.1))
    torch.library.opcheck(ops.transport_columns, (cost, a, b, b, a, a, 0.1, True))
    torch.library.opcheck(ops.transport_sweep, (cost, a, b, b, b, a, a, a, None, 0.1, False))
    torch.library.opcheck(ops.transport_kernel, (cost, a, b, 0.1))
    torch.library.opcheck(ops.transport_plan_, (cost.clone(), a, b))
    torch.library.opcheck(ops.transport_start, (cost, a, b))
    for kind in ("unbalanced", "partial"):
        p = problem((2, 7, 5), torch.float64, kind)
        numbers = (None, None) if p.shift is None else p.shift.numbers[:2]
        sides = [fused._side(s, x) for s, x in zip((p.rows, p.columns), numbers, strict=True)]
        torch.library.opcheck(ops.transport_scale, (cost, a, b, b, *sides[0], *sides[1], 0.5, 0.1, 2))


# ---- CUDA kernels on threads of the host --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler")
    return emulation.build("transport", tmp_path_factory.mktemp("emulation"))


def wanted_sums(cost: Tensor, g: Tensor, v: Tensor, u: Tensor, epsilon: float) -> dict[str, Tensor]:
    above = (g[:, None] - cost).double()
    f = -above.amax(-1)
    kernel = ((above + f[..., None]) / epsilon).exp()
    log_s = ((above + f[..., None]) / epsilon + u.double().log()[..., None]).logsumexp(1)
    return {
        "f": f,
        "r": (kernel * v[:, None]).sum(-1),
        "s": (kernel * u[..., None]).sum(1),
        "log_s": log_s,
    }


# Rows of a warp and of a block, packs and none, several chunks of rows, several problems.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 3), (1, 70, 20), (1, 3, 2100), (2, 33, 140)])
@pytest.mark.parametrize("points", [False, True])
def test_cuda_kernels(
    program: Path, tmp_path: Path, shape: tuple[int, int, int], dtype: torch.dtype, points: bool
) -> None:
    problems, n, k = shape
    cost, epsilon = draw(*shape, dtype=dtype) - 0.5 * points, 0.03
    of_row, of_column = (draw(problems, size, dtype=dtype, seed=5) * 0.5 if points else None for size in (n, k))
    g, v, u = (
        draw(problems, k, dtype=dtype, seed=1),
        draw(problems, k, dtype=dtype, seed=2),
        draw(problems, n, dtype=dtype),
    )
    if k > 2:
        g[:, 1] = -torch.inf
    if n > 2:
        u[:, 1] = 0
    arrays = {"cost": cost, "of_row": of_row, "of_column": of_column, "g": g, "v": v, "u": u, "log_u": u.log()}
    numbers = {"problems": problems, "rows": n, "columns": k, "epsilon": epsilon, "type": emulation.TYPES.index(dtype)}
    out = emulation.run(program, tmp_path / "case", arrays, numbers, dict.fromkeys(("f", "r", "s", "log_s"), dtype))
    if of_row is not None and of_column is not None:
        cost = (cost + of_row[..., None] + of_column[:, None]).clamp_min(0)
    for name, wanted in wanted_sums(cost, g, v, u, epsilon).items():
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(out[name].double(), wanted.flatten(), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not kernels.available()["transport_rows"]["cuda"], reason="no CUDA kernels of the transport family")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 65, 33), (1, 5000, 100), (1, 700, 4100)])
def test_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    problems, n, k = shape
    cost, epsilon = draw(*shape, dtype=dtype).cuda(), 0.03
    g, v, u = (draw(problems, size, dtype=dtype, seed=size).cuda() for size in (k, k, n))
    tile = fused.Tile(cost, g, epsilon)
    f, r = tile.row_sums(v)
    found = {"f": f, "r": r, "s": tile.column_sums(f, u), "log_s": tile.column_sums(f, u.log(), logs=True)}
    for name, wanted in wanted_sums(cost, g, v, u, epsilon).items():
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(found[name].double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(tile.column_sums(f, u), found["s"])
