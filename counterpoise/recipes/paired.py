r"""Contrast between images and the rows of a table about them: each finds its partner among those of the batch.

A step: (1) the image is augmented, and a share of the row's columns takes other rows' values; (2) the model without its
last layer, and a small network for the table, give features; (3) a projection head of each gives embeddings z and u of
one width; (4) an objective of two modalities compares them. Any objective called as ``loss(z, u)`` does: CLIP, SigLIP,
ConVIRT, the image-tabular loss; those of two views too, which then also push apart within a modality.

It is judged by retrieval, the other modality's partner among all of a split, and where classes are known by what
neighbours and a linear probe make of the images' features.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021; with tables: Hager
et al., Best of Both Worlds: Multimodal Contrastive Learning with Tabular and Imaging Data, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoise._core import check_number
from counterpoise.contrastive import collapse_statistics
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
from counterpoise.recipes.heads import ProjectionHead, feature_extractor
from counterpoise.recipes.models import MLP
from counterpoise.recipes.module import Batch, Recipe
from counterpoise.recipes.retrieval import pair_ranks, retrieval_scores
from counterpoise.recipes.sections_paired import paired_sections, rank_curve, retrieved_pictures
from counterpoise.recipes.table_corruption import TableCorruption
from counterpoise.recipes.views import TransformViews, Views

DIRECTIONS = ("image_to_table", "table_to_image")
MOST_WATCHED = 1_000  # validation pairs whose similarities are compared each epoch


class Paired(Recipe):
    """Representation learning from pairs: ``Paired(SmallCNN(1, 10), CLIPLoss(), num_classes=10, train_table=rows)``.

    A batch has ``input={"image": .., "table": ..}``. The model's last linear layer is not used: what goes into it are
    the features of an image. Classes are read by the evaluation alone. predictions.npz holds features and embeddings of
    the test split, embeddings.npz the features of all three (``features``, ``targets``, ``val_features``, ..).

    Args:
        model: images to logits, with a linear layer as its last.
        loss: an objective of two modalities or of two views that needs no teacher, predictor or bank, called as
            ``loss(images, tables)`` with embeddings (N, dim).
        num_classes: C; 1 where classes are not known.
        train_table: (N, d) the training rows of the table, standardised.
        column_of: (d,) the column of the original table that each entry comes from; None = a column each.
        reweighter, scheduler: see :class:`~counterpoise.recipes.module.Recipe`.
        optimizer: parameters to an optimiser; None = AdamW, learning rate 2e-3: plain gradient steps suit no learned
            temperature or bias.
        views: of the training images, one each; None = the images as they are. What a table says of an image, its
            views should leave alone.
        corruption: share of the columns in [0, 1] that hold other rows' values in training.
        dim: width of the embeddings; hidden: of the layers of both projection heads; layers: of each.
        table_hidden: widths of the table's network.
        knn: neighbours that vote in the evaluation, >= 1.
        seed: >= 0, of the corruption.

    Raises:
        ValueError: parts that do not fit together; said before any training.
    """

    targets = "pairs"
    tasks = ("paired", "two_view")
    monitor = "val/recall_at_5"
    drop_last = True  # a last batch of another size would have fewer negatives

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        train_table: Tensor,
        column_of: Sequence[int] | None = None,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        views: nn.Module | None = None,
        corruption: float = 0.3,
        dim: int = 64,
        hidden: int = 256,
        layers: int = 2,
        table_hidden: Sequence[int] = (128, 128),
        knn: int = 20,
        seed: int = 0,
    ) -> None:
        encoder, width = feature_extractor(model)
        super().__init__(encoder, loss, reweighter=reweighter, optimizer=optimizer or adamw, scheduler=scheduler)
        needs = [need for need in _needs(loss) if need in ("momentum_encoder", "predictor", "bank")]
        if needs:
            raise ValueError(f"loss {type(loss).__name__} needs a {needs[0]}, expected an objective of two embeddings")
        if isinstance(views, (Views, TransformViews)) and views.num_views != 1:
            raise ValueError(f"views has num_views {views.num_views}, expected 1: the table is the other view")
        for name, value in (("dim", dim), ("knn", knn), ("table_hidden", min(table_hidden, default=0))):
            check_number(name, value, 1)
        check_number("corruption", corruption, 0, 1)
        self.num_classes, self.knn, self.views = num_classes, knn, views
        self.corrupt = TableCorruption(train_table, column_of, corruption, seed)
        self.table_model = MLP(train_table.shape[1], 1, table_hidden).encoder
        self.image_projection = ProjectionHead(width, dim, hidden, layers)
        self.table_projection = ProjectionHead(table_hidden[-1], dim, hidden, layers)
        self.sections = paired_sections(labelled=num_classes > 1)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Pairs to embeddings (N, dim) of images and of tables, not normalised."""
        return self.image_projection(self.model(x["image"])), self.table_projection(self.table_model(x["table"]))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """The batch's pairs, augmented."""
        image, table = batch["input"]["image"], batch["input"]["table"]
        if self.views is not None:
            image = self.views(image, batch["index"], self.current_epoch)[0]
        return {"image": image, "table": self.corrupt(table, batch["index"], self.current_epoch)}

    def losses(self, embeddings: Any, batch: Batch, **row_options: Any) -> Tensor:  # type: ignore[override]
        """The objective of two embeddings, as its own reduction says."""
        return self.loss(*embeddings, **{name: x for name, x in row_options.items() if x is not None})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective of a batch's pairs."""
        total = self.composed(self(self.inputs(batch)), batch)  # type: ignore[arg-type]
        self.log_training("loss", total, batch)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the embeddings."""
        image, table = self(batch["input"])
        self._seen.append((image.float(), table.float()))

    def on_validation_epoch_end(self) -> None:
        """Logs recalls, median ranks, the cosines of matching and of other pairs, and the signs of collapse."""
        image, table = (torch.cat(column) for column in zip(*self._seen, strict=True))
        self._seen = []
        for name, value in _retrieval(image, table).items():
            self.log(f"val/{name}", value, prog_bar=name == "recall_at_5")
        pairs = pair_similarities(image[:MOST_WATCHED], table[:MOST_WATCHED])
        if len(pairs[1]):
            for name, value in similarity_quantiles(*pairs).items():
                self.log(f"val/{name}", value)
            for name, sign in _collapse(image[:MOST_WATCHED], table[:MOST_WATCHED]).items():
                self.log(f"val/{name}", sign)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target, features of the image, and both embeddings."""
        features = self.model(batch["input"]["image"])
        table = self.table_projection(self.table_model(batch["input"]["table"]))
        return {
            "index": batch["index"],
            "target": batch["target"],
            "features": features.float(),
            "image": self.image_projection(features).float(),
            "table": table.float(),
        }

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Retrieval in both directions, and where classes are known what the images' features are worth."""
        scalars: dict[str, float | None] = dict(_retrieval(predictions["image"], predictions["table"]))
        if self.num_classes < 2:
            return Scores(scalars, {}, [])
        known, classes = self.train_features(data)
        queries, target = predictions["features"].cpu(), predictions["target"].cpu()
        band, rule = assign_bands(data.class_counts)
        per_class: dict[str, Any] = {"train_count": data.class_counts, "band": band}
        for name, scores in (
            ("knn", knn_scores(known, classes, queries, self.num_classes, k=self.knn)),
            ("linear", LinearProbe(known, classes, self.num_classes)(queries)),
        ):
            recall = recalls(scores, target)
            there = [r for r in recall if r is not None]
            per_class[f"{name}_recall"] = recall
            scalars[f"{name}_accuracy"] = float((scores.argmax(1) == target).double().mean())
            scalars[f"balanced_{name}_accuracy"] = sum(there) / len(there)
        return Scores(scalars, {"per_class": per_class, "bands": rule}, [])

    @torch.no_grad()
    def train_features(self, data: LabelledData) -> tuple[Tensor, Tensor]:
        """Features (N, width) and classes (N,) of the training images."""
        was_training = self.training
        self.eval()
        found = [
            (self.model(b["input"]["image"].to(self.device)).float().cpu(), b["target"])
            for b in data.in_order(data.splits.train)
        ]
        self.train(was_training)
        return torch.cat([f for f, _ in found]), torch.cat([t for _, t in found])

    def finish(self, folder: Path, data: LabelledData, predictions: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Writes embeddings.npz, and gives the report similarities, recalls and pictures."""
        features, targets = self.train_features(data)
        arrays: dict[str, Any] = {"features": features.numpy(), "targets": targets.numpy()}
        for split, found in predictions.items():
            arrays[f"{split}_features"] = found["features"].cpu().numpy()
            arrays[f"{split}_targets"] = found["target"].cpu().numpy()
        np.savez_compressed(folder / "embeddings.npz", **arrays)
        image, table = (predictions["test"][name].cpu() for name in ("image", "table"))
        some = pair_similarities(image[:MOST_WATCHED], table[:MOST_WATCHED])
        return {
            "similarities": similarity_histograms(*some),
            "recalls": {name: rank_curve(pair_ranks(*pair)) for name, pair in _both(image, table)},
            "retrieved": retrieved_pictures(data, image, table),
        }


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """What the configuration of the recipe names."""
    return torch.optim.AdamW(parameters, lr=2e-3)


def _needs(loss: nn.Module) -> tuple[str, ...]:
    return loss.spec.needs if hasattr(loss, "spec") else ()  # type: ignore[union-attr, return-value]


def _both(image: Tensor, table: Tensor) -> Any:
    """Queries and keys by direction."""
    return zip(DIRECTIONS, ((image, table), (table, image)), strict=True)


def _collapse(image: Tensor, table: Tensor) -> dict[str, Tensor]:
    """Spread, rank and uniformity of either modality, and the alignment of pairs."""
    rows = collapse_statistics(table)._asdict()
    return collapse_statistics(image, table)._asdict() | {f"table_{k}": x for k, x in rows.items() if k != "alignment"}


def _retrieval(image: Tensor, table: Tensor) -> dict[str, float]:
    there, back = (pair_ranks(*pair) for _, pair in _both(image, table))
    return retrieval_scores(there, back, DIRECTIONS)


__all__ = ["DIRECTIONS", "Paired"]
