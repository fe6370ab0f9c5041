"""The long-tailed recipe: a model, a loss, and optionally a reweighter, put together as the design says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torchmetrics.classification import MulticlassAccuracy

from counterpoise._core import Spec
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Evaluation, classification_metrics
from counterpoise.recipes.models import BatchAugment
from counterpoise.samplers import reweighted_loss

Batch = dict[str, Any]


class LongTailed(pl.LightningModule):
    """Classification on long-tailed data: ``LongTailed(model, LogitAdjustedLoss(data.class_counts))``.

    With a reweighter, the loss is taken per row and composed as :func:`~counterpoise.samplers.reweighted_loss` says; a
    normaliser of the loss's own then does not apply.
    A prior-based loss follows the sampler: with a re-balancing one it is given the sampled prior, every epoch.

    Args:
        model: inputs to logits (N, C).
        loss: multi-class, or multi-label (then given one-hot targets). Any ``nn.Module`` called as
            ``loss(logits, target)`` does.
        num_classes: C.
        reweighter: for example :class:`~counterpoise.samplers.GroupDRO`; None = plain mean.
        optimizer: parameters to an optimiser; None = SGD with momentum 0.9, learning rate 0.1, weight decay 2e-4.
        scheduler: (optimiser, total steps) to a scheduler stepped every step; None = constant.
        augment: of batches of images; None = none.
        many, few: classes with more, or fewer, training examples are the head and the tail of the evaluation.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    tasks = ("multiclass", "multilabel")
    monitor = "val/balanced_accuracy"

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
        many: int = 100,
        few: int = 20,
    ) -> None:
        super().__init__()
        check_fit(loss, reweighter, self.tasks)
        check_classes(loss, num_classes)
        self.model = model
        self.loss = loss
        self.reweighter = reweighter
        self.augment = augment
        self.num_classes = num_classes
        self.many, self.few = many, few
        self._make_optimizer = optimizer or sgd
        self._make_scheduler = scheduler
        if reweighter is not None:
            self.loss.reduction = "none"  # type: ignore[assignment]
        if hasattr(loss, "sync"):
            self.loss.sync = True  # type: ignore[assignment]
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_balanced_accuracy = MulticlassAccuracy(num_classes, average="macro")

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to logits (N, C)."""
        return self.model(x)

    def _losses(self, logits: Tensor, batch: Batch, **row_options: Any) -> Tensor:
        target = batch["target"]
        if getattr(self.loss, "spec", Spec("multiclass", "")).task == "multilabel":
            target = one_hot(target, self.num_classes)
        given = {name: x for name, x in row_options.items() if x is not None}
        return self.loss(logits, target, **given)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The composed loss of a batch."""
        x = batch["input"]
        if self.augment is not None:
            x = self.augment(x, batch["index"], self.current_epoch)
        logits = self.model(x)
        weight, mask = batch.get("weight"), batch.get("mask")
        if self.reweighter is None:
            total = self._losses(logits, batch, weight=weight, mask=mask)
        else:
            losses = self._losses(logits, batch, mask=mask)
            total = reweighted_loss(
                losses,
                self.reweighter,  # type: ignore[arg-type]
                weight=weight,
                mask=mask,
                target=batch["target"],
                group=batch.get("group"),
                index=batch["index"],
            )
        self.log(
            "train/loss",
            total.detach(),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            prog_bar=True,
            batch_size=len(logits),
        )
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracies; the combined loss is not a criterion and is not logged."""
        logits = self.model(batch["input"])
        self.val_accuracy.update(logits, batch["target"])
        self.val_balanced_accuracy.update(logits, batch["target"])
        self.log("val/accuracy", self.val_accuracy, batch_size=len(logits))
        self.log("val/balanced_accuracy", self.val_balanced_accuracy, prog_bar=True, batch_size=len(logits))

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target, logits, and group where known."""
        kept: Batch = {name: batch[name] for name in ("index", "target", "group") if name in batch}
        return kept | {"logits": self.model(batch["input"]).float()}

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Evaluation:
        """Metrics of what :meth:`predict_step` gave for a split."""
        names = data.splits.class_names
        logits, target = predictions["logits"], predictions["target"]
        return classification_metrics(
            logits, target, data.class_counts, many=self.many, few=self.few, class_names=names
        )

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
        optimizer = self._make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The long-tail papers' optimiser."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=2e-4)


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
