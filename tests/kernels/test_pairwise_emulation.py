"""CUDA kernels of the pairwise family without a GPU: their source on threads of the host, against the CPU's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from counterpoise import kernels
from counterpoise.kernels import pair_rules
from tests.kernels import emulation

pytestmark = [
    pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        not kernels.available()["pairwise_rows"]["cpu"], reason=str(kernels.available()["pairwise_rows"]["why_not"])
    ),
]
QUERIES, KEYS, WIDTH = 23, 61, 5
RULES = {
    "labels": {"positive": pair_rules.SAME_LABEL, "candidate": pair_rules.NOT_SELF},
    "classes": {"positive": pair_rules.SAME_CLASS, "candidate": pair_rules.SAME_CLASS},
    "bank": {"positive": pair_rules.SAME_LABEL, "candidate": pair_rules.POSITIVE_OR_BANK},
    "index": {"positive": pair_rules.NONE, "candidate": pair_rules.EVERY},
}
OPERATORS = ("rows", "slopes", "sigmoid")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation.build("pairwise", tmp_path_factory.mktemp("pairwise"))


def case(name: str, dtype: torch.dtype, *, alone: bool) -> tuple[Tensor, pair_rules.Pairs]:
    """Products of all queries and keys, and rules."""
    generator = torch.Generator().manual_seed(len(name))
    keys = QUERIES if alone else KEYS
    z = torch.randn(QUERIES, WIDTH, dtype=dtype, generator=generator)
    k = z if alone else torch.randn(KEYS, WIDTH, dtype=dtype, generator=generator)
    own = torch.stack([torch.arange(keys), torch.randint(-1, 3, (keys,), generator=generator)], 1)
    others = own.clone()
    others[keys // 2 :, 0] -= 2 * keys if name == "bank" else 0
    weight = torch.randn(KEYS, dtype=dtype, generator=generator)
    weight[3] = -torch.inf
    by_index = name == "index"
    rules = pair_rules.pairs(
        z,
        query_ids=own[:QUERIES],
        key_ids=others,
        index=torch.randint(0, keys, (QUERIES, 3), generator=generator) if by_index else None,
        probability=torch.rand(QUERIES, 3, dtype=dtype, generator=generator) if by_index else None,
        itself=torch.arange(QUERIES) if by_index else None,
        log_weight=None if alone else weight,
        sharpness=1.0 if alone else 1.3,
        **RULES[name],
    )
    return (z @ k.T).contiguous(), rules


def place(tile: Tensor, rules: pair_rules.Pairs, row: int, column: int, m: int) -> dict[str, float]:
    return {
        "queries": QUERIES,
        "keys": m,
        "rows": len(tile),
        "columns": tile.shape[1],
        "row": row,
        "column": column,
        "positive": rules.positive,
        "candidate": rules.candidate,
        "positives": 0 if rules.index is None else rules.index.shape[1],
        "sharpness": rules.sharpness,
        "in_double": tile.dtype == torch.float64,
    }


def arrays(rules: pair_rules.Pairs) -> dict[str, Tensor | None]:
    names = ("query_ids", "key_ids", "index", "probability", "itself", "log_weight")
    found = {name: getattr(rules, name) for name in names}
    return {name: x.long() if name.endswith("ids") and x is not None else x for name, x in found.items()}


def compare(
    program: Path, folder: Path, tile: Tensor, rules: pair_rules.Pairs, at: tuple[int, int], **how: Any
) -> None:
    """One operator on both devices: every tensor that it changes."""
    operator, tensors, numbers, m = how["operator"], how["tensors"], how["numbers"], how["keys"]
    ours = {name: x.clone() for name, x in {"products": tile, **tensors}.items() if x is not None}
    dtypes = {f"new_{name}": x.dtype for name, x in ours.items() if name in how["changed"]}
    given = {**arrays(rules), **ours}
    settings = {**place(tile, rules, *at, m), "operator": operator, "width": WIDTH, **numbers}
    found = emulation.run(program, folder / "case", given, settings, dtypes)
    how["call"](ours, (ours["products"], *at, *rules.arguments()))
    tolerance = 1e-11 if tile.dtype == torch.float64 else 3e-6
    for name in how["changed"]:
        if name in ours:
            assert_close(found[f"new_{name}"], ours[name].flatten(), rtol=tolerance, atol=tolerance, msg=name)


def vectors(dtype: torch.dtype, names: str, n: int = QUERIES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(n, dtype=dtype, generator=generator) for name in names.split()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_sums_by_row(program: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    products, rules = case(name, dtype, alone=False)
    tensors = vectors(dtype, "total dot similarity mass")
    tensors["top"] = torch.linspace(-4, 9, QUERIES, dtype=dtype)
    tensors["top"][0], tensors["total"][0], tensors["dot"][0] = -torch.inf, 0, 0
    tensors["mean_key"] = torch.rand(QUERIES, WIDTH, dtype=dtype)

    def call(x: dict[str, Tensor], tile: tuple[Any, ...]) -> None:
        sums = (x["top"], x["total"], x["dot"], x["similarity"], x["mass"], x["mean_key"])
        torch.ops.counterpoise.pairwise_rows(*tile, *sums, True)

    compare(
        program, tmp_path, products[4:20, 7:53].contiguous(), rules, (4, 7), keys=KEYS, operator=0, tensors=tensors,
        numbers={"keep": 1}, call=call, changed=("products", *tensors),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_slopes(program: Path, tmp_path: Path, name: str, bent: bool, dtype: torch.dtype) -> None:
    products, rules = case(name, dtype, alone=False)
    tensors = vectors(dtype, "log_sum slope pull" + (" bend middle" if bent else ""))

    def call(x: dict[str, Tensor], tile: tuple[Any, ...]) -> None:
        more = (x["log_sum"], x["slope"], x.get("bend"), x.get("middle"), 20, x["pull"], False, False)
        torch.ops.counterpoise.pairwise_slopes(*tile, *more)

    compare(
        program, tmp_path, products[4:20, 7:53].contiguous(), rules, (4, 7), keys=KEYS, operator=1, tensors=tensors,
        numbers={"fixed": 20, "mirrored": 0}, call=call, changed=("products",),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [(0, 0), (2, 11)])
@pytest.mark.parametrize("name", ["labels", "classes", "index"])
def test_slopes_in_both_directions(
    program: Path, tmp_path: Path, name: str, at: tuple[int, int], dtype: torch.dtype
) -> None:
    products, rules = case(name, dtype, alone=True)
    tensors = vectors(dtype, "log_sum slope pull")

    def call(x: dict[str, Tensor], tile: tuple[Any, ...]) -> None:
        more = (x["log_sum"], x["slope"], None, None, 0, x["pull"], True, False)
        torch.ops.counterpoise.pairwise_slopes(*tile, *more)

    tile = products[at[0] : at[0] + 9, at[1] : at[1] + 9].contiguous()
    compare(
        program, tmp_path, tile, rules, at, keys=QUERIES, operator=1, tensors=tensors,
        numbers={"fixed": 0, "mirrored": 1}, call=call, changed=("products",),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["classes", "index"])
def test_independent_pairs(program: Path, tmp_path: Path, name: str, backward: bool, dtype: torch.dtype) -> None:
    products, rules = case(name, dtype, alone=False)
    rules = replace(rules, candidate=pair_rules.EVERY, itself=None)
    tensors = vectors(dtype, "sums" + (" upstream" if backward else ""))
    tensors["bias"] = torch.full((1,), -1.5, dtype=dtype)

    def call(x: dict[str, Tensor], tile: tuple[Any, ...]) -> None:
        if backward:
            torch.ops.counterpoise.pairwise_sigmoid_slopes(*tile, x["bias"], x["upstream"], x["sums"])
        else:
            torch.ops.counterpoise.pairwise_sigmoid(*tile, x["bias"], x["sums"])

    compare(
        program, tmp_path, products[4:20, 7:53].contiguous(), rules, (4, 7), keys=KEYS, operator=2, tensors=tensors,
        numbers={}, call=call, changed=("products", "sums"),
    )  # fmt: skip


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_are_content(sanitizer: str, tmp_path: Path) -> None:
    built = emulation.build("pairwise", tmp_path, sanitizer, "FLOAT_ALONE")
    test_sums_by_row(built, tmp_path, "index", torch.float32)
    test_slopes_in_both_directions(built, tmp_path, "index", (2, 11), torch.float32)
    test_independent_pairs(built, tmp_path, "index", True, torch.float32)
