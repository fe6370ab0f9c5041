"""The multi-task recipe: one encoder, a head a task, and a weighting that makes one loss of several.

The combined loss is no criterion: a learned weighting may take it below zero, and weights change its scale. Watched is
``val/score``, the mean over tasks of balanced accuracy or of max(R2, 0): in [0, 1], and the same whatever the units of
a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise._core import check_number
from counterpoise.losses import task_means
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Scores
from counterpoise.recipes.models import BatchAugment, with_heads
from counterpoise.recipes.module import Batch, Recipe
from counterpoise.recipes.report_sections import CLOSING, RESULTS, Section
from counterpoise.recipes.sections_tasks import loss_figure, scatter_figure, score_figure, task_table, weight_figure
from counterpoise.recipes.task_evaluation import TaskPredictions, evaluated, mean_score, targets_there, task_score
from counterpoise.recipes.tasks import errors_of, kinds_of, order_of, starting_noise, tasks_of


class MultiTask(Recipe):
    """Classifications and regressions from one input, some of whose targets may be missing.

    Args:
        model: inputs to a dict of outputs (N, size) by task. Of a model without
            :class:`~counterpoise.recipes.models.Heads` the last linear layer is replaced by a head a task.
        loss: a weighting, called as ``loss({task: (N,) losses}, mask=(N, K))``: ``UncertaintyWeighting``,
            ``EqualWeighting``, ``StaticWeighting`` or alike. Its parameters are trained.
        tasks: task name to ``{"kind": "classification" or "regression", "size": C or D}``, with the training targets'
            ``mean`` and ``std`` where known: heads of regressions start in these units.
        errors: "squared" or "absolute" of regressions, or by task; None = what the weighting's kinds stand for
            (gaussian, laplace), else squared.
        noise_from_targets: noise levels of an ``UncertaintyWeighting`` that were left at 0 start at their optimum for
            constant predictions, log of the target's variance. From 0 they take thousands of steps to badly scaled
            targets.
        weighting_lr_factor: > 0, times the learning rate for parameters of the weighting that have a group of their
            own, as noise levels have: they must follow losses that fall by orders of magnitude.
        reweighter: none composes with tasks; refused.
        optimizer, scheduler, augment: see :class:`~counterpoise.recipes.module.Recipe`.

    Raises:
        ValueError: parts that do not fit together; said before any training.

    Source: the setting of Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, 2018.
    """

    targets = "tasks"
    tasks = ("multi_task",)
    monitor = "val/score"
    sections = (
        RESULTS,
        Section("Tasks", {"Table of tasks": task_table, "Effective weights": weight_figure}),
        Section("Plots", {"Predicted and true": scatter_figure, "Learning curves": score_figure, "Loss": loss_figure}),
        *CLOSING,
    )

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        tasks: Mapping[str, Mapping[str, Any]],
        errors: str | Mapping[str, str] | None = None,
        noise_from_targets: bool = True,
        weighting_lr_factor: float = 1.0,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
    ) -> None:
        super().__init__(model, loss, reweighter=reweighter, optimizer=optimizer, scheduler=scheduler, augment=augment)
        check_number("weighting_lr_factor", weighting_lr_factor, 0, open_low=True)
        self.weighting_lr_factor = weighting_lr_factor
        self.named = tasks_of(tasks)
        self.errors = errors_of(self.named, loss, errors)
        self.order = order_of(self.named, loss)
        self.model = with_heads(model, self.named)
        if noise_from_targets:
            self._start_noise()
        self.val_predictions = TaskPredictions(self.named)
        self._make_optimizer = self._with_own_rate(self._make_optimizer)

    def _start_noise(self) -> None:
        s, kinds = getattr(self.loss, "log_variance", None), kinds_of(self.named, self.loss)
        if not isinstance(s, Tensor) or bool(s.detach().any()):
            return
        costs = {task.name: task.constant_cost(self.errors.get(task.name, "")) for task in self.named}
        with torch.no_grad():
            s.copy_(torch.tensor([starting_noise(kinds[name], costs[name]) for name in self.order]))

    def costs(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """(N,) losses by task in the weighting's order, and (N, K) bool: which of them count."""
        target = batch["target"]
        if not isinstance(target, Mapping) or not set(self.order) <= target.keys():
            raise ValueError(f"target is {type(target).__name__}, expected a dict with {', '.join(self.order)}")
        by_name = {task.name: task for task in self.named}
        costs = {n: by_name[n].costs(outputs[n], target[n], self.errors.get(n, "")) for n in self.order}
        counted = torch.stack([by_name[n].counted(target[n]) for n in self.order], 1)
        mask = batch.get("mask")
        return costs, counted if mask is None else counted & mask[:, None]

    def composed(self, logits: Any, batch: Batch) -> Tensor:
        """The weighted loss of the outputs ``logits``, a dict by task."""
        costs, counted = self.costs(logits, batch)
        weight = self.weight_of(batch)
        return self.loss(costs, mask=counted, **({} if weight is None else {"weight": weight}))

    def unweighted(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """(K,) mean losses of the tasks in the weighting's order, 0 for a task that the batch lacks."""
        costs, counted = self.costs(outputs, batch)
        return task_means(costs, names=self.order, weight=self.weight_of(batch), mask=counted)[0]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted loss of a batch; logs it, and the unweighted sum."""
        outputs = self.model(self.inputs(batch))
        total = self.composed(outputs, batch)
        self.log_training("loss", total, batch)
        with torch.no_grad():
            self.log_training("unweighted", self.unweighted(outputs, batch).sum(), batch)
        return total

    @property
    def effective_weights(self) -> dict[str, float]:
        """What each task's mean loss is multiplied by now; ones for a weighting without ``effective_weights``."""
        weights = getattr(self.loss, "effective_weights", None)
        values = [1.0] * len(self.order) if weights is None else weights.tolist()
        return dict(zip(self.order, values, strict=True))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Gathers outputs and targets."""
        self.val_predictions.update(self.model(batch["input"]), batch["target"])

    def on_validation_epoch_end(self) -> None:
        """Logs the score, each task's score and errors, and the effective weights."""
        metrics = self.val_predictions.compute()
        score = mean_score(metrics)
        self.log("val/score", torch.nan if score is None else score, prog_bar=True)
        for name, found in metrics.items():
            own = task_score(found)
            self.log(f"val/score_{name}", torch.nan if own is None else own)
            if found.get("rmse") is not None:
                self.log(f"val/rmse_{name}", found["rmse"])  # type: ignore[arg-type]
        for name, weight in self.effective_weights.items():
            self.log(f"weight/{name}", weight)
        self.val_predictions.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, and of each task its target_<name> and output_<name>."""
        outputs = self.model(batch["input"])
        found = {"index": batch["index"]}
        for task in self.named:
            found |= {f"target_{task.name}": batch["target"][task.name]}
            found |= {f"output_{task.name}": outputs[task.name].float()}
        return found

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Each task's metrics on a split, and the score over all of them."""
        outputs = {task.name: predictions[f"output_{task.name}"] for task in self.named}
        targets = {task.name: predictions[f"target_{task.name}"] for task in self.named}
        return evaluated(self.named, outputs, targets, targets_there(self.named, data.splits.train.targets))

    def _with_own_rate(self, make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], torch.optim.Optimizer]:
        """The same optimiser, with the weighting's parameters at their own learning rate."""

        def made(groups: Any) -> torch.optim.Optimizer:
            optimizer = make(groups)
            own = {id(p) for p in self.loss.parameters()}
            for group in optimizer.param_groups:
                if own and all(id(p) in own for p in group["params"]):
                    group["lr"] *= self.weighting_lr_factor
            if hasattr(self.loss, "check_in_optimizer"):
                self.loss.check_in_optimizer(optimizer)  # type: ignore[operator]
            return optimizer

        return made
