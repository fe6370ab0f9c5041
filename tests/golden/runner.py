"""Reads reference vectors, and hands each case to its adapter with a record of what was read."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class NotMapped(Exception):
    """A case or a key of it that is left out by choice; the message says why."""


def parse(value: Any) -> Any:
    """ "inf", "-inf" and "nan" to floats, inside lists too."""
    if isinstance(value, list):
        return [parse(v) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def as_tensor(value: Any, dtype: str) -> Any:
    """A value as the case's ``dtypes`` name it: a tensor, a list, a list of tensors, or None."""
    value = parse(value)
    if value is None or dtype in ("NoneType", "list"):
        return value
    if dtype.startswith("list["):
        return [torch.tensor(v, dtype=getattr(torch, dtype[5:-1])) for v in value]
    return torch.tensor(value, dtype=getattr(torch, dtype))


@dataclass
class Case:
    """One case of a vector file. Reading a parameter or an input is recorded; what stays unread fails the case."""

    method: str
    name: str
    raw: dict[str, Any]
    read: set[str] = field(default_factory=set)
    leaves: dict[str, Tensor] = field(default_factory=dict)

    @property
    def expected(self) -> dict[str, Any]:
        """What must come out."""
        return self.raw["expected"]

    def param(self, name: str, default: Any = None) -> Any:
        """A parameter, or ``default`` where this case has none."""
        self.read.add(f"params.{name}")
        return parse(self.raw["params"].get(name, default))

    def input(self, name: str) -> Any:
        """An input as its dtype says, or None; one whose gradient is expected requires it."""
        self.read.add(f"inputs.{name}")
        if name not in self.raw["inputs"]:
            return None
        dtypes = self.raw.get("dtypes", {})
        value = as_tensor(self.raw["inputs"][name], dtypes.get(name, dtypes.get("all", "list")))
        if isinstance(value, Tensor) and value.is_floating_point():
            self.leaves[name] = value.requires_grad_()
        return value

    @property
    def unread(self) -> set[str]:
        """Parameters and inputs that the adapter did not look at."""
        there = {f"{kind}.{name}" for kind in ("params", "inputs") for name in self.raw[kind]}
        return there - self.read

    @property
    def is_float32(self) -> bool:
        """All floating inputs are float32."""
        dtypes = [d for d in self.raw.get("dtypes", {}).values() if "float" in d]
        return bool(dtypes) and all("float32" in d for d in dtypes)


def load(folder: Path) -> list[tuple[dict[str, Any], Case]]:
    """(file, case) of every vector file of a folder."""
    pairs = []
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        pairs += [(file, Case(file["method"], raw["name"], raw)) for raw in file["cases"]]
    return pairs


def with_gradients(case: Case, outputs: dict[str, Any]) -> dict[str, Any]:
    """Adds grad_<input> of the output named loss (of its sum), where expected and not given by the adapter."""
    wanted = [k for k in case.expected if k.startswith("grad_") and k not in outputs]
    if not wanted:
        return outputs
    leaves = [case.leaves[k.removeprefix("grad_")] for k in wanted]
    grads = torch.autograd.grad(outputs["loss"].sum(), leaves, allow_unused=True, materialize_grads=True)
    return {**outputs, **dict(zip(wanted, grads, strict=True))}


def required_keys(file: dict[str, Any], case: Case) -> list[str]:
    """Expected keys less those that record a quirk of some released code."""
    quirks = file.get("compat_keys") or []
    return [k for k in case.expected if not any(fnmatch.fnmatch(k, pattern) for pattern in quirks)]


def compare(file: dict[str, Any], case: Case, key: str, value: Any) -> None:
    """Raises AssertionError unless ``value`` is the expected one at the file's tolerance; integers, states exactly."""
    if isinstance(case.expected[key], list) and any(isinstance(step, dict) for step in case.expected[key]):
        assert value == case.expected[key], f"{key}: {value} != {case.expected[key]}"
        return
    expected = torch.from_numpy(np.asarray(parse(case.expected[key])))
    actual = torch.as_tensor(value).detach()
    if not expected.is_floating_point() and not actual.is_floating_point():
        assert actual.tolist() == expected.tolist(), f"{key}: {actual.tolist()} != {expected.tolist()}"
        return
    tolerance = file["tolerance"]["float32" if case.is_float32 else "float64"]
    for pattern, special in (file.get("tolerance_by_key") or {}).items():
        if fnmatch.fnmatch(key, pattern):
            tolerance = special
    torch.testing.assert_close(
        actual.double(), expected.double(), **tolerance, equal_nan=True, msg=lambda text: f"{key}: {text}"
    )
