"""The multi-label recipe: several labels an example, most of them absent, some of them rare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Scores
from counterpoise.recipes.label_evaluation import LabelAveragePrecision, label_metrics
from counterpoise.recipes.models import BatchAugment
from counterpoise.recipes.module import Batch, Recipe, check_classes
from counterpoise.recipes.report_pictures import encoded
from counterpoise.recipes.report_sections import CLOSING, LEARNING, RESULTS, Section
from counterpoise.recipes.sections_labels import example_figure, label_count_table, label_figure, label_table

SHOWN = 12  # test examples in the report


class MultiLabel(Recipe):
    """Classification into label sets, judged by the mean over labels of their average precision.

    Args:
        model: inputs to logits (N, C).
        loss: multi-label, called as ``loss(logits, target)`` with targets (N, C) of 0 and 1; as floats where it is not
            one of this library.
        num_classes: C labels.
        many, few: labels with more, or fewer, training positives are the head and the tail of the evaluation.
        reweighter, optimizer, scheduler, augment: see :class:`~counterpoise.recipes.module.Recipe`.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    targets = "labels"
    tasks = ("multilabel",)
    monitor = "val/mAP"
    sections = (
        RESULTS,
        Section("Plots", {"Average precision by label frequency": label_figure, **LEARNING}),
        Section("Labels", {"Table of labels": label_table, "Labels per example": label_count_table}),
        Section("Examples", {"Test examples": example_figure}),
        *CLOSING,
    )

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
        if getattr(reweighter, "by", None) == "target":
            raise ValueError(
                f'reweighter {type(reweighter).__name__} has by="target", expected by="group": an example has several '
                "labels"
            )
        self.many, self.few = many, few
        self.val_precision = LabelAveragePrecision()

    def losses(self, logits: Tensor, batch: Batch, **row_options: Any) -> Tensor:
        """The loss of the logits; one from elsewhere is given floating labels, which torch's BCE wants."""
        if not hasattr(self.loss, "spec"):
            batch = {**batch, "target": batch["target"].to(logits.dtype)}
        return super().losses(logits, batch, **row_options)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Gathers logits and labels; the combined loss is not a criterion and is not logged."""
        self.val_precision.update(self.model(batch["input"]), batch["target"])

    def on_validation_epoch_end(self) -> None:
        """Logs the mean average precision."""
        precision = self.val_precision.compute()
        self.log("val/mAP", precision[~precision.isnan()].mean().float(), prog_bar=True)
        self.val_precision.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target (N, C), logits (N, C), and group where known."""
        kept: Batch = {name: batch[name] for name in ("index", "target", "group") if name in batch}
        return kept | {"logits": self.model(batch["input"]).float()}

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Average precisions and F1 of what :meth:`predict_step` gave for a split, and the first test images."""
        logits, target, names = predictions["logits"], predictions["target"], data.splits.class_names
        found = label_metrics(logits, target, data.class_counts, many=self.many, few=self.few, class_names=names)
        if len(data.splits.input_shape) != 3:
            return found
        examples = [
            {
                "image": encoded(data.splits.test[i]["input"]),
                "true": torch.where(target[i] > 0)[0].tolist(),
                "predicted": torch.where(logits[i] > 0)[0].tolist(),
            }
            for i in range(min(SHOWN, len(data.splits.test), len(target)))
        ]
        return Scores(found.scalars, {**found.details, "examples": examples}, found.notes)
