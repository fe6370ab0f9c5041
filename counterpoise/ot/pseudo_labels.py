r"""Pseudo-labels of a training: the memory bank they are solved with, the mass that grows, and the two-view loss.

.. math:: L = -\frac{1}{N} \sum_i \sum_k q^{(2)}_{ik} \log \mathrm{softmax}(z^{(1)}_i)_k
              + q^{(1)}_{ik} \log \mathrm{softmax}(z^{(2)}_i)_k

Each view is taught by the labels of the other. They are *not* normalised: a row of mass below one counts that much, so
the transport's row mass is the weight of the example. Hence the loss grows with the mass; to compare epochs, divide it
by the mass.

Labels of a batch are solved together with a bank of the logits of the batches before, without which sizes of many
clusters cannot be told. View 1 is written over the oldest rows, then view 2 over the same ones. The released bank needs
a size that is a multiple of the batch's; here the ring takes any.

Source: Zhang, Ren, He, P2OT: Progressive Partial Optimal Transport for Deep Imbalanced Clustering, 2024; the loss:
Asano et al., Self-labelling via Simultaneous Clustering and Representation Learning, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from counterpoise._core import (
    PreciseBuffers,
    at_least_float32,
    check_choice,
    check_number,
    check_per_row,
    in_second_pass,
    reduce_losses,
)
from counterpoise.distributed import gather_rows, row_offset
from counterpoise.ot.progressive_partial import P2OTResult, mass_schedule, p2ot_labels
from counterpoise.ot.semantic import SP2OTResult, sp2ot_labels, sub_affinity

KINDS = ("p2ot", "sp2ot", "semi_relaxed", "uniform")


def two_view_label_loss(
    logits: Tensor,
    other: Tensor,
    labels: Tensor,
    other_labels: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: str | float = "count",
    sync: bool = False,
) -> Tensor:
    """Swapped cross-entropy of two views; the formula is at the top of this file.

    Args:
        logits, other: (N, K) of view 1 and view 2.
        labels, other_labels: (N, K) labels of view 1 and view 2, >= 0; no gradient flows into them.
        weight: (N,), multiplies row losses.
        mask: (N,) bool, True = counts.
        reduction: "none" gives (N,); "mean", "sum".
        normalizer: what "mean" divides by: "count", "weight" or a number.
        sync: denominators are summed over ranks.

    Returns:
        (N,) or 0-d; at least float32.

    Raises:
        ValueError, TypeError: a shape or setting that does not fit.
    """
    for name, x in (("other", other), ("labels", labels), ("other_labels", other_labels)):
        if logits.ndim != 2 or x.shape != logits.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)} beside logits {tuple(logits.shape)}, expected (N, K)")
    check_per_row("weight", weight, logits)
    check_per_row("mask", mask, logits, dtype=torch.bool)
    rows = _cross_entropy(logits, other_labels) + _cross_entropy(other, labels)
    return reduce_losses(rows, counted=mask, weight=weight, reduction=reduction, normalizer=normalizer, sync=sync)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,); a cluster without label costs nothing, even at a logit of -inf."""
    log_p = log_softmax(at_least_float32(logits), 1)
    q = labels.detach().to(log_p.dtype)
    return -torch.where(q > 0, q * log_p, 0).sum(1)


class PseudoLabels(PreciseBuffers):
    """Labels of the views of a batch, solved with a bank of past logits at the mass of the step.

    State moves in ``train()`` mode only, not inside ``second_pass()``, and not on logits that are not finite. Under
    several ranks the rows are gathered in rank order, and every rank holds the same bank and solves the same problem.

    Args:
        num_clusters: K >= 1.
        kind: "p2ot"; "sp2ot" (P2OT that agrees between neighbours, needs :meth:`set_affinity` and the index of each
            row); "semi_relaxed" (all mass from the start); "uniform" (all mass, and clusters of equal size, as SwAV).
        total_steps: T >= 1 of the mass's schedule; may be set later.
        bank_size: rows of the bank, 0 for none. Where a batch is as large, it is solved alone.
        bank_start: steps before which labels come from the batch alone, >= 0.
        mass_start, mass_end, schedule: see :func:`~counterpoise.ot.mass_schedule`; read by "p2ot" and "sp2ot".
        epsilon, penalty, prior, max_iterations, tolerance: see :func:`~counterpoise.ot.p2ot_labels`; "uniform" has an
            infinite penalty.
        semantic_weight, decay, safeguard, psd_shift, momentum, mm_max_iterations, mm_tolerance: see
            :func:`~counterpoise.ot.sp2ot_labels`. Tolerances are coarser here than there: training asks for no more.

    Buffers (persistent, so that a resumed run goes on exactly):
        bank (S, K) float32, bank_index (S,) int64, pointer (), filled (), steps () int64, scaling (K + 1,) float64.

    Raises:
        ValueError, TypeError: a setting out of range; a batch that does not fit.
    """

    bank: Tensor
    bank_index: Tensor
    pointer: Tensor
    filled: Tensor
    steps: Tensor
    scaling: Tensor

    def __init__(
        self,
        num_clusters: int,
        kind: str = "p2ot",
        *,
        total_steps: int = 1,
        bank_size: int = 5120,
        bank_start: int = 0,
        mass_start: float = 0.1,
        mass_end: float = 1.0,
        schedule: str = "sigmoid",
        epsilon: float = 0.1,
        penalty: float = 1.0,
        prior: Sequence[float] | Tensor | None = None,
        semantic_weight: float = 0.195,
        decay: bool = True,
        safeguard: bool = True,
        psd_shift: bool = True,
        momentum: float = 1.0,
        max_iterations: int = 1000,
        tolerance: float = 1e-4,
        mm_max_iterations: int = 100,
        mm_tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_number("num_clusters", num_clusters, 1)
        check_number("bank_size", bank_size, 0)
        check_number("bank_start", bank_start, 0)
        self.kind = kind
        self.total_steps = total_steps
        self.bank_start = bank_start
        self.mass_start, self.mass_end, self.schedule = mass_start, mass_end, schedule
        self.options: dict[str, Any] = {
            "epsilon": epsilon,
            "penalty": math.inf if kind == "uniform" else penalty,
            "prior": None if prior is None else torch.as_tensor(prior, dtype=torch.float64),
            "max_iterations": max_iterations,
            "tolerance": tolerance,
        }
        if kind == "sp2ot":
            self.options |= {"semantic_weight": semantic_weight, "decay": decay}
            self.options |= {"safeguard": safeguard, "psd_shift": psd_shift, "momentum": momentum}
            self.options |= {"mm_max_iterations": mm_max_iterations, "mm_tolerance": mm_tolerance}
        self.register_buffer("bank", torch.zeros(bank_size, num_clusters))
        self.register_buffer("bank_index", torch.full((bank_size,), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(0))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("scaling", torch.zeros(num_clusters + 1, dtype=torch.float64))
        self.affinity: Tensor | None = None  # no buffer: DDP would send it at every step, and cannot send it sparse
        neighbors = torch.zeros(1, 1) if kind == "sp2ot" else None
        self.last = self._solve(torch.zeros(1, num_clusters), neighbors, self.scaling)  # settings are refused here

    @property
    def mass(self) -> float:
        """Share of the examples that the next labels hold."""
        if self.kind in ("semi_relaxed", "uniform"):
            return 1.0
        return mass_schedule(int(self.steps), self.total_steps, self.mass_start, self.mass_end, self.schedule)

    def set_affinity(self, affinity: Tensor) -> None:
        """Gives "sp2ot" the neighbours (N, N) of the whole data set, see :func:`~counterpoise.ot.knn_affinity`."""
        if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1]:
            raise ValueError(f"affinity has shape {tuple(affinity.shape)}, expected (N, N)")
        self.affinity = affinity

    @torch.no_grad()
    def forward(self, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (V, N, K) of V views and the rows' places (N,) in the data set to labels (V, N, K)."""
        clusters = self.bank.shape[1]
        if logits.ndim != 3 or logits.shape[2] != clusters:
            raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (V, N, {clusters})")
        if self.kind == "sp2ot" and (index is None or self.affinity is None):
            raise ValueError('kind "sp2ot" needs the index of each row, and set_affinity before')
        check_per_row("index", index, logits[0])
        rows = gather_rows(at_least_float32(logits.detach()).transpose(0, 1).contiguous())
        places = gather_rows(torch.full_like(rows[:, 0, 0], -1).long() if index is None else index.long())
        slots = self._slots(len(rows))
        neighbors = self._neighbors(places, slots)
        scaling, found = self.scaling, []
        for view in rows.unbind(1):
            self.last = self._solve(self._joint(self.bank, view, slots), neighbors, scaling)
            scaling = self.last.scaling
            found.append(self.last.labels if slots is None else self.last.labels[slots])
        if self.training and not in_second_pass() and bool(rows.isfinite().all()):
            self._remember(rows[:, -1], places, scaling)
        start = row_offset(logits[0])
        return torch.stack(found)[:, start : start + logits.shape[1]]

    def _slots(self, rows: int) -> Tensor | None:
        """(N,) rows of the bank that a batch takes; None where it is solved alone."""
        if rows >= len(self.bank) or int(self.steps) < self.bank_start:
            return None
        start = int(self.pointer) - (rows if in_second_pass() else 0)  # a second pass writes nothing, and comes after
        return (torch.arange(rows, device=self.bank.device) + start) % len(self.bank)

    def _joint(self, memory: Tensor, rows: Tensor, slots: Tensor | None) -> Tensor:
        """The bank with the batch in its slots, as far as it is filled."""
        if slots is None:
            return rows
        joint = memory.to(rows.dtype, copy=True)
        joint[slots] = rows
        return joint[: max(int(self.filled), int(slots.max()) + 1)]

    def _neighbors(self, places: Tensor, slots: Tensor | None) -> Tensor | None:
        if self.affinity is None or self.kind != "sp2ot":
            return None
        self.affinity = self.affinity.to(places.device)
        return sub_affinity(self.affinity, self._joint(self.bank_index, places, slots))

    def _solve(self, logits: Tensor, neighbors: Tensor | None, scaling: Tensor) -> P2OTResult | SP2OTResult:
        if neighbors is None:
            return p2ot_labels(logits, mass=self.mass, scaling=scaling, **self.options)
        return sp2ot_labels(logits, neighbors, mass=self.mass, scaling=scaling, **self.options)

    def _remember(self, rows: Tensor, places: Tensor, scaling: Tensor) -> None:
        """Writes a batch over the oldest rows, of more than the bank holds the last; one more step is done."""
        self.steps += 1
        self.scaling.copy_(scaling)
        size, start = len(self.bank), int(self.pointer)
        if not size:
            return
        slots = ((torch.arange(len(rows), device=rows.device) + start) % size)[-size:]
        kept = places.argsort(stable=True)[-size:]  # the same bank however the batch is divided among ranks
        self.bank[slots] = rows[kept].to(self.bank)
        self.bank_index[slots] = places[kept]
        self.filled.fill_(max(int(self.filled), min(start + len(rows), size)))
        self.pointer.fill_((start + len(rows)) % size)

    def extra_repr(self) -> str:
        """Kind, clusters and size of the bank."""
        size, clusters = self.bank.shape
        return f"num_clusters={clusters}, kind={self.kind!r}, bank_size={size}"
