"""The group-robust recipe: classification judged by the group that it serves worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Scores, classification_metrics
from counterpoise.recipes.models import BatchAugment
from counterpoise.recipes.module import Batch, Recipe, check_classes
from counterpoise.recipes.report_sections import CLASS_PLOTS, CLASSES, CLOSING, LEARNING, RESULTS, Section
from counterpoise.recipes.sections_groups import group_figure, group_table


class GroupAccuracy(Metric):
    """Accuracy of each group, summed over batches and ranks: ``compute()`` gives (G,), NaN for an absent group.

    Args:
        num_groups: G.
    """

    correct: Tensor
    total: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, group: Tensor) -> None:
        """Logits (N, C), targets (N,) and groups (N,)."""
        hits = (logits.argmax(1) == target).to(self.correct.dtype)
        self.correct.index_add_(0, group, hits)
        self.total.index_add_(0, group, torch.ones_like(hits))

    def compute(self) -> Tensor:
        """(G,) accuracies."""
        return self.correct / self.total


class GroupRobust(Recipe):
    """Classification whose best epoch is that of the best worst group, with any loss and reweighter.

    Plain training is ``reweighter=none``; group DRO needs the groups in training, CVaR and chi-square DRO do not, and
    :class:`~counterpoise.recipes.JustTrainTwice` is a callback. Validation and test need the groups.

    Args:
        model: inputs to logits (N, C).
        loss: multi-class, called as ``loss(logits, target)``.
        num_classes: C.
        group_counts: (G,) training examples a group.
        group_names: (G,), default "0", "1", ...
        reweighter, optimizer, scheduler, augment: see :class:`~counterpoise.recipes.module.Recipe`.

    Raises:
        ValueError: parts that do not fit together; said before any training.

    Source: the protocol of Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, 2020.
    """

    monitor = "val/worst_group_accuracy"
    sections = (
        RESULTS,
        Section("Groups", {"Accuracy of each group": group_figure, "Table of groups": group_table}),
        Section("Plots", {**LEARNING, **CLASS_PLOTS}),
        CLASSES,
        *CLOSING,
    )

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        group_counts: Sequence[int],
        group_names: Sequence[str] | None = None,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
    ) -> None:
        super().__init__(model, loss, reweighter=reweighter, optimizer=optimizer, scheduler=scheduler, augment=augment)
        check_classes(loss, num_classes)
        self.group_counts = [int(n) for n in group_counts]
        self.group_names = [str(n) for n in (group_names or range(len(self.group_counts)))]
        self.val_groups = GroupAccuracy(len(self.group_counts))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Gathers hits and counts of each group."""
        self.val_groups.update(self.model(batch["input"]), batch["target"], batch["group"])

    def on_validation_epoch_end(self) -> None:
        """Logs the worst group's accuracy, and the mean over groups."""
        accuracy = self.val_groups.compute()
        present = accuracy[~accuracy.isnan()].float()
        self.log("val/worst_group_accuracy", present.min(), prog_bar=True)
        self.log("val/mean_group_accuracy", present.mean())
        self.val_groups.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target, group, logits."""
        return {name: batch[name] for name in ("index", "target", "group")} | {
            "logits": self.model(batch["input"]).float()
        }

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Worst, mean and training-weighted accuracy over groups, beside what classification has."""
        logits, target, group = (predictions[name] for name in ("logits", "target", "group"))
        plain = classification_metrics(logits, target, data.class_counts, class_names=data.splits.class_names)
        metric = GroupAccuracy(len(self.group_counts))
        metric.update(logits, target, group)
        accuracy, total = metric.compute(), metric.total.long().tolist()
        present = ~accuracy.isnan()
        share = torch.tensor(self.group_counts, dtype=torch.float64) * present
        adjusted = float((accuracy.nan_to_num() * share).sum() / share.sum()) if float(share.sum()) else None
        values = [None if not n else float(a) for a, n in zip(accuracy, total, strict=True)]
        scalars = {
            "worst_group_accuracy": float(accuracy[present].min()),
            "mean_group_accuracy": float(accuracy[present].mean()),
            "training_mix_accuracy": adjusted,
        }
        kept = ("accuracy", "balanced_accuracy", "expected_calibration_error", "nll")
        groups = {"name": self.group_names, "train_count": self.group_counts, "test_count": total, "accuracy": values}
        return Scores(
            {**scalars, **{name: plain.scalars[name] for name in kept}},
            {**plain.details, "groups": groups},
            plain.notes,
        )
