"""From a configuration to parts: each ``_partial_`` node is completed with the facts that its part needs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from counterpoise.recipes.data.datamodule import LabelledData
from counterpoise.recipes.errors import ConfigError, one_sentence
from counterpoise.recipes.module import check_sampler
from counterpoise.recipes.validation import OF_THE_RUN, locate

KINDS = {
    "classes": "one class an example",
    "labels": "a set of labels an example",
    "tasks": "several targets an example",
    "pixels": "a class for each pixel",
    "pairs": "an image and a row of a table an example",
}
REFUSALS = (ValueError, TypeError, OSError, ImportError)  # how parts refuse their settings


@dataclass
class Parts:
    """What a run is made of."""

    recipe: pl.LightningModule
    data: LabelledData
    callbacks: list[pl.Callback]
    loggers: list[Any]
    notes: list[str] = field(default_factory=list)


def build(config: Mapping[str, Any], folder: Path) -> Parts:
    """Everything of a checked configuration.

    Args:
        config: resolved, see :func:`~counterpoise.recipes.validation.check_config`.
        folder: of the run.

    Raises:
        ConfigError: a part refuses its settings, or parts do not fit together.
    """
    pl.seed_everything(config["seed"], verbose=False)
    data = make("data", config["data"], {})
    if not isinstance(data, LabelledData):
        raise ConfigError(
            f"data gave a {type(data).__name__}, expected LabelledData: wrap your data sets with "
            "counterpoise.recipes.data.from_datasets"
        )
    _check_kind(config["recipe"], data)
    facts = facts_of(data, config)
    facts["head"] = "cosine" if "cosine_logits" in _needs(config["loss"]) else "linear"
    loss = make("loss", config["loss"], facts)
    sampler = make("sampler", config.get("sampler"), facts)
    model_node = dict(config["model"])
    if model_node.get("head") == "auto":
        del model_node["head"]
    elif facts["head"] == "cosine" and model_node.get("head") == "linear":
        raise ConfigError("model.head is 'linear', and the loss needs cosines: use model.head=cosine or auto")
    by_target = (config.get("reweighter") or {}).get("by") == "target"
    of_reweighter = {**facts, "group_counts": facts["class_counts"]} if by_target else facts
    parts = {
        "model": make("model", model_node, facts),
        "loss": loss,
        "reweighter": make("reweighter", config.get("reweighter"), of_reweighter),
        "optimizer": make("optimizer", config.get("optimizer"), {}, call=False),
        "scheduler": make("scheduler", config.get("scheduler"), {}, call=False),
    }
    if sampler is not None:
        data.train_sampler = sampler
    data.seed = config["seed"]
    try:
        note = check_sampler(loss, data.train_sampler)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    recipe_node = {key: value for key, value in config["recipe"].items() if key not in OF_THE_RUN}
    recipe = make("recipe", recipe_node, {**facts, **parts})
    _try_out(parts["optimizer"], parts["scheduler"], recipe)
    callbacks = [
        make(f"callbacks.{name}", node, {**facts, "folder": folder / "checkpoints"})
        for name, node in (config.get("callbacks") or {}).items()
    ]
    return Parts(
        recipe,
        data,
        [c for c in callbacks if c is not None],
        _loggers(config.get("logger"), folder),
        [*data.splits.notes, *([note] if note else [])],
    )


def facts_of(data: LabelledData, config: Mapping[str, Any]) -> dict[str, Any]:
    """What only the data and the trainer know, by the names that parts use."""
    shape = data.splits.input_shape
    facts: dict[str, Any] = {
        "num_classes": data.num_classes,
        "class_counts": data.class_counts,
        "targets": data.train_targets if data.splits.kind == "classes" else len(data.splits.train),
        "num_examples": len(data.splits.train),
        "num_epochs": (config.get("trainer") or {}).get("max_epochs") or 1,
        "in_channels": shape[0],
        "in_features": math.prod(shape),
        "seed": config["seed"],
    }
    if "dim" in config["recipe"]:
        facts["embedding_dim"] = config["recipe"]["dim"]
    if data.splits.group_counts is not None:
        facts["group_counts"] = data.splits.group_counts
    if data.splits.train.input_range is not None:
        facts["input_range"] = data.splits.train.input_range
    return {**facts, **data.splits.facts}


def _check_kind(node: Mapping[str, Any], data: LabelledData) -> None:
    """ConfigError unless the data are of the kind that the recipe trains on."""
    wanted = getattr(locate("recipe._target_", node["_target_"]), "targets", data.splits.kind)
    if data.splits.kind != wanted:
        raise ConfigError(
            f"recipe {node.get('name')} trains on {KINDS[wanted]}, and the data have {KINDS[data.splits.kind]}: choose "
            "data that fit, with data=..."
        )


def make(path: str, node: Mapping[str, Any] | None, facts: Mapping[str, Any], *, call: bool = True) -> Any:
    """The part of a node: instantiated, and where it is partial, completed with facts and called.

    Raises:
        ConfigError: the part refuses, or a fact that it needs is not known.
    """
    if not node or "_target_" not in node:
        return None
    try:
        part = instantiate({"_convert_": "all", **node})  # lists and dicts, not OmegaConf's
        if not call or not isinstance(part, functools.partial):
            return part
        return part(**_completion(path, part, facts))
    except InstantiationException as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, REFUSALS):
            raise error.__cause__ from None  # a bug in the part: its traceback tells more than a sentence
        raise ConfigError(f"{path}: {one_sentence(error.__cause__ or error)}") from error
    except ConfigError:
        raise
    except REFUSALS as error:
        raise ConfigError(f"{path}: {one_sentence(error)}") from error


def _completion(path: str, part: functools.partial[Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a partial lacks: those that its Spec names, or without one all that it has parameters for."""
    spec = getattr(part.func, "spec", None)
    given = {}
    for name, parameter in inspect.signature(part.func).parameters.items():
        if name in part.keywords:
            continue
        wanted = spec is None or name in spec.needs or name == "seed"
        if wanted and name in facts:
            given[name] = facts[name]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            hint = ": the data has no groups" if name == "group_counts" else ""
            raise ConfigError(f"{path}.{name} is missing, and {part.func.__qualname__} needs it{hint}")
    return given


def _try_out(optimizer: Any, scheduler: Any, recipe: pl.LightningModule) -> None:
    """Optimiser and scheduler refuse their settings when called, and Lightning calls them after the start."""
    path = "optimizer"
    try:
        made = None if optimizer is None else optimizer([p for p in recipe.parameters() if p.requires_grad])
        path = "scheduler"
        if made is not None and scheduler is not None:
            scheduler(made, total_steps=100)
    except REFUSALS as error:
        raise ConfigError(f"{path}: {one_sentence(error)}") from error


def _needs(node: Mapping[str, Any]) -> tuple[str, ...]:
    return getattr(getattr(locate("loss._target_", node["_target_"]), "spec", None), "needs", ())


def _loggers(node: Mapping[str, Any] | None, folder: Path) -> list[Any]:
    """One logger from a node with a target, several from a mapping of such nodes."""
    if not node:
        return []
    if "_target_" in node:
        return [make("logger", node, {})]
    return [make(f"logger.{name}", part, {}) for name, part in node.items() if part]
