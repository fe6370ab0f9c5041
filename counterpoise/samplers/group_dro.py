r"""Group DRO: weights that follow the worst group, by exponentiated ascent.

.. math:: L_g = \frac{1}{n_g^{batch}} \sum_{i \in g} \ell_i, \quad A_g = L_g + \frac{C_g}{\sqrt{n_g}}, \quad
          q_g \leftarrow \frac{q_g\, e^{\eta A_g}}{\sum_h q_h\, e^{\eta A_h}}, \quad
          w_i = \frac{q_{g_i}}{n_{g_i}^{batch}}

so that sum_i w_i l_i = sum_g q_g L_g, with q from after the update. Strong weight decay or early stopping is essential:
a model that fits every training example leaves the weights nothing to work on.

Groups absent from a batch: the released code multiplies the present ones and renormalises all, so rare groups lose
weight just by being absent; here their weight stays (``absent="freeze"``; "renormalize" is the released rule).
The duals are kept as log q: a weight that underflows would never come back.

Source: Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, 2020, algorithm 1; size adjustments:
section 3.3; the greedy variant is the released code's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import (
    PreciseBuffers,
    Spec,
    check_choice,
    check_number,
    check_per_row,
    check_within,
    in_second_pass,
    sum_over_ranks,
)


class GroupDRO(PreciseBuffers):
    """Weights (N,) from per-example losses and their groups; composes with every loss of one value a row.

    Normalisation "sum_one": the weights sum to one over all ranks when every group is in the batch (less the mass of
    absent groups otherwise), and the loss is their plain sum. State moves in ``train()`` mode only, not inside
    ``second_pass()``, and not on losses that are not finite; sums are reduced over ranks first.

    Args:
        group_counts: (G,) training examples a group; read by adjustments and the greedy variant.
        step_size: eta >= 0.
        adjustment: C >= 0, a number or (G,): larger for more regularisation of small groups (0 to 5).
        normalize_loss: divide A by its sum before the step.
        absent: "freeze" or "renormalize", see above.
        ema: weight in [0, 1] of the new batch in the moving average of group losses.
        greedy_alpha: None, or a fraction in (0, 1): instead of q, the groups of largest average loss are filled up to
            this fraction of the data (a CVaR over groups).
        min_variance_weight: in [0, 1], mixes the greedy weights with the group fractions.
        by: which field of the batch holds the groups: "group", or "target" (every class is a group).

    Buffers: log_q (G,), ema_loss (G,), seen (G,) bool, steps (); all persistent.

    Raises:
        ValueError: settings out of range, or a batch without groups.
    """

    spec = Spec(
        task="reweighter",
        source="Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, 2020, algorithm 1",
        needs=("group_counts",),
        distributed="statistics",
        stateful=True,
    )
    normalization = "sum_one"
    group_counts: Tensor
    log_q: Tensor
    ema_loss: Tensor
    seen: Tensor
    steps: Tensor

    def __init__(
        self,
        group_counts: Sequence[int] | Tensor,
        step_size: float = 0.01,
        adjustment: float | Sequence[float] = 0.0,
        normalize_loss: bool = False,
        absent: str = "freeze",
        ema: float = 0.1,
        greedy_alpha: float | None = None,
        min_variance_weight: float = 0.0,
        by: str = "group",
    ) -> None:
        super().__init__()
        counts = torch.as_tensor(group_counts)
        if counts.ndim != 1 or counts.numel() == 0 or bool((counts < 0).any()):
            raise ValueError(f"group_counts is {counts.tolist()}, expected (G,) numbers >= 0 with G >= 1")
        size = torch.as_tensor(adjustment, dtype=torch.float64).expand(counts.shape)
        if bool((size < 0).any()) or bool(((size > 0) & (counts == 0)).any()):
            raise ValueError(f"adjustment is {adjustment!r}, expected >= 0, and 0 for a group without examples")
        check_number("step_size", step_size, 0)
        check_choice("absent", absent, ("freeze", "renormalize"))
        check_number("ema", ema, 0, 1)
        check_number("min_variance_weight", min_variance_weight, 0, 1)
        check_choice("by", by, ("group", "target"))
        if greedy_alpha is not None:
            check_number("greedy_alpha", greedy_alpha, 0, 1, open_low=True)
            if int(counts.sum()) == 0:
                raise ValueError("group_counts sums to 0, expected at least one example")
        self.step_size = step_size
        self.normalize_loss = normalize_loss
        self.absent = absent
        self.ema = ema
        self.greedy_alpha = greedy_alpha
        self.min_variance_weight = min_variance_weight
        self.by = by
        groups = len(counts)
        self.register_buffer("group_counts", counts.to(torch.int64).clone())
        self.register_buffer("bonus", size / counts.double().sqrt().clamp_min(1))
        self.register_buffer("log_q", torch.zeros(groups, dtype=torch.float64).log_softmax(0))
        self.register_buffer("ema_loss", torch.zeros(groups, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(groups, dtype=torch.bool))
        self.register_buffer("steps", torch.tensor(0))

    bonus: Tensor

    @property
    def group_weights(self) -> Tensor:
        """(G,) float64 q, or the greedy weights: what each group's mean loss is multiplied by. For logging."""
        return self.log_q.exp() if self.greedy_alpha is None else self._greedy(self.greedy_alpha)

    @torch.no_grad()
    def forward(
        self,
        losses: Tensor,
        *,
        target: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Losses (N,) and groups (N,) in [0, G - 1] to detached weights (N,)."""
        groups = group if self.by == "group" else target
        if groups is None:
            raise ValueError(f'GroupDRO got no {self.by}: give the batch one, or say by="target" for classes as groups')
        if losses.ndim != 1:
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected (N,), one a row")
        check_per_row(self.by, groups, losses)
        check_within(self.by, groups, 0, len(self.log_q) - 1, what="group indices")
        groups = groups.long()
        sums = self.log_q.new_zeros(2, len(self.log_q))
        sums[0].index_add_(0, groups, losses.detach().to(sums.dtype))
        sums[1].index_add_(0, groups, torch.ones_like(losses, dtype=sums.dtype))
        total, count = sum_over_ranks(sums)
        mean = total / count.clamp_min(1)
        if self.training and not in_second_pass():
            self._update(mean, count > 0)
        weights = (self.group_weights / count.clamp_min(1))[groups]
        return weights.to(losses.dtype)

    def _update(self, mean: Tensor, present: Tensor) -> None:
        """One step of the average and of the duals; none at all if a group's loss is not finite."""
        finite = mean.isfinite().all()
        average = torch.where(self.seen, (1 - self.ema) * self.ema_loss + self.ema * mean, mean)
        log_q = self.log_q if self.greedy_alpha is not None else self._ascend(mean, present)
        self.ema_loss.copy_(torch.where(finite & present, average, self.ema_loss))
        self.seen.copy_(self.seen | (present & finite))
        self.log_q.copy_(torch.where(finite, log_q, self.log_q))
        self.steps.add_(finite.long())

    def _ascend(self, mean: Tensor, present: Tensor) -> Tensor:
        a = mean + self.bonus
        if self.normalize_loss:
            total = a.sum()
            a = a / torch.where(total != 0, total, 1)
        moved = self.log_q + self.step_size * a
        if self.absent == "renormalize":
            return moved.log_softmax(0)
        absent = ~present
        mass = self.log_q.masked_fill(absent, -torch.inf).logsumexp(0)  # what the present groups share
        moved = moved - moved.masked_fill(absent, -torch.inf).logsumexp(0) + mass
        return torch.where(present, moved, self.log_q)

    def _greedy(self, alpha: float) -> Tensor:
        fraction = self.group_counts.double() / self.group_counts.sum()
        order = (self.ema_loss + self.bonus).argsort(descending=True, stable=True)
        ordered = fraction[order]
        full = ordered.cumsum(0) <= alpha
        weights = torch.where(full, ordered / alpha, 0)
        last = full.sum().clamp_max(len(order) - 1)
        weights = weights + torch.where(torch.arange(len(order), device=order.device) == last, 1 - weights.sum(), 0)
        mixed = self.min_variance_weight * ordered + (1 - self.min_variance_weight) * weights
        return torch.empty_like(mixed).scatter_(0, order, mixed)
