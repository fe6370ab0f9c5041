"""The sampler that the others are made of: seeded, epoch-aware, split over ranks by itself, resumable in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from counterpoise._core import Spec, check_number, generator_for, rank, world_size


class EpochSampler(Sampler[int]):
    """Yields this rank's share of an order that depends on (seed, epoch) alone.

    All ranks form the same order and take every W-th index, so that step k of W ranks with batches of B sees the
    examples that one process with batches of W * B sees. An order that W does not divide is filled up from its start.
    Recipes therefore set Lightning's ``use_distributed_sampler=False``.

    Args:
        num_samples: length of the order over all ranks, >= 1.
        seed: >= 0.
    """

    def __init__(self, num_samples: int, *, seed: int = 0) -> None:
        check_number("num_samples", num_samples, 1)
        check_number("seed", seed, 0)
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0
        self._start = 0
        self._position = 0

    def draw(self, generator: torch.Generator) -> Tensor:
        """(num_samples,) int64 order of the epoch."""
        return torch.randperm(self.num_samples, generator=generator)

    def order(self) -> Tensor:
        """(num_samples,) order of the present epoch, over all ranks."""
        return self.draw(generator_for(self.seed, self.epoch))

    def share(self, order: Tensor) -> Tensor:
        """(len(self),) what this rank takes of an order."""
        return order[torch.arange(rank(), len(self) * world_size(), world_size()) % len(order)]

    def __iter__(self) -> Iterator[int]:
        own = self.share(self.order()).tolist()
        self._position, self._start = self._start, 0
        for index in own[self._position :]:
            self._position += 1
            yield index

    def __len__(self) -> int:
        """Indices a rank gets in a whole epoch, also where a resumed epoch starts later."""
        return -(-self.num_samples // world_size())

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch (0, 1, ...); another epoch than the present one starts at its beginning."""
        if epoch != self.epoch:
            self._start = self._position = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and how many indices this rank has been handed in it.

        A loader with workers fetches ahead of training: take the position from the training loop then.
        """
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on at ``position`` of ``epoch``."""
        self.epoch = int(state["epoch"])
        self._start = self._position = int(state["position"])


class ShuffleSampler(EpochSampler):
    """Every example once an epoch, in a seeded order.

    Args:
        targets: (N,) labels, of which only the length is read, or N itself.
        seed: >= 0.
    """

    spec = Spec(task="sampler", source="Random reshuffling", needs=("targets",))

    def __init__(self, targets: Tensor | int, *, seed: int = 0) -> None:
        super().__init__(targets if isinstance(targets, int) else len(targets), seed=seed)
