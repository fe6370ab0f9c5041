"""Whatever remembers: class statistics (counts and prior), and banks of past embeddings: one queue, or one a class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise._core import (
    PreciseBuffers,
    check_choice,
    check_embeddings,
    check_number,
    check_per_row,
    check_within,
    in_second_pass,
)

ClassCounts = Sequence[int] | Tensor

ZERO_COUNT_POLICIES = ("error", "ignore", "smooth")


def effective_number_weights(class_counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    r"""Class weights by the effective number of samples, normalised to sum to the number of classes.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    beta = 0 gives all ones, beta = 1 its limit :math:`w_c \propto 1 / n_c`. Computed as ``expm1(n log beta)``: with
    beta near one the printed form loses digits.

    Args:
        class_counts: (C,) training examples a class; a class with none gets weight 0 and is left out of the sum.
        beta: in [0, 1].

    Returns:
        (C,) float64.

    Raises:
        ValueError: negative counts, no example at all, or beta outside [0, 1].

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019.
    """
    check_number("beta", beta, 0, 1)
    return _by_effective_number(_as_counts(class_counts), beta)


def _by_effective_number(counts: Tensor, beta: float) -> Tensor:
    n = counts.double()
    if beta == 0:
        raw = torch.ones_like(n)
    elif beta == 1:
        raw = 1 / n
    else:
        raw = 1 / -torch.expm1(n * math.log(beta))
    raw = torch.where(n > 0, raw, 0)
    return raw * (n > 0).sum() / raw.sum()


def _as_counts(class_counts: ClassCounts) -> Tensor:
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts has shape {tuple(counts.shape)}, expected (C,) with C >= 1")
    if counts.is_floating_point() and not (counts == counts.round()).all():
        raise ValueError("class_counts holds fractions, expected whole numbers of examples")
    counts = counts.to(torch.int64)
    if (counts < 0).any():
        raise ValueError(f"class_counts holds {int(counts.min())}, expected numbers >= 0")
    if int(counts.sum()) == 0:
        raise ValueError("class_counts sums to 0, expected at least one example")
    return counts


class ClassStatistics(PreciseBuffers):
    """Validated class counts and the prior that training sees: one object for the whole long-tail family.

    The prior starts as counts / sum(counts). A re-balancing sampler changes what training sees; tell it here with
    :meth:`set_prior`, and every prior-based loss follows.

    Args:
        class_counts: (C,) training examples a class.
        zero_count: what to do with a class without examples. "error" refuses it; "ignore" gives it the smallest seen
            prior in adjustments and weight 0 in class weights; "smooth" adds one to every count.

    Buffers:
        counts: (C,) int64, as given.
        prior: (C,) float64, sums to one over the classes seen. Both travel in ``state_dict()``.

    Raises:
        ValueError: negative or fractional counts, an empty class under "error".
    """

    counts: Tensor
    prior: Tensor

    def __init__(self, class_counts: ClassCounts, zero_count: str = "error") -> None:
        super().__init__()
        check_choice("zero_count", zero_count, ZERO_COUNT_POLICIES)
        counts = _as_counts(class_counts)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty and zero_count == "error":
            raise ValueError(
                f"class_counts has no example of class {', '.join(map(str, empty))}: drop the class, or pass "
                'zero_count="ignore" or "smooth"'
            )
        self.zero_count = zero_count
        self.register_buffer("counts", counts.cpu().clone())
        smoothed = self.smoothed_counts.double()
        self.register_buffer("prior", smoothed / smoothed.sum())

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.counts)

    @property
    def smoothed_counts(self) -> Tensor:
        """(C,) int64 counts after the zero-count policy: one more each under "smooth"."""
        return self.counts + 1 if self.zero_count == "smooth" else self.counts

    @torch.no_grad()
    def set_prior(self, prior: Tensor) -> None:
        """Makes ``prior`` (C,), class probabilities >= 0 that sum to one, what training is said to see."""
        prior = torch.as_tensor(prior, dtype=self.prior.dtype, device=self.prior.device)
        if prior.shape != self.prior.shape:
            raise ValueError(f"prior has shape {tuple(prior.shape)}, expected {tuple(self.prior.shape)}")
        if not bool((prior >= 0).all()) or abs(float(prior.sum()) - 1) > 1e-6:
            raise ValueError(f"prior sums to {float(prior.sum()):g}, expected probabilities that sum to one")
        self.prior.copy_(prior)

    def seen_prior(self) -> Tensor:
        """(C,) float64 prior, where a class never seen borrows the smallest prior that was."""
        smallest = torch.where(self.prior > 0, self.prior, torch.inf).min()
        return torch.where(self.prior > 0, self.prior, smallest)

    def effective_number_weights(self, beta: float = 0.9999) -> Tensor:
        """(C,) float64, see :func:`effective_number_weights`."""
        check_number("beta", beta, 0, 1)
        return _by_effective_number(self.smoothed_counts, beta)

    def extra_repr(self) -> str:
        """Class count and the range of the counts."""
        return f"num_classes={self.num_classes}, counts={int(self.counts.min())}..{int(self.counts.max())}"


class MemoryBank(PreciseBuffers):
    """First-in first-out bank of unit embeddings, for objectives that want more negatives than a batch holds.

    An objective only reads it. Its owner (the recipe) enqueues after the backward pass; under several ranks enqueue
    keys gathered in rank order, so that all ranks hold the same bank. Nothing is written in eval mode, inside
    ``second_pass()``, or when a key is not finite.

    Args:
        size: number of slots K >= 1.
        dim: width d of an embedding.
        init: "empty" starts with no key (objectives see only what was enqueued); "random" fills the bank with random
            unit vectors, as the MoCo releases do.
        overflow: "wrap" writes with modular indices; "drop" drops the keys that do not fit before the end and starts
            over at slot 0, as lightly does.
        generator: draws the random start.

    Buffers (persistent, so that a resumed run goes on exactly):
        keys (K, d), labels (K,) int64 with -1 = unknown, pointer () and filled () int64.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020.
    """

    keys: Tensor
    labels: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        init: str = "empty",
        overflow: str = "wrap",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_number("size", size, 1)
        check_number("dim", dim, 1)
        check_choice("init", init, ("empty", "random"))
        check_choice("overflow", overflow, ("wrap", "drop"))
        self.overflow = overflow
        keys = torch.zeros(size, dim, dtype=dtype)
        if init == "random":
            keys = normalize(torch.randn(size, dim, dtype=dtype, generator=generator), dim=1)
        self.register_buffer("keys", keys)
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(size if init == "random" else 0))

    @property
    def valid(self) -> Tensor:
        """(K,) bool, True where a slot holds a key."""
        return torch.arange(len(self.keys), device=self.keys.device) < self.filled

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Writes ``keys`` (N, d), normalised first, and their ``labels`` (N,) over the oldest slots.

        Raises:
            ValueError: another width than the bank's, or labels of another length.
        """
        check_embeddings("keys", keys)
        size, dim = self.keys.shape
        if keys.shape[1] != dim:
            raise ValueError(f"keys has shape {tuple(keys.shape)}, expected (N, {dim})")
        if labels is not None and labels.shape != keys.shape[:1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({len(keys)},)")
        if not self.training or in_second_pass() or not bool(keys.isfinite().all()):
            return
        start = int(self.pointer)
        if self.overflow == "drop":
            kept = slice(0, min(len(keys), size - start))
            after = start + len(keys) if start + len(keys) < size else 0
        else:
            kept = slice(max(len(keys) - size, 0), len(keys))  # of more than K keys the last K remain
            after = (start + len(keys)) % size
        slots = (torch.arange(len(keys), device=self.keys.device)[kept] + start) % size
        self.keys[slots] = normalize(keys[kept].to(self.keys), dim=1)
        self.labels[slots] = -1 if labels is None else labels[kept].to(self.labels)
        self.filled.fill_(max(int(self.filled), min(start + len(keys), size)))
        self.pointer.fill_(after)

    def extra_repr(self) -> str:
        """Size and width."""
        return f"size={len(self.keys)}, dim={self.keys.shape[1]}, overflow={self.overflow!r}"


class ClassQueue(PreciseBuffers):
    r"""First-in first-out queues of features, one a class, in one bank: rare classes always have keys.

    Of K slots every class gets ``per_class`` and, of the rest, its share: class c = 1, 2, .. ends before slot

    .. math:: e_c = \Big\lceil c\, b + (K - C b) \sum_{j \le c} \pi_j \Big\rceil, \qquad b = \text{per\_class}

    Enqueue rows gathered in rank order, so that all ranks hold the same queue. Nothing is written in eval mode, inside
    ``second_pass()``, or when a feature is not finite. Features are stored as given: the released recipe stores them
    before the projection and projects the whole queue anew at every step, *after* enqueueing the batch.

    Args:
        size: number of slots K >= C * per_class.
        dim: width d of a feature.
        class_counts: (C,) training examples a class; a class without any still has its ``per_class`` slots.
        per_class: slots that every class has, >= 1.
        generator: draws the random unit vectors that fill the queue at the start; they carry their slot's class.

    Buffers (persistent, so that a resumed run goes on exactly):
        features (K, d), labels (K,) int64 the class of each slot, index (K,) int64 the dataset index of what it holds
        (-K..-1 at the start), pointers (C,) int64 the next slot of each class, counted from its first, and starts
        (C + 1,) int64 the first slots.

    Source: Suh and Seo, Long-Tailed Recognition by Mutual Information Maximization between Latent Features and
    Ground-Truth Labels, 2023, and the released code.
    """

    features: Tensor
    labels: Tensor
    index: Tensor
    pointers: Tensor
    starts: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        class_counts: ClassCounts,
        *,
        per_class: int = 2,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        counts = _as_counts(class_counts).cpu()
        check_number("dim", dim, 1)
        check_number("per_class", per_class, 1)
        check_number("size", size, len(counts) * per_class)
        c, total = torch.arange(len(counts) + 1), int(counts.sum())
        upto = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shares = c * per_class * total + (size - len(counts) * per_class) * upto
        starts = (shares + total - 1) // total  # a ceiling of whole numbers: exact
        self.register_buffer("starts", starts)
        self.register_buffer("labels", torch.arange(len(counts)).repeat_interleave(starts.diff()))
        self.register_buffer("index", torch.arange(-size, 0))
        self.register_buffer("pointers", torch.zeros(len(counts), dtype=torch.int64))
        self.register_buffer("features", normalize(torch.randn(size, dim, dtype=dtype, generator=generator), dim=1))

    @property
    def slots_per_class(self) -> Tensor:
        """(C,) int64."""
        return self.starts.diff()

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor, index: Tensor) -> None:
        """Writes ``features`` (N, d) over the oldest slots of their class; what exceeds a class's slots is left out.

        Args:
            features: (N, d).
            labels: (N,) class indices.
            index: (N,) dataset indices, by which an objective leaves an example's own key out.

        Raises:
            ValueError: another width than the queue's, a label out of range, or labels or index of another length.
        """
        check_embeddings("features", features)
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(f"features has shape {tuple(features.shape)}, expected (N, {self.features.shape[1]})")
        check_per_row("labels", labels, features)
        check_per_row("index", index, features)
        check_within("labels", labels, 0, len(self.pointers) - 1, what="class indices")
        if not self.training or in_second_pass() or not bool(features.isfinite().all()):
            return
        order = labels.long().argsort(stable=True)
        of_class, counts = labels.long()[order], labels.long().bincount(minlength=len(self.pointers))
        turn = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[of_class]
        slots = self.slots_per_class
        kept = turn < slots[of_class]
        order, of_class, turn = order[kept], of_class[kept], turn[kept]
        slot = self.starts[of_class] + (self.pointers[of_class] + turn) % slots[of_class]
        self.features[slot] = features[order].to(self.features)
        self.index[slot] = index[order].to(self.index)
        self.pointers.copy_((self.pointers + torch.minimum(counts, slots)) % slots)

    def extra_repr(self) -> str:
        """Size, width and the range of slots a class."""
        slots = self.slots_per_class
        size, dim = self.features.shape
        return f"size={size}, dim={dim}, slots_per_class={int(slots.min())}..{int(slots.max())}"


__all__ = ["ClassCounts", "ClassQueue", "ClassStatistics", "MemoryBank", "effective_number_weights"]
