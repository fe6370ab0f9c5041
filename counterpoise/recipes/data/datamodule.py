"""Loaders over train, validation and test splits, whose order and draws are a function of (seed, epoch, index)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from counterpoise._core import check_number, mix_seeds
from counterpoise.samplers import ShuffleSampler

if TYPE_CHECKING:
    from counterpoise.recipes.data.splits import Splits


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python, numpy and torch's CPU generators seeded inside, and put back as they were afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device's, too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class SeededItems(Dataset[dict[str, Any]]):
    """A data set whose random transforms depend on (seed, epoch, index) alone, in whatever process they run.

    Args:
        dataset: yields dictionaries.
        sampler: tells the epoch. Loader workers are started anew each epoch and see the present one.
        seed: >= 0.
    """

    def __init__(self, dataset: Any, sampler: Any, seed: int) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with seeded(mix_seeds(self.seed, getattr(self.sampler, "epoch", 0), index)):
            return self.dataset[index]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A list of examples to a batch, by torch's rule."""
    return torch.utils.data.default_collate(items)


class LabelledData(pl.LightningDataModule):
    """Train, validation and test loaders of dictionaries: input, target, index, and group where known.

    The checkpoint carries the position (epoch, batches trained) as the training loop knows it; a resumed run goes on
    behind it, with any number of loader workers.

    Args:
        splits: the three data sets and what is known of them.
        batch_size: examples a batch and rank, >= 1.
        num_workers: loader processes, >= 0.
        sampler: of the training set; None = seeded shuffling.
        seed: >= 0, of the order and of random transforms.
        drop_last: leave out a last training batch that is not full, unless it is the only one.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        batch_size: int = 128,
        num_workers: int = 0,
        sampler: Sampler[int] | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        check_number("batch_size", batch_size, 1)
        check_number("num_workers", num_workers, 0)
        self.splits = splits
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_last = drop_last
        self.train_sampler: Any = sampler or ShuffleSampler(len(splits.train), seed=seed)
        self._position = {"epoch": 0, "batches": 0}

    @property
    def class_counts(self) -> list[int]:
        """Training examples a class."""
        return list(self.splits.class_counts)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.splits.class_counts)

    @property
    def train_targets(self) -> Tensor:
        """(N,) labels of the training set."""
        return self.splits.train.targets

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of the training set, from the restored position on."""
        sampler = self.train_sampler
        if hasattr(sampler, "load_state_dict"):
            done = self._position["batches"] * self.batch_size
            sampler.load_state_dict({"epoch": self._position["epoch"], "position": done})
        elif self._position["batches"]:
            raise ValueError(
                f"sampler {type(sampler).__name__} has no load_state_dict, so a run stopped in mid-epoch cannot go on "
                "exactly: derive it from counterpoise.samplers.EpochSampler"
            )
        train: Any = self.splits.train
        if not getattr(train, "draws_nothing", False):
            train = SeededItems(train, sampler, self.seed)
        lone = len(sampler) % self.batch_size == 1 and len(sampler) > 1  # batch normalisation needs two
        short = self.drop_last and len(sampler) > self.batch_size
        return self._loader(train, sampler=sampler, drop_last=lone or short)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The validation set in order; every rank reads all of it."""
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The test set in order; every rank reads all of it."""
        return self._loader(self.splits.test)

    def in_order(self, dataset: Any) -> DataLoader[dict[str, Any]]:
        """Batches of any of the splits, each example once: for passes over the training set beside training."""
        return self._loader(dataset)

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(mix_seeds(self.seed)),  # spares the global generator
            **options,
        )

    def state_dict(self) -> dict[str, Any]:
        """The position from the training loop: a sampler's own counter runs ahead through prefetching."""
        if self.trainer is None:
            return dict(self._position)
        loop: Any = self.trainer.fit_loop
        epoch = loop.epoch_progress.current
        inside = epoch.started > epoch.completed and epoch.processed == epoch.completed
        trained = loop.epoch_loop.batch_progress.current.processed
        return {"epoch": epoch.processed, "batches": trained if inside else 0}

    def teardown(self, stage: str) -> None:
        """A further fit with the same data starts at the beginning."""
        if stage == "fit":
            self._position = {"epoch": 0, "batches": 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next training loader starts behind ``batches`` of ``epoch``."""
        self._position = {"epoch": int(state_dict["epoch"]), "batches": int(state_dict["batches"])}
