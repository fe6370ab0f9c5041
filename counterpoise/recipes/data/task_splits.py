"""Splits with several targets an example: what is known of each task, and which targets are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from counterpoise._core import check_number, generator_for
from counterpoise.recipes.data.splits import InMemory, Splits
from counterpoise.recipes.tasks import MISSING, Task, tasks_of


def splits_of_tasks(
    train: InMemory, val: InMemory, test: InMemory, tasks: Mapping[str, Mapping[str, Any]], notes: Sequence[str] = ()
) -> Splits:
    """Splits with a dict of targets by task, and the facts that the multi-task recipe and its weightings need.

    Args:
        train, val, test: targets by task, (N,) class indices or (N,) or (N, D) numbers; NaN or -100 = missing.
        tasks: task name to ``kind``, ``size`` and optionally ``class_names``; mean and std of regressions are added.
        notes: sentences for the report.

    Raises:
        ValueError: a split without any target of a task, a class index out of range.
    """
    known = tasks_of(tasks)
    for name, part in (("train", train), ("val", val), ("test", test)):
        for task in known:
            _check(name, task, part.targets[task.name])
    facts = {task.name: _facts(task, train.targets[task.name], tasks[task.name]) for task in known}
    return Splits(
        train,
        val,
        test,
        class_names=[],
        class_counts=[],
        input_shape=tuple(train[0]["input"].shape),
        notes=[*_notes(known, train), *notes],
        kind="tasks",
        facts={
            "tasks": facts,
            "kinds": {task.name: "classification" if task.classifies else "gaussian" for task in known},
            "num_classes": sum(task.size for task in known),
        },
    )


def without_some(targets: Mapping[str, Tensor], fraction: float, seed: int) -> dict[str, Tensor]:
    """The targets, of each task a ``fraction`` of them missing; which ones is drawn for each task anew."""
    check_number("missing", fraction, 0, 1 - 1e-9)
    found = {}
    for k, (name, values) in enumerate(targets.items()):
        dropped = torch.randperm(len(values), generator=generator_for(seed, k))[: round(fraction * len(values))]
        found[name] = values.clone()
        found[name][dropped] = torch.nan if values.is_floating_point() else MISSING
    return found


def _check(split: str, task: Task, target: Tensor) -> None:
    there = target[task.counted(target)]
    if not len(there):
        raise ValueError(f"{split} has no target of task {task.name!r}, expected at least one that is not missing")
    if task.classifies and (int(there.min()) < 0 or int(there.max()) >= task.size):
        raise ValueError(
            f"{split} holds the class {int(there.max()) if int(there.min()) >= 0 else int(there.min())} of task "
            f"{task.name!r}, expected [0, {task.size - 1}], or {MISSING} where it is missing"
        )


def _facts(task: Task, target: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and for a regression mean and standard deviation of its training targets; 1 for a constant."""
    if task.classifies:
        return dict(given)
    there = target[task.counted(target)].double().reshape(-1, task.size)
    std = there.std(0, correction=0)
    return {**given, "mean": there.mean(0).tolist(), "std": torch.where(std > 0, std, 1).tolist()}


def _notes(tasks: Sequence[Task], train: InMemory) -> list[str]:
    absent = {task.name: int((~task.counted(train.targets[task.name])).sum()) for task in tasks}
    return [
        f"{n:,} of {len(train):,} training targets of task {name!r} are missing." for name, n in absent.items() if n
    ]
