"""Gradient surgery: instead of weighting losses, each task's gradient of the encoder goes into an aggregator.

The aggregators are TorchJD's (``pip install 'counterpoise[multitask]'``): UPGrad projects each task's gradient so that
it conflicts with none, PCGrad and MGDA are there, too. Heads get the gradients of their own tasks alone. A step costs
a backward pass through the encoder for each task. One device only.

Aggregators are not indifferent to scale, either: by default a task's loss is divided by what the best constant
prediction costs, and the effective weights of the weighting multiply that. Noise levels are not trained.

Source: Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024 (UPGrad); the aggregators of TorchJD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise._core import check_choice
from counterpoise.losses import task_means
from counterpoise.recipes.models import BatchAugment, Heads
from counterpoise.recipes.module import Batch
from counterpoise.recipes.multi_task import MultiTask


class GradientSurgery(MultiTask):
    """:class:`~counterpoise.recipes.MultiTask` under manual optimisation, with an aggregator of gradients.

    Args:
        loss: a weighting without parameters: ``EqualWeighting`` or ``StaticWeighting``.
        aggregator: (K, P) gradients to (P,), or the name of one in ``torchjd.aggregation`` ("UPGrad", "PCGrad", ...).
        relative_losses: divide by the loss of the best constant prediction, so that units do not matter.
        model, tasks, errors, reweighter, optimizer, scheduler, augment: see MultiTask. The model calls its heads once.

    Raises:
        ModuleNotFoundError: TorchJD is not installed.
        ValueError: no such aggregator, a weighting with parameters, parts that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        tasks: Mapping[str, Mapping[str, Any]],
        aggregator: str | nn.Module = "UPGrad",
        relative_losses: bool = True,
        errors: str | Mapping[str, str] | None = None,
        reweighter: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        augment: BatchAugment | None = None,
    ) -> None:
        found = aggregator_of(aggregator)
        if any(True for _ in loss.parameters()):
            raise ValueError(
                f"loss {type(loss).__name__} has parameters, which gradient surgery does not train, expected a "
                "weighting without, such as static_weighting"
            )
        super().__init__(
            model,
            loss,
            tasks=tasks,
            errors=errors,
            reweighter=reweighter,
            optimizer=optimizer,
            scheduler=scheduler,
            augment=augment,
        )
        self.aggregator = found
        self.relative_losses = relative_losses
        self.automatic_optimization = False
        self.features: Tensor | None = None
        heads = next(m for m in self.model.modules() if isinstance(m, Heads))
        heads.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def on_train_start(self) -> None:
        """Refuses several ranks: the gradients of tasks are not reduced over them."""
        if self.trainer.world_size > 1:
            raise ValueError(f"world_size is {self.trainer.world_size}, expected 1: gradient surgery is for one device")
        super().on_train_start()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of the aggregated gradient; logs the weighted loss and the unweighted sum."""
        from torchjd.autojac import jac_to_grad, mtl_backward

        outputs = self.model(self.inputs(batch))
        features, self.features = self.features, None
        means = self.means(outputs, batch)
        losses = [self.effective_weights[name] * mean for name, mean in means.items()]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        mtl_backward(losses, features=features)
        shared = [p for p in self.model.parameters() if getattr(p, "jac", None) is not None]
        jac_to_grad(shared, self.aggregator)
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        total = torch.stack(losses).sum().detach()
        self.log_training("loss", total, batch)
        self.log_training("unweighted", torch.stack(list(means.values())).sum(), batch)
        return total

    @property
    def effective_weights(self) -> dict[str, float]:
        """What each task's mean loss is multiplied by before its gradient is taken."""
        weights = super().effective_weights
        if not self.relative_losses:
            return weights
        return {t.name: weights[t.name] / t.constant_cost(self.errors.get(t.name, "")) for t in self.named}

    def means(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Each task's mean loss, in a graph of its own behind the features; 0 for a task that the batch lacks."""
        costs, counted = self.costs(outputs, batch)
        weight = self.weight_of(batch)
        rows = dict(zip(self.order, counted.unbind(1), strict=True))
        return {n: task_means({n: x}, weight=weight, mask=rows[n])[0].squeeze(0) for n, x in costs.items()}


def aggregator_of(given: str | nn.Module) -> nn.Module:
    """The aggregator, or a new one of that name; ModuleNotFoundError without TorchJD says what to install."""
    try:
        from torchjd import aggregation
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "gradient surgery needs torchjd: pip install 'counterpoise[multitask]'", name="torchjd"
        ) from missing
    if not isinstance(given, str):
        return given
    check_choice("aggregator", given, sorted(name for name in dir(aggregation) if name[0].isupper()))
    return getattr(aggregation, given)()
