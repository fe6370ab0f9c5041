"""Sphinx configuration: ``make docs`` builds these pages into ``site/``."""

from __future__ import annotations

import counterpoise

project = "counterpoise"
version = release = counterpoise.__version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"counterpoise {release}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
