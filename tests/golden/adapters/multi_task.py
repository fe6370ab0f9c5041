"""Adapters of task weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.golden.runner import Case

Outputs = dict[str, Any]


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {}
