"""The record of a run: JSON lines that hold each step exactly once, whatever interrupts the run.

Order on disk makes it so. Before the checkpoint of step k is written, the records up to k are
flushed to the disk; when a run resumes from k, records behind k, doubles and a half-written last
line are dropped, by writing the rest beside the file and renaming. So a record is there once if its
step is in the state, and not otherwise.

Lines are strict JSON: a value that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jaxmp.run.config import ConfigError

Record = dict[str, Any]


class Writer(Protocol):
    """Where records go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes one record with a `step`."""

    def sync(self) -> None:
        """Returns when all records so far are on the disk."""

    def close(self) -> None:
        """Syncs and lets go of the file."""


class JsonLines:
    """A file of JSON lines, each with a `step`, that continues behind step `after`."""

    def __init__(self, path: pathlib.Path, *, after: int) -> None:
        """Opens `path`, first dropping what lies behind step `after` (0: everything)."""
        self.path = path
        kept = list(_lines_until(path, after)) if path.exists() else []
        beside = path.with_name(path.name + ".new")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)
        self.kept = len(kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; whoever follows the file sees it at once, the disk at the next `sync`."""
        self._file.write(to_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Returns when all lines so far are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes the file."""
        self.sync()
        self._file.close()


class Nowhere:
    """Takes records and keeps none: for all processes but the one that writes."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class TensorBoard:
    """Scalars for TensorBoard, one series a key, through tensorboardX."""

    def __init__(self, directory: pathlib.Path, *, after: int) -> None:
        """Opens event files in `directory`; points behind step `after` of an earlier start are hidden.

        Raises ConfigError where tensorboardX is missing.
        """
        try:
            import tensorboardX
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard needs the package tensorboardX, which is not installed: "
                "pip install tensorboardX, or leave log.tensorboard off."
            ) from error
        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=after + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds every number of the record but its step as a point."""
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, float(value), record["step"])

    def sync(self) -> None:
        """Hands the points so far to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


def to_line(record: Mapping[str, Any]) -> str:
    """The record as one line of strict JSON: non-finite numbers become null."""
    return json.dumps({k: _strict(v) for k, v in record.items()}, allow_nan=False) + "\n"


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file of JSON lines in order; what cannot be read is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [record for _, record in _parsed(file)]


def sync_directory(directory: pathlib.Path) -> None:
    """Makes renames and new names in a directory survive a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lines_until(path: pathlib.Path, after: int) -> Iterator[str]:
    """The lines of steps up to `after`, in rising order, each once."""
    last = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line, record in _parsed(file):
            if last < record["step"] <= after:
                last = record["step"]
                yield line


def _parsed(lines: Iterator[str]) -> Iterator[tuple[str, Record]]:
    """The whole lines that are records, each with its record."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
