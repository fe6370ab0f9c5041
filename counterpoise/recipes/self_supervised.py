r"""Representation learning on views: any two-view objective, judged by nearest neighbours and a linear probe.

A step: (1) V views of each example are drawn; (2) the encoder and a projection head give embeddings z (V, N, d), and
for objectives that ask for it a prediction head stands behind them; (3) for objectives that compare with a teacher, an
encoder that follows the online one, :math:`\theta_k \leftarrow m\,\theta_k + (1 - m)\,\theta_q`, gives the keys of the
same views; (4) the objective; (5) behind the optimiser's step the teacher follows, and the keys of the last view, from
all ranks, go into the bank.

What an objective needs ("momentum_encoder", "predictor", "bank") it says in its Spec; here it is supplied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoise._core import check_choice, check_number
from counterpoise.contrastive import SwAVLoss, collapse_statistics
from counterpoise.distributed import gather_rows
from counterpoise.memory import MemoryBank, MomentumEncoder, momentum_schedule
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.embedding_evaluation import (
    LinearProbe,
    knn_scores,
    pair_similarities,
    recalls,
    similarity_histograms,
    similarity_quantiles,
)
from counterpoise.recipes.evaluation import Scores, assign_bands
from counterpoise.recipes.heads import PredictionHead, ProjectionHead, feature_extractor
from counterpoise.recipes.module import Batch, Recipe
from counterpoise.recipes.sections_embeddings import embedding_sections, neighbour_pictures
from counterpoise.recipes.views import TransformViews, Views

MOST_WATCHED = 1_000  # validation examples of which pairs are compared each epoch
BANK = 4_096  # keys, where an objective needs a bank and no size is given


class SelfSupervised(Recipe):
    """Representation learning: ``SelfSupervised(SmallCNN(1, 10), NTXentLoss(), num_classes=10)``.

    The model's last linear layer is not used: what goes into it are the features. Labels are read for evaluation and
    for the choice of the epoch alone. predictions.npz holds the features of the test split, embeddings.npz those of
    the training split (``features``, ``targets``) and of the others (``val_features``, ..).

    Args:
        model: inputs to logits, with a linear layer as its last.
        loss: a two-view objective: called with embeddings (V, N, d); with those of the teacher besides where its Spec
            needs "momentum_encoder"; with queries (N, d), keys (N, d) and a bank where there is a bank and it does not.
        num_classes: C.
        views: of the training examples; None = :class:`~counterpoise.recipes.views.Views` as it comes.
        key_views: of what the teacher sees; None = the same views.
        dim: width of the embeddings; hidden: of the layers of both heads; layers: of the projection head.
        bank_size: keys; None = 4,096 where the objective needs a bank, else none.
        momentum: m in [0, 1] of the teacher; schedule: "constant", or "cosine" from m to 1 over the run.
        knn: neighbours that vote, >= 1.
        knn_examples: training examples, the first so many, that they are taken from while training.
        optimizer, scheduler: see :class:`~counterpoise.recipes.module.Recipe`; a reweighter is refused.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    tasks = ("two_view", "teacher_views", "queue_views")
    monitor = "val/knn_balanced_accuracy"
    sections = embedding_sections
    labelled = False
    drop_last = True  # a last batch of another size would have other statistics and fewer negatives

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        views: nn.Module | None = None,
        key_views: nn.Module | None = None,
        dim: int = 64,
        hidden: int = 256,
        layers: int = 2,
        bank_size: int | None = None,
        momentum: float = 0.99,
        schedule: str = "constant",
        knn: int = 20,
        knn_examples: int = 10_000,
    ) -> None:
        if reweighter is not None:
            raise ValueError(f"reweighter is a {type(reweighter).__name__}, expected none: views are not examples")
        encoder, width = feature_extractor(model)
        super().__init__(encoder, loss, optimizer=optimizer, scheduler=scheduler)
        needs: tuple[str, ...] = getattr(getattr(loss, "spec", None), "needs", ())
        for name, value in (("dim", dim), ("knn", knn), ("knn_examples", knn_examples)):
            check_number(name, value, 1)
        check_number("momentum", momentum, 0, 1)
        check_choice("schedule", schedule, ("constant", "cosine"))
        size = (BANK if "bank" in needs else 0) if bank_size is None else bank_size
        check_number("bank_size", size, 1 if "bank" in needs else 0)
        self.num_classes, self.knn, self.knn_examples = num_classes, knn, knn_examples
        self.momentum, self.schedule = momentum, schedule
        self.views, self.key_views = views or Views(), key_views
        self.projection = ProjectionHead(width, dim, hidden, layers)
        self.prediction = PredictionHead(dim, hidden) if "predictor" in needs else None
        self.against_teacher = "momentum_encoder" in needs
        has_teacher = self.against_teacher or (size > 0 and not isinstance(loss, SwAVLoss))  # SwAV queues its own
        self.teacher = MomentumEncoder(nn.Sequential(encoder, self.projection)) if has_teacher else None
        self.bank = MemoryBank(size, dim) if size else None
        self._check_views()
        self._keys: Tensor | None = None
        self._known: tuple[Tensor, Tensor, LinearProbe] | None = None
        self._seen: list[tuple[Tensor, ...]] = []
        self._pairs: list[tuple[Tensor, ...]] = []

    def _check_views(self) -> None:
        fewest = 1 if self.labelled else 2
        for name, views in (("views", self.views), ("key_views", self.key_views)):
            if isinstance(views, (Views, TransformViews)) and views.num_views < fewest:
                raise ValueError(f"{name} has num_views {views.num_views}, expected at least {fewest}")
        if self.teacher is None and self.key_views is not None:
            raise ValueError(f"key_views is given, and {type(self.loss).__name__} has no teacher: expected none")

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to features (N, width)."""
        return self.model(x)

    def on_train_start(self) -> None:
        """Checks the sampler, and forgets what an earlier fit was judged by."""
        super().on_train_start()
        self._known = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective of the views of a batch."""
        views = self.views(batch["input"], batch["index"], self.current_epoch)
        v, n = views.shape[:2]
        z = self.projection(self.model(views.flatten(0, 1)))
        queries = z if self.prediction is None else self.prediction(z)
        other = None if self.prediction is None else z.detach().view(v, n, -1)
        if self.teacher is not None:
            seen = (
                views if self.key_views is None else self.key_views(batch["input"], batch["index"], self.current_epoch)
            )
            with torch.no_grad():
                other = self.teacher(seen.flatten(0, 1)).view(len(seen), n, -1)
        self._keys = z.detach().view(v, n, -1)[-1] if other is None else other[-1]
        total = self.objective(queries.view(v, n, -1), other, batch)
        self.log_training("loss", total, batch)
        return total

    def objective(self, z: Tensor, other: Tensor | None, batch: Batch) -> Tensor:
        """The loss of embeddings (V, N, d) and what they are compared with, in the form that it takes."""
        given = {
            name: x for name, x in (("weight", self.weight_of(batch)), ("mask", batch.get("mask"))) if x is not None
        }
        if self.labelled:
            given["labels"] = batch["target"]
        if self.bank is not None:
            given["bank"] = self.bank
        if self.bank is not None and not self.against_teacher and other is not None:
            return self.loss(z[0], other[1], **given)
        return self.loss(z, **given) if other is None else self.loss(z, other, **given)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Moves the teacher and fills the bank, behind the optimiser's step."""
        if self.teacher is not None:
            m = self.momentum
            if self.schedule == "cosine":
                m = momentum_schedule(self.global_step / max(self.trainer.estimated_stepping_batches, 1), start=m)
            self.teacher.update(nn.Sequential(self.model, self.projection), m)
        if self.bank is not None and self._keys is not None:
            rows = [gather_rows(x) for x in (self._keys, batch["target"], batch["index"])]
            order = rows[2].argsort(stable=True)  # the same bank however the batch is divided among ranks
            self.bank.enqueue(rows[0][order], rows[1][order] if self.labelled else None)
        self._keys = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps features, and the embeddings of two views of the first examples, drawn as in epoch 0."""
        self._seen.append((self.model(batch["input"]).float().cpu(), batch["target"].cpu()))
        wanted = MOST_WATCHED - sum(len(first) for first, _ in self._pairs)
        if wanted > 1 and len(batch["index"]) > 1:
            views = self.views(batch["input"][:wanted], batch["index"][:wanted], 0)
            self._pairs.append(tuple(self.projection(self.model(view)).float() for view in (views[0], views[-1])))

    def on_validation_epoch_end(self) -> None:
        """Logs the accuracy of the nearest neighbours, the signs of collapse, and how pairs compare."""
        features, target = (torch.cat(column) for column in zip(*self._seen, strict=True))
        pairs = [torch.cat(column) for column in zip(*self._pairs, strict=True)]
        self._seen, self._pairs = [], []
        known, classes = self.train_features(self.trainer.datamodule, most=self.knn_examples)  # type: ignore[attr-defined]
        found = recalls(knn_scores(known, classes, features, self.num_classes, k=self.knn), target)
        there = [r for r in found if r is not None]
        self.log("val/knn_balanced_accuracy", sum(there) / max(len(there), 1), prog_bar=True)
        if pairs:
            for name, value in collapse_statistics(*pairs)._asdict().items():
                self.log(f"val/{name}", value)
            for name, quantile in similarity_quantiles(*pair_similarities(*pairs)).items():
                self.log(f"val/{name}", quantile)

    @torch.no_grad()
    def train_features(self, data: LabelledData, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Features (N, width) and classes (N,) of the training examples, or of the first so many."""
        train: Any = data.splits.train
        count = len(train) if most is None else min(most, len(train))
        subset = train if count == len(train) else torch.utils.data.Subset(train, range(count))
        was_training = self.training
        self.eval()
        batches = [(self.model(b["input"].to(self.device)).float().cpu(), b["target"]) for b in data.in_order(subset)]
        self.train(was_training)
        return torch.cat([f for f, _ in batches]), torch.cat([t for _, t in batches])

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target, features, and group where known."""
        kept: Batch = {name: batch[name] for name in ("index", "target", "group") if name in batch}
        return kept | {"features": self.model(batch["input"]).float()}

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Nearest neighbours and a linear probe on the features of the training split, for a split."""
        if self._known is None:  # the weights of the best epoch are there by now, for every split
            known, classes = self.train_features(data)
            self._known = known, classes, LinearProbe(known, classes, self.num_classes)
        known, classes, probe = self._known
        queries, target = predictions["features"].cpu(), predictions["target"].cpu()
        band, rule = assign_bands(data.class_counts)
        scalars: dict[str, float | None] = {}
        per_class: dict[str, Any] = {"train_count": data.class_counts, "band": band}
        for name, scores in (
            ("knn", knn_scores(known, classes, queries, self.num_classes, k=self.knn)),
            ("linear", probe(queries)),
        ):
            recall = recalls(scores, target)
            per_class[f"{name}_recall"] = recall
            scalars[f"{name}_accuracy"] = float((scores.argmax(1) == target).double().mean())
            for kind in ("balanced", "head", "medium", "tail"):
                there = [
                    r for r, b in zip(recall, band, strict=True) if r is not None and (kind == "balanced" or b == kind)
                ]
                scalars[f"{kind}_{name}_accuracy"] = sum(there) / len(there) if there else None
        if len(queries) > 1:
            found = collapse_statistics(queries[:MOST_WATCHED])
            scalars |= {"std": float(found.std), "effective_rank": float(found.effective_rank)}
            scalars["uniformity"] = float(found.uniformity)
        return Scores(
            scalars, {"per_class": per_class, "bands": rule}, [rule["note"]] if rule["rule"] == "terciles" else []
        )

    def finish(self, folder: Path, data: LabelledData, predictions: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Writes embeddings.npz, and gives the report pairs and pictures of neighbours."""
        known, classes = self.train_features(data) if self._known is None else self._known[:2]
        arrays: dict[str, Any] = {"features": known, "targets": classes}
        for split, found in predictions.items():
            arrays |= {f"{split}_features": found["features"], f"{split}_targets": found["target"]}
        np.savez_compressed(folder / "embeddings.npz", **{name: x.cpu().numpy() for name, x in arrays.items()})  # type: ignore[arg-type]
        return {
            "similarities": similarity_histograms(*self._test_pairs(data)),
            "neighbours": neighbour_pictures(data, known, classes, predictions["test"]["features"].cpu()),
        }

    @torch.no_grad()
    def _test_pairs(self, data: LabelledData) -> tuple[Tensor, Tensor]:
        """Cosines of matching and of other pairs of views of the first test examples."""
        test: Any = torch.utils.data.Subset(data.splits.test, range(min(MOST_WATCHED, len(data.splits.test))))  # type: ignore[arg-type]
        self.eval()
        found = []
        for batch in data.in_order(test):
            views = self.views(batch["input"].to(self.device), batch["index"].to(self.device), 0)
            found.append([self.projection(self.model(view)).cpu() for view in (views[0], views[-1])])
        first, second = (torch.cat(x) for x in zip(*found, strict=True))
        return pair_similarities(first, second)
