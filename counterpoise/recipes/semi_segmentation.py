r"""Segmentation in which some images hold many labelled pixels and others almost none, with AdaWAC.

.. math:: L = \tfrac{1}{2}\, \mathrm{Dice} + \frac{1}{2N} \sum_i w_i\, \ell_i + (1 - w_i)\, R_i, \qquad
          R_i = \lambda\, \mathrm{MSE}(f(x_i^1), f(x_i^2))

l is the cross-entropy of an example, the mean over its pixels and over two augmented views; R compares the encoder's
features of the views, flips undone. AdaWAC raises w where l > R: dense, difficult images are trained on their labels,
sparse ones on consistency.

Source: Dong et al., Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization under
Concept Shift, 2023, algorithm 1 and the released code's Dice half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from counterpoise._core import check_number
from counterpoise.recipes.aligned_views import AlignedViews
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Scores
from counterpoise.recipes.module import Batch, Recipe, check_classes
from counterpoise.recipes.report_pictures import encoded, encoded_classes
from counterpoise.recipes.report_sections import CLOSING, LEARNING, RESULTS, Section
from counterpoise.recipes.sections_segmentation import class_table, picture_figure, weight_figure
from counterpoise.recipes.segmentation_evaluation import (
    PixelConfusion,
    foreground_share,
    overlap,
    segmentation_metrics,
)
from counterpoise.samplers import AdaWAC, adawac_loss

SHOWN = 4  # test images of each density in the report
KEPT = 2000  # weights of each density in metrics.json, evenly spaced over the training set


def soft_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    r"""One less the mean over classes of soft Dice, sums running over all pixels of the batch.

    .. math:: 1 - \frac{1}{C} \sum_c \frac{2 \sum p_c t_c + s}{\sum p_c^2 + \sum t_c^2 + s}

    Args:
        logits: (N, C, H, W); target: (N, H, W) class indices, negative ones do not count.
        smooth: s > 0; a class neither there nor predicted costs nothing.

    Source: Milletari et al., V-Net, 2016 (squares in the denominator).
    """
    counted = (target >= 0)[:, None]
    p = logits.float().softmax(1) * counted
    t = one_hot(target.clamp(min=0), logits.shape[1]).movedim(-1, 1).to(p.dtype) * counted
    sums = (0, *range(2, p.ndim))
    both = (p * t).sum(sums)
    return 1 - ((2 * both + smooth) / (p.square().sum(sums) + t.square().sum(sums) + smooth)).mean()


class SemiSegmentation(Recipe):
    """Segmentation judged by mean IoU over foreground classes, on dense and sparse images apart.

    Class 0 is the background. Without a reweighter every example has the same ``share``: 1 is plain training on
    labels, 1/2 a fixed half. With :class:`~counterpoise.samplers.AdaWAC` the shares are learned; its state is in the
    checkpoint.

    Args:
        model: inputs (N, ...) to logits (N, C, H, W), with ``encode`` (a list of features, the deepest last) and
            ``decode`` (that list to logits), as :class:`~counterpoise.recipes.segmentation_models.SmallUNet` has them.
        loss: multi-class with ``reduction``, one value a row.
        num_classes: C, background included.
        reweighter: an AdaWAC, or None.
        share: in [0, 1], of the supervised loss without a reweighter.
        coefficient: lambda >= 0 of the consistency.
        dice: in [0, 1], weight of the Dice loss; 1 - dice is that of the rest.
        sparse_below: images whose share of foreground is at most this are the sparse ones of evaluation and report.
        views: of training images; None = :class:`~counterpoise.recipes.aligned_views.AlignedViews` as it comes.
        optimizer, scheduler: see :class:`~counterpoise.recipes.module.Recipe`.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    targets = "pixels"
    monitor = "val/mean_iou"
    sections = (
        RESULTS,
        Section("Plots", {"Weights of sparse and dense examples": weight_figure, **LEARNING}),
        Section("Pictures", {"Test images": picture_figure}),
        Section("Classes", {"Table of classes": class_table}),
        *CLOSING,
    )

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        reweighter: nn.Module | None = None,
        share: float = 1.0,
        coefficient: float = 2.0,
        dice: float = 0.5,
        sparse_below: float = 0.12,
        views: AlignedViews | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, loss, reweighter=reweighter, optimizer=optimizer, scheduler=scheduler)
        check_classes(loss, num_classes)
        for name, value in (("share", share), ("dice", dice), ("sparse_below", sparse_below)):
            check_number(name, value, 0, 1)
        check_number("coefficient", coefficient, 0)
        if not (hasattr(model, "encode") and hasattr(model, "decode")):
            raise ValueError(f"model {type(model).__name__} has no encode and decode, expected both as in SmallUNet")
        if reweighter is not None and not isinstance(reweighter, AdaWAC):
            raise ValueError(f"reweighter is a {type(reweighter).__name__}, expected AdaWAC or none")
        if not hasattr(loss, "reduction"):
            raise ValueError(f'loss {type(loss).__name__} has no reduction="none", expected one with a value per row')
        self.loss.reduction = "none"  # type: ignore[assignment]
        self.share, self.coefficient, self.dice, self.sparse_below = share, coefficient, dice, sparse_below
        self.views = views or AlignedViews()
        self.val_pixels = PixelConfusion(num_classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Dice and cross-entropy of two views, and the agreement of their features."""
        if self.weight_of(batch) is not None or "mask" in batch:
            raise ValueError("the batch has weights or a mask, expected neither: semi_segmentation weighs by itself")
        target, n = batch["target"].long(), len(batch["index"])
        views, flips = self.views(batch["input"], batch["index"], self.current_epoch)
        seen = self.views.undo(target.repeat(2, 1, 1), flips)
        features = self.model.encode(views)  # type: ignore[operator]
        logits = self.model.decode(features)  # type: ignore[operator]
        supervised = self.loss(logits, seen).view(2, n).mean(0)
        first, second = self.views.undo(features[-1], flips).chunk(2)
        consistency = self.coefficient * (first - second).square().flatten(1).mean(1)
        weights = self.shares(supervised, consistency, batch["index"])
        dice = soft_dice_loss(logits, seen)
        total = self.dice * dice + (1 - self.dice) * adawac_loss(supervised, consistency, weights, sync=True)
        told = {"loss": total, "cross_entropy": supervised.mean(), "consistency": consistency.mean(), "dice_loss": dice}
        for name, value in {**told, "share": weights.mean()}.items():
            self.log_training(name, value, batch)
        return total

    def shares(self, supervised: Tensor, consistency: Tensor, index: Tensor) -> Tensor:
        """(N,) shares of the supervised losses."""
        if self.reweighter is None:
            return torch.full_like(supervised, self.share)
        return self.reweighter(supervised, consistency=consistency, index=index)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts pixels; the combined loss is not a criterion and is not logged."""
        self.val_pixels.update(self.model(batch["input"]).argmax(1), batch["target"])

    def on_validation_epoch_end(self) -> None:
        """Logs mean IoU and mean Dice over foreground classes."""
        for name, values in zip(("iou", "dice"), overlap(self.val_pixels.compute()), strict=True):
            known = values[1:][~values[1:].isnan()]
            self.log(f"val/mean_{name}", known.mean().float(), prog_bar=name == "iou")
        self.val_pixels.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, and (N, H, W) target and predicted classes."""
        predicted = self.model(batch["input"]).argmax(1)
        return {"index": batch["index"], "target": batch["target"].short(), "predicted": predicted.short()}

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """IoU and Dice of a split; pictures of the first sparse and dense test images, and the weights of training."""
        predicted, target, names = predictions["predicted"], predictions["target"], data.splits.class_names
        found = segmentation_metrics(predicted, target, class_names=names, sparse_below=self.sparse_below)
        found.details["per_class"]["train_pixels"] = data.class_counts
        sparse = foreground_share(target) <= self.sparse_below
        rows = [*torch.where(~sparse)[0][:SHOWN].tolist(), *torch.where(sparse)[0][:SHOWN].tolist()]
        pictures = [
            {
                "density": "sparse" if sparse[i] else "dense",
                "input": encoded(data.splits.test[i]["input"]),
                "truth": encoded_classes(target[i].clamp(min=0)),
                "prediction": encoded_classes(predicted[i]),
            }
            for i in rows
            if i < len(data.splits.test)
        ]
        weights = {} if self.reweighter is None else {"weights": self._weights(data)}
        return Scores(found.scalars, {**found.details, "pictures": pictures, **weights}, found.notes)

    def _weights(self, data: LabelledData) -> dict[str, Any]:
        """Those of dense and of sparse training examples."""
        weights = self.reweighter.logits.sigmoid().cpu()  # type: ignore[union-attr, operator]
        sparse = foreground_share(data.splits.train.targets) <= self.sparse_below
        parts = {"dense": weights[~sparse], "sparse": weights[sparse]}
        return {
            "values": {name: x[:: max(1, -(-len(x) // KEPT))].tolist() for name, x in parts.items()},
            "mean": {name: float(x.mean()) if len(x) else None for name, x in parts.items()},
        }
