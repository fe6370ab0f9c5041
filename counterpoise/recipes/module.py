"""What every recipe shares: a model, a loss and optionally a reweighter composed as the design says, and an optimiser.

A recipe of its own says which data it takes (``targets``), what it watches (``monitor``) and what its report shows
(``sections``). It writes ``validation_step``, ``predict_step`` and ``evaluate(predictions, data)``, which gives what
``recipes.evaluation.Scores`` holds; and ``losses`` or ``training_step`` where it trains on something else than the loss
of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from counterpoise.recipes.models import BatchAugment
from counterpoise.samplers import CoresetSampler, reweighted_loss

Batch = dict[str, Any]


class Recipe(pl.LightningModule):
    """The base of the recipes.

    Args:
        model: inputs to logits.
        loss: called as ``loss(logits, target, weight=..., mask=...)``.
        reweighter: of per-row losses; None = the loss's own mean.
        optimizer: parameters to an optimiser; None = SGD with momentum 0.9, learning rate 0.1, weight decay 2e-4.
        scheduler: (optimiser, total steps) to a scheduler stepped every step; None = constant.
        augment: of batches of images; None = none.

    Attributes:
        targets: which kind of data it takes, as ``Splits.kind`` says: "classes", "labels", "tasks", "pixels".
        tasks: of the losses that it takes.
        monitor: the logged value by which the best epoch is chosen.
        sections: what its report shows; None = the report's own.
        example_weight: (N,) weights by index of the training examples, or None; whoever sets them (a callback) keeps
            them in its own state.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    targets = "classes"
    tasks: tuple[str, ...] = ("multiclass",)
    monitor = "val/balanced_accuracy"
    sections: Any = None
    example_weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
    ) -> None:
        super().__init__()
        check_fit(loss, reweighter, self.tasks)
        self.model = model
        self.loss = loss
        self.reweighter = reweighter
        self.augment = augment
        self._make_optimizer = optimizer or sgd
        self._make_scheduler = scheduler
        self.register_buffer("example_weight", None, persistent=False)
        if reweighter is not None:
            self.loss.reduction = "none"  # type: ignore[assignment]
        if hasattr(loss, "sync"):
            self.loss.sync = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to logits."""
        return self.model(x)

    def inputs(self, batch: Batch) -> Tensor:
        """The batch's inputs, augmented."""
        x = batch["input"]
        return x if self.augment is None else self.augment(x, batch["index"], self.current_epoch)

    def losses(self, logits: Tensor, batch: Batch, **row_options: Any) -> Tensor:
        """The loss of the logits, as its own reduction says."""
        given = {name: x for name, x in row_options.items() if x is not None}
        return self.loss(logits, batch["target"], **given)

    def composed(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss, reweighter and weights as one scalar."""
        weight, mask = self.weight_of(batch), batch.get("mask")
        if self.reweighter is None:
            return self.losses(logits, batch, weight=weight, mask=mask)
        target = batch["target"]
        return reweighted_loss(
            self.losses(logits, batch, mask=mask),
            self.reweighter,  # type: ignore[arg-type]
            weight=weight,
            mask=mask,
            target=target if isinstance(target, Tensor) else None,
            group=batch.get("group"),
            index=batch["index"],
        )

    def weight_of(self, batch: Batch) -> Tensor | None:
        """(N,) the batch's own weights times those of its examples and of a weighted coreset; None without any."""
        index, sampler = batch["index"], self._sampler() if self._trainer is not None else None
        given = [batch.get("weight"), None if self.example_weight is None else self.example_weight[index]]
        if isinstance(sampler, CoresetSampler) and sampler.weighted:
            given.append(sampler.weight_of(index).to(index.device))
        weights = [w for w in given if w is not None]
        return math.prod(weights[1:], start=weights[0]) if weights else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The composed loss of a batch."""
        total = self.composed(self.model(self.inputs(batch)), batch)
        self.log_training("loss", total, batch)
        return total

    def log_training(self, name: str, value: Tensor, batch: Batch) -> None:
        """Logs ``train/<name>``, averaged over the epoch."""
        rows, shown = len(batch["index"]), name == "loss"
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "prog_bar": shown}
        self.log(f"train/{name}", value.detach(), batch_size=rows, **options)

    def on_train_start(self) -> None:
        """Checks loss and sampler against each other: ValueError where the sampled prior cannot be known."""
        check_sampler(self.loss, self._sampler())
        self._follow_sampler()

    def on_train_epoch_start(self) -> None:
        """Gives a prior-based loss the prior that this epoch's sampler makes."""
        self._follow_sampler()

    def _sampler(self) -> Any:
        """Of the data module, or of the loader that the Trainer was given."""
        module = getattr(self.trainer, "datamodule", None)
        return getattr(module, "train_sampler", None) or getattr(self.trainer.train_dataloader, "sampler", None)

    def _follow_sampler(self) -> None:
        prior = getattr(self._sampler(), "class_probabilities", None)
        if prior is not None and uses_prior(self.loss):
            self.loss.statistics.set_prior(prior)  # type: ignore[union-attr, operator]

    def configure_optimizers(self) -> Any:
        """The optimiser over the parameters of model, loss and reweighter, and the scheduler stepped every step."""
        optimizer = self._make_optimizer(parameter_groups(self))
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The long-tail papers' optimiser."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=2e-4)


def parameter_groups(module: nn.Module) -> list[Any]:
    """Trainable parameters for an optimiser; those of a ``no_weight_decay`` apart.

    Weight decay on a log-variance or a temperature is a prior that nobody meant.
    """
    spared = {id(p) for p in _without_decay(module)}
    trained = [p for p in module.parameters() if p.requires_grad]
    if not spared:
        return trained
    decayed = [p for p in trained if id(p) not in spared]
    rest = {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0}
    return [{"params": decayed}, rest] if decayed else [rest]


def _without_decay(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in module.modules():
        for name in getattr(part, "no_weight_decay", ()):
            yield getattr(part, name)


def uses_prior(loss: nn.Module) -> bool:
    """The loss corrects for the training prior."""
    return bool(getattr(getattr(loss, "spec", None), "uses_prior", False))


def check_fit(loss: nn.Module, reweighter: nn.Module | None, tasks: tuple[str, ...]) -> None:
    """Raises ValueError unless the loss is of a task that the recipe takes and composes with the reweighter."""
    spec = getattr(loss, "spec", None)
    name = type(loss).__name__
    if spec is not None and spec.task not in tasks:
        raise ValueError(f"loss {name} is a {spec.task} objective, expected one of {', '.join(tasks)}")
    if reweighter is None:
        return
    if spec is not None and not spec.per_row:
        raise ValueError(f"loss {name} has no value per row, so no reweighter composes with it")
    if not hasattr(loss, "reduction"):
        raise ValueError(f'loss {name} has no reduction="none", which reweighter {type(reweighter).__name__} needs')
    own = getattr(loss, "class_weight", None) is not None or getattr(loss, "weight", None) is not None  # ours, torch's
    weighs = own or name == "ClassBalancedLoss"
    if weighs and getattr(reweighter, "by", None) == "target":
        raise ValueError(f"class weights in both loss {name} and reweighter {type(reweighter).__name__}: drop one")


def check_classes(loss: nn.Module, num_classes: int) -> None:
    """Raises ValueError unless what the loss holds per class is of ``num_classes`` classes."""
    counts = getattr(getattr(loss, "statistics", None), "counts", None)
    for name, x in (("class_weight", getattr(loss, "class_weight", None)), ("class_counts", counts)):
        if isinstance(x, Tensor) and x.shape != (num_classes,):
            raise ValueError(f"loss {name} has shape {tuple(x.shape)}, expected ({num_classes},), one entry a class")


def check_sampler(loss: nn.Module, sampler: Any) -> str | None:
    """A note where a prior-based loss is given the sampled prior; ValueError where that prior cannot be known."""
    if not uses_prior(loss) or type(sampler).__name__ in ("ShuffleSampler", "RandomSampler", "NoneType"):
        return None
    name = type(sampler).__name__
    if not hasattr(sampler, "class_probabilities") or not hasattr(loss, "statistics"):
        raise ValueError(
            f"loss {type(loss).__name__} corrects for the class prior and sampler {name} may change it: give the "
            "sampler a class_probabilities property (C,), or use sampler=shuffle"
        )
    return f"{type(loss).__name__} uses the prior that {name} samples, not that of the data."
