"""What is timed: pairs of a loss of ours and of what one would write otherwise, on the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from counterpoise.contrastive import NTXentLoss
from counterpoise.losses import (
    AsymmetricLoss,
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    CrossEntropyLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
)

Step = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """Two forms of one job, each a forward and a backward pass."""

    ours: str
    theirs: str
    shape: str
    our_step: Step
    their_step: Step


def step(loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Forward and backward; the gradient lands where an input requires it."""
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(loss(*inputs), leaves)


def plain_ntxent(z: Tensor, other: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent as tutorials write it: concatenate, multiply, mask the diagonal, cross-entropy."""
    n = len(z)
    rows = normalize(torch.cat([z, other]), dim=1)
    similarity = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return cross_entropy(similarity, torch.arange(2 * n).roll(n))


def plain_asymmetric(z: Tensor, t: Tensor, gamma_neg: float = 4.0, margin: float = 0.05, eps: float = 1e-8) -> Tensor:
    """The asymmetric loss as it is printed, clamped: probabilities, their logarithms, a power."""
    p = torch.sigmoid(z)
    not_p = (1 - p + margin).clamp(max=1)
    base = t * torch.log(p.clamp(min=eps)) + (1 - t) * torch.log(not_p.clamp(min=eps))
    return -(base * (1 - p * t - not_p * (1 - t)) ** (gamma_neg * (1 - t))).mean()


def pairs() -> Iterator[Pair]:
    """Every pair, at a small and a large size."""
    for n, c in ((128, 10), (512, 1000)):
        logits, target = torch.rand(n, c).mul(2).sub(1).requires_grad_(), torch.randint(c, (n,))  # as cosines are
        counts = torch.linspace(1000, 10, c).long()
        for loss in (
            CrossEntropyLoss(),
            LogitAdjustedLoss(counts),
            BalancedSoftmaxLoss(counts),
            ClassBalancedLoss(counts),
            LDAMLoss(counts),
            SoftmaxFocalLoss(),
        ):
            ours, theirs = step(loss, logits, target), step(cross_entropy, logits, target)
            yield Pair(type(loss).__name__, "torch cross_entropy", f"{n} x {c}", ours, theirs)

    for n, c in ((128, 20), (4096, 80)):
        logits, labels = torch.randn(n, c, requires_grad=True), torch.rand(n, c).lt(0.05).float()
        ours = step(SigmoidFocalLoss(alpha=0.25), logits, labels)
        theirs = step(lambda z, t: torchvision_focal(z, t, reduction="mean"), logits, labels)
        yield Pair("SigmoidFocalLoss", "torchvision sigmoid_focal_loss", f"{n} x {c}", ours, theirs)
        ours, theirs = step(AsymmetricLoss(), logits, labels), step(plain_asymmetric, logits, labels)
        yield Pair("AsymmetricLoss", "the printed form", f"{n} x {c}", ours, theirs)

    for n, d in ((64, 128), (512, 128)):
        z, other = torch.randn(n, d, requires_grad=True), torch.randn(n, d, requires_grad=True)
        ours, theirs = step(NTXentLoss(temperature=0.5), z, other), step(plain_ntxent, z, other)
        yield Pair("NTXentLoss", "cat, matmul, cross_entropy", f"2 x {n} x {d}", ours, theirs)
