"""PK sampling: batches of P classes with m examples each, for objectives that need positives in every batch.

Every batch of P m indices holds P distinct classes, dealt from shuffled decks of classes, and m examples of each, dealt
from shuffled decks of the class: without repetition while it lasts, and again where a class has fewer than m. All ranks
form the same sequence, and step k of W ranks takes W blocks of P classes, distinct over the ranks too while there are
enough classes: what an objective gathers over ranks then holds W P classes.

Pass it as the DataLoader's ``sampler`` with ``batch_size = P m``. An index sampler with any other batch size would cut
batches through the blocks, unless the size is a multiple of m and whole groups of one class are all that is asked for.

Source: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoise._core import Spec, check_number, rank, world_size
from counterpoise.samplers.epoch_sampler import EpochSampler


class PKSampler(EpochSampler):
    """Blocks of P classes with m examples each; the rule is at the top of this file.

    An epoch has ``num_batches`` batches a rank, by default floor(N / (P m W)) and at least one, over W ranks. It does
    not visit every example: classes come equally often, whatever their size.

    Args:
        targets: (N,) class indices of the training set.
        classes_per_batch: P >= 1, of a rank's batch; at most the number of classes.
        samples_per_class: m >= 1.
        drop_short_classes: leave out classes with fewer than m examples instead of repeating theirs.
        num_batches: batches an epoch and rank; None = as above.
        seed: >= 0.

    Raises:
        ValueError: targets that are not class indices, or fewer than P classes to draw from.
    """

    spec = Spec(
        task="sampler",
        source="Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017, section 2",
        needs=("targets",),
    )

    def __init__(
        self,
        targets: Tensor | Sequence[int],
        classes_per_batch: int = 4,
        samples_per_class: int = 4,
        *,
        drop_short_classes: bool = False,
        num_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        targets = torch.as_tensor(targets)
        if targets.ndim != 1 or targets.numel() == 0 or targets.is_floating_point() or int(targets.min()) < 0:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}, expected (N,) class indices >= 0"
            )
        super().__init__(len(targets), seed=seed)
        check_number("classes_per_batch", classes_per_batch, 1)
        check_number("samples_per_class", samples_per_class, 1)
        if num_batches is not None:
            check_number("num_batches", num_batches, 1)
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.num_batches = num_batches
        self.class_counts = torch.bincount(targets.long())
        self._members = targets.argsort(stable=True).split(self.class_counts.tolist())
        least = samples_per_class if drop_short_classes else 1
        self._classes = (self.class_counts >= least).nonzero().flatten()
        if len(self._classes) < classes_per_batch:
            raise ValueError(
                f"classes_per_batch is {classes_per_batch}, expected at most {len(self._classes)}, the number of "
                f"classes with {least} or more examples"
            )

    @property
    def class_probabilities(self) -> Tensor:
        """(C,) float64: the prior that training sees, uniform over the classes that are drawn from."""
        p = torch.zeros(len(self.class_counts), dtype=torch.float64)
        p[self._classes] = 1 / len(self._classes)
        return p

    @property
    def batch_size(self) -> int:
        """P m, of one rank."""
        return self.classes_per_batch * self.samples_per_class

    def __len__(self) -> int:
        """Indices a rank gets in an epoch."""
        batches = self.num_batches or max(1, self.num_samples // (self.batch_size * world_size()))
        return batches * self.batch_size

    def draw(self, generator: torch.Generator) -> Tensor:
        """(W len(self),) indices: step by step, the ranks' blocks one after the other."""
        classes = torch.tensor(self._deal_classes(generator))
        order = torch.empty(len(classes), self.samples_per_class, dtype=torch.int64)
        for k in self._classes.tolist():
            places = (classes == k).nonzero().flatten()
            if len(places):
                order[places] = self._deal_examples(self._members[k], len(places), generator)
        return order.flatten()

    def share(self, order: Tensor) -> Tensor:
        """(len(self),) the blocks of this rank."""
        return order.view(-1, world_size(), self.batch_size)[:, rank()].flatten()

    def _deal_classes(self, generator: torch.Generator) -> list[int]:
        """A class for every group of m, from shuffled decks; within a block none twice, within a step if it can be."""
        steps, blocks = len(self) // self.batch_size, world_size()
        dealt: list[int] = []
        deck: list[int] = []
        for _ in range(steps):
            step: list[int] = []
            for _ in range(blocks):
                block: list[int] = []
                while len(block) < self.classes_per_batch:
                    fresh = [k for k in deck if k not in block and k not in step]
                    if not fresh and len(set(step) | set(block)) == len(self._classes):
                        fresh = [k for k in deck if k not in block]  # more places than classes
                    if not fresh:
                        deck += self._classes[torch.randperm(len(self._classes), generator=generator)].tolist()
                        continue
                    block.append(fresh[0])
                    deck.remove(fresh[0])
                step += block
            dealt += step
        return dealt

    def _deal_examples(self, members: Tensor, groups: int, generator: torch.Generator) -> Tensor:
        """(groups, m) examples of a class: each group from one shuffled deck, which is repeated where it is short."""
        m, n = self.samples_per_class, len(members)
        repeats, groups_a_deck = -(-m // n), max(1, n // m)
        rows: list[Tensor] = []
        for _ in range(-(-groups // groups_a_deck)):
            deck = torch.cat([members[torch.randperm(n, generator=generator)] for _ in range(repeats)])
            rows.append(deck[: groups_a_deck * m].view(groups_a_deck, m))
        return torch.cat(rows)[:groups]
