"""CUDA kernels of the row-wise family without a GPU: their source on threads of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from counterpoise.kernels import rows
from counterpoise.losses import cross_entropy_loss
from tests.kernels import emulation
from tests.kernels.test_cuda_emulation import assert_close
from tests.kernels.test_rows import LOSSES, each_loss, problem

pytestmark = [
    pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(not kernels.available()["rows_total"]["cpu"], reason="the calls are those of the CPU kernels"),
]
SETTINGS = ("kind", "scale", "smoothing", "gamma_pos", "gamma_neg", "detach", "ignore_index", "divisor", "number")
INPUTS = ("target", "mask", "multiplicative", "additive", "margin", "class_weight", "weight")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def program(work: Path) -> Path:
    return emulation.build("rows", work)


def asked(function: Any, z: Tensor, y: Tensor, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The arrays and numbers with which a loss calls its kernel."""
    calls: list[tuple[Any, ...]] = []

    def listen(member: str, logits: Tensor, inputs: Any, settings: list[float], *_: Any) -> Tensor:
        calls.append((inputs, settings))
        return logits.sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "total", listen)
        function(z, y, **options)
    ((inputs, settings),) = calls
    return dict(zip(INPUTS, inputs, strict=True)), dict(zip(SETTINGS, map(float, settings), strict=True))


def emulated(
    program: Path, folder: Path, function: Any, z: Tensor, y: Tensor, options: dict[str, Any], *, offset: int = 0
) -> dict[str, Tensor]:
    """What the CUDA kernels make of a loss's call."""
    arrays, numbers = asked(function, z, y, options)
    numbers |= {"rows": z.shape[0], "classes": z.shape[1], "logits_type": emulation.TYPES.index(z.dtype)}
    numbers |= {"logits_offset": offset * z.element_size(), "upstream": 0.5}
    computed = torch.float64 if z.dtype == torch.float64 else torch.float32
    results = dict.fromkeys(("losses", "total", "kept_losses", "kept_total"), computed)
    results |= dict.fromkeys(("grad", "kept_grad"), z.dtype)
    return emulation.run(program, folder, {"logits": z, **arrays}, numbers, results)


def compare(
    program: Path, folder: Path, function: Any, z: Tensor, y: Tensor, options: dict[str, Any], *, offset: int = 0
) -> dict[str, Tensor]:
    """Losses, totals and gradients of both paths against the plain form in float64; what the kernels gave."""
    out = emulated(program, folder, function, z, y, options, offset=offset)
    computed = torch.float64 if z.dtype == torch.float64 else torch.float32
    leaf = z.double().requires_grad_()
    exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    with kernels.disabled():
        alone = {**exact, "weight": None, "normalizer": "count", "reduction": "none"}
        losses, total = function(leaf, y, **alone), function(leaf, y, **exact)
    (grad,) = torch.autograd.grad(total, leaf)
    for kept, upstream in (("", 1.0), ("kept_", 0.5)):
        assert_close(out[f"{kept}losses"], losses.detach(), computed)
        assert_close(out[f"{kept}total"], total.detach().reshape(1), computed)
        assert_close(out[f"{kept}grad"], upstream * grad, z.dtype)
    return out


# From one lane to a row to a warp, a block of 256, 512 and 1,024; packs (20, 1,000, 5,000, 40,000) and none.
SHAPES = [(3, 2), (67, 3), (150, 10), (33, 20), (5, 77), (9, 1000), (3, 1027), (2, 5000), (1, 20_001), (1, 40_000)]


@each_loss
def test_every_form_equals_its_plain_one(program: Path, tmp_path: Path, name: str) -> None:
    for shape in ((33, 20), (70, 10), (3, 1500)):
        function, options, z, y = problem(name, *shape)
        z[:, 1] = torch.where(y == 1, z[:, 1], -torch.inf)
        options = {k: v for k, v in options.items() if k != "multiplicative"}
        y[2] = -100
        compare(program, tmp_path / "case", function, z, y, options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["adjusted", "all"])
def test_ragged_sizes(program: Path, tmp_path: Path, shape: tuple[int, int], name: str) -> None:
    function, options, z, y = problem(name, *shape)
    z = z.float()
    out = compare(program, tmp_path / "case", function, z, y, options)
    again = compare(program, tmp_path / "case", function, z, y, options)
    assert all(torch.equal(out[key], again[key]) for key in out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 16), (3, 1030)])
def test_types(program: Path, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    function, options, z, y = problem("all", *shape)
    compare(program, tmp_path / "case", function, z.to(dtype), y, options)


@pytest.mark.parametrize("normalizer", ["count", "weight", "positives", 2.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_masks_weights_and_divisors(program: Path, tmp_path: Path, normalizer: str | float, weighted: bool) -> None:
    function, options = LOSSES["focal"]
    for rows_ in (67, 600):
        z, y = torch.randn(rows_, 5), torch.arange(rows_) % 5
        z[0], y[7] = torch.nan, -100  # what does not count is not looked at
        given = {"mask": torch.arange(rows_) % 3 > 0, "weight": torch.rand(rows_) if weighted else None}
        compare(program, tmp_path / "case", function, z, y, {**options, **given, "normalizer": normalizer})


def test_pointers_that_no_pack_fits(program: Path, tmp_path: Path) -> None:
    function, options, z, y = problem("all", 4, 1100)
    compare(program, tmp_path / "case", function, z.float(), y, options, offset=1)


def test_nothing_gives_zero(program: Path, tmp_path: Path) -> None:
    z, y = torch.zeros(3, 5), torch.full((3,), -100)
    out = compare(program, tmp_path / "case", cross_entropy_loss, z, y, {})
    assert out["total"] == out["kept_total"] == 0
    out = emulated(program, tmp_path / "case", cross_entropy_loss, z[:0], y[:0], {})
    assert out["total"] == out["kept_total"] == 0


@pytest.mark.parametrize("bad", [-1, 10])
def test_a_class_out_of_range_stops_the_kernel(program: Path, tmp_path: Path, bad: int) -> None:
    z, y = torch.zeros(9, 10), torch.zeros(9).long()
    y[3] = bad
    with pytest.raises(AssertionError, match=r"target holds a class index outside \[0, C - 1\]"):
        compare(program, tmp_path / "case", cross_entropy_loss, z, y, {})


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_nothing_beside_an_array(work: Path, tmp_path: Path, sanitizer: str) -> None:
    program = emulation.build("rows", work, sanitizer, "FLOAT_ALONE")
    for shape, offset in (((67, 3), 0), ((1, 1100), 0), ((1, 1100), 1)):
        function, options, z, y = problem("all", *shape)
        options |= {"mask": torch.arange(shape[0]) % 3 < 2, "weight": torch.rand(shape[0])}
        compare(program, tmp_path / "case", function, z.float(), y, options, offset=offset)
