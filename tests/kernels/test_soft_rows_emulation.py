"""CUDA kernels of cross-entropy with probabilities without a GPU: their source on threads of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from tests.kernels import emulation
from tests.kernels.test_cuda_emulation import assert_close
from tests.kernels.test_soft_rows import LOSSES, VECTORS, each_loss, problem

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler")
DIVISORS = ("number", "count", "weight")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soft_rows")


@pytest.fixture(scope="module")
def program(work: Path) -> Path:
    return emulation.build("soft_rows", work)


def emulated(
    program: Path,
    folder: Path,
    options: dict[str, Any],
    z: Tensor,
    t: Tensor,
    *,
    divergence: bool = False,
    target_scale: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: str = "count",
    offset: int = 0,
) -> dict[str, Tensor]:
    """What the CUDA kernels make of (N, C) logits and targets."""
    computed = torch.float64 if z.dtype == torch.float64 else torch.float32
    numbers = {
        "rows": z.shape[0],
        "classes": z.shape[1],
        "divergence": divergence,
        "scale": options.get("scale", 1.0),
        "smoothing": options.get("label_smoothing", 0.0),
        "target_scale": target_scale,
        "divisor": DIVISORS.index(divisor),
        "number": 2.5,
        "logits_type": emulation.TYPES.index(z.dtype),
        "target_type": emulation.TYPES.index(t.dtype),
        "logits_offset": offset * z.element_size(),
    }
    vectors = {name: options[name].to(computed) for name in VECTORS if name in options}
    arrays = {"logits": z, "target": t, "mask": mask, "weight": None if weight is None else weight.to(computed)}
    results = dict.fromkeys(("losses", "total", "factor", "kept_losses", "kept_total"), computed)
    results |= {"grad": z.dtype, "kept_grad": z.dtype}
    return emulation.run(program, folder, arrays | vectors, numbers, results)


def compare(program: Path, folder: Path, name: str, z: Tensor, t: Tensor, **how: Any) -> dict[str, Tensor]:
    """Losses, total and gradient against the plain form in float64; what the kernels gave."""
    function, _ = LOSSES[name]
    options = how.pop("options")
    given, scale = (
        (t, 0.0) if name != "distillation" else (torch.where((t == 0).all(1, keepdim=True), 0, t.log()) * 2, 0.5)
    )
    how["divergence"] = name in ("divergence", "distillation")
    out = emulated(program, folder, options, z, given, target_scale=scale, **how)
    divisor = how.get("divisor", "count")
    settings = {
        "mask": how.get("mask"),
        "weight": None if how.get("weight") is None else how["weight"].double(),
        "normalizer": 2.5 if divisor == "number" else divisor,
    }
    leaf = z.double().requires_grad_()
    with kernels.disabled():
        losses = function(leaf, t.double(), reduction="none", mask=how.get("mask"), **options)
        total = function(leaf, t.double(), **settings, **options)
    (grad,) = torch.autograd.grad(total, leaf)
    single = torch.float64 if z.dtype == torch.float64 else torch.float32
    for kept in ("", "kept_"):
        assert_close(out[f"{kept}losses"], losses.detach(), single)
        assert_close(out[f"{kept}total"], total.detach().reshape(1), single)
        assert_close(out[f"{kept}grad"], grad, z.dtype)
    return out


# A warp and (from 1,025 on) a block to a row, several slices of a row (8,200); packs (20, 1,000, 8,200) and none.
SHAPES = [(3, 1), (67, 3), (33, 20), (5, 77), (9, 1000), (3, 1027), (2, 8200), (2, 9001)]


@each_loss
def test_every_form_equals_its_plain_one(program: Path, tmp_path: Path, name: str) -> None:
    for shape in ((33, 20), (3, 1500)):
        _, options, z, t = problem(name, *shape)
        z[:, 2], t[:, 2] = -torch.inf, 0
        options = {k: v for k, v in options.items() if k != "multiplicative"}
        compare(program, tmp_path / "case", name, z, t, options=options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["adjusted", "all", "divergence", "distillation"])
def test_ragged_sizes(program: Path, tmp_path: Path, shape: tuple[int, int], name: str) -> None:
    _, options, z, t = problem(name, *shape)
    z, t = z.float(), t.float()
    out = compare(program, tmp_path / "case", name, z, t, options=options)
    again = compare(program, tmp_path / "case", name, z, t, options=options)
    assert all(torch.equal(out[key], again[key]) for key in out)


@pytest.mark.parametrize("labels", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types(program: Path, tmp_path: Path, dtype: torch.dtype, labels: torch.dtype | None) -> None:
    if dtype == torch.float64:
        labels = None  # with which float64 alone goes
    _, options, z, t = problem("all", 12, 16)
    compare(program, tmp_path / "case", "all", z.to(dtype), t.to(labels or dtype), options=options)


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("weighted", [False, True])
def test_masks_weights_and_divisors(program: Path, tmp_path: Path, divisor: str, weighted: bool) -> None:
    for rows in (67, 600):
        _, options, z, t = problem("cross-entropy", rows, 5)
        mask = torch.arange(rows) % 3 > 0
        z[0], t[0] = torch.nan, 7  # what is masked is not looked at
        how = {"mask": mask, "weight": torch.rand(rows) if weighted else None, "divisor": divisor}
        compare(program, tmp_path / "case", "cross-entropy", z.float(), t.float(), options=options, **how)


def test_masked_chunks_and_pointers_that_no_pack_fits(program: Path, tmp_path: Path) -> None:
    _, options, z, t = problem("all", 4, 1100)
    z[:, :1090], t[:, :1090] = -torch.inf, 0
    for offset in (0, 1):
        compare(program, tmp_path / "case", "all", z.float(), t.float(), options=options, offset=offset)


def test_mass_on_a_masked_class_costs_infinitely_much(program: Path, tmp_path: Path) -> None:
    z, t = torch.zeros(2, 40), torch.full((2, 40), 1 / 40)
    z[0, 3] = -torch.inf
    out = emulated(program, tmp_path / "case", {}, z, t)
    assert out["losses"][0] == torch.inf
    assert out["losses"][1].isfinite()
    assert out["grad"].isfinite().all()


def test_nothing_gives_zero(program: Path, tmp_path: Path) -> None:
    out = emulated(program, tmp_path / "case", {}, torch.empty(0, 5), torch.empty(0, 5))
    assert out["total"] == 0


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_a_target_out_of_range_stops_the_kernel(program: Path, tmp_path: Path, bad: float) -> None:
    z, t = torch.zeros(9, 10), torch.full((9, 10), 0.1)
    t[3, 3] = bad
    with pytest.raises(AssertionError, match=r"target holds a value outside \[0, 1\]"):
        emulated(program, tmp_path / "case", {}, z, t)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_nothing_beside_an_array(work: Path, tmp_path: Path, sanitizer: str) -> None:
    program = emulation.build("soft_rows", work, sanitizer, "FLOAT_ALONE")
    for shape in ((67, 3), (1, 2100)):
        _, options, z, t = problem("all", *shape)
        options["multiplicative"] = options["additive"]
        how = {"mask": torch.arange(shape[0]) % 3 < 2, "weight": torch.rand(shape[0])}
        compare(program, tmp_path / "case", "all", z.float(), t.float(), options=options, **how)
        compare(program, tmp_path / "case", "all", z.float(), t.float(), options=options, offset=1)
