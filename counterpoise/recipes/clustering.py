r"""Clustering with pseudo-labels by optimal transport: clusters of unequal size, found without any class.

A step: (1) two views of each example are drawn; (2) the encoder and a linear map that starts as the identity give
embeddings, and heads the cosines of these with a vector a cluster, times 10; (3) each head's logits, with a bank of
those before, are given labels: P2OT's hold the surest share of the examples, which grows over the run; (4) each view
learns the labels of the other.

Classes are read for evaluation, never for training: neither for the choice of the head, which is that of the lowest
loss an epoch, divided by the mass of its labels, nor of the epoch. That is the one whose two views of the validation
examples tell most of each other, as a share of what K clusters can tell:

.. math:: \frac{1}{\log K} \sum_{kl} P_{kl} \log \frac{P_{kl}}{P_{k \cdot}\, P_{\cdot l}}, \qquad
          P = \frac{1}{2 N} \sum_i p^{(1)}_i p^{(2) \top}_i + p^{(2)}_i p^{(1) \top}_i

A loss over its mass compares heads of one epoch, but not epochs: it is low where only what is sure has labels, and
where clusters have merged.

Source: Zhang, Ren, He, P2OT: Progressive Partial Optimal Transport for Deep Imbalanced Clustering, 2024, section 4; the
shared information: Ji et al., Invariant Information Clustering, 2019, eq. 3, as a choice of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoise._core import check_choice, check_number, sum_over_ranks
from counterpoise.losses import CosineLinear
from counterpoise.ot import PseudoLabels, knn_affinity
from counterpoise.recipes.clustering_evaluation import clustering_metrics, label_free_metrics, shared_information
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.encoders import identity_linear, load_encoder
from counterpoise.recipes.evaluation import Scores
from counterpoise.recipes.heads import feature_extractor
from counterpoise.recipes.module import Batch, Recipe, uses_prior
from counterpoise.recipes.sections_clusters import cluster_pictures, cluster_sections
from counterpoise.recipes.views import Views

LABELS = ("p2ot", "sp2ot", "semi_relaxed", "uniform", "k_means")
BANK = 5_120  # rows, where no size is given and the data are as many


class Clustering(Recipe):
    """Clusters of unequal size: ``Clustering(MLP(64, 10, hidden=[]), CrossEntropyLoss(), num_classes=10, ...)``.

    The model's last linear layer is not used. clusters.npz holds the clusters of the training split (``index``,
    ``cluster``, ``confidence``), predictions.npz the embeddings and logits of the test split.

    Args:
        model: inputs to logits, with a linear layer as its last.
        loss: multi-class, without class counts, called with soft targets whose rows sum to at most one.
        num_classes: C, of the evaluation.
        num_examples: of the training split.
        labelled: whether classes are known; without them only what needs none is reported.
        num_clusters: K >= 1; None = C, to be given without classes.
        labels: "p2ot", "sp2ot" (which also pays for agreement between neighbours in the features from before training),
            "semi_relaxed" (all mass from the start), "uniform" (clusters of equal size), or "k_means", a baseline that
            trains nothing.
        heads: >= 1, trained beside each other; the one of the lowest loss counts.
        init: of the heads: "random" as published, or "k_means": the centres of the features from before training.
        adapt: put a linear map behind the encoder, the identity at the start.
        train_encoder: train it, or leave it as it is.
        encoder_checkpoint: of a run of another recipe with the same model, whose encoder is taken; None = none.
        views: of the training examples, two; None = :class:`~counterpoise.recipes.views.Views` as it comes.
        logit_scale: what cosines are multiplied by, > 0.
        bank_size: rows of logits; None = as many as training examples, at most 5,120.
        bank_start, mass_start, mass_end, schedule, epsilon, penalty, semantic_weight, decay, psd_shift: see
            :class:`~counterpoise.ot.PseudoLabels`.
        num_neighbors, bandwidth: of "sp2ot", see :func:`~counterpoise.ot.knn_affinity`.
        seed: of k-means.
        optimizer, scheduler: see :class:`~counterpoise.recipes.module.Recipe`; a reweighter is refused.

    Raises:
        ValueError, TypeError: parts that do not fit together; said before any training.
    """

    monitor = "val/shared_information"
    drop_last = True  # a small last batch would move the mass of the labels as much as a full one

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        num_examples: int,
        labelled: bool = True,
        num_clusters: int | None = None,
        labels: str = "p2ot",
        heads: int = 1,
        init: str = "random",
        adapt: bool = True,
        train_encoder: bool = True,
        encoder_checkpoint: str | None = None,
        views: nn.Module | None = None,
        logit_scale: float = 10.0,
        bank_size: int | None = None,
        bank_start: int = 0,
        mass_start: float = 0.1,
        mass_end: float = 1.0,
        schedule: str = "sigmoid",
        epsilon: float = 0.1,
        penalty: float = 1.0,
        semantic_weight: float = 0.195,
        decay: bool = True,
        psd_shift: bool = True,
        num_neighbors: int = 20,
        bandwidth: float = 2.0,
        seed: int = 0,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        _check_parts(loss, reweighter, labelled, num_clusters)
        encoder, width = feature_extractor(model)
        super().__init__(encoder, loss, optimizer=optimizer, scheduler=scheduler)
        check_choice("labels", labels, LABELS)
        check_choice("init", init, ("random", "k_means"))
        check_number("heads", heads, 1)
        check_number("logit_scale", logit_scale, 0, open_low=True)
        self.num_clusters = num_classes if num_clusters is None else num_clusters
        check_number("num_clusters", self.num_clusters, 1, num_examples)
        self.num_classes, self.labelled, self.kind, self.seed = num_classes, labelled, labels, seed
        self.init = init
        self.train_encoder, self.logit_scale = train_encoder, logit_scale
        self.num_neighbors, self.bandwidth = num_neighbors, bandwidth
        self.views = views or Views()
        if encoder_checkpoint is not None:
            load_encoder(self.model, encoder_checkpoint)
        self.model.requires_grad_(train_encoder)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.tensor(1.0))
        self.adapter = identity_linear(width) if adapt and labels != "k_means" else nn.Identity()
        one = nn.Linear if labels == "k_means" else CosineLinear
        self.heads: Any = nn.ModuleList([one(width, self.num_clusters) for _ in range(heads)])
        self.engines: Any = nn.ModuleList()
        if labels != "k_means":
            self.engines.extend(
                PseudoLabels(
                    self.num_clusters,
                    labels,
                    bank_size=min(BANK, num_examples) if bank_size is None else bank_size,
                    bank_start=bank_start,
                    mass_start=mass_start,
                    mass_end=mass_end,
                    schedule=schedule,
                    epsilon=epsilon,
                    penalty=penalty,
                    semantic_weight=semantic_weight,
                    decay=decay,
                    psd_shift=psd_shift,
                )
                for _ in range(heads)
            )
        self.register_buffer("best_head", torch.tensor(0))
        self.register_buffer("head_loss", torch.zeros(heads, dtype=torch.float64))  # of the epoch so far, over the mass
        self.register_buffer("head_mass", torch.zeros(heads, self.num_clusters, dtype=torch.float64))
        self.register_buffer("head_steps", torch.tensor(0))
        self.mass_by_epoch: list[list[float]] = []
        self._initial: nn.Module | None = None
        self._resumed = False
        self._seen: list[tuple[Tensor, ...]] = []

    mean: Tensor
    scale: Tensor
    best_head: Tensor
    head_loss: Tensor
    head_mass: Tensor
    head_steps: Tensor

    @property
    def sections(self) -> Any:  # type: ignore[override]
        """What the report shows: less of classes where none are known."""
        return cluster_sections(self.labelled)

    # From inputs to logits

    def embed(self, x: Tensor) -> Tensor:
        """Inputs to embeddings (N, d): features, centred and scaled as those of the untrained encoder, and adapted."""
        return self.adapter((self.model(x).flatten(1) - self.mean) / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to logits (N, K) of the best head."""
        return self.logits(self.embed(x), int(self.best_head))

    def logits(self, z: Tensor, head: int) -> Tensor:
        """Embeddings (N, d) to logits (N, K) of one head; cosines, or for k-means what a distance asks for."""
        return self.heads[head](z) * (1.0 if self.kind == "k_means" else self.logit_scale)

    # What is known before training

    def setup(self, stage: str) -> None:
        """Keeps the encoder as it is before training, and before a resumed run's weights come in."""
        if stage == "fit":
            self._initial = copy.deepcopy(self.model)

    def on_fit_start(self) -> None:
        """Centre and scale of the features, and what is made of them: neighbours for SP2OT, centres for k-means."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        features = self._initial_features(data)
        self.mean.copy_(features.mean(0))
        spread = (features - self.mean).square().mean().sqrt()
        self.scale.copy_(torch.where(spread > 0, spread, 1))
        features = (features - self.mean) / self.scale
        if self.kind == "sp2ot":
            affinity = knn_affinity(features, self.num_neighbors, self.bandwidth)
            for engine in self.engines:
                engine.set_affinity(affinity)
        if "k_means" in (self.kind, self.init) and not self._resumed:
            self._set_centres(features)
        self._resumed = False

    @torch.no_grad()
    def _initial_features(self, data: LabelledData) -> Tensor:
        """(N, d) of the training examples in order, by the encoder from before training."""
        encoder, self._initial = (self._initial or self.model).to(self.device).eval(), None
        batches = data.in_order(data.splits.train)
        return torch.cat([encoder(batch["input"].to(self.device)).flatten(1).float() for batch in batches])

    @torch.no_grad()
    def _set_centres(self, features: Tensor) -> None:
        """Heads at the centres of k-means; to score the squared distance to them, less what all have in common."""
        from sklearn.cluster import KMeans

        x = features.double().cpu().numpy()
        inertia = []
        for h, head in enumerate(self.heads):
            found = KMeans(self.num_clusters, n_init=10, random_state=self.seed + h).fit(x)
            centres = torch.from_numpy(found.cluster_centers_)
            head.weight.copy_(2 * centres)
            if self.kind == "k_means":
                head.bias.copy_(-centres.square().sum(1))
            inertia.append(float(found.inertia_))
        if self.kind == "k_means":
            self.best_head.fill_(int(np.argmin(inertia)))

    # Training

    def configure_optimizers(self) -> Any:
        """As every recipe; none where nothing is trained."""
        return None if self.kind == "k_means" else super().configure_optimizers()

    def on_train_start(self) -> None:
        """Tells the schedule of the mass how long the run is."""
        super().on_train_start()
        for engine in self.engines:
            engine.total_steps = max(int(self.trainer.estimated_stepping_batches), 1)

    def on_train_epoch_start(self) -> None:
        """An encoder that is not trained keeps its statistics too."""
        super().on_train_epoch_start()
        self.model.train(self.train_encoder)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """The losses of all heads, each with labels of its own."""
        if self.kind == "k_means":
            return None
        views = self.views(batch["input"], batch["index"], self.current_epoch)
        if len(views) != 2:
            raise ValueError(f"views gives {len(views)} views, expected 2")
        z = self.embed(views.flatten(0, 1))
        given = {
            name: x for name, x in (("weight", self.weight_of(batch)), ("mask", batch.get("mask"))) if x is not None
        }
        losses = []
        for h, engine in enumerate(self.engines):
            logits = self.logits(z, h).unflatten(0, views.shape[:2])
            mass = engine.mass
            q1, q2 = engine(logits, batch["index"])
            losses.append(self.loss(logits[0], q2, **given) + self.loss(logits[1], q1, **given))
            self.head_loss[h] += losses[-1].detach() / mass
            self.head_mass[h] += engine.last.column_mass
        self.head_steps += 1
        total = torch.stack(losses).sum()
        self.log_training("loss", total, batch)
        self.log_training("mass", torch.tensor(mass), batch)
        return total

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Gathers logits of the examples, and of two views drawn as in epoch 0."""
        if not self._seen:
            self._choose_head()
        views = self.views(batch["input"], batch["index"], 0)
        logits = [self(x).float().cpu() for x in (batch["input"], views[0], views[1])]
        self._seen.append((*logits, batch["target"].cpu()))

    def on_validation_epoch_end(self) -> None:
        """Logs how well the views agree, and, to be watched only, what the classes say."""
        logits, first, second, target = (torch.cat(column) for column in zip(*self._seen, strict=True))
        self._seen = []
        self.log("val/shared_information", shared_information(first, second), prog_bar=True)
        for name, value in label_free_metrics(logits.softmax(1)).items():
            self.log(f"val/{name}", value)
        if self.labelled:
            found = self._compare(logits, target, None).scalars
            for name in ("mutual_information", "accuracy", "balanced_accuracy"):
                self.log(f"val/{name}", found[name] or 0.0)

    @torch.no_grad()
    def _choose_head(self) -> None:
        """The best head of the epoch that ends, and its clusters' mass; the next epoch starts at zero."""
        if not int(self.head_steps) or self.trainer.sanity_checking:
            return
        losses = sum_over_ranks(self.head_loss)
        self.best_head.copy_(losses.argmin())
        self.mass_by_epoch.append((self.head_mass[self.best_head] / self.head_steps).tolist())
        for total in (self.head_loss, self.head_mass, self.head_steps):
            total.zero_()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the masses of the epochs so far."""
        checkpoint["mass_by_epoch"] = [list(row) for row in self.mass_by_epoch]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on behind those."""
        self.mass_by_epoch = [list(row) for row in checkpoint["mass_by_epoch"]]
        self._resumed = True

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, embedding (N, d), logits (N, K), and target where classes are known."""
        kept: Batch = {name: batch[name] for name in ("index", "target") if name == "index" or self.labelled}
        z = self.embed(batch["input"])
        return kept | {"embedding": z.float(), "logits": self.logits(z, int(self.best_head)).float()}

    def _compare(self, logits: Tensor, target: Tensor, class_counts: Sequence[int] | None) -> Any:
        return clustering_metrics(
            logits.argmax(1),
            target,
            num_clusters=self.num_clusters,
            num_classes=self.num_classes,
            class_counts=class_counts,
        )

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Clusters against the classes of a split where they are known, and by themselves."""
        logits = predictions["logits"].cpu()
        free: dict[str, float | None] = {**label_free_metrics(logits.softmax(1))}
        if not self.labelled:
            return Scores(free, {}, ["The data have no classes: what needs none is reported."])
        found = self._compare(logits, predictions["target"], data.class_counts)
        note = "Accuracies are of clusters matched one to one with classes such that most examples agree."
        bands = {"note": "head, medium and tail are 30, 40 and 30% of the classes, sorted by training examples"}
        details = {"per_class": found.per_class, "bands": bands, "contingency": found.contingency}
        return Scores({**found.scalars, **free}, details, [note])

    @torch.no_grad()
    def finish(self, folder: Path, data: LabelledData, predictions: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Writes clusters.npz of the training split, and gives the report what it shows of clusters."""
        self.eval()
        batches = data.in_order(data.splits.train)
        logits = torch.cat([self(batch["input"].to(self.device)).float().cpu() for batch in batches])
        confidence, cluster = logits.softmax(1).max(1)
        arrays = {"index": torch.arange(len(cluster)), "cluster": cluster, "confidence": confidence}
        given: dict[str, Any] = {name: x.numpy() for name, x in arrays.items()}
        np.savez_compressed(folder / "clusters.npz", **given)
        sizes = cluster.bincount(minlength=self.num_clusters)
        found: dict[str, Any] = {
            "size": sizes.tolist(),
            "confidence": [float(confidence[cluster == k].mean()) if n else None for k, n in enumerate(sizes.tolist())],
            "mass_by_epoch": self.mass_by_epoch,
            "pictures": cluster_pictures(data, cluster, confidence),
        }
        if self.labelled:
            compared = self._compare(logits, data.train_targets, data.class_counts)
            found |= {"training": compared.scalars, "contingency": compared.contingency}
            found["cluster_of_class"] = compared.per_class["cluster"]
        return {"clusters": found}


def _check_parts(loss: nn.Module, reweighter: nn.Module | None, labelled: bool, num_clusters: int | None) -> None:
    if reweighter is not None:
        raise ValueError(f"reweighter is a {type(reweighter).__name__}, expected none: row masses are the weights")
    spec = getattr(loss, "spec", None)
    if uses_prior(loss) or "class_counts" in getattr(spec, "needs", ()):
        raise ValueError(f"loss {type(loss).__name__} needs class counts, and classes are not read: use cross_entropy")
    if not labelled and num_clusters is None:
        raise ValueError("num_clusters is None, and the data have no classes: expected how many clusters to find")


__all__ = ["LABELS", "Clustering"]
