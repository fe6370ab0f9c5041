"""Learning-rate schedules by fraction of training, stepped every optimiser step, all with linear warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from counterpoise._core import check_number


def _scheduler(optimizer: Optimizer, total_steps: int, warmup: float, factor_at: Callable[[float], float]) -> LambdaLR:
    check_number("warmup", warmup, 0, 1)
    warm = round(warmup * total_steps)

    def factor(step: int) -> float:
        return (step + 1) / (warm + 1) if step < warm else factor_at(min(step / max(total_steps, 1), 1.0))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """The optimiser's learning rate after the warm-up, a fraction in [0, 1] of the ``total_steps``."""
    return _scheduler(optimizer, total_steps, warmup, lambda progress: 1.0)


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Half a cosine from the learning rate to zero. Source: Loshchilov and Hutter, SGDR, 2017, eq. 5."""

    def half_cosine(progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))

    return _scheduler(optimizer, total_steps, warmup, half_cosine)


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    milestones: Sequence[float] = (0.8, 0.9),
    factor: float = 0.1,
    warmup: float = 0.0,
) -> LambdaLR:
    """Multiplies the learning rate by ``factor`` at each fraction in ``milestones`` of the ``total_steps``."""
    for milestone in milestones:
        check_number("milestones", milestone, 0, 1)
    return _scheduler(optimizer, total_steps, warmup, lambda progress: factor ** sum(progress >= m for m in milestones))
