r"""The adversarial recipe: a classifier trained, and judged, on inputs that are moved against it.

.. math:: \min_\theta \sum_i w_i\, \ell(x_i + \delta_i, y_i) + \frac{\beta}{N} \sum_i \ell(x_i, y_i), \qquad
          \delta_i = \arg\max_{|\delta| \le r} \mathrm{CE}(x_i + \delta, y_i)

Without a reweighter w is 1 / N: plain adversarial training. With KL-DRO weights and a momentum below one,

.. math:: w_i = \frac{e^{\ell_i / \lambda}}{N u}, \qquad
          u \leftarrow (1 - b)\, u + \frac{b}{N} \sum_i e^{\ell_i / \lambda}

it is doubly robust: against the attack, and over the examples, of which the easily attacked count most. An infinite
temperature lambda is plain adversarial training again, one close to zero trains on the worst example of a batch. With
``worst_group`` kappa the total has a third term, of what groups suffer instead of examples: kappa times the largest
mean loss of a group under attack.

Perturbations and weights are constants to the optimiser. The paper's total gradient also goes through the inner
solution by implicit differentiation; here is its first-order form.

Source: Sow et al., Doubly Robust Instance-Reweighted Adversarial Training, 2024 (first-order form: derived); Madry et
al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018, eq. 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from counterpoise._core import check_choice, check_number, uniform_by_index
from counterpoise.recipes.attacks import INNER, Attacked, projected_gradient_attack, strongest_attack
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Scores, classification_metrics
from counterpoise.recipes.group_robust import GroupAccuracy
from counterpoise.recipes.models import BatchAugment
from counterpoise.recipes.module import Batch, Recipe, check_classes
from counterpoise.recipes.report_sections import CLASS_PLOTS, CLASSES, CLOSING, LEARNING, RESULTS, Section
from counterpoise.recipes.robustness import input_bounds, pictures_of, robustness_metrics
from counterpoise.recipes.sections_robust import class_figure, curve_figure, picture_figure, robust_table
from counterpoise.samplers import TiltedERM, reweighted_loss

TRAINING, EVALUATION = 0, 1  # the draws of the one are not those of the other
OVERSHOOT = 2.5  # the steps together are this many radii long, so that the ball's edge is reached from everywhere


class Adversarial(Recipe):
    """Adversarial training with any multi-class loss and reweighter: ``Adversarial(model, loss, num_classes=10)``.

    The attack raises the cross-entropy, in evaluation mode; the gradient step is on the loss of the attacked inputs, in
    training mode, so batch statistics are those of attacked inputs (and of clean ones where beta is above zero).
    Draws are a function of (seed, epoch, index).

    The best epoch is that of the best mean over classes of the robust accuracy. The worst class alone, which is logged
    too, moves by 1/20 with one example where validation has 20 of a class; the plain mean over examples could be had by
    giving up the rare classes on data whose validation split is as imbalanced as the training.

    Args:
        model: inputs to logits (N, C); inputs are one floating tensor.
        loss: multi-class, called as ``loss(logits, target)``.
        num_classes: C.
        input_range: (smallest, largest) of the inputs, numbers or one a channel; the built-in image sets tell it. None
            = not known: nothing is clipped.
        radius: r >= 0 of the attack in the maximum norm, as a fraction of the range of the inputs (8/255 of images), or
            in their own units where the range is not known.
        steps: of the training attack; 0 trains on the inputs as they are.
        step_size: in units of ``radius``; None = 2.5 radius / steps.
        random_start: begin the training attack anywhere in the ball instead of at the input.
        inner: "projection" or "barrier", see :func:`~counterpoise.recipes.attacks.projected_gradient_attack`.
        barrier: weight of the barrier, > 0.
        beta: >= 0, weight of the mean loss of the inputs as they are.
        worst_group: >= 0, weight of the largest mean loss of a group (of a class, where batches have no groups) under
            attack; the means are over the whole batch of all ranks. Needs a reweighter.
        validation_steps: of the attack every epoch, one random start.
        test_steps, test_restarts: of the attack at the end, on validation and test, by projection.
        curve: multiples of the radius at which accuracy is measured at the end, beside 0 and 1.
        seed: of the random starts.
        reweighter, optimizer, scheduler, augment: see :class:`~counterpoise.recipes.module.Recipe`.

    Raises:
        ValueError: parts that do not fit together, or settings out of range; said before any training.
    """

    monitor = "val/robust_balanced_accuracy"
    sections = (
        RESULTS,
        Section(
            "Plots",
            {
                "Clean and robust accuracy of each class": class_figure,
                "Accuracy against radius": curve_figure,
                **LEARNING,
                **CLASS_PLOTS,
            },
        ),
        Section("Attacked examples", {"Attacked examples": picture_figure}),
        Section("Robustness", {"Table of robust accuracies": robust_table}),
        CLASSES,
        *CLOSING,
    )
    low: Tensor
    high: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        input_range: Sequence[Any] | None = None,
        radius: float = 0.1,
        steps: int = 7,
        step_size: float | None = None,
        random_start: bool = True,
        inner: str = "projection",
        barrier: float = 1e-6,
        beta: float = 0.0,
        worst_group: float = 0.0,
        validation_steps: int = 5,
        test_steps: int = 20,
        test_restarts: int = 2,
        curve: Sequence[float] = (0.5, 1.5, 2.0),
        seed: int = 0,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
    ) -> None:
        super().__init__(model, loss, reweighter=reweighter, optimizer=optimizer, scheduler=scheduler, augment=augment)
        check_classes(loss, num_classes)
        check_number("radius", radius, 0)
        check_number("steps", steps, 0)
        if step_size is not None:
            check_number("step_size", step_size, 0, open_low=True)
        check_choice("inner", inner, INNER)
        check_number("barrier", barrier, 0, open_low=True)
        check_number("beta", beta, 0)
        check_number("worst_group", worst_group, 0)
        if worst_group and reweighter is None:
            raise ValueError("worst_group needs a reweighter: KLDRO(math.inf) weights all examples alike")
        for name, value in (("validation_steps", validation_steps), ("test_steps", test_steps)):
            check_number(name, value, 1)
        check_number("test_restarts", test_restarts, 1)
        for multiple in curve:
            check_number("curve", multiple, 0, open_low=True)
        self.radius, self.steps, self.step_size, self.random_start = radius, steps, step_size, random_start
        self.inner, self.barrier, self.beta, self.seed, self.worst_group = inner, barrier, beta, seed, worst_group
        self.validation_steps, self.test_steps, self.test_restarts = validation_steps, test_steps, test_restarts
        self.curve = sorted({*map(float, curve), 1.0})
        self.range_known = input_range is not None
        low, high = input_bounds(input_range)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.val_robust = GroupAccuracy(num_classes)
        self.val_clean = MulticlassAccuracy(num_classes, average="macro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The composed loss of the attacked batch, that of its worst group, and that of the batch as it is."""
        x = self.inputs(batch)
        logits = self.model(self.attacked(x, batch))
        total = self.composed(logits, batch)
        if self.worst_group:
            worst = self._worst_group_loss(logits, batch)
            self.log_training("worst_group_loss", worst, batch)
            total = total + self.worst_group * worst
        if self.beta:
            clean = self._mean_loss(self.model(x), batch)
            self.log_training("clean_loss", clean, batch)
            total = total + self.beta * clean
        self.log_training("loss", total, batch)
        return total

    def attacked(self, x: Tensor, batch: Batch) -> Tensor:
        """The inputs (N, ...) of a training batch, attacked."""
        if self.steps == 0 or self.radius == 0:
            return x
        draws = self._draws(x, batch, 1, TRAINING, self.current_epoch)[0] if self.random_start else None
        options = self._attack(x, self.steps, step_size=self.step_size)
        options |= {"inner": self.inner, "barrier": self.barrier}
        return projected_gradient_attack(self.model, x, batch["target"], draws=draws, **options)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Gathers accuracies under a small attack and without one."""
        x, target = batch["input"], batch["target"]
        found = Attacked(x, self.model(x))
        self.val_clean.update(found.logits, target)
        self.val_robust.update(self._strongest(found, batch, self.validation_steps, 1).logits, target, target)

    def on_validation_epoch_end(self) -> None:
        """Logs the mean and the smallest robust accuracy over classes, and the mean of the clean one."""
        robust = self.val_robust.compute()
        robust = robust[~robust.isnan()].float()
        self.log("val/robust_balanced_accuracy", robust.mean(), prog_bar=True)
        self.log("val/clean_balanced_accuracy", self.val_clean.compute())
        self.log("val/worst_class_robust_accuracy", robust.min())
        self.val_robust.reset()
        self.val_clean.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target, logits, robust_logits, hits at every radius, a few pictures."""
        x, target = batch["input"], batch["target"]
        found = robust = Attacked(x, self.model(x).float())
        hits, logits = [found.logits.argmax(1) == target], found.logits
        for multiple in self.curve:
            starts = self.test_restarts if multiple == 1 else 1
            found = self._strongest(found, batch, self.test_steps, starts, multiple)
            hits.append(found.logits.argmax(1) == target)
            robust = found if multiple == 1 else robust
        kept: Batch = {name: batch[name] for name in ("index", "target", "group") if name in batch}
        pictures, rows = pictures_of(x, robust.inputs, target, self.low, self.high, none=batch_idx > 0)
        shown = {"pictures": pictures, "picture_index": batch["index"][rows]}
        return kept | {"logits": logits, "robust_logits": robust.logits, "hits": torch.stack(hits, 1)} | shown

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Clean and robust accuracy: over examples, over classes, of the worst classes, and at every radius."""
        plain = classification_metrics(
            predictions["logits"], predictions["target"], data.class_counts, class_names=data.splits.class_names
        )
        radii = [0.0, *(self.radius * multiple for multiple in self.curve)]
        hits = predictions["hits"].cpu()
        robust, details = robustness_metrics(hits, predictions["target"].cpu(), data.num_classes, radii, self.radius)
        kept = ("accuracy", "balanced_accuracy", "expected_calibration_error", "nll")
        told = {"attack": f"{self.test_steps} steps, {self.test_restarts} random starts", "radius": self.radius}
        unit = "as a share of the inputs' range" if self.range_known else "in units of the inputs"
        return Scores(
            {**robust, **{name: plain.scalars[name] for name in kept}},
            {**plain.details, "robustness": {**told, "unit": unit, **details}},
            plain.notes,
        )

    def _mean_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss without the reweighter."""
        weight, mask = self.weight_of(batch), batch.get("mask")
        if self.reweighter is None:
            return self.losses(logits, batch, weight=weight, mask=mask)
        return reweighted_loss(self.losses(logits, batch, mask=mask), weight=weight, mask=mask)

    def _worst_group_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The largest mean loss of a group."""
        weight, mask, groups = self.weight_of(batch), batch.get("mask"), batch.get("group", batch["target"])
        worst = TiltedERM(0.0, group_tilt=math.inf)
        return reweighted_loss(self.losses(logits, batch, mask=mask), worst, weight=weight, mask=mask, group=groups)

    def _strongest(self, found: Attacked, batch: Batch, steps: int, starts: int, multiple: float = 1.0) -> Attacked:
        """``found``, with what it still gets right attacked from random starts."""
        x = batch["input"]
        draws = self._draws(x, batch, starts, EVALUATION, 0)
        return strongest_attack(self.model, found, x, batch["target"], draws, **self._attack(x, steps, multiple))

    def _attack(self, x: Tensor, steps: int, multiple: float = 1.0, step_size: float | None = None) -> dict[str, Any]:
        """Radius, step and range in units of the inputs."""
        low, high = (bound.reshape(-1, *(1,) * (x.ndim - 2)) for bound in (self.low, self.high))
        radius = multiple * self.radius * ((high - low) if self.range_known else torch.ones_like(low))
        step = radius * (OVERSHOOT / steps if step_size is None else step_size)
        return {"radius": radius, "step_size": step, "steps": steps, "low": low, "high": high}

    def _draws(self, x: Tensor, batch: Batch, starts: int, stage: int, epoch: int) -> list[Tensor]:
        """Points of the unit cube for each start, of x's shape."""
        entries = x[0].numel()
        u = uniform_by_index(batch["index"], starts * entries, self.seed, stage, epoch).to(x.device, x.dtype)
        return [part.reshape(x.shape) for part in u.split(entries, dim=1)]
