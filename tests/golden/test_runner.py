"""The runner of reference vectors keeps its word: nothing unread, nothing silently passed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.runner import Case, compare, parse, required_keys, with_gradients

FILE: dict[str, Any] = {
    "tolerance": {"float64": {"rtol": 1e-9, "atol": 0}, "float32": {"rtol": 1e-5, "atol": 0}},
    "tolerance_by_key": {"rough*": {"rtol": 0.1, "atol": 0}},
    "compat_keys": ["old_*"],
}


def case(**raw: Any) -> Case:
    return Case("method", "name", {"params": {}, "inputs": {}, "dtypes": {}, "expected": {}, **raw})


def test_what_an_adapter_does_not_read_is_known() -> None:
    read_in_part = case(params={"gamma": 2, "alpha": 1}, inputs={"z": [1.0]}, dtypes={"z": "float64"})
    read_in_part.param("gamma")
    assert read_in_part.unread == {"params.alpha", "inputs.z"}


def test_strings_stand_for_floats_that_json_lacks() -> None:
    assert parse(["inf", ["-inf", 1.0]]) == [float("inf"), [float("-inf"), 1.0]]


def test_gradients_are_those_of_the_sum_of_the_loss() -> None:
    made = case(inputs={"z": [1.0, 2.0]}, dtypes={"z": "float64"}, expected={"loss": 0, "grad_z": 0})
    z = made.input("z")
    assert with_gradients(made, {"loss": z**2})["grad_z"].tolist() == [2.0, 4.0]


def test_values_compare_at_the_tolerance_of_the_file_and_integers_exactly() -> None:
    made = case(expected={"loss": 1.0, "rough_loss": 1.0, "counts": [3, 4], "old_loss": 9})
    compare(FILE, made, "loss", torch.tensor(1 + 1e-10, dtype=torch.float64))
    compare(FILE, made, "rough_loss", 1.05)
    compare(FILE, made, "counts", [3, 4])
    for key, value in (("loss", 1.001), ("counts", [3, 5]), ("loss", float("nan"))):
        with pytest.raises(AssertionError, match=key):
            compare(FILE, made, key, value)
    assert required_keys(FILE, made) == ["loss", "rough_loss", "counts"]


def test_a_method_without_implementation_is_counted_as_not_covered(tmp_path: Path) -> None:
    raw = {"name": "only", "params": {}, "inputs": {}, "dtypes": {}, "expected": {"loss": 1.0}}
    (tmp_path / "unheard_of.json").write_text(json.dumps({"method": "unheard_of", **FILE, "cases": [raw]}))
    command = [sys.executable, "-m", "pytest", "tests/golden/test_golden.py", "--golden-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert "golden cases: 0 passed, 0 failed, 1 not covered, 0 not mapped by choice" in done.stdout.splitlines()[-1]
    assert "1 not covered" in done.stdout
