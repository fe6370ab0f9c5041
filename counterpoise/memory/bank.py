"""A first-in first-out bank of past embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from counterpoise._core import PreciseBuffers, check_choice, check_embeddings, check_number, in_second_pass


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
