"""A run with everything that could be lost in it: bank, duals, dropout, augmentation, random transforms, a scheduler.

``python -m tests.recipes.resume_job FOLDER WORKERS KILL_AT_STEP``; 0 = run to the end. Writes final.pt.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from counterpoise.contrastive import NTXentLoss
from counterpoise.losses import LogitAdjustedLoss
from counterpoise.memory import MemoryBank
from counterpoise.recipes import MLP, BatchAugment, Checkpoints, LongTailed, fit
from counterpoise.recipes.data import LabelledData, digits_lt
from counterpoise.recipes.data.splits import InMemory
from counterpoise.recipes.schedules import cosine
from counterpoise.samplers import GroupDRO, ProgressivelyBalancedSampler

EPOCHS = 3


class WithBank(LongTailed):
    """The long-tailed recipe plus a contrastive term against a memory bank of earlier batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.contrast = NTXentLoss(temperature=0.2)
        self.bank = MemoryBank(96, 10)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        views = [self.model(batch["input"] + 0.1 * torch.randn_like(batch["input"])) for _ in range(2)]
        self.keys = views[1].detach()
        return super().training_step(batch, batch_idx) + self.contrast(*views, bank=self.bank)

    def on_train_batch_end(self, *args: Any) -> None:
        self.bank.enqueue(self.keys)


class Kill(pl.Callback):
    """kill -9 behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def noisy(x: Tensor) -> Tensor:
    """A random transform of one example."""
    return x + 0.05 * torch.randn_like(x)


def data(workers: int) -> LabelledData:
    """Digits with a random transform, drawn by a sampler whose prior changes every epoch."""
    plain = digits_lt(batch_size=32).splits
    inputs = torch.stack([plain.train[i]["input"] for i in range(len(plain.train))])
    noisy_train = InMemory(inputs, plain.train.targets, transform=noisy)
    sampler = ProgressivelyBalancedSampler(plain.train.targets, EPOCHS)
    return LabelledData(replace(plain, train=noisy_train), batch_size=32, num_workers=workers, sampler=sampler)


def main(folder: Path, workers: int, kill_at: int) -> None:
    """Goes on from the folder's checkpoint where there is one."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    loaded = data(workers)
    recipe = WithBank(
        MLP(64, 10, hidden=(32,), dropout=0.3),
        LogitAdjustedLoss(loaded.class_counts),
        num_classes=10,
        reweighter=GroupDRO(loaded.class_counts, step_size=0.1, by="target"),
        scheduler=cosine,
        augment=BatchAugment(shift=1),
    )
    fit(
        recipe,
        loaded,
        folder=folder,
        max_epochs=EPOCHS,
        resume=True,
        callbacks=[Checkpoints(folder / "checkpoints", every_n_steps=5), *([Kill(kill_at)] if kill_at else [])],
        enable_progress_bar=False,
        accelerator="cpu",
    )
    torch.save(recipe.state_dict(), folder / "final.pt")
    torch.save(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], folder / "last.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
