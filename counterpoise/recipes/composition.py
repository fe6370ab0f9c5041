"""Hydra's part of a launch: whose files win, which run folder, and what a failed composition means in one sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from counterpoise._core.checks import did_you_mean
from counterpoise.recipes.errors import ConfigError, one_sentence
from counterpoise.recipes.run_folder import new_folder, unfinished
from counterpoise.recipes.validation import GROUPS, check_config, locate, parameters

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)  # ValueError: Hydra's word on group=null
FLAGS_WITH_VALUE = {
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", "--cfg", "-c", "--info", "-i"),
}
RUN_FOLDER_VARIABLE = "COUNTERPOISE_RUN_FOLDER"  # tells the other ranks which folder rank 0 chose


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments with flags behind the overrides, which Hydra wants in one piece."""
    overrides: list[str] = []
    flags: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_flag = argument.startswith("-") or previous in FLAGS_WITH_VALUE
        (flags if is_flag else overrides).append(argument)
    return overrides + flags


def prefer_the_users_configs(arguments: Sequence[str]) -> None:
    """Puts ``--config-dir`` and ``hydra.searchpath`` before our configs: Hydra appends them, and the first hit wins."""
    TheirsFirst.paths = _their_paths(arguments)
    Plugins.instance().register(TheirsFirst)


class TheirsFirst(SearchPathPlugin):
    """Puts ``paths`` before the main configs, the first of them foremost."""

    paths: ClassVar[Sequence[str]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra."""
        for path in self.paths:
            search_path.prepend("project", path, anchor=SearchPathQuery(provider="main"))


def _their_paths(arguments: Sequence[str]) -> list[str]:
    folder = _option(arguments, "--config-dir", "-cd")
    found = [] if folder is None else [f"file://{Path(folder).absolute()}"]
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "hydra.searchpath":
            found += [part for part in (entry.strip(" '\"") for entry in value.strip("[]").split(",")) if part]
    return found


def _option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``."""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else following
    return None


def settle(cfg: DictConfig) -> tuple[dict[str, Any], Path, bool]:
    """A composed configuration, resolved and checked; its run folder; and whether to go on in it.

    Raises:
        ConfigError: see :func:`~counterpoise.recipes.validation.check_config`; or a run folder to go on in that is
            not one, or that ran with other settings.
    """
    resume, output_dir, recipe = cfg.get("resume"), cfg.get("output_dir"), OmegaConf.select(cfg, "recipe.name")
    if not recipe:
        raise ConfigError("recipe.name is missing, expected the name that run folders get")
    check_config(resolved(cfg, Path(".")))
    chosen = os.environ.get(RUN_FOLDER_VARIABLE)
    if chosen is not None and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        folder, going_on = Path(chosen), bool(resume)
    elif resume is None:
        folder, going_on = new_folder(output_dir, recipe), False
    elif resume == "auto":
        found = unfinished(output_dir, recipe, lambda folder: resolved(cfg, folder))
        folder, going_on = (found, True) if found else (new_folder(output_dir, recipe), False)
    else:
        folder, going_on = Path(resume).absolute(), True
        _check_same_run(folder, resolved(cfg, folder))
    os.environ[RUN_FOLDER_VARIABLE] = str(folder)
    return resolved(cfg, folder), folder, going_on


def resolved(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The configuration as a dict, resolved for a run in ``folder``."""
    OmegaConf.register_new_resolver("run_dir", lambda: str(folder), replace=True)
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = error.full_key or one_sentence(error)
        raise ConfigError(f"{key} is missing, give it as {key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(one_sentence(error)) from error


def _check_same_run(folder: Path, config: dict[str, Any]) -> None:
    """Raises ConfigError unless the folder's config.yaml describes this run; more epochs are welcome."""
    file = folder / "config.yaml"
    if not file.exists():
        raise ConfigError(f"resume is {str(folder)!r}, which has no config.yaml: expected a run folder, or auto")
    before = OmegaConf.to_container(OmegaConf.load(file))
    free = ("resume", "output_dir", "logger", "trainer")
    for key in (*GROUPS, "seed"):
        if key not in free and config.get(key) != before.get(key):  # type: ignore[union-attr]
            raise ConfigError(
                f"resume: {key} differs from that of the run in {str(folder)!r}, expected the same command"
            )


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """A failed composition in one sentence, with what was probably meant."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        known = [name for name in error.options if not name.startswith("_")]
        return f"{group}={option} is not there, expected one of {', '.join(known)}{did_you_mean(option, known)}"
    if isinstance(error, OverrideParseException):
        return (
            f"override {error.override!r} cannot be read, expected key=value (quote special characters: 'key=\"a=b\"')"
        )
    text = one_sentence(error).rstrip(".")
    if text.startswith("Config group override"):
        return "a group was given something that is no name, expected group=option, or ~group to leave it out"
    if text.startswith("Ambiguous value"):
        return f"{text}: to run each of them, add -m"
    key = _failed_key(error)
    if key and "@" in key:
        return f"{key} cannot be overridden from there: an experiment starts with the line '# @package _global_'"
    return _about_key(key, arguments) if key else text


def _failed_key(error: BaseException) -> str | None:
    """The key of "Could not override 'a.b'"."""
    text = one_sentence(error)
    return text.split("'")[1] if text.startswith("Could not override '") else None


def _about_key(key: str, arguments: Sequence[str]) -> str:
    parent, _, name = key.rpartition(".")
    config = _compose_without(key, arguments)
    node = config if not parent else OmegaConf.select(config, parent, default=None) if config else None
    known = list(node) if isinstance(node, DictConfig) else []
    takes = _parameters_at(parent, node)
    if name in takes:
        return f"{key} is not set by any file: to add it, write +{key}=..."
    return f"{key} is not a key of the configuration{did_you_mean(name, [*known, *takes])}"


def _parameters_at(parent: str, node: Any) -> list[str]:
    if parent == "trainer":
        import lightning.pytorch as pl

        return list(parameters(pl.Trainer))
    if isinstance(node, DictConfig) and "_target_" in node:
        with suppress(ConfigError):
            return list(parameters(locate(parent, node["_target_"])))
    return []


def _compose_without(key: str, arguments: Sequence[str]) -> DictConfig | None:
    """The configuration without the override of ``key``, to see what could have been meant."""
    from hydra import compose, initialize_config_module

    overrides = [a for a in arguments if "=" in a and not a.startswith("-") and a.partition("=")[0].lstrip("+~") != key]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("counterpoise.recipes.conf", version_base="1.3"):
            return compose(_option(arguments, "--config-name", "-cn") or "train", overrides=overrides)
    except COMPOSITION_ERRORS:
        return None
