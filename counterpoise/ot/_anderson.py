r"""Anderson acceleration of a fixed-point iteration of few numbers, with a way back.

.. math:: g_{t+1} = T(g_t) - \sum_j \gamma_j\, \big(T(g_{j+1}) - T(g_j)\big), \qquad
          \gamma = \arg\min \Big\| r_t - \sum_j \gamma_j\, (r_{j+1} - r_j) \Big\|, \quad r_j = T(g_j) - g_j

over the last few points j. Where it leads to a residual larger than before, the plain step is taken after all and the
memory starts anew, so that an iteration which converges by itself still does.

Source: Walker and Ni, Anderson Acceleration for Fixed-Point Iterations, 2011, section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEMORY = 5
RIDGE = 1e-10  # of the least squares, relative
WORSE = 2.0  # times the least residual: beyond it a point is given up


class Anderson:
    """Where to look next, one call an iteration."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.images: list[Tensor] = []
        self.plain: Tensor | None = None
        self.least = math.inf

    def next(self, point: Tensor, image: Tensor) -> Tensor:
        """The next point (C,) from the last one and its image under the iteration, both (C,) and finite."""
        residual = float((image - point).abs().max())
        if self.plain is not None and not residual <= WORSE * self.least:
            back, self.plain, self.points, self.images = self.plain, None, [], []
            return back
        self.least = min(self.least, residual)
        self.points = [*self.points[-MEMORY:], point]
        self.images = [*self.images[-MEMORY:], image]
        self.plain = image
        mixed = self._mixed()
        return mixed if bool(mixed.isfinite().all()) else image

    def _mixed(self) -> Tensor:
        images = torch.stack(self.images, 1)
        if len(self.images) == 1:
            return images[:, 0]
        residuals = images - torch.stack(self.points, 1)
        change = residuals.diff(dim=1)
        gram = change.T @ change
        gram.diagonal().add_(RIDGE * gram.diagonal().max())
        gamma, _ = torch.linalg.solve_ex(gram, change.T @ residuals[:, -1])
        return images[:, -1] - images.diff(dim=1) @ gamma
