"""setuptools' build backend, which asks for torch where kernels can be compiled and its headers are not at hand.

Where torch is installed already, or there is no C++ compiler, or ``COUNTERPOISE_BUILD=0``, nothing is downloaded for
the build: in the last two cases the package is pure Python.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *headers()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """What pip installs before an editable install."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *headers()]


def headers() -> list[str]:
    """Torch, if the kernels can be compiled with it and not without it."""
    build = build_script()
    wanted = os.environ.get("COUNTERPOISE_BUILD") != "0" and build.compiler() is not None
    return ["torch>=2.11"] if wanted and build.torch_folder() is None else []


def build_script() -> SimpleNamespace:
    """setup.py, which looks for the compiler and for torch."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("setup.py"))))
