"""The coreset recipe: train a little, score or select, and train again on what is kept, or with propagated weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from counterpoise._core import check_choice, check_number
from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.evaluation import Evaluation, Scores
from counterpoise.recipes.long_tailed import LongTailed
from counterpoise.recipes.meta_weights import learn_meta_weights
from counterpoise.recipes.models import BatchAugment
from counterpoise.recipes.module import Batch
from counterpoise.recipes.proxy import outputs_of
from counterpoise.recipes.report_sections import CLASS_PLOTS, CLASSES, CLOSING, LEARNING, RESULTS, Section
from counterpoise.recipes.sections_selection import selection_sections
from counterpoise.recipes.selecting import Chosen, Pool, check_method, choose, pictures, read_selection, write_selection
from counterpoise.samplers import CoresetSampler, ForgettingEvents, propagate_weights

USES = ("prune", "reweight")


class Proxy(LongTailed):
    """The short training that scores come from; counts forgetting events as it goes.

    Args:
        num_examples: N of the training set; the others are those of :class:`LongTailed`.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, *, num_examples: int, **options: Any) -> None:
        super().__init__(model, loss, **options)
        self.forgetting = ForgettingEvents(num_examples)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The composed loss, with the batch's outcome counted."""
        logits = self.model(self.inputs(batch))
        self.forgetting.update(logits.detach(), batch["target"], batch["index"])
        total = self.composed(logits, batch)
        self.log_training("loss", total, batch)
        return total


class Coreset(LongTailed):
    """Classification on a part of the training set, or with weights that were learned on a part.

    Before training proper, a copy of the model is trained for ``proxy_epochs`` on everything (in ``proxy/`` of the run
    folder, a run of its own) and the selection is made from its logits, features and forgetting events; it is kept in
    ``selection.npz``, which a resumed run reads. Then the model is trained from its initial weights,

    - ``use="prune"``: on the selected examples alone, with the selection's weights if ``weighted``;
    - ``use="reweight"``: on all examples. A small network learns weights of the selected examples, such that a step on
      them helps the balanced validation split, and every example takes the weight of its nearest selected one of its
      class (The Power of Few). With ``fraction=1`` that is meta-reweighting of the whole set.

    Args:
        model, loss, num_classes, reweighter, optimizer, scheduler, augment, many, few: see :class:`LongTailed`.
        method: "random", "el2n", "grand", "forgetting", "coverage", "herding", "k_center", "facility_location",
            "moderate".
        fraction: in (0, 1] of the examples.
        use: "prune" or "reweight".
        balanced: select inside every class.
        keep: by scores, "hardest" or "easiest".
        weighted: train with the selection's weights.
        proxy_epochs: >= 1 of the short training; "random" needs none.
        meta_epochs: >= 1 over the selected examples, of learning weights.
        meta_step_size: > 0 of the virtual step.

    Raises:
        ValueError: settings out of range, or several processes: select with ``counterpoise-select`` there.

    Source: Jafari et al., The Power of Few: Accelerating and Enhancing Data Reweighting with Coreset Selection, 2024;
    the methods' own sources are in their files.
    """

    sections = (
        RESULTS,
        *selection_sections,
        Section("Plots", {**CLASS_PLOTS, **LEARNING}),
        CLASSES,
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
        method: str = "el2n",
        fraction: float = 0.3,
        use: str = "prune",
        balanced: bool = True,
        keep: str = "hardest",
        weighted: bool = False,
        proxy_epochs: int = 5,
        meta_epochs: int = 5,
        meta_step_size: float = 0.1,
    ) -> None:
        options: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "augment": augment}
        super().__init__(model, loss, num_classes=num_classes, reweighter=reweighter, many=many, few=few, **options)
        check_method(method, fraction, keep)
        check_choice("use", use, USES)
        for name, epochs in (("proxy_epochs", proxy_epochs), ("meta_epochs", meta_epochs)):
            check_number(name, epochs, 1)
        check_number("meta_step_size", meta_step_size, 0, open_low=True)
        self.method, self.fraction, self.use, self.balanced, self.keep = method, fraction, use, balanced, keep
        self.weighted, self.proxy_epochs = weighted, proxy_epochs
        self.meta_epochs, self.meta_step_size = meta_epochs, meta_step_size
        self._options = options
        self._found: dict[str, Any] = {}

    def prepare(self, data: LabelledData, folder: Path, *, resume: bool, **fit_options: Any) -> None:
        """Selects, or reads what was selected, and sets sampler and weights; called before training."""
        if int(fit_options.pop("world_size", 1)) > 1:
            raise ValueError("recipe coreset selects in one process: use counterpoise-select, then sampler=coreset")
        file = folder / "selection.npz"
        if not (resume and file.exists()):
            started = time.monotonic()
            arrays = self._select(data, folder, resume, fit_options)
            write_selection(file, {**arrays, "seconds": time.monotonic() - started})
        self._train_on(data, {name: torch.from_numpy(x) for name, x in read_selection(file).items()})

    def _select(self, data: LabelledData, folder: Path, resume: bool, fit_options: dict[str, Any]) -> dict[str, Any]:
        seed = int(fit_options.pop("seed", 0))
        pool = self._pool(data, folder / "proxy", resume, seed, fit_options)
        chosen = choose(pool, self.method, self.fraction, balanced=self.balanced, keep=self.keep, seed=seed)
        picked = chosen.selection
        weights = picked.weights if self.weighted else torch.ones_like(picked.weights)
        of_all = self._propagated(pool, chosen, data, seed) if self.use == "reweight" else None
        return {
            "indices": picked.indices,
            "weights": weights,
            "scores": chosen.scores,
            "features": pool.features.half() if len(pool) <= 20_000 else None,
            "targets": pool.targets,
            "example_weights": of_all,
        }

    def _pool(self, data: LabelledData, folder: Path, resume: bool, seed: int, fit_options: dict[str, Any]) -> Pool:
        """Targets, and unless nothing is needed of it, what the proxy says of the training set."""
        if self.method == "random" and self.use == "prune":
            return Pool(data.train_targets, torch.zeros(len(data.train_targets), 1))
        from counterpoise.recipes.run import fit

        proxy = Proxy(
            copy.deepcopy(self.model),
            copy.deepcopy(self.loss),
            num_examples=len(data.splits.train),
            num_classes=self.num_classes,
            **self._options,
        )
        full = LabelledData(data.splits, batch_size=data.batch_size, num_workers=data.num_workers, seed=data.seed)
        options = {**fit_options, "max_epochs": self.proxy_epochs}
        fit(proxy, full, folder=folder, seed=seed, resume=resume, **options)
        logits, features = outputs_of(proxy.model, (batch["input"] for batch in full.in_order(data.splits.train)))
        return Pool(data.train_targets, features, logits, proxy.forgetting.scores().cpu())

    def _propagated(self, pool: Pool, chosen: Chosen, data: LabelledData, seed: int) -> Tensor:
        """(N,) weights of mean one: learned on the selected examples, given to all."""
        kept = chosen.selection.indices
        learned = learn_meta_weights(
            copy.deepcopy(self.model),
            copy.deepcopy(self.loss),
            _tensors(data, Subset(data.splits.train, kept.tolist())),
            _tensors(data, data.splits.val),
            batch_size=data.batch_size,
            epochs=self.meta_epochs,
            step_size=self.meta_step_size,
            seed=seed,
        )
        of_all = propagate_weights(
            learned, pool.features[kept], pool.features, coreset_targets=pool.targets[kept], targets=pool.targets
        )
        of_all[kept] = learned.to(of_all)
        return of_all / of_all.mean().clamp_min(1e-12)

    def _train_on(self, data: LabelledData, found: dict[str, Tensor]) -> None:
        if "example_weights" in found:
            self.example_weight = found["example_weights"].float()
        else:
            sampler: Any = CoresetSampler(found["indices"], found["weights"], seed=data.seed)
            mass = torch.zeros(self.num_classes, dtype=torch.float64)
            mass.index_add_(0, data.train_targets[sampler.indices], sampler.weights)
            sampler.class_probabilities = mass / mass.sum()  # what a prior-based loss has to know
            data.train_sampler = sampler  # whose weights, if any, the base multiplies the losses by
        of_all = found.get("example_weights")
        self._found = {
            "method": self.method,
            "use": self.use,
            "kept": len(found["indices"]),
            "of": len(data.splits.train),
            "seconds": round(float(found["seconds"]), 2),
            "kept_per_class": data.train_targets[found["indices"]].bincount(minlength=self.num_classes).tolist(),
            "pictures": pictures(data.splits.train, data.splits.class_names, found["indices"], found.get("scores")),
            "effective_share": None if of_all is None else _effective_share(of_all),
        }

    def evaluate(self, predictions: dict[str, Tensor], data: LabelledData) -> Evaluation | Scores:  # type: ignore[override]
        """What :class:`LongTailed` has, and what was kept."""
        plain = super().evaluate(predictions, data)
        return Scores(plain.scalars, {**plain.details, "selection": self._found}, plain.notes)


def _effective_share(weights: Tensor) -> float:
    """Kish's effective sample size over the number of examples, in (0, 1]."""
    return float(weights.sum() ** 2 / weights.square().sum() / len(weights))


def _tensors(data: LabelledData, split: Any) -> tuple[Tensor, Tensor]:
    """All inputs and targets of a split."""
    batches = list(data.in_order(split))
    return torch.cat([b["input"] for b in batches]), torch.cat([b["target"] for b in batches])
