"""The long-tailed recipe: classification with many examples of some classes and few of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torchmetrics.classification import MulticlassAccuracy

from counterpoise._core import Spec
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Evaluation, classification_metrics
from counterpoise.recipes.models import BatchAugment
from counterpoise.recipes.module import Batch, Recipe, check_classes


class LongTailed(Recipe):
    """Classification on long-tailed data: ``LongTailed(model, LogitAdjustedLoss(data.class_counts))``.

    With a reweighter, the loss is taken per row and composed as :func:`~counterpoise.samplers.reweighted_loss` says; a
    normaliser of the loss's own then does not apply.
    A prior-based loss follows the sampler: with a re-balancing one it is given the sampled prior, every epoch.

    Args:
        model: inputs to logits (N, C).
        loss: multi-class, or multi-label (then given one-hot targets). Any ``nn.Module`` called as
            ``loss(logits, target)`` does.
        num_classes: C.
        many, few: classes with more, or fewer, training examples are the head and the tail of the evaluation.
        reweighter, optimizer, scheduler, augment: see :class:`~counterpoise.recipes.module.Recipe`.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    tasks: tuple[str, ...] = ("multiclass", "multilabel")

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
        super().__init__(model, loss, reweighter=reweighter, optimizer=optimizer, scheduler=scheduler, augment=augment)
        check_classes(loss, num_classes)
        self.num_classes = num_classes
        self.many, self.few = many, few
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_balanced_accuracy = MulticlassAccuracy(num_classes, average="macro")

    def losses(self, logits: Tensor, batch: Batch, **row_options: Any) -> Tensor:
        """The loss of the logits; a multi-label one is given one-hot targets."""
        if getattr(self.loss, "spec", Spec("multiclass", "")).task == "multilabel":
            batch = {**batch, "target": one_hot(batch["target"], self.num_classes)}
        return super().losses(logits, batch, **row_options)

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
