r"""The fair recipe: a binary classifier from whose prediction an adversary cannot tell the sensitive group.

.. math:: \min_f \max_g\ L_Y(f) - \lambda\, \frac{1}{N} \sum_i r_i\, \ell_S(g(z_i), s_i), \qquad
          z_i = f_1(x_i) - f_0(x_i)

With r = 1 ("none") this is adversarial debiasing: fair on average over everybody, and perhaps unfair in some region.
With the weights of :class:`~counterpoise.samplers.BROAD` ("broad") or of a ratio network ("road") the examples whose
group is easiest to guess count most, in each group with a mean of one. Against equalised odds the adversary is told the
true class, too.

A step: the adversary, several times, on the plain mean of its losses with the prediction held fixed; the ratio network,
several times, with the adversary held fixed; the predictor, once. The adversary's loss is cross-entropy over the
groups, which for two of them is the paper's binary one.

Source: Grari et al., On the Fairness ROAD: Robust Optimization for Adversarial Debiasing, 2024; step order from the
released code. Adversarial debiasing: Zhang et al., Mitigating Unwanted Biases with Adversarial Learning, 2018.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from counterpoise._core import check_choice, check_number, check_within
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Scores, classification_metrics
from counterpoise.recipes.fairness_evaluation import CRITERIA, SCALARS, FairnessCounts, fairness_metrics
from counterpoise.recipes.models import MLP, BatchAugment
from counterpoise.recipes.module import Batch, Recipe, check_classes, parameter_groups
from counterpoise.recipes.report_sections import CLASS_PLOTS, CLASSES, CLOSING, RESULTS, Section
from counterpoise.recipes.sections_fairness import (
    accuracy_figure,
    cell_table,
    learning_figure,
    rate_figure,
    trade_off_figure,
    trade_off_table,
    weight_figure,
)
from counterpoise.samplers import BROAD, RatioNetwork, reweighted_loss, road_ratio_objective

WEIGHTS = ("none", "broad", "road")


class Fair(Recipe):
    """Adversarial debiasing of a binary classifier, plain or with local weights.

    The best epoch is that of the best :func:`~counterpoise.recipes.fairness_evaluation.fair_score` on validation: the
    informedness 2 * balanced accuracy - 1, where a guess has zero, times the p-rule (or one less the equalised-odds
    gap). No fairness threshold is enforced; the report shows what the other epochs traded.

    Training steps several optimisers by itself, so Lightning's gradient clipping and accumulation are not to be had.
    The Trainer's steps are those of the predictor. Several devices need
    ``strategy="ddp_find_unused_parameters_true"``: each player's loss leaves parameters of the others unused.

    Args:
        model: the predictor, inputs to logits (N, 2).
        loss: multi-class, called as ``loss(logits, target)``.
        num_classes: 2; class 1 is the favourable outcome.
        in_features: entries of one input, which the ratio network reads.
        group_counts: (G,) training examples a sensitive group, G >= 2.
        group_names: (G,), default "0", "1", ...
        subgroup_feature: the entry of the input that makes the subgroups of the local figures; None = none.
        subgroup_edges: ascending thresholds of that entry, in the units of the inputs: K - 1 make K subgroups.
        subgroup_names: (K,), default from the edges.
        criterion: "demographic_parity", or "equalized_odds".
        weights: "none", "broad" or "road".
        adversary_weight: lambda >= 0; 0 is plain training. The paper's grid is within [0, 5].
        temperature: tau > 0 of the weights, finite for "road"; the paper's grid is within (0, 0.7].
        adversary_steps: a batch, >= 1. The released code has 50 by default and advises 10.
        ratio_steps: of the ratio network a batch, >= 1.
        adversary_hidden: widths of the adversary's layers.
        ratio_hidden: width of the ratio network's first layer.
        optimizer: made anew for each player, as the paper has it; None = Adam with learning rate 1e-3.
        reweighter, scheduler, augment: see :class:`~counterpoise.recipes.module.Recipe`; the reweighter is of the
            predictor's own losses.

    Raises:
        ValueError: parts that do not fit together, or settings out of range; said before any training.
    """

    monitor = "val/fair_score"
    sections = (
        RESULTS,
        Section(
            "Groups",
            {
                "Positive rates": rate_figure,
                "Accuracies": accuracy_figure,
                "Weights": weight_figure,
                "Table of groups": cell_table,
            },
        ),
        Section("Trade-off", {"Trade-off of the epochs": trade_off_figure, "Table of the trade-off": trade_off_table}),
        Section("Plots", {"Learning curves": learning_figure, **CLASS_PLOTS}),
        CLASSES,
        *CLOSING,
    )
    edges: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        num_classes: int,
        in_features: int,
        group_counts: Sequence[int],
        group_names: Sequence[str] | None = None,
        subgroup_feature: int | None = None,
        subgroup_edges: Sequence[float] | None = None,
        subgroup_names: Sequence[str] | None = None,
        criterion: str = "demographic_parity",
        weights: str = "broad",
        adversary_weight: float = 1.0,
        temperature: float = 0.5,
        adversary_steps: int = 10,
        ratio_steps: int = 10,
        adversary_hidden: Sequence[int] = (64, 32, 16),
        ratio_hidden: int = 64,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
    ) -> None:
        super().__init__(
            model, loss, reweighter=reweighter, optimizer=optimizer or adam, scheduler=scheduler, augment=augment
        )
        self.automatic_optimization = False
        check_classes(loss, num_classes)
        _check_facts(num_classes, group_counts, group_names, reweighter)
        check_choice("criterion", criterion, CRITERIA)
        check_choice("weights", weights, WEIGHTS)
        check_number("adversary_weight", adversary_weight, 0)
        largest = sys.float_info.max if weights == "road" else math.inf
        check_number("temperature", temperature, 0, largest, open_low=True)
        check_number("adversary_steps", adversary_steps, 1)
        check_number("ratio_steps", ratio_steps, 1)
        self.criterion, self.weights = criterion, weights
        self.adversary_weight, self.temperature = adversary_weight, temperature
        self.adversary_steps, self.ratio_steps = adversary_steps, ratio_steps
        self.group_counts = [int(n) for n in group_counts]
        self.group_names = [str(name) for name in (group_names or range(len(self.group_counts)))]
        self.subgroup_feature = subgroup_feature
        edges = _checked_edges(subgroup_feature, subgroup_edges, in_features)
        self.register_buffer("edges", torch.tensor(edges), persistent=False)
        self.subgroup_names = _checked_names(subgroup_names, edges)
        groups = len(self.group_counts)
        self.broad = BROAD(self.group_counts, temperature) if weights == "broad" else None
        self.adversary = MLP(1 + (criterion == "equalized_odds"), groups, hidden=adversary_hidden)
        self.ratio = RatioNetwork(in_features, ratio_hidden, groups) if weights == "road" else None
        self.val_counts = FairnessCounts(len(self.subgroup_names), groups)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of the game, see the top of this file; the predictor's own loss, detached."""
        x, group = self.inputs(batch), self._groups(batch)
        logits = self.model(x)
        task = self.composed(logits, batch)
        seen, mask = self.evidence(logits, batch["target"]), batch.get("mask")
        kept = slice(None) if mask is None else mask
        seen, group, features = seen[kept], group[kept], x.flatten(1)[kept]
        first, *others = self._optimizers()
        for _ in range(self.adversary_steps):
            guess = reweighted_loss(self.guess_losses(seen.detach(), group))
            self._helper_step(others[0], guess)
        if self.adversary_weight:
            weight = self._train_weights(seen.detach(), group, features, others)
            penalty = reweighted_loss(self.guess_losses(seen, group), weight=weight)
            total = task - self.adversary_weight * penalty
        else:
            total = task
        first.zero_grad()
        self.manual_backward(total)
        first.step()
        for scheduler in self._schedulers():
            scheduler.step()
        self.log_training("loss", task, batch)
        self.log_training("adversary_loss", guess, batch)
        return task.detach()

    def evidence(self, logits: Tensor, target: Tensor) -> Tensor:
        """What the adversary sees of logits (N, 2) and classes (N,): (N, 1), or (N, 2) against equalised odds."""
        difference = logits[:, 1:] - logits[:, :1]
        if self.criterion == "demographic_parity":
            return difference
        return torch.cat([difference, target[:, None].to(difference.dtype)], 1)

    def guess_losses(self, evidence: Tensor, group: Tensor) -> Tensor:
        """The adversary's losses (N,)."""
        return cross_entropy(self.adversary(evidence), group, reduction="none")

    def _train_weights(self, seen: Tensor, group: Tensor, features: Tensor, others: list[Any]) -> Tensor | None:
        """The weights (N,) of the predictor's step, detached; None for ones. The ratio network is trained first."""
        losses = self.guess_losses(seen, group).detach()
        if self.ratio is None:
            return None if self.broad is None else self.broad(losses, group=group)
        for _ in range(self.ratio_steps):
            objective = road_ratio_objective(
                self.ratio(features, group), losses, temperature=self.temperature, sync=True
            )
            self._helper_step(others[1], objective)
        return self.ratio(features, group).detach().exp()

    def _helper_step(self, optimizer: Any, loss: Tensor) -> None:
        """A step of adversary or ratio network, which the Trainer does not count: its steps are batches."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def _groups(self, batch: Batch) -> Tensor:
        if "group" not in batch:
            raise ValueError("the batch has no group, expected one sensitive group an example")
        group: Tensor = batch["group"]
        check_within("group", group, 0, len(self.group_counts) - 1, what="group indices")
        return group

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts predictions by group and subgroup."""
        predicted = self.model(batch["input"]).argmax(1)
        self.val_counts.update(predicted, batch["target"], self._groups(batch), self.subgroup_of(batch["input"]))

    def on_validation_epoch_end(self) -> None:
        """Logs the score, what it is made of, and the worst local p-rule."""
        counts = self.val_counts.compute()
        found = self._metrics(counts).scalars
        recall = counts.sum((0, 1)).diagonal() / counts.sum((0, 1)).sum(1)
        self.log("val/fair_score", found["fair_score"], prog_bar=True)  # type: ignore[arg-type]
        self.log("val/balanced_accuracy", recall.mean())
        for name in ("p_rule", "equalized_odds_gap", "worst_local_p_rule"):
            value = found[name]
            self.log(f"val/{name}", math.nan if value is None else value)
        self.val_counts.reset()

    def subgroup_of(self, x: Tensor) -> Tensor:
        """(N,) subgroups of inputs (N, ...): how many edges the chosen entry is above."""
        if self.subgroup_feature is None:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return torch.bucketize(x.flatten(1)[:, self.subgroup_feature].contiguous(), self.edges)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What predictions.npz holds: index, target, group, subgroup, logits, the adversary's guess and weight.

        ``log_weight`` is known up to a constant in each group: it is what is normalised over the rows of a split.
        """
        x, group = batch["input"], self._groups(batch)
        logits = self.model(x).float()
        seen = self.evidence(logits, batch["target"])
        losses = self.guess_losses(seen, group)
        if self.ratio is not None:
            score = self.ratio.scores(x.flatten(1).float(), group)
        else:
            score = -losses / (self.temperature if self.weights == "broad" else math.inf)
        kept = {name: batch[name] for name in ("index", "target", "group")}
        told = {"subgroup": self.subgroup_of(x), "guess": self.adversary(seen).argmax(1), "log_weight": score}
        return {**kept, "logits": logits, **told}

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Scores:
        """Accuracy, fairness of the groups and in the worst subgroup, and how well the adversary still guesses."""
        logits, target, group = (predictions[name] for name in ("logits", "target", "group"))
        plain = classification_metrics(logits, target, data.class_counts, class_names=data.splits.class_names)
        accuracy = {name: plain.scalars[name] for name in ("accuracy", "balanced_accuracy")}
        rest = {name: plain.scalars[name] for name in ("expected_calibration_error", "nll")}
        if plain.confusion is None:  # no prediction
            return Scores({**accuracy, **dict.fromkeys(SCALARS), **rest}, plain.details, plain.notes)
        metric = FairnessCounts(len(self.subgroup_names), len(self.group_counts))
        metric.update(logits.argmax(1), target, group, predictions["subgroup"])
        found = self._metrics(metric.compute())
        right = (predictions["guess"] == group).double()
        recalls = torch.stack([right[group == g].mean() for g in group.unique()])
        settings = {"criterion": self.criterion, "weights": self.weights, "train_count": self.group_counts}
        return Scores(
            {**accuracy, **found.scalars, "adversary_balanced_accuracy": float(recalls.mean()), **rest},
            {**plain.details, "fairness": {**found.details, **settings}},
            [*plain.notes, *found.notes],
        )

    def configure_optimizers(self) -> Any:
        """One optimiser a player: predictor (with the parameters of loss and reweighter), adversary, ratio network."""
        predictor = nn.ModuleList([part for part in (self.model, self.loss, self.reweighter) if part is not None])
        players = [predictor, *(part for part in (self.adversary, self.ratio) if part is not None)]
        made = [self._make_optimizer(parameter_groups(player)) for player in players]
        if self._make_scheduler is None:
            return made
        total = int(self.trainer.estimated_stepping_batches)
        return made, [{"scheduler": self._make_scheduler(o, total_steps=total), "interval": "step"} for o in made]

    def _optimizers(self) -> list[Any]:
        return list(self.optimizers())  # type: ignore[arg-type]  # at least two

    def _schedulers(self) -> Iterator[Any]:
        found = self.lr_schedulers()
        yield from found if isinstance(found, list) else ()

    def _metrics(self, counts: Tensor) -> Any:
        named = {"group_names": self.group_names, "subgroup_names": self.subgroup_names}
        return fairness_metrics(counts, criterion=self.criterion, **named)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The paper's optimiser."""
    return torch.optim.Adam(parameters, lr=1e-3)


def _check_facts(
    num_classes: int, group_counts: Sequence[int], group_names: Sequence[str] | None, reweighter: nn.Module | None
) -> None:
    if num_classes != 2:
        raise ValueError(f"num_classes is {num_classes}, expected 2: rates are of one favourable outcome")
    if len(group_counts) < 2:
        raise ValueError(f"group_counts has length {len(group_counts)}, expected at least 2 groups to compare")
    if group_names is not None and len(group_names) != len(group_counts):
        raise ValueError(f"group_names has length {len(group_names)}, expected {len(group_counts)}, one a group")
    if isinstance(reweighter, BROAD):
        raise ValueError("reweighter BROAD is for the adversary's losses, expected weights='broad' and no reweighter")


def _checked_edges(feature: int | None, edges: Sequence[float] | None, in_features: int) -> list[float]:
    if feature is None:
        if edges:
            raise ValueError("subgroup_edges are given without subgroup_feature, expected the entry that they divide")
        return []
    check_number("subgroup_feature", feature, 0, in_features - 1)
    found = [float(edge) for edge in edges or ()]
    if not found or sorted(set(found)) != found:
        raise ValueError(f"subgroup_edges is {edges}, expected ascending thresholds of entry {feature}, one at least")
    return found


def _checked_names(names: Sequence[str] | None, edges: list[float]) -> list[str]:
    if names is None or not edges:
        bounds = [f"{edge:.3g}" for edge in edges]
        return [f"to {edge}" for edge in bounds] + ([f"above {bounds[-1]}"] if bounds else ["all"])
    if len(names) != len(edges) + 1:
        raise ValueError(f"subgroup_names has length {len(names)}, expected {len(edges) + 1}, one more than the edges")
    return [str(name) for name in names]
