"""CUDA kernels of the transport family for a matrix in memory, on threads of the host, against the plain form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import counterpoise.ot._iterations as iterations
from counterpoise import kernels
from counterpoise.kernels import transport as fused
from counterpoise.ot._kernels import DenseKernel, Problem
from tests.kernels import emulation
from tests.kernels.test_transport import DTYPES, KINDS, draw, plainly, problem, wide

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler")

START, PLAN, SCALE, SCALED = range(4)
BY_SHAPE, TURNS, PROBLEMS = range(3)  # the form of the iterations: launches for each, or a block that does all
# One entry, lanes that share few columns, packs and none, several chunks of rows, rows of a block, several problems.
SHAPES = ((1, 1, 1), (2, 5, 3), (3, 70, 20), (1, 9, 2101), (2, 65, 140))
PARTS = ("mass", "reference", "log_ratio", "penalty", "pull", "amount", "ceiling", "log_exact")
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-9}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="module")
def program(work: Path) -> Path:
    """In which two blocks do the work of all."""
    return emulation.build("transport_scale", work, "none", "EMULATION_MOST_BLOCKS=2")


def numbers(p: Problem, what: int, **more: float) -> dict[str, float]:
    problems, n, k = p.matrix.shape
    kind = emulation.TYPES.index(p.matrix.dtype)
    return {"what": what, "problems": problems, "rows": n, "columns": k, "epsilon": p.epsilon, "type": kind, **more}


def assert_near(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    tolerance = TOLERANCES[found.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(found.double(), wanted.double().flatten(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_start(program: Path, tmp_path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    p = problem(shape, dtype, zeros=True)
    arrays = {"cost": p.matrix - 0.3, "row_mass": p.rows.mass, "column_mass": p.columns.mass}
    types = {"f": dtype, "g": dtype, "spread": torch.float64}
    out = emulation.run(program, tmp_path / "case", arrays, numbers(p, START), types)
    p.cost = arrays["cost"]
    f, g, spread = plainly(iterations.start_in_tiles, p)  # type: ignore[misc]
    assert torch.equal(out["f"], f.flatten())
    assert torch.equal(out["g"], g.flatten())
    assert float(out["spread"].amax()) == float(spread)


def test_a_start_with_bad_costs_is_not_finite(program: Path, tmp_path: Path) -> None:
    for bad in (torch.nan, -torch.inf, torch.inf):
        p = problem((2, 40, 9), torch.float32)
        p.matrix[1, 33, 4 if bad != torch.inf else slice(None)] = bad
        arrays = {"cost": p.matrix, "row_mass": p.rows.mass, "column_mass": p.columns.mass}
        types = {"f": torch.float32, "spread": torch.float64}
        out = emulation.run(program, tmp_path / "case", arrays, numbers(p, START), types)
        assert out["f"].isfinite().logical_not().nonzero().tolist() == [[73]]
        torch.testing.assert_close(out["f"][73], torch.tensor(bad), equal_nan=True)
        assert bool(out["spread"].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_plan(program: Path, tmp_path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    p = problem(shape, dtype, epsilon=0.008, zeros=True)  # some entries are subnormal
    f, g, _ = plainly(iterations.start_of, p)  # type: ignore[misc]
    f, g = p.rows.without_void(f), p.columns.without_void(g)
    u, v = draw(*f.shape, dtype=dtype, seed=3), draw(*g.shape, dtype=dtype, seed=4)
    arrays = {"cost": p.matrix, "f": f, "g": g, "u": u, "v": v}
    out = emulation.run(program, tmp_path / "case", arrays, numbers(p, PLAN), {"kernel": dtype, "plan": dtype})
    exact = plainly(DenseKernel, wide(p), f.double(), g.double()).matrix  # type: ignore[attr-defined]
    assert_near(out["kernel"], exact)
    assert not bool((out["kernel"] < torch.finfo(dtype).tiny).logical_and(out["kernel"] > 0).any())
    torch.testing.assert_close(out["plan"], (u[..., None] * out["kernel"].view(shape) * v[:, None]).flatten())


def emulated(program: Path, folder: Path, p: Problem, count: int, form: int) -> dict[str, Tensor]:
    """The iterations, and the exact numbers behind them under names that begin with "exact_"."""
    f, g, _ = plainly(iterations.start_of, p)  # type: ignore[misc]
    kernel, one, dtype = plainly(DenseKernel, p, f, g), p.columns.reference, p.matrix.dtype
    shift = None if p.shift is None else p.shift.numbers
    arrays = {"matrix": kernel.matrix, "f0": f, "g0": g, "v0": one}  # type: ignore[attr-defined]
    for name, side, log_exact in zip(("row", "column"), (p.rows, p.columns), (shift or (None, None))[:2], strict=True):
        arrays |= {f"{name}_{part}": x for part, x in zip(PARTS, fused._side(side, log_exact), strict=True)}
    types = dict.fromkeys(("f", "g", "u", "v", "s"), dtype)
    ceilings = {"row_level": dtype, "column_level": dtype} if p.rows.ceiling is not None else {}
    length = 0.0 if shift is None else shift.length
    settings = numbers(p, SCALE, shift_length=length, count=count, form=form)
    out = emulation.run(program, folder, arrays, settings, types | ceilings)
    exact = wide(p)
    with kernels.disabled():
        wanted = iterations.advance(exact, DenseKernel(exact, f.double(), g.double()), one.double(), count)
    out |= {f"exact_{name}": getattr(wanted, name) for name in types}
    for name, side in (("row", exact.rows), ("column", exact.columns)):
        if side.ceiling is not None:
            out[f"exact_{name}_level"] = side.ceiling.value
    return out


def assert_exact(p: Problem, out: dict[str, Tensor]) -> None:
    """f, g, u, v, s where there is mass, relative to the largest; and the ceilings."""
    for name in ("f", "g", "u", "v", "s"):
        some = p.rows.mass > 0 if name in "fu" else p.columns.mass > 0
        found, wanted = out[name].view(some.shape)[some].double(), out[f"exact_{name}"][some]
        scale = max(float(wanted.abs().max()), 0.05)
        assert float((found - wanted).abs().max()) <= (4e-6 if out[name].dtype == torch.float32 else 1e-10) * scale
    for name in ("row_level", "column_level"):
        if name in out:
            assert_near(out[name], out[f"exact_{name}"], 1e-4 if out[name].dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [TURNS, PROBLEMS])
@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[1], DTYPES[1]), (SHAPES[2], DTYPES[0]), (SHAPES[4], DTYPES[1])])
def test_iterations(
    program: Path, tmp_path: Path, shape: tuple[int, int, int], dtype: torch.dtype, form: int, kind: str
) -> None:
    p = problem(shape, dtype, kind, zeros=True)
    assert_exact(p, emulated(program, tmp_path / "case", p, 2, form))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 2101), (1, 12, 2048), (2, 131, 128)])
def test_iterations_as_the_shape_has_them(
    program: Path, tmp_path: Path, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    p = problem(shape, dtype, "balanced", zeros=True)
    assert_exact(p, emulated(program, tmp_path / "case", p, 1, BY_SHAPE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_side_between_both_halves(program: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    p = problem((3, 300, 7), dtype, kind, zeros=True)
    rows = p.rows
    rows.ceiling = None
    f, r = draw(3, 300, dtype=dtype, seed=1), 0.1 + draw(3, 300, dtype=dtype, seed=2)
    r[rows.mass == 0] = 0
    arrays = {f"row_{name}": x for name, x in zip(PARTS, fused._side(rows, None), strict=True)} | {"f": f, "r": r}
    out = emulation.run(program, tmp_path / "case", arrays, numbers(p, SCALED), {"u": dtype, "log_u": dtype})
    exact = wide(p).rows
    u = exact.scaled(r.double(), f.double())
    assert_near(out["u"], u)
    log_u = exact.log_scaling(exact.divisor(r.double()).log(), f.double()) + exact.reference.log()
    assert_near(out["log_u"], log_u)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_nothing_beside_an_array(work: Path, tmp_path: Path, sanitizer: str) -> None:
    program = emulation.build("transport_scale", work, sanitizer)
    for kind, form in (("unbalanced", TURNS), ("partial", PROBLEMS)):
        p = problem((1, 34, 21), torch.float32, kind, zeros=True)
        assert_exact(p, emulated(program, tmp_path / "case", p, 1, form))
