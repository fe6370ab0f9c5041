r"""An encoder that follows another: the key network of MoCo, the target network of BYOL, the mean teacher.

.. math:: \theta_k \leftarrow m\, \theta_k + (1 - m)\, \theta_q
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise._core import check_number, in_second_pass


def momentum_schedule(progress: float, start: float = 0.996) -> float:
    r"""BYOL's momentum, from ``start`` to 1 along a cosine.

    .. math:: m = 1 - (1 - m_0) \frac{\cos(\pi p) + 1}{2}

    Args:
        progress: p in [0, 1], the share of the training steps that lie behind.
        start: m_0 in [0, 1].

    Raises:
        ValueError: either outside of [0, 1].

    Source: Grill et al., Bootstrap Your Own Latent, 2020, section 3.
    """
    check_number("progress", progress, 0, 1)
    check_number("start", start, 0, 1)
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def follow(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """Moves the parameters of ``key`` towards those of the same names in ``query``; buffers are left alone.

    Args:
        key: may lack parameters of ``query``, a head that was taken off.
        query: leads.
        momentum: m in [0, 1]; 0 copies.

    Raises:
        ValueError: ``query`` lacks a parameter of ``key``.
    """
    leading = dict(query.named_parameters())
    for name, parameter in key.named_parameters():
        if name not in leading:
            raise ValueError(f"query has no parameter {name}, expected all of the encoder that follows it")
        parameter.lerp_(leading[name].to(parameter), 1 - momentum)


class MomentumEncoder(nn.Module):
    r"""A frozen copy of an encoder that follows it: ``teacher = MomentumEncoder(online)``, ``keys = teacher(view)``.

    Call :meth:`update` behind the optimiser's step (or before the keys are made, as MoCo does). Its output carries no
    gradient. In train mode batch norm in it uses the statistics of its own batch and moves its own running ones, as in
    MoCo and BYOL; ``frozen_statistics`` keeps it in eval mode instead, as some mean teachers do, and then the
    running statistics are those of ``copy_buffers``. Nothing moves in a second pass: neither parameters nor buffers.

    Keep its parameters in float32 (under autocast they are): in bfloat16 a step of 0.001 is lost to rounding.

    Args:
        online: copied as it is; the copy's parameters, the same names, require no gradient.
        momentum: m in [0, 1], where :meth:`update` is given none. MoCo uses 0.999, BYOL 0.996 and more, see
            :func:`momentum_schedule`. The copy needs some 1 / (1 - m) steps to leave its start.
        copy_buffers: buffers (running statistics) are copied from ``online`` at each update; they are never averaged.
        frozen_statistics: the copy stays in eval mode.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020, eq. 2.
    """

    def __init__(
        self,
        online: nn.Module,
        momentum: float = 0.999,
        *,
        copy_buffers: bool = False,
        frozen_statistics: bool = False,
    ) -> None:
        super().__init__()
        check_number("momentum", momentum, 0, 1)
        self.momentum, self.copy_buffers, self.frozen_statistics = momentum, copy_buffers, frozen_statistics
        self.encoder = copy.deepcopy(online).requires_grad_(False)
        self.train(online.training)

    def train(self, mode: bool = True) -> MomentumEncoder:
        """Train or eval mode; with ``frozen_statistics`` the encoder stays in eval mode."""
        super().train(mode)
        if self.frozen_statistics:
            self.encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """What the copy makes of the inputs, without a gradient."""
        if not in_second_pass():
            return self.encoder(*inputs)
        before = [buffer.clone() for buffer in self.encoder.buffers()]
        found = self.encoder(*inputs)
        for buffer, old in zip(self.encoder.buffers(), before, strict=True):
            buffer.copy_(old)
        return found

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float | None = None) -> None:
        """Follows ``online``; does nothing in eval mode or in a second pass.

        Args:
            online: with the parameters (and, with ``copy_buffers``, the buffers) that the copy was made of, by name.
            momentum: m in [0, 1] of this step; None = that of the encoder.

        Raises:
            ValueError: names that do not fit, or a momentum outside of [0, 1].
        """
        m = self.momentum if momentum is None else momentum
        check_number("momentum", m, 0, 1)
        if not self.training or in_second_pass():
            return
        follow(self.encoder, online, m)
        if self.copy_buffers:
            leading: dict[str, Tensor] = dict(online.named_buffers())
            for name, buffer in self.encoder.named_buffers():
                buffer.copy_(leading[name])

    def extra_repr(self) -> str:
        """The options."""
        return f"momentum={self.momentum}, copy_buffers={self.copy_buffers}, frozen_statistics={self.frozen_statistics}"
