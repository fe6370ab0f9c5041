"""Checks a composed configuration before anything is built: unknown keys, wrong types, targets that do not import."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from counterpoise._core.checks import did_you_mean
from counterpoise.recipes.errors import ConfigError, one_sentence

GROUPS = (
    "recipe",
    "data",
    "model",
    "loss",
    "reweighter",
    "sampler",
    "optimizer",
    "scheduler",
    "trainer",
    "logger",
    "callbacks",
)
NEEDED = ("recipe", "data", "model", "loss")
SET_BY_THE_RUN = (
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "logger",
    "use_distributed_sampler",
)
TOP_LEVEL = (*GROUPS, "seed", "output_dir", "resume", "vars")
OF_THE_RUN = ("name", "monitor")  # keys of the recipe node that its class is not given
HYDRA_WORDS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for the first thing in a resolved configuration that cannot work."""
    for key in config:
        if key not in TOP_LEVEL:
            raise ConfigError(f"{key} is not a key of the configuration{did_you_mean(key, TOP_LEVEL)}")
    if isinstance(config.get("seed"), bool) or not isinstance(config.get("seed"), int) or config["seed"] < 0:
        raise ConfigError(f"seed is {config.get('seed')!r}, expected an integer >= 0")
    for group in GROUPS:
        _walk(group, config.get(group))
    for group in NEEDED:
        if "_target_" not in (config.get(group) or {}):
            raise ConfigError(f"{group} has no _target_, expected an option of that group")
    for key in config.get("trainer") or {}:
        if key in SET_BY_THE_RUN:
            raise ConfigError(f"trainer.{key} is set by the run itself, expected it left out")
    check_call("trainer", pl.Trainer, config.get("trainer") or {}, partial=True)


def _walk(path: str, node: Any) -> None:
    """Checks every node with a ``_target_`` below ``path``."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            target = locate(f"{path}._target_", node["_target_"])
            ours = OF_THE_RUN if path == "recipe" else ()
            settings = {key: value for key, value in node.items() if key not in (*HYDRA_WORDS, *ours)}
            check_call(path, target, settings, partial=bool(node.get("_partial_")) or "_args_" in node)
        for key, value in node.items():
            _walk(f"{path}.{key}", value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for i, value in enumerate(node):
            _walk(f"{path}[{i}]", value)


def locate(path: str, target: Any) -> Callable[..., Any]:
    """The object that a dotted ``target`` names; ConfigError where there is none."""
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{path} is {target!r}, expected a dotted name such as package.module.Class")
    module_name, _, name = target.rpartition(".")
    try:
        owner: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        owner = _class_in(module_name)
        if owner is None:
            raise ConfigError(f"{path} is {target!r}, but {one_sentence(error)}") from error
    if not hasattr(owner, name):
        raise ConfigError(f"{path}: {module_name} has no {name}{did_you_mean(name, dir(owner))}")
    return getattr(owner, name)


def _class_in(dotted: str) -> Any:
    """A class named as module.Class, for targets such as module.Class.method."""
    module_name, _, name = dotted.rpartition(".")
    try:
        return getattr(import_module(module_name), name, None)
    except (ModuleNotFoundError, ValueError):
        return None


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a callable by name; empty where they cannot be read."""
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return {}


def check_call(path: str, target: Callable[..., Any], settings: Mapping[str, Any], *, partial: bool) -> None:
    """Raises ConfigError unless ``target`` takes these keyword arguments, of these types."""
    known = parameters(target)
    if not known:
        return
    name = getattr(target, "__qualname__", str(target)).removesuffix(".__init__")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key, value in settings.items():
        if key not in known:
            if takes_any:
                continue
            raise ConfigError(f"{path}.{key} is not a parameter of {name}{did_you_mean(key, known)}")
        annotation = _hints(target).get(key, known[key].annotation)
        if not accepts(annotation, value):
            raise ConfigError(f"{path}.{key} is {value!r} ({type(value).__name__}), expected {spell(annotation)}")
    if partial:
        return
    for key, parameter in known.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and key not in settings:
            raise ConfigError(f"{path}.{key} is missing, and {name} needs it")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations that only exist for type checkers; the plain ones are used instead
        return {}


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a plain ``value`` can be what ``annotation`` asks for; what cannot be judged is accepted."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(option, value) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation in (str, Path):
        return isinstance(value, str)
    if origin in (list, tuple, Sequence) or annotation in (list, tuple, Tensor):
        return isinstance(value, Sequence) and not isinstance(value, str)
    return not (value is None and annotation in (Mapping, dict))


def spell(annotation: Any) -> str:
    """An annotation as a person would read it."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(spell(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(repr(option) for option in typing.get_args(annotation))
    if annotation in (None, type(None)):
        return "null"
    return getattr(annotation, "__name__", str(annotation).replace("typing.", ""))
