"""A run's directory: it can be written, and it belongs to one experiment, whose settings it remembers."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from typing import Any

from jaxmp.run import config as configs
from jaxmp.run.config import Config, ConfigError
from jaxmp.run.metrics import sync_directory

CONFIG_FILE = "config.json"


def prepare(workdir: pathlib.Path) -> None:
    """Makes the directory if it is not there. Raises ConfigError when it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r} cannot be written ({error.strerror}); "
            "write --workdir with a directory that can."
        ) from error


def remember(workdir: pathlib.Path, config: Config) -> None:
    """Writes the settings to `config.json`, whole or not at all."""
    beside = workdir / (CONFIG_FILE + ".new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(configs.to_json(config), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, workdir / CONFIG_FILE)
    sync_directory(workdir)


def recall(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The settings that the directory's run was last started with, or None if there are none."""
    try:
        stored = json.loads((workdir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def check_same_run(workdir: pathlib.Path, config: Config) -> None:
    """Raises ConfigError, naming the setting, if the directory holds checkpoints of another experiment."""
    stored = recall(workdir)
    changed = configs.difference(stored, config) if stored else None
    if changed:
        key, old, new = changed
        raise ConfigError(
            f"{key}={new} here, but workdir={str(workdir)!r} holds a run with {key}={old}; "
            f"write {key}={old} to resume it, or another --workdir to start a new run."
        )
