"""Every case of every reference vector: values and gradients at the tolerance that the file gives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import NOT_COVERED, NOT_MAPPED
from tests.golden.adapters import ADAPTERS
from tests.golden.runner import Case, NotMapped, compare, load, required_keys, with_gradients


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = load(metafunc.config.getoption("--golden-dir"))
    metafunc.parametrize(("file", "case"), pairs, ids=[f"{case.method}-{case.name}" for _, case in pairs])


def test_case(file: dict[str, Any], case: Case) -> None:
    if case.method not in ADAPTERS:
        pytest.skip(f"{NOT_COVERED}: {case.method} has no implementation yet")
    try:
        outputs = with_gradients(case, ADAPTERS[case.method](case))
    except NotMapped as reason:
        pytest.skip(f"{NOT_MAPPED}: {reason}")
    assert not case.unread, f"the adapter of {case.method} does not read {sorted(case.unread)}"
    keys = required_keys(file, case)
    missing = [key for key in keys if key not in outputs]
    assert not missing, f"the adapter of {case.method} does not give {missing}"
    assert keys
    for key in keys:
        compare(file, case, key, outputs[key])
