r"""Uncertainty weighting: task losses combined with learned noise levels, one scalar a task.

.. math:: L = \sum_{k\ \mathrm{present}} w_k(s_k)\, L_k + r_k(s_k), \qquad
          L_k = \frac{1}{n_k} \sum_{i\ \mathrm{counts\ for}\ k} \ell_{ik}

=================  ==================================  ================  ===============  =============
kind               task loss                           w(s)              r(s)             optimum
=================  ==================================  ================  ===============  =============
gaussian           squared error, s = log sigma^2      exp(-s) / 2       s / 2            s = log L
laplace            absolute error, s = log scale       exp(-s)           s                s = log L
classification     cross-entropy, s = log sigma^2      exp(-s)           s / 2            s = log 2L
liebel_korner      any; s = log c^2                    exp(-s) / 2       log(1 + exp s)
likelihood         already a negative log-likelihood   1                 0
=================  ==================================  ================  ===============  =============

At the optimum, multiplying a task's loss by a constant leaves the model's gradient as it was: that is what it is for.
The total may go *negative*, as a log-density may: watch the task means (:func:`~counterpoise.losses.task_means`) and
choose checkpoints by metrics; liebel_korner's r is positive and keeps the total so. A loss that can reach 0 drives its
s to minus infinity and its weight to infinity: give ``bounds``. For losses that are no likelihoods (contrastive,
adversarial) only the argument of scale holds. Weight decay on s pulls every weight towards 1 or 1/2: what
``no_weight_decay`` names is to be spared, as recipes do. And s must be in the optimiser: ``check_in_optimizer``.

"classification" is the paper's approximation of cross-entropy at temperature exp(s), equal to it at s = 0 only;
:func:`softmax_likelihood` is the exact one, for a task of kind "likelihood". Where a target has D dimensions and the
loss is their *sum*, r would have to count D times: take the mean. An absent task contributes neither loss nor r (with r
alone its s would drift).

Constants differ between releases: the authors' example is twice this; LibMTL takes "gaussian" for every task and
starts at s = -0.5; another port doubles r alone.

Source: Kendall, Gal, Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics,
2018, eq. 7 and 10; liebel_korner: Liebel and Koerner, Auxiliary Tasks in Multi-task Learning, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from counterpoise._core import No, Spec, at_least_float32, check_choice, check_number, in_second_pass
from counterpoise.losses.cross_entropy import cross_entropy_loss
from counterpoise.losses.task_weights import AVERAGED, TaskLosses, names_and_values, task_means

KINDS = ("gaussian", "laplace", "classification", "liebel_korner", "likelihood")
CONSTANTS = {"gaussian": 0.5 * math.log(2 * math.pi), "laplace": math.log(2)}


def uncertainty_weights(log_variance: Tensor, kinds: Sequence[str]) -> Tensor:
    """w(s): what each task's loss is multiplied by. Scales (..., K) to weights (..., K)."""
    columns = zip(log_variance.unbind(-1), kinds, strict=True)
    return torch.stack([_weight(s, kind) for s, kind in columns], -1)


def uncertainty_regularizers(log_variance: Tensor, kinds: Sequence[str], constants: bool = False) -> Tensor:
    """r(s): what each task adds. Scales (..., K) to (..., K); ``constants`` adds 1/2 log 2 pi and log 2."""
    columns = zip(log_variance.unbind(-1), kinds, strict=True)
    r = torch.stack([_regularizer(s, kind) for s, kind in columns], -1)
    return r + r.new_tensor([CONSTANTS.get(kind, 0.0) for kind in kinds]) if constants else r


def _weight(s: Tensor, kind: str) -> Tensor:
    if kind == "likelihood":
        return torch.ones_like(s)
    precision = torch.exp(-s)
    return 0.5 * precision if kind in ("gaussian", "liebel_korner") else precision


def _regularizer(s: Tensor, kind: str) -> Tensor:
    if kind == "likelihood":
        return 0 * s
    if kind == "liebel_korner":
        return softplus(s)
    return s if kind == "laplace" else 0.5 * s


def uncertainty_weighted_loss(
    losses: TaskLosses,
    *,
    log_variance: Tensor,
    kinds: Mapping[str, str] | Sequence[str],
    constants: bool = False,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    sync: bool = False,
) -> Tensor:
    """The combined loss; the formula is at the top of this file.

    Args:
        losses: (N, K), one column a task; or task name to (N,) values or to a 0-d mean.
        log_variance: (K,) s, in any range in which exp(-s) is finite.
        kinds: K of "gaussian", "laplace", "classification", "liebel_korner", "likelihood", or task name to kind.
        constants: adds the constants of the exact densities (1/2 log 2 pi, log 2), for values that are compared.
        weight: (N,) >= 0, multiplies the losses of a row.
        mask: bool, True = counts; (N,) rows or (N, K) labels that are there. What does not count may hold NaN.
        sync: rows of all ranks. Averaged over ranks, as DDP does, value and gradients are then those of one process; r
            counts once.

    Returns:
        0-d, at least float32; may be negative. Without any present task, a zero connected to the graph.

    Raises:
        ValueError, TypeError: a shape, type, name or kind that does not fit.
    """
    names, of_tasks = names_and_values("kinds", kinds)
    kinds = _checked(of_tasks)
    if log_variance.shape != (len(kinds),):
        raise ValueError(f"log_variance has shape {tuple(log_variance.shape)}, expected ({len(kinds)},), one a task")
    mean, present = task_means(losses, names=names, weight=weight, mask=mask, sync=sync)
    if len(mean) != len(kinds):
        raise ValueError(f"losses holds {len(mean)} tasks, expected {len(kinds)}, as many as kinds")
    s = torch.where(present, log_variance.to(mean), 0)  # the s of an absent task: connected, and no gradient
    terms = uncertainty_weights(s, kinds) * mean + uncertainty_regularizers(s, kinds, constants)
    return torch.where(present, terms, mean).sum()


def _checked(kinds: Any) -> tuple[str, ...]:
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    return tuple(kinds)


def softmax_likelihood(logits: Tensor, target: Tensor, log_variance: Tensor, **options: Any) -> Tensor:
    r"""The exact likelihood of a classification task at temperature exp(s), for a task of kind "likelihood".

    .. math:: \ell_i = -\log \mathrm{softmax}(z_i\, e^{-s})_{y_i}

    Args:
        logits: (N, C) or (N, C, ...); target: (N, ...) class indices.
        log_variance: 0-d s, such as ``weighting.log_variance[k]``.
        **options: of :func:`~counterpoise.losses.cross_entropy_loss`, whose reduction defaults to "none" here.

    Returns:
        (N,) by default.
    """
    z = at_least_float32(logits)
    return cross_entropy_loss(z * torch.exp(-log_variance.to(z)), target, **{"reduction": "none", **options})


class UncertaintyWeighting(nn.Module):
    """Module form of :func:`uncertainty_weighted_loss`, with the scales as parameters.

    Args:
        kinds: K kinds, or task name to kind.
        initial: s at the start, a number or K.
        bounds: None, or (low, high): s is projected onto this range at every training call, so that no weight exceeds
            exp(-low). (-10, 10) is a safe one.
        constants: adds the constants of the exact densities.
        sync: rows of all ranks.

    Parameters: log_variance (K,), kept in float32 in half-precision modules; named in ``no_weight_decay``.
    """

    spec = Spec(
        task="multi_task",
        source="Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, 2018, eq. 7 and 10",
        needs=("kinds",),
        per_row=AVERAGED,
        weight_linear=No("the term of the noise level does not grow with the weights of rows"),
    )
    no_weight_decay = ("log_variance",)

    def __init__(
        self,
        kinds: Mapping[str, str] | Sequence[str],
        initial: float | Sequence[float] = 0.0,
        bounds: Sequence[float] | None = None,
        constants: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        self.names, of_tasks = names_and_values("kinds", kinds)
        self.kinds = _checked(of_tasks)
        start = torch.as_tensor(initial, dtype=torch.float32)
        if start.ndim and start.shape != (len(self.kinds),):
            raise ValueError(f"initial has shape {tuple(start.shape)}, expected a number or ({len(self.kinds)},)")
        if bounds is not None:
            low, high = bounds
            check_number("bounds[0]", low)
            check_number("bounds[1]", high, low)
            start = start.clamp(low, high)
        self.bounds = None if bounds is None else (float(low), float(high))
        self.constants = constants
        self.sync = sync
        self.log_variance = nn.Parameter(start.expand(len(self.kinds)).clone())

    @property
    def effective_weights(self) -> Tensor:
        """(K,) detached w(s): what each task's mean is multiplied by now. For logging."""
        return uncertainty_weights(self.log_variance.detach(), self.kinds)

    def forward(self, losses: TaskLosses, *, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Task losses (N, K), or by name, to the total."""
        kinds = self.kinds if self.names is None else dict(zip(self.names, self.kinds, strict=True))
        return uncertainty_weighted_loss(
            losses,
            log_variance=self._within_bounds(),
            kinds=kinds,
            constants=self.constants,
            weight=weight,
            mask=mask,
            sync=self.sync,
        )

    def _within_bounds(self) -> Tensor:
        if self.bounds is None:
            return self.log_variance
        s = self.log_variance
        if self.training and not in_second_pass():
            with torch.no_grad():
                s.clamp_(*self.bounds)
        return s + (s.clamp(*self.bounds) - s).detach()  # clamp alone has no gradient at a bound: no way back

    def check_in_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ValueError unless ``optimizer`` trains log_variance, and without weight decay."""
        groups = [g for g in optimizer.param_groups if any(p is self.log_variance for p in g["params"])]
        if not groups or not self.log_variance.requires_grad:
            raise ValueError(
                "log_variance is not trained by the optimizer, expected it in a parameter group, or the weights never "
                "move: add weighting.parameters()"
            )
        decay = groups[0].get("weight_decay", 0)
        if decay:
            raise ValueError(f"log_variance has weight_decay {decay}, expected 0 in a parameter group of its own")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.log_variance.detach()
        super()._apply(fn, recurse)
        s = self.log_variance
        if s.dtype in (torch.float16, torch.bfloat16):
            s.data = before.to(device=s.device, dtype=torch.float32)
        return self
