"""Lightning callbacks of the recipes: deferred re-balancing, checkpoints, random states, history."""

from __future__ import annotations

import csv
import os
import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

from counterpoise._core import check_choice, check_number
from counterpoise._core.checks import did_you_mean
from counterpoise.memory import effective_number_weights
from counterpoise.recipes.errors import ConfigError


def deferred_beta(epoch: int, *, switch_epoch: int, before: float = 0.0, after: float = 0.9999) -> float:
    """Beta of the effective-number weights in ``epoch`` (0-based): ``before`` gives all ones until the switch."""
    return after if epoch >= switch_epoch else before


class DeferredReweighting(pl.Callback):
    """DRW: trains without class weights first, and switches effective-number weights on late.

    A pure function of the epoch, so there is nothing to restore. Pair the switch with a drop of the learning rate, as
    the paper does.

    Args:
        class_counts: (C,) training examples a class.
        switch_at: fraction of the epochs in [0, 1] after which the weights are on.
        beta: in [0, 1], see :func:`~counterpoise.memory.effective_number_weights`.

    Raises:
        ValueError: the recipe's loss takes no class weights, or has its own already.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, 2019, algorithm 1.
    """

    def __init__(self, class_counts: list[int], switch_at: float = 0.8, beta: float = 0.9999) -> None:
        check_number("switch_at", switch_at, 0, 1)
        check_number("beta", beta, 0, 1)
        self.class_counts = list(class_counts)
        self.switch_at = switch_at
        self.beta = beta

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuses a loss that cannot take the weights, before any training."""
        if stage != "fit":
            return
        loss, name = pl_module.loss, type(pl_module.loss).__name__
        if "class_weight" not in getattr(loss, "_buffers", {}):
            raise ValueError(f"deferred re-weighting got {name}, expected a loss with class_weight")
        weighs = loss.class_weight is not None and not getattr(loss, "deferred", False)
        if weighs or getattr(loss, "alpha", None) is not None:
            raise ValueError(f"{name} has class_weight or alpha already, and deferred re-weighting sets it: drop one")
        if getattr(getattr(pl_module, "reweighter", None), "by", None) == "target":
            raise ValueError("class weights in both deferred re-weighting and a reweighter by target: drop one")
        if (trainer.max_epochs or 0) < 1:
            raise ValueError(f"max_epochs is {trainer.max_epochs}, expected at least 1: the switch is a fraction of it")
        loss.deferred = True  # the weights are ours: a further fit may set them again
        self._apply(trainer, pl_module, epoch=0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sets the weights of the epoch that a resumed run goes on in."""
        self._apply(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Sets the weights of the epoch."""
        self._apply(trainer, pl_module, trainer.current_epoch)

    def _apply(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        switch_epoch = round(self.switch_at * trainer.max_epochs)  # type: ignore[operator]
        weights = effective_number_weights(
            self.class_counts, deferred_beta(epoch, switch_epoch=switch_epoch, after=self.beta)
        )
        pl_module.loss.set_class_weight(weights.float().to(pl_module.device))


class Checkpoints(Checkpoint):
    """``last.ckpt`` every so many steps and at each epoch's end, ``best.ckpt`` by a monitored value.

    Of Lightning's kind, so that it hears of an epoch's end behind early stopping and saves what that decided. Files are
    written aside and moved into place, so a run killed while writing leaves the previous one whole.

    Args:
        folder: where they go.
        monitor: name of a logged value; mode: "max" or "min".
        every_n_steps: optimiser steps between two ``last.ckpt``, >= 1; epochs' ends come on top.
    """

    def __init__(
        self, folder: str | Path, monitor: str = "val/balanced_accuracy", mode: str = "max", every_n_steps: int = 200
    ) -> None:
        check_choice("mode", mode, ("max", "min"))
        check_number("every_n_steps", every_n_steps, 1)
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self._saved_step = 0
        self._stopped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The state that a run starts from is not written again; a run that had stopped early stays stopped."""
        self._saved_step = trainer.global_step
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Saves ``last.ckpt`` of the steps so far, before the next one.

        Only now has everything heard of the last batch: a module's own ``on_train_batch_end``, where banks are filled,
        runs behind those of the callbacks. Before an epoch's last batch nothing is saved; its end is one step away.
        """
        step = trainer.global_step
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if step % self.every_n_steps == 0 and step != self._saved_step and not last_batch:
            self._save(trainer, "last.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Saves ``best.ckpt`` where the monitored value improved; one that is not logged is refused at the start."""
        if self.monitor not in trainer.callback_metrics:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            hint = did_you_mean(self.monitor, known)
            raise ConfigError(f"callbacks.checkpoints.monitor is {self.monitor!r}, expected one of {known}{hint}")
        if trainer.sanity_checking:
            return
        score = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))  # saving takes all ranks
        best = self.best_score
        better = score == score and (best is None or (score > best if self.mode == "max" else score < best))  # not NaN
        if better:
            self.best_score, self.best_epoch = score, trainer.current_epoch
            self._save(trainer, "best.ckpt", weights_only=True)

    def forget_best(self) -> None:
        """The next validation is the best so far: what was trained until now does not count."""
        self.best_score = self.best_epoch = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Saves ``last.ckpt``."""
        self._stopped = trainer.should_stop
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: pl.Trainer, name: str, weights_only: bool = False) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_step = trainer.global_step if name == "last.ckpt" else self._saved_step
        aside = self.folder / f"{name}.part"
        trainer.save_checkpoint(aside, weights_only=weights_only)
        if trainer.is_global_zero:
            os.replace(aside, self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and whether training was stopped early."""
        return {"best_score": self.best_score, "best_epoch": self.best_epoch, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the best value so far."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]
        self._stopped = state_dict["stopped"]


class RandomStates(pl.Callback):
    """Random states of Python, numpy and torch travel in the checkpoint, as plain lists and tensors."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states as they stand."""
        version, internal, gauss = random.getstate()
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        return {
            "python": [version, list(internal), gauss],
            "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the first batch: what Lightning draws before it must not count."""
        self._restored = state_dict

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Puts the states back before the first resumed batch."""
        if self._restored is None:
            return
        states, self._restored = self._restored, None
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(states["torch"].cpu())
        if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])


class History(pl.Callback):
    """One row of logged values an epoch, in ``history.csv``; rows of a resumed run go on where the checkpoint stood.

    Args:
        file: the CSV file.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._started = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Adds the epoch's row."""
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if torch.as_tensor(v).numel() == 1}
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **values})
        now = time.monotonic()
        self.seconds, self._started = self.seconds + now - self._started, now
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.write()

    def write(self) -> None:
        """Writes the file, aside first."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        aside = self.file.with_suffix(".part")
        with aside.open("w", newline="") as out:
            writer = csv.DictWriter(out, names)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(aside, self.file)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and the seconds they took."""
        return {"rows": [dict(row) for row in self.rows], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the rows so far."""
        self.rows, self.seconds = [dict(row) for row in state_dict["rows"]], state_dict["seconds"]
