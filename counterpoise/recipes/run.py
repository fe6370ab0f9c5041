"""One run from start to report: train, pick the best checkpoint, evaluate once, write everything down."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from counterpoise.recipes.callbacks import Checkpoints, History, RandomStates
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.errors import ConfigError, one_sentence
from counterpoise.recipes.report import write_report
from counterpoise.recipes.run_folder import (
    check_checkpoint,
    command_line,
    config_hash,
    environment,
    forget_checkpoints,
    locked,
    open_folder,
    read_metrics,
    write_config,
    write_metrics,
    write_predictions,
)


@dataclass(frozen=True)
class Result:
    """Where a run lies and what came out."""

    folder: Path
    metrics: dict[str, Any]
    report: Path | None

    def __getitem__(self, name: str) -> float:
        """A scalar of the test split: ``result["balanced_accuracy"]``; KeyError for a run that has not got so far."""
        if "splits" not in self.metrics:
            raise KeyError(
                f"{name}: the run in {self.folder} is {self.metrics.get('status')}, it has no test split yet"
            )
        return self.metrics["splits"]["test"][name]


def fit(
    recipe: pl.LightningModule,
    data: LabelledData,
    *,
    folder: str | Path,
    max_epochs: int = 30,
    seed: int = 0,
    resume: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Any] = (),
    config: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    **trainer_options: Any,
) -> Result:
    """Trains, evaluates and reports into ``folder``.

    Args:
        recipe: what is trained, with ``predict_step`` and ``evaluate`` as :class:`LongTailed` has them; data: what on.
            A recipe may have ``prepare(data, folder, ..)``, called before training, and ``finish(folder, data,
            predictions)``, called behind the evaluation, which gives further entries of metrics.json.
        folder: of the run, made if need be.
        max_epochs: >= 1.
        seed: of everything random that is left.
        resume: go on from ``checkpoints/last.ckpt`` of the folder, exactly.
        callbacks, loggers: of Lightning; checkpoints, random states and history are added.
        config: what is written to config.yaml; None = what can be told of the parts.
        notes: sentences for the report.
        trainer_options: passed on to ``lightning.pytorch.Trainer``.

    Returns:
        the Result; on failure everything written so far stays, marked as failed.

    Raises:
        TypeError: a recipe without ``evaluate``; said before training.
        ConfigError: the folder cannot be written, or its checkpoint not be read, or the Trainer refuses its options.
    """
    if not callable(getattr(recipe, "evaluate", None)):
        raise TypeError(f"recipe {type(recipe).__name__} has no evaluate(predictions, data), which makes the metrics")
    folder = Path(folder).absolute()
    config = dict(config or {"recipe": {"name": _name(recipe)}, "seed": seed, "trainer": {"max_epochs": max_epochs}})
    open_folder(folder)
    last = folder / "checkpoints" / "last.ckpt"
    going_on = resume and last.exists()
    if going_on:
        check_checkpoint(last)
    history = History(folder / "history.csv")
    pl.seed_everything(seed, verbose=False)
    trainer = _trainer(recipe, folder, [*callbacks, history], loggers, {"max_epochs": max_epochs, **trainer_options})
    metrics: dict[str, Any] = {
        "recipe": config["recipe"]["name"],
        "config_hash": config_hash(config),
        "status": "running",
        "error": None,
        "notes": list(notes),
        "command": command_line(),
        "environment": environment(str(trainer.strategy.root_device), trainer.world_size),
        "class_names": list(data.splits.class_names),
        "class_counts": data.class_counts,
    }
    data.drop_last = data.drop_last or bool(getattr(recipe, "drop_last", False))
    keeps = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
    with locked(folder) if keeps else nullcontext():
        if keeps:
            if not going_on:
                forget_checkpoints(folder)
            write_config(folder, config)
            write_metrics(folder, metrics)
        try:
            prepare: Any = getattr(recipe, "prepare", None)
            if prepare is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                prepare(data, folder, resume=resume, seed=seed, world_size=trainer.world_size, **trainer_options)
            trainer.fit(recipe, datamodule=data, ckpt_path=last if going_on else None, weights_only=True)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                found = _evaluate(trainer, recipe, data, folder)
                metrics |= {**found, "notes": [*metrics["notes"], *dict.fromkeys(found["notes"])]}
            metrics |= {"status": "completed", "cost": _cost(trainer, recipe, data, history)}
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            metrics |= {"status": "interrupted" if stopped else "failed", "error": one_sentence(error)}
            raise
        finally:
            report = _write(folder, metrics, getattr(recipe, "sections", None)) if keeps else None
    return Result(folder, metrics, report)


def _trainer(
    recipe: pl.LightningModule,
    folder: Path,
    callbacks: list[pl.Callback],
    loggers: Sequence[Any],
    options: dict[str, Any],
) -> pl.Trainer:
    """Lightning's Trainer with our callbacks added; ConfigError where it refuses its options."""
    options = {"deterministic": True, "enable_progress_bar": True, **options}
    added = [*callbacks, RandomStates(), *([RichProgressBar()] if options["enable_progress_bar"] else [])]
    if not any(isinstance(c, Checkpoints) for c in added):
        added.append(Checkpoints(folder / "checkpoints", monitor=getattr(recipe, "monitor", "val/balanced_accuracy")))
    added.sort(key=lambda c: isinstance(c, Checkpoints))  # last, so that they save what the others hold by then
    try:
        return pl.Trainer(
            default_root_dir=folder,
            logger=list(loggers) or False,
            callbacks=added,
            enable_checkpointing=True,  # ours, which is there: Lightning then adds none
            use_distributed_sampler=False,
            enable_model_summary=False,
            **options,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {one_sentence(error)}") from error


def _write(folder: Path, metrics: dict[str, Any], sections: Any) -> Path:
    write_metrics(folder, metrics)
    return write_report(folder, sections)


def _evaluate(trainer: pl.Trainer, recipe: pl.LightningModule, data: LabelledData, folder: Path) -> dict[str, Any]:
    """Metrics of validation and test split with the best weights; the test split is read here and nowhere else."""
    best = folder / "checkpoints" / "best.ckpt"
    if best.exists():
        recipe.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
    found, notes = {}, list[str]()
    predictions: dict[str, dict[str, Tensor]] = {}
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches: Any = trainer.predict(recipe, dataloaders=loader)
        predictions[split] = {name: torch.cat([b[name].cpu() for b in batches]) for name in batches[0]}
        found[split] = recipe.evaluate(predictions[split], data)  # type: ignore[operator]
        notes += found[split].notes
    finish: Any = getattr(recipe, "finish", None)
    more: dict[str, Any] = {}
    if trainer.is_global_zero:
        write_predictions(folder, predictions["test"])
        more = {} if finish is None else finish(folder, data, predictions)
    return {
        "splits": {name: evaluation.scalars for name, evaluation in found.items()},
        "notes": notes,
        **found["test"].details,
        **more,
    }


def _cost(trainer: pl.Trainer, recipe: pl.LightningModule, data: LabelledData, history: History) -> dict[str, Any]:
    epochs = trainer.current_epoch
    seen = epochs * len(data.train_sampler)
    return {
        "train_seconds": round(history.seconds, 3),
        "epochs": epochs,
        "steps": trainer.global_step,
        "parameters": sum(p.numel() for p in recipe.parameters()),
        "examples_per_second": round(seen / history.seconds, 1) if history.seconds > 0 else None,
    }


def _name(recipe: pl.LightningModule) -> str:
    """LongTailed to long_tailed, GML to gml."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(recipe).__name__).lower()


def load_result(folder: str | Path) -> Result:
    """The Result of a run that has been written."""
    folder = Path(folder)
    report = folder / "report.html"
    return Result(folder, read_metrics(folder), report if report.exists() else None)
