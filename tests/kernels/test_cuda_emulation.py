"""CUDA kernels without a GPU: their own source on threads of the host, against the plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterpoise import kernels
from counterpoise.kernels.binary import Binary, asymmetric, focal, focal_star
from counterpoise.losses import (
    asymmetric_loss,
    binary_cross_entropy_loss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
)
from tests.kernels import emulation

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="module")
def binary(work: Path) -> Path:
    return emulation.build("binary", work)


@pytest.fixture(scope="module")
def block(work: Path) -> Path:
    return emulation.build("block", work)


# ---- what all kernels share ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "threads", "lanes"), [(1, 32, 1), (77, 64, 4), (1000, 256, 32)])
def test_reductions_over_groups_of_lanes_and_blocks(
    block: Path, tmp_path: Path, n: int, threads: int, lanes: int
) -> None:
    x = 30 * torch.randn(n, generator=torch.Generator().manual_seed(n))
    packs = {name: torch.randn(64, dtype=dtype) for name, dtype in PACKED.items()}
    numbers = {"n": n, "threads": threads, "lanes": lanes, "packed": 64}
    copies = {f"{name}_copy": dtype for name, dtype in PACKED.items()}
    names = ("sums", "largest", "log_sums", "grouped")
    out = emulation.run(
        block, tmp_path / "case", {"x": x, **packs}, numbers, {**dict.fromkeys(names, torch.float32), **copies}
    )
    sums = out["sums"].reshape(-1, 2)
    assert (sums == sums[0]).all(), "every thread holds the same bits"
    torch.testing.assert_close(sums[0, 0], x.sum(), rtol=1e-5, atol=1e-4)
    assert sums[0, 1] == n
    assert (out["largest"] == x.max()).all()
    assert (out["log_sums"] == out["log_sums"][0]).all()
    torch.testing.assert_close(out["log_sums"][0], x.logsumexp(0), rtol=1e-6, atol=1e-6)
    groups = torch.arange(threads, dtype=torch.float32).reshape(-1, lanes)
    torch.testing.assert_close(out["grouped"], groups.sum(1, True).expand_as(groups).flatten().repeat(2))
    for name in PACKED:
        assert torch.equal(out[f"{name}_copy"], packs[name])


PACKED = {"half": torch.float16, "brain": torch.bfloat16, "double": torch.float64}


@pytest.mark.parametrize(("special", "wanted"), [("-inf", "-inf"), ("inf", "inf"), ("nan", "nan")])
def test_log_sums_of_what_is_not_finite(block: Path, tmp_path: Path, special: str, wanted: str) -> None:
    x = torch.full((70,), float(special))
    packs = {name: torch.randn(64, dtype=dtype) for name, dtype in PACKED.items()}
    names = ("largest", "log_sums")
    for some in (x, torch.cat([x[:3], torch.zeros(50)])):
        numbers = {"n": len(some), "threads": 64, "lanes": 8, "packed": 64}
        out = emulation.run(
            block, tmp_path / "case", {"x": some, **packs}, numbers, dict.fromkeys(names, torch.float32)
        )
        expected = some.logsumexp(0).expand(128)
        torch.testing.assert_close(out["log_sums"], expected, equal_nan=True)
        torch.testing.assert_close(out["largest"], some.max().expand(128), equal_nan=True)
        if some is x:
            torch.testing.assert_close(expected[0], torch.tensor(float(wanted)), equal_nan=True)


# ---- the element-wise family --------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Binary, Any, dict[str, Any]]] = {
    "focal": (focal(0.25, 2.0), sigmoid_focal_loss, {"alpha": 0.25, "gamma": 2.0}),
    "focal, any exponent": (focal(None, 1.7), sigmoid_focal_loss, {"alpha": None, "gamma": 1.7}),
    "focal*": (focal_star(0.3, 2.0, 0.5), sigmoid_focal_star_loss, {"alpha": 0.3, "gamma": 2.0, "beta": 0.5}),
    "asymmetric": (
        asymmetric(4.0, 1.0, 0.05, 1e-8, True),
        asymmetric_loss,
        {"gamma_neg": 4.0, "gamma_pos": 1.0, "margin": 0.05, "eps": 1e-8, "detach_weight": True},
    ),
    "asymmetric, any exponent": (
        asymmetric(2.5, 0.0, 0.0, None, False),
        asymmetric_loss,
        {"gamma_neg": 2.5, "gamma_pos": 0.0, "margin": 0.0, "eps": None, "detach_weight": False},
    ),
    "asymmetric, no margin": (
        asymmetric(2.0, 1.0, 0.0, None, False),
        asymmetric_loss,
        {"gamma_neg": 2.0, "gamma_pos": 1.0, "margin": 0.0, "eps": None, "detach_weight": False},
    ),
    "asymmetric, margin, any exponent": (
        asymmetric(2.5, 1.5, 0.1, None, True),
        asymmetric_loss,
        {"gamma_neg": 2.5, "gamma_pos": 1.5, "margin": 0.1, "eps": None, "detach_weight": True},
    ),
}


def inputs(rows: int, row: int, dtype: torch.dtype, labels: torch.dtype, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Logits with a masked class and large values; labels, a fifth of them positive, some in between with `soft`."""
    draw = torch.Generator().manual_seed(rows * 1000 + row)
    z = (3 * torch.randn(rows, row, generator=draw, dtype=torch.float64)).to(dtype)
    t = (torch.rand(rows, row, generator=draw) < 0.2).to(labels)
    if soft:
        t[::2] = torch.rand(t[::2].shape, generator=draw).to(labels)
    z[0, 0], z[-1, -1] = -100, 100
    z[rows // 2, row // 2], t[rows // 2, row // 2] = -torch.inf, 0
    return z, t


def emulated(
    program: Path,
    folder: Path,
    loss: Binary,
    z: Tensor,
    t: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mean: bool = False,
    divisor: float = 0.0,
    offset: int = 0,
    upstream: float = 1.0,
) -> dict[str, Tensor]:
    """What the CUDA kernels make of (N, C) logits; upstream gradients are 0.7 and 0.1, 0.2, ... by row.

    ``upstream`` is that of a gradient which came with its total, "both_grad".
    """
    computed = torch.float64 if z.dtype == torch.float64 else torch.float32
    names = ("kind", "gamma_pos", "gamma_neg", "alpha_pos", "alpha_neg", "margin", "log_eps", "beta", "detach")
    numbers = {
        **dict(zip(names, loss, strict=True)),
        "rows": z.shape[0],
        "row": z.shape[1],
        "mean": mean,
        "divisor": divisor,
        "logits_type": emulation.TYPES.index(z.dtype),
        "target_type": emulation.TYPES.index(t.dtype),
        "mask_by_entry": mask is not None and mask.numel() == z.numel(),
        "logits_offset": offset * z.element_size(),
    }
    arrays = {
        "logits": z,
        "target": t,
        "mask": mask,
        "weight": None if weight is None else weight.to(computed),
        "entry_weight": None if class_weight is None else class_weight.to(computed),
        "positive_weight": None if pos_weight is None else pos_weight.to(computed),
        "upstream": torch.tensor([0.7], dtype=computed),
        "both_upstream": torch.tensor([upstream], dtype=computed),
        "by_row": (torch.arange(z.shape[0]) % 7 + 1).to(computed) / 10,
    }
    results = dict.fromkeys(("sums", "counts", "total", "divided_by"), computed)
    results |= dict.fromkeys(("grad", "grad_rows"), z.dtype)
    if mask is None and weight is None and class_weight is None:
        results |= {"both_total": computed, "both_divided_by": computed, "both_grad": z.dtype}
    return emulation.run(program, folder, arrays, numbers, results)


def plain(function: Any, settings: dict[str, Any], z: Tensor, t: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient of the plain form in double precision, upstream 0.7 or as above."""
    leaf = z.double().requires_grad_()
    with kernels.disabled():
        value = function(leaf, t.double(), **settings, **options)
    upstream = torch.tensor(7.0) if value.ndim == 0 else torch.arange(len(value)) % 7 + 1
    return value.detach(), torch.autograd.grad(value, leaf, upstream.double() / 10)[0]


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    scale = wanted.abs().max().clamp_min(1e-3).item()
    absolute = tolerance * scale if dtype in (torch.float64, torch.float32) else 1e-6
    torch.testing.assert_close(found.double(), wanted.flatten(), rtol=tolerance, atol=absolute)


# Rows: a thread, a few lanes, a warp and (with 8,200) a block to a row; packs (20, 1,000) and none (1, 3, 77).
SHAPES = [(1, 1), (1031, 1), (67, 3), (33, 20), (5, 77), (9, 1000), (2, 8200)]


@pytest.mark.parametrize("name", LOSSES)
def test_every_form_equals_its_plain_one(binary: Path, tmp_path: Path, name: str) -> None:
    loss, function, settings = LOSSES[name]
    for soft in (False, True):
        z, t = inputs(33, 20, torch.float64, torch.float64, soft)
        out = emulated(binary, tmp_path / "case", loss, z, t, mean=True)
        value, grad = plain(function, settings, z, t)
        assert_close(out["total"], value, z.dtype)
        assert_close(out["grad"], grad, z.dtype)
        value, grad = plain(function, settings, z, t, inner="sum", reduction="none")
        assert_close(out["sums"], value, z.dtype)
        assert_close(out["grad_rows"], grad, z.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_sizes(binary: Path, tmp_path: Path, shape: tuple[int, int]) -> None:
    loss, function, settings = LOSSES["focal"]
    z, t = inputs(*shape, torch.float32, torch.int64)
    out = emulated(binary, tmp_path / "case", loss, z, t, mean=True)
    value, grad = plain(function, settings, z, t)
    assert_close(out["total"], value, z.dtype)
    assert_close(out["grad"], grad, z.dtype)
    value, grad = plain(function, settings, z, t, inner="sum", reduction="none")
    assert_close(out["sums"], value, z.dtype)
    assert_close(out["grad_rows"], grad, z.dtype)
    live = ~((z == -torch.inf) & (t == 0))
    assert torch.equal(out["counts"], live.sum(1).float())
    again = emulated(binary, tmp_path / "case", loss, z, t, mean=True)
    assert all(torch.equal(out[key], again[key]) for key in out)


@pytest.mark.parametrize("labels", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(binary: Path, tmp_path: Path, dtype: torch.dtype, labels: torch.dtype) -> None:
    loss, function, settings = LOSSES["asymmetric"]
    z, t = inputs(12, 16, dtype, labels)
    out = emulated(binary, tmp_path / "case", loss, z, t, divisor=1.0)
    value, grad = plain(function, settings, z, t, inner="sum", reduction="sum")
    assert_close(out["total"], value, torch.float32)
    assert_close(out["grad"], grad, dtype)


@pytest.mark.parametrize("shape", [(67, 3), (9, 100)])
@pytest.mark.parametrize("by_entry", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_masks_and_weights(binary: Path, tmp_path: Path, shape: tuple[int, int], by_entry: bool, mean: bool) -> None:
    loss, function, settings = LOSSES["asymmetric"]
    z, t = inputs(*shape, torch.float32, torch.uint8)
    mask = torch.rand(shape if by_entry else shape[:1]) < 0.6
    mask[0] = False
    z[0], t[0] = torch.nan, 7  # what is masked is not looked at
    weight, class_weight = torch.rand(shape[0]), torch.rand(shape[1])
    factors = {"weight": weight, "class_weight": class_weight}
    out = emulated(binary, tmp_path / "case", loss, z, t, mask=mask, mean=mean, **factors)
    kept = z.clone(), t.clone()
    kept[0][0], kept[1][0] = 0, 0
    doubled = {name: x.double() for name, x in factors.items()}
    value, grad = plain(function, settings, *kept, mask=mask, inner="mean" if mean else "sum", **doubled)
    assert_close(out["total"], value, z.dtype)
    assert_close(out["grad"], grad, z.dtype)


@pytest.mark.parametrize("shape", [(67, 3), (9, 100), (40, 1)])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_the_positive_part(binary: Path, tmp_path: Path, shape: tuple[int, int], soft: bool) -> None:
    z, t = inputs(*shape, torch.float32, torch.float32, soft)
    pos_weight, class_weight = 3 * torch.rand(shape[1]), torch.rand(shape[1])
    pos_weight[0] = 0
    out = emulated(
        binary, tmp_path / "case", focal(None, 0.0), z, t, mean=True, class_weight=class_weight, pos_weight=pos_weight
    )
    doubled = {"class_weight": class_weight.double(), "pos_weight": pos_weight.double()}
    value, grad = plain(binary_cross_entropy_loss, {}, z, t, **doubled)
    assert_close(out["total"], value, z.dtype)
    assert_close(out["grad"], grad, z.dtype)


def test_pointers_that_no_pack_fits(binary: Path, tmp_path: Path) -> None:
    loss, function, settings = LOSSES["focal"]
    z, t = inputs(9, 100, torch.float32, torch.float32)
    out = emulated(binary, tmp_path / "case", loss, z, t, mean=True, offset=1)
    assert_close(out["grad"], plain(function, settings, z, t)[1], z.dtype)


def test_nothing_gives_zero(binary: Path, tmp_path: Path) -> None:
    out = emulated(binary, tmp_path / "case", LOSSES["focal"][0], torch.empty(0, 5), torch.empty(0, 5))
    assert out["total"] == 0
    assert out["divided_by"] == 1
    assert out["grad"].numel() == 0


def test_many_blocks_share_a_sum(binary: Path, tmp_path: Path) -> None:
    loss, function, settings = LOSSES["focal"]
    z, t = inputs(300, 20, torch.float32, torch.float32)
    for mean, divisor in ((True, 0.0), (False, 3.0)):  # by row, and flat
        out = emulated(binary, tmp_path / "case", loss, z, t, mean=mean, divisor=divisor)
        options = {} if mean else {"inner": "sum", "normalizer": 3.0}
        value, grad = plain(function, settings, z, t, **options)
        assert_close(out["total"], value, z.dtype)
        assert_close(out["grad"], grad, z.dtype)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("drops_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(600, 1), (67, 3), (9, 100), (1, 1)])
def test_a_gradient_with_its_total(
    binary: Path, tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, drops_out: bool, upstream: float
) -> None:
    loss, function, settings = LOSSES["asymmetric"]
    z, t = inputs(*shape, dtype, torch.float32)
    if not drops_out:
        z[z == -torch.inf] = 0
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    for mean, divisor in ((True, 0.0), (False, 3.0)):
        out = emulated(binary, tmp_path / "case", loss, z, t, mean=mean, divisor=divisor, upstream=upstream)
        options = {} if mean else {"inner": "sum", "normalizer": 3.0}
        value, grad = plain(function, settings, z, t, **options)
        assert_close(out["both_total"], value, computed)
        assert_close(out["both_grad"], grad * (upstream / 0.7), dtype)
        assert out["both_divided_by"][1] == (not drops_out)


@pytest.mark.parametrize("label", [-0.1, 1.5, float("nan")])
def test_a_label_out_of_range_stops_the_kernel(binary: Path, tmp_path: Path, label: float) -> None:
    z, t = inputs(9, 10, torch.float32, torch.float32)
    t[3, 3] = label
    with pytest.raises(AssertionError, match=r"target holds a value outside \[0, 1\]"):
        emulated(binary, tmp_path / "case", LOSSES["focal"][0], z, t)


# ---- under the sanitizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_nothing_beside_an_array(work: Path, tmp_path: Path, sanitizer: str) -> None:
    loss, function, settings = LOSSES["asymmetric"]
    program = emulation.build("binary", work, sanitizer, "FLOAT_ALONE")
    for shape in ((261, 1), (67, 3), (9, 100), (1, 8200)):
        z, t = inputs(*shape, torch.float32, torch.float32)
        mask = torch.rand(shape) < 0.6
        for options in ({"mean": True}, {"mask": mask, "weight": torch.rand(shape[0]), "offset": 1}):
            out = emulated(program, tmp_path / "case", loss, z, t, **options)
            if "mean" in options:
                assert_close(out["total"], plain(function, settings, z, t)[0], z.dtype)


@pytest.mark.parametrize(
    ("sanitizer", "mistake", "report"),
    [("thread", "race", "data race"), ("address", "beside", "heap-buffer-overflow")],
)
def test_the_sanitizers_see_a_planted_mistake(work: Path, sanitizer: str, mistake: str, report: str) -> None:
    program = emulation.build("planted", work, sanitizer)
    clean = emulation.execute(program, "none")
    assert clean.returncode == 0, clean.stderr
    found = emulation.execute(program, mistake)
    assert found.returncode != 0
    assert report in found.stderr
