"""Discovery of every public part through its Spec, and one input generator per task."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import counterpoise.contrastive
import counterpoise.losses
import counterpoise.samplers
from counterpoise._core import Spec
from counterpoise.memory import MemoryBank

ROOMS = (counterpoise.losses, counterpoise.contrastive, counterpoise.samplers)
CLASSES = 4
DIM = 5
FACTS: dict[str, Any] = {
    "class_counts": [50, 20, 8, 3],
    "group_counts": [40, 20, 5],
    "targets": torch.tensor([0] * 20 + [1] * 10 + [2] * 4 + [3]),
    "num_epochs": 5,
    "embedding_dim": DIM,
    "scores": torch.arange(1.0, 31.0),
    "indices": torch.arange(3, 90, 3),
    "num_examples": 38,
    "kinds": ["gaussian", "laplace", "classification", "liebel_korner"],
    "task_weights": [1.0, 0.5, 2.0, 0.25],
}

SETTINGS: dict[str, dict[str, Any]] = {  # where the batches of the contracts are too small for the defaults
    "CWRGPLoss": {"groups": 1, "on_singular": "shrink"},
    "WMSELoss": {"on_singular": "shrink"},
}


def discover() -> list[type]:
    """Every exported class with a Spec."""
    found = {
        getattr(room, name): None
        for room in ROOMS
        for name in room.__all__
        if isinstance(getattr(getattr(room, name), "spec", None), Spec)
    }
    return list(found)


PARTS = discover()
SAMPLERS = [p for p in PARTS if p.spec.task == "sampler"]
REWEIGHTERS = [p for p in PARTS if p.spec.task == "reweighter"]
OBJECTIVES = [p for p in PARTS if p not in SAMPLERS and p not in REWEIGHTERS]


def build(part: type, **settings: Any) -> Any:
    """The part with the run-time facts that its Spec names."""
    facts = {name: FACTS[name] for name in part.spec.needs if name in FACTS}
    return part(**facts, **{**SETTINGS.get(part.__name__, {}), **settings})


def function_of(part: type) -> Callable[..., Tensor]:
    """``xxx_loss`` of ``XxxLoss``, ``xxx_weighted_loss`` of ``XxxWeighting``: the function in the same file."""
    module = inspect.getmodule(part)
    assert isinstance(module, ModuleType)
    wanted = re.sub("weighting$", "weightedloss", part.__name__.lower())
    names = [n for n in vars(module) if n.replace("_", "") == wanted and n != part.__name__]
    assert len(names) == 1, f"{module.__name__} has no function of {part.__name__}"
    return getattr(module, names[0])


@dataclass
class Batch:
    """Positional inputs of a part, the first ``differentiable`` of which take gradients; all have N rows."""

    inputs: list[Tensor]
    differentiable: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return self.inputs[: self.differentiable]

    def rows(self, index: Any) -> Batch:
        """Some rows, as fresh leaves."""
        picked = [x.detach()[index] for x in self.inputs]
        options = {k: v[index] if isinstance(v, Tensor) else v for k, v in self.options.items()}  # a bank has no rows
        return replace(self, inputs=picked, options=options).fresh()

    def fresh(self) -> Batch:
        """The same values with leaves that require gradients."""
        leaves = [x.detach().clone().requires_grad_() for x in self.leaves]
        return replace(self, inputs=[*leaves, *self.inputs[self.differentiable :]])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Differentiable inputs changed."""
        changed = [change(x.detach()) for x in self.leaves]
        return replace(self, inputs=[*changed, *self.inputs[self.differentiable :]]).fresh()


def batch_of(task: str, n: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    """Random inputs of a task."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    if task == "multiclass":
        return Batch([normal(n, CLASSES), torch.randint(CLASSES, (n,), generator=g)], 1).fresh()
    if task == "multilabel":
        return Batch([normal(n, CLASSES), torch.randint(2, (n, CLASSES), generator=g)], 1).fresh()
    if task == "grouped":
        return Batch([normal(n, CLASSES), torch.randint(CLASSES, (n,), generator=g), torch.arange(n) % 3], 1).fresh()
    if task == "anchors":
        labels = torch.randint(-2, CLASSES, (n, CLASSES), generator=g)
        labels[:, 0] = -1
        return Batch([normal(n, CLASSES, CLASSES), labels], 1).fresh()
    if task == "labelled_embeddings":
        return Batch([normal(n, DIM), torch.arange(n) // 2 % CLASSES], 1).fresh()
    if task == "two_view":
        return Batch([normal(n, DIM), normal(n, DIM)], 2).fresh()
    if task == "paired":
        return Batch([normal(n, DIM), normal(n, DIM)], 2).fresh()
    if task == "teacher_views":  # the second comes from a momentum encoder: it takes no gradient
        return Batch([normal(n, DIM), normal(n, DIM)], 1).fresh()
    if task == "queue_views":  # and a bank besides, not quite full
        bank = MemoryBank(8, DIM, dtype=dtype)
        keys = torch.randn(7, DIM, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        bank.enqueue(keys.to(dtype))  # the same on every rank and for every seed
        return Batch([normal(n, DIM), normal(n, DIM)], 1, {"bank": bank}).fresh()
    if task == "multi_task":
        return Batch([normal(n, CLASSES)], 1).fresh()
    if task == "reweighter":
        losses = torch.rand(n, generator=g, dtype=torch.float64).to(dtype)
        options = {"group": torch.arange(n) % 3, "target": torch.arange(n) % CLASSES, "index": torch.arange(n) + 2}
        return Batch([losses], 1, options)
    raise KeyError(f"no input generator for task {task!r}: add one")


def value(part: nn.Module, batch: Batch, **options: Any) -> Tensor:
    """The part on a batch."""
    return part(*batch.inputs, **batch.options, **options)


def views(part: type, batch: Batch) -> int:
    """Rows of "none" per example: two for a two-view objective."""
    return 2 if part.spec.task == "two_view" else 1


def ids(parts: list[type]) -> list[str]:
    """Names for parametrised tests."""
    return [part.__name__ for part in parts]
