"""The run folder: config.yaml, metrics.json, history.csv, predictions.npz, checkpoints/, report.html."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np
import torch
import yaml

import counterpoise
from counterpoise.recipes.errors import ConfigError, one_sentence

SCHEMA_VERSION = 1
NOT_HASHED = ("logger", "output_dir", "resume", "vars")  # what vars say stands where they are interpolated


def new_folder(output_dir: str | Path, recipe: str) -> Path:
    """A fresh <output_dir>/<recipe>/<date>/<time>; runs started in the same second get -1, -2, ... behind it."""
    now = datetime.now()
    base = Path(output_dir).absolute() / recipe / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S")
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        folder = base.with_name(base.name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"output_dir {str(output_dir)!r} cannot be written: {error.strerror}") from error
        return folder
    raise ConfigError(f"output_dir {str(output_dir)!r} holds a thousand runs of this second, expected fewer")


def open_folder(folder: Path) -> None:
    """Makes the folder and its ``checkpoints``; ConfigError where nothing can be written."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank may have been faster
    except OSError as error:
        raise ConfigError(f"run folder {str(folder)!r} cannot be written: {error.strerror}") from error


def drop_if_empty(folder: Path) -> None:
    """Removes a run folder that holds nothing, and those of its day and recipe if they then hold nothing either."""
    for empty in (folder / "checkpoints", folder, *folder.parents[:2]):
        try:
            empty.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder, so that two processes never train into it; ConfigError where another one does.

    The lock ends with the process, however it ends. Without ``fcntl`` (Windows) nothing is locked.
    """
    with (folder / ".lock").open("w") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"run folder {str(folder)!r} is in use by another process") from error
        yield


def in_use(folder: Path) -> bool:
    """Another process trains into the folder."""
    if not (folder / ".lock").exists():
        return False
    try:
        with locked(folder):
            return False
    except ConfigError:
        return True


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve digits that two configurations share if they describe the same run."""
    kept = {key: value for key, value in config.items() if key not in NOT_HASHED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def unfinished(output_dir: str | Path, recipe: str, config_in: Callable[[Path], Mapping[str, Any]]) -> Path | None:
    """The newest run of this very configuration that has not completed and that no process is at work on.

    Args:
        output_dir: where runs go; recipe: the runs of which one.
        config_in: the configuration as it would be resolved in a run folder.
    """
    files = Path(output_dir).absolute().glob(f"{recipe}/*/*/metrics.json")
    for folder in (file.parent for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True)):
        metrics = read_metrics(folder)
        ours = metrics.get("config_hash") == config_hash(config_in(folder))
        if ours and metrics.get("status") != "completed" and not in_use(folder):
            return folder
    return None


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json, empty where there is none that can be read."""
    try:
        return json.loads((folder / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def write_text(file: Path, text: str) -> None:
    """Writes aside and moves into place."""
    aside = file.with_name(file.name + ".part")
    aside.write_text(text)
    os.replace(aside, file)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.yaml, resolved."""
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """metrics.json, schema version 1."""
    write_text(folder / "metrics.json", json.dumps({"schema_version": SCHEMA_VERSION, **metrics}, indent=2))


def write_predictions(folder: Path, predictions: Mapping[str, torch.Tensor]) -> None:
    """predictions.npz: index, target, logits, and group where known."""
    aside = folder / "predictions.part.npz"
    arrays: dict[str, Any] = {name: x.numpy() for name, x in predictions.items()}
    np.savez_compressed(aside, **arrays)
    os.replace(aside, folder / "predictions.npz")


def environment(device: str, world_size: int) -> dict[str, Any]:
    """What the run ran on, as far as it matters for its numbers."""
    import lightning

    return {
        "counterpoise": counterpoise.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def command_line() -> str:
    """The command that started this process."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def forget_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of an earlier run in the folder: a new run must never be taken for it."""
    for file in (folder / "checkpoints").glob("*.ckpt*"):
        file.unlink()


def check_checkpoint(file: Path) -> None:
    """Raises ConfigError unless a checkpoint holds plain data that loads."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # every kind of damage raises its own type
        raise ConfigError(
            f"checkpoint {str(file)!r} cannot be read ({one_sentence(error)[:120]}): delete it to start the run anew"
        ) from error
