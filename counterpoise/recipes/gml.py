r"""Long-tailed classification with GML: a cosine classifier, and queries classified by queued keys of each class.

A step: (1) the query network sees two views of the batch, the class view for the logits, the contrast view for the
queries; (2) the key network follows it,

.. math:: \theta_k \leftarrow m\, \theta_k + (1 - m)\, \theta_q ,

(3) its features of the class view, from all ranks, go into a queue with slots of each class's own; (4) the whole queue
is projected anew, the batch's own keys included, and the objective taken.

Without a contrast view, and for inputs that are no images, one view serves for both. There is no teacher here, which
the released results have.

Source: Suh and Seo, Long-Tailed Recognition by Mutual Information Maximization between Latent Features and Ground-Truth
Labels, 2023, and the released code; which view the keys see is a choice of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise._core import check_number, in_second_pass
from counterpoise.contrastive import GMLLoss
from counterpoise.distributed import gather_rows
from counterpoise.losses import CosineLinear
from counterpoise.memory import ClassQueue, follow
from counterpoise.recipes.long_tailed import LongTailed
from counterpoise.recipes.models import BatchAugment
from counterpoise.recipes.module import Batch
from counterpoise.recipes.report_sections import CLASS_PLOTS, CLASSES, CLOSING, LEARNING, RESULTS, Section
from counterpoise.recipes.sections_gml import temperature_figure


class GML(LongTailed):
    """Classification on long-tailed data: ``GML(SmallCNN(1, 10, head="cosine"), GMLLoss(counts), num_classes=10)``.

    Predictions are softmaxes of the classifier's cosines over tau_s, without the prior. Queue and key network are in
    the checkpoint.

    Args:
        model: inputs to cosine logits (N, C), with a :class:`~counterpoise.losses.CosineLinear` as its head; what goes
            into the head are the features.
        loss: GML's objective, with the class counts.
        num_classes: C.
        queue_size: slots K >= C * keys_per_class of the queue.
        keys_per_class: slots that every class has beside its share, >= 1.
        dim: width of queries and keys, >= 1.
        momentum: m in [0, 1] of the key network. 0.999 is for runs of many thousand steps: a key network needs some
            1 / (1 - m) steps to leave its random start.
        augment: of the class view; contrast_augment: of the contrast view, with another seed. None = none; without
            contrast_augment there is one view.
        reweighter, optimizer, scheduler: see :class:`~counterpoise.recipes.module.Recipe`.
        many, few: see :class:`~counterpoise.recipes.LongTailed`.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    tasks = ("labelled_embeddings",)
    sections = (
        RESULTS,
        Section("Plots", {**CLASS_PLOTS, **LEARNING, "Temperature": temperature_figure}),
        CLASSES,
        *CLOSING,
    )

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        queue_size: int = 1024,
        keys_per_class: int = 2,
        dim: int = 32,
        momentum: float = 0.999,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
        contrast_augment: BatchAugment | None = None,
        many: int = 100,
        few: int = 20,
    ) -> None:
        if not isinstance(loss, GMLLoss):
            raise ValueError(f"loss is a {type(loss).__name__}, expected GMLLoss")
        head_name, head = _cosine_head(model)
        check_number("keys_per_class", keys_per_class, 1)
        check_number("queue_size", queue_size, num_classes * keys_per_class)
        check_number("dim", dim, 1)
        check_number("momentum", momentum, 0, 1)
        _check_views(augment, contrast_augment)
        super().__init__(
            model,
            loss,
            num_classes=num_classes,
            reweighter=reweighter,
            optimizer=optimizer,
            scheduler=scheduler,
            augment=augment,
            many=many,
            few=few,
        )
        width = head.weight.shape[1]
        self.momentum, self.contrast_augment = momentum, contrast_augment
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.key_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.key_model = copy.deepcopy(model).requires_grad_(False)
        _replace(self.key_model, head_name, nn.Identity())
        self.queue = ClassQueue(queue_size, width, loss.statistics.counts, per_class=keys_per_class)
        self._head_name = head_name

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to logits (N, C): cosines over tau_s."""
        return self.model(x) / self.loss.supervised_temperature  # type: ignore[operator]

    def views(self, batch: Batch) -> list[Tensor]:
        """The class view and, where there is one, the contrast view."""
        x = batch["input"]
        if x.ndim != 4:
            return [x]
        first = self.inputs(batch)
        if self.contrast_augment is None:
            return [first]
        return [first, self.contrast_augment(x, batch["index"], self.current_epoch)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """GML's loss of a batch, after its keys have been queued."""
        views = self.views(batch)
        n = len(views[0])
        features, cosines = self._features_and_cosines(torch.cat(views))
        keys = self._keys(views[0], batch)
        total = self.composed(cosines[:n], {**batch, "queries": self.projection(features[-n:]), "keys": keys})
        self.log_training("loss", total, batch)
        self.log_training("temperature", self.loss.log_temperature.exp(), batch)  # type: ignore[union-attr, operator]
        return total

    def losses(self, logits: Tensor, batch: Batch, **row_options: Any) -> Tensor:
        """The objective of cosines, queries and keys, as its own reduction says."""
        given = {name: x for name, x in row_options.items() if x is not None}
        return self.loss(
            batch["queries"],
            batch["target"],
            logits=logits,
            index=batch["index"],
            keys=batch["keys"],
            key_labels=self.queue.labels,
            key_index=self.queue.index,
            **given,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target, logits over tau_s, and group where known."""
        found = super().predict_step(batch, batch_idx)
        return found | {"logits": found["logits"] / self.loss.supervised_temperature}  # type: ignore[operator]

    def _features_and_cosines(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the head, and what comes out."""
        seen: list[Tensor] = []
        head = self.model.get_submodule(self._head_name)
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            cosines = self.model(x)
        finally:
            hook.remove()
        return seen[0], cosines

    @torch.no_grad()
    def _keys(self, x: Tensor, batch: Batch) -> Tensor:
        """Moves the key network, queues the batch of all ranks, projects the queue: (K, dim)."""
        if self.training and not in_second_pass():
            follow(self.key_model, self.model, self.momentum)
            follow(self.key_projection, self.projection, self.momentum)
        features, mask = self.key_model(x), batch.get("mask")
        rows = [gather_rows(z if mask is None else z[mask]) for z in (features, batch["target"], batch["index"])]
        order = rows[2].argsort(stable=True)  # the same queue however the batch is divided among ranks
        self.queue.enqueue(*(z[order] for z in rows))
        return self.key_projection(self.queue.features.to(next(self.key_projection.parameters()).dtype))


def _cosine_head(model: nn.Module) -> tuple[str, CosineLinear]:
    """The last cosine layer of a model, and its name."""
    heads = [(name, part) for name, part in model.named_modules() if isinstance(part, CosineLinear)]
    if not heads or not heads[-1][0]:
        raise ValueError(f'model {type(model).__name__} has no cosine head, expected one made with head="cosine"')
    return heads[-1]


def _check_views(augment: BatchAugment | None, contrast: BatchAugment | None) -> None:
    """Refuses two views with the same draws."""
    if augment is not None and contrast is not None and augment.seed == contrast.seed:
        raise ValueError(f"contrast_augment has seed {contrast.seed}, expected another than that of augment")


def _replace(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, part)
