r"""Just train twice: train, see which training examples are wrong, and train again with those weighted up.

.. math:: E = \{i : \arg\max_c f_c(x_i) \neq y_i\}, \qquad w_i = \lambda^{[i \in E]}

The first model has to be stopped early: one that fits everything has no errors left. Needs no groups in training; the
two settings are chosen by the worst group of validation, which does. The weights are brought to a mean of one over the
training set, as copies of the errors would have it, so that the learning rate keeps its meaning.

Source: Liu et al., Just Train Twice: Improving Group Robustness without Training Group Information, 2021, algorithm 1.
The released code adds lambda copies of an error, so that it counts 1 + lambda times; here the weight is what is given.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from counterpoise._core import check_number
from counterpoise.recipes.callbacks import Checkpoints
from counterpoise.samplers import just_train_twice_weights


class JustTrainTwice(pl.Callback):
    """At ``identify_at`` of the epochs: finds the errors, puts the initial weights back and weights the errors up.

    The optimiser starts anew, its schedule goes on; best weights of the first training do not count. The state holds
    initial weights and errors, so a resumed run goes on as it was.

    Args:
        identify_at: in (0, 1), fraction of the epochs that the first training gets, rounded, at least one.
        up_weight: weight >= 1 of an error, or "auto" for about as much mass as all other examples have.
    """

    def __init__(self, identify_at: float = 0.2, up_weight: float | str = 20.0) -> None:
        check_number("identify_at", identify_at, 0, 1, open_low=True)
        if up_weight != "auto":
            check_number("up_weight", up_weight, 1)
        self.identify_at = identify_at
        self.up_weight = up_weight
        self.initial: dict[str, Tensor] = {}
        self.wrong: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuses a recipe without ``example_weight`` and a training too short for two."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "example_weight"):
            raise TypeError(f"{type(pl_module).__name__} has no example_weight, expected a counterpoise Recipe")
        epochs = trainer.max_epochs or 0
        if epochs < 2:
            raise ValueError(f"max_epochs is {epochs}, expected at least 2: one for each training")

    def switch_epoch(self, trainer: pl.Trainer) -> int:
        """The first epoch of the second training."""
        epochs = int(trainer.max_epochs or 2)
        return min(max(1, round(self.identify_at * epochs)), epochs - 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keeps the initial weights, or, resumed, sets the weights of the examples again."""
        if not self.initial:
            self.initial = {name: x.detach().cpu().clone() for name, x in pl_module.state_dict().items()}
        if self.wrong is not None:
            self._weigh(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Between the two trainings."""
        if trainer.current_epoch != self.switch_epoch(trainer) or self.wrong is not None:
            return
        self.wrong = self._errors(trainer, pl_module)
        pl_module.load_state_dict(self.initial)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.forget_best()
        self._weigh(pl_module)

    @torch.no_grad()
    def _errors(self, trainer: pl.Trainer, pl_module: Any) -> Tensor:
        """(N,) bool by index: wrong in evaluation mode, without augmentation."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        wrong = torch.zeros(len(data.splits.train), dtype=torch.bool)
        was_training = pl_module.training
        pl_module.eval()
        for batch in data.in_order(data.splits.train):
            batch = trainer.strategy.batch_to_device(batch, pl_module.device)
            predicted = pl_module(batch["input"]).argmax(1)
            wrong[batch["index"].cpu()] = (predicted != batch["target"]).cpu()
        pl_module.train(was_training)
        return wrong

    def _weigh(self, pl_module: Any) -> None:
        if self.wrong is not None:
            weights = just_train_twice_weights(self.wrong, self.up_weight)
            pl_module.example_weight = (weights / weights.mean()).to(pl_module.device, torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Initial weights and errors."""
        return {"initial": self.initial, "wrong": self.wrong}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of the run that goes on."""
        self.initial, self.wrong = state_dict["initial"], state_dict["wrong"]
