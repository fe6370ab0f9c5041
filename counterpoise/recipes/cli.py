"""``counterpoise-train``: composes the configuration with Hydra, checks it, runs it, prints the table.

Exit codes: 0 done; 2 a mistake in the configuration, told in one sentence before any training; 1 anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

CONFIG_MODULE = "counterpoise.recipes.conf"


def train() -> None:
    """Entry point of ``counterpoise-train``."""
    try:
        import hydra
        import lightning.pytorch  # noqa: F401

        from counterpoise.recipes import composition
    except ModuleNotFoundError as missing:
        sys.exit(_complain(f"counterpoise-train needs {missing.name}: pip install 'counterpoise[recipes]'"))

    sys.path.insert(0, str(Path.cwd()))  # the user's own modules, as python -m has it
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed by Hydra
    sys.argv[1:] = composition.overrides_first(sys.argv[1:])
    composition.prefer_the_users_configs(sys.argv[1:])
    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="train")(_task)()
    except composition.COMPOSITION_ERRORS as error:  # those of the job itself end in _task
        sys.exit(_complain(composition.explain(error, sys.argv[1:])))


def _complain(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _task(cfg: Any) -> None:
    """One job: also what each job of a multirun calls."""
    from rich.console import Console

    from counterpoise.recipes.composition import settle
    from counterpoise.recipes.errors import ConfigError
    from counterpoise.recipes.report import results_table

    _quiet()
    try:
        result = launch(*settle(cfg))
    except ConfigError as error:  # SystemExit passes through Hydra without its own report of the job
        sys.exit(_complain(str(error)))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    if result is None or result.report is None:
        return
    console = Console()
    console.print(results_table(result.metrics))
    console.print(f"report: {os.path.relpath(result.report)}", soft_wrap=True)


def launch(config: dict[str, Any], folder: Path, resume: bool) -> Any:
    """Builds and runs a checked configuration in its run folder, which goes again if nothing came to lie in it."""
    from counterpoise.recipes.build import build
    from counterpoise.recipes.run import fit
    from counterpoise.recipes.run_folder import drop_if_empty

    try:
        parts = build(config, folder)
        return fit(
            parts.recipe,
            parts.data,
            folder=folder,
            seed=config["seed"],
            resume=resume,
            callbacks=parts.callbacks,
            loggers=parts.loggers,
            config=config,
            notes=parts.notes,
            **(config.get("trainer") or {}),
        )
    finally:
        drop_if_empty(folder)


def _quiet() -> None:
    """Lightning's announcements of what was not asked for."""
    import logging

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*dataloader is not resumable.*"
    )  # the data module restores the position
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    train()
