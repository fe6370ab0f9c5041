"""A first-in first-out queue of features for each class, all in one bank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise._core import (
    PreciseBuffers,
    check_embeddings,
    check_number,
    check_per_row,
    check_within,
    in_second_pass,
)
from counterpoise.memory.class_statistics import ClassCounts, as_counts


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
        counts = as_counts(class_counts).cpu()
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
