"""Tasks of several targets an example: what each is, which rows have it, and what a prediction of it costs.

A missing target is NaN (regression, in any of its dimensions) or -100 (classification).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from counterpoise._core import at_least_float32, check_choice, check_number
from counterpoise._core.checks import did_you_mean

MISSING = -100  # as class index
ERRORS = ("squared", "absolute")


@dataclass(frozen=True)
class Task:
    """One target of an example.

    Args:
        name: by which targets and outputs are found.
        kind: "classification" or "regression".
        size: C classes, >= 2; or D dimensions, >= 1, of targets (N,) or (N, D).
        mean, std: (D,) of the training targets of a regression, in whose units a head starts; default 0 and 1.
        class_names: (C,) for readers; default "0", "1", ...
    """

    name: str
    kind: str
    size: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice(f"kind of task {self.name!r}", self.kind, ("classification", "regression"))
        check_number(f"size of task {self.name!r}", self.size, 2 if self.classifies else 1)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and (self.classifies or len(values) != self.size):
                raise ValueError(
                    f"{name} of task {self.name!r} has {len(values)} numbers, expected one a dimension of a regression"
                )

    @property
    def classifies(self) -> bool:
        """It is a classification."""
        return self.kind == "classification"

    def counted(self, target: Tensor) -> Tensor:
        """(N,) bool: the rows whose target is there."""
        if self.classifies:
            return target != MISSING
        return ~target.isnan() if target.ndim == 1 else ~target.isnan().any(1)

    def costs(self, output: Tensor, target: Tensor, error: str = "squared") -> Tensor:
        """(N,) losses: cross-entropy, or the mean over dimensions of squared or absolute errors.

        Where the target is missing the entry is 0 and has no gradient.

        Args:
            output: (N, size).
            target: (N,) class indices; or (N,) or (N, D) numbers.
            error: "squared" or "absolute", of a regression.
        """
        z = at_least_float32(output)
        if self.classifies:
            return cross_entropy(z, target, ignore_index=MISSING, reduction="none")
        y = target.reshape(z.shape).to(z.dtype)
        counted = self.counted(target)[:, None]
        difference = torch.where(counted, z - torch.where(counted, y, 0), 0)
        return (difference.abs() if error == "absolute" else difference.square()).mean(1)

    def constant_cost(self, error: str = "squared") -> float:
        """About what the best constant prediction costs: log C, the variance, or the standard deviation."""
        if self.classifies:
            return math.log(self.size)
        std = self.std or (1.0,) * self.size
        return sum(s if error == "absolute" else s * s for s in std) / self.size


def tasks_of(given: Mapping[str, Mapping[str, Any]]) -> list[Task]:
    """Tasks by name, as ``Splits.facts["tasks"]`` has them: the fields of :class:`Task` but its name.

    Raises:
        ValueError: no task, an unknown kind or field, a size out of range.
    """
    if not given:
        raise ValueError("tasks is empty, expected at least one task")
    known = ("kind", "size", "mean", "std", "class_names")
    for name, fields in given.items():
        for field in fields:
            if field not in known:
                raise ValueError(f"task {name!r} has the field {field!r}, expected {known}{did_you_mean(field, known)}")
        for field in ("kind", "size"):
            if field not in fields:
                raise ValueError(f"task {name!r} has no {field}, expected kind and size")
    made = []
    for name, fields in given.items():
        settings: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
        made.append(Task(name, **settings))
    return made


def errors_of(tasks: list[Task], weighting: Any, errors: str | Mapping[str, str] | None) -> dict[str, str]:
    """ "squared" or "absolute" of each regression: what was asked for, else what the weighting's kinds stand for.

    Raises:
        ValueError: an error, name or number of kinds that does not fit.
    """
    asked = {t.name: errors for t in tasks} if isinstance(errors, str) else dict(errors or {})
    kinds = kinds_of(tasks, weighting)
    names = [t.name for t in tasks if not t.classifies]
    for name in asked:
        if name not in [t.name for t in tasks]:
            raise ValueError(f"errors names {name!r}, expected one of {names}{did_you_mean(name, names)}")
    found = {}
    for task in tasks:
        kind = kinds.get(task.name)
        if task.classifies:
            if kind in ("gaussian", "laplace"):
                raise ValueError(f"kind of task {task.name!r} is {kind!r}, expected 'classification': it has classes")
            continue
        if kind in ("classification", "likelihood"):
            raise ValueError(
                f"kind of task {task.name!r} is {kind!r}, expected 'gaussian' or 'laplace': it has numbers"
            )
        meant = {"gaussian": "squared", "laplace": "absolute"}.get(kind or "")
        error = asked.get(task.name) or meant or "squared"
        check_choice(f"errors of task {task.name!r}", error, ERRORS)
        if meant not in (None, error):
            raise ValueError(f"errors of task {task.name!r} is {error!r}, and its kind {kind!r} is of {meant} errors")
        found[task.name] = error
    return found


def kinds_of(tasks: list[Task], weighting: Any) -> dict[str, str]:
    """The weighting's kinds by task; empty where it has none."""
    kinds = getattr(weighting, "kinds", None)
    return {} if kinds is None else dict(zip(order_of(tasks, weighting, len(kinds)), kinds, strict=True))


def order_of(tasks: list[Task], weighting: Any, number: int | None = None) -> list[str]:
    """Task names in the order of the weighting; ValueError unless they are those of the tasks."""
    names = [t.name for t in tasks]
    given = getattr(weighting, "names", None)
    if given is not None and sorted(given) != sorted(names):
        raise ValueError(f"loss {type(weighting).__name__} has the tasks {list(given)}, expected {names}")
    if number is not None and number != len(names):
        raise ValueError(f"loss {type(weighting).__name__} has {number} tasks, expected {len(names)}: {names}")
    return names if given is None else list(given)


def starting_noise(kind: str, cost: float) -> float:
    """The s at which a task of mean loss ``cost`` has the least uncertainty-weighted loss; 0 for a likelihood."""
    if kind == "likelihood" or cost <= 0:
        return 0.0
    if kind == "liebel_korner":
        half = cost / 2
        return math.log((half + math.sqrt(half * half + 4 * half)) / 2)
    return math.log(2 * cost if kind == "classification" else cost)
