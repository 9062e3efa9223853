"""What a person sees of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

Record = Mapping[str, Any]


class Progress(Protocol):
    """Shows a run while it goes on."""

    def step(self, record: Record) -> None:
        """A step is done."""

    def note(self, text: str) -> None:
        """Something a person should know, as a line of its own."""

    def close(self) -> None:
        """No more will come."""


def describe(record: Record, unit: str) -> str:
    """A step's figures in a few words: loss, gradient norm, loss scale, throughput."""
    parts = [f"loss {_number(record['loss'])}", f"grad norm {_number(record['grad_norm'])}"]
    if record["loss_scale"] != 1:
        parts.append(f"scale {record['loss_scale']:g}")
    if record["skipped"]:
        parts.append("SKIPPED")
    parts.append(f"{_rounded(record[unit + '_per_second'])} {unit}/s")
    return "  ".join(parts)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _rounded(rate: float) -> str:
    """A rate to three digits: 941, 43.1k, 2.07M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{letter}"
    return f"{rate:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.4 s, 1 min 12 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


class Plain:
    """A line every `every` steps, for logs and pipes."""

    def __init__(self, *, total: int, every: int, unit: str) -> None:
        self._total, self._every, self._unit = total, every, unit
        self._first: tuple[int, float] | None = None

    def step(self, record: Record) -> None:
        """Prints one step in `every`, and the last."""
        step, now = record["step"], time.perf_counter()
        # The first step seen only starts the clock of the estimate.
        first, then = self._first = self._first or (step, now)
        if step % self._every and step != self._total:
            return
        rate = (now - then) / max(step - first, 1)
        left = f"  {duration(rate * (self._total - step))} left" if step < self._total else ""
        width = len(str(self._total))
        self.note(f"step {step:>{width}}/{self._total}  {describe(record, self._unit)}{left}")

    def note(self, text: str) -> None:
        """Prints a line."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing to tidy up."""


class Silent:
    """Shows nothing: for all processes but the one that speaks."""

    def step(self, record: Record) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Live:
    """A bar with the newest figures and the time left, redrawn in place by rich."""

    def __init__(self, *, total: int, done: int, unit: str) -> None:
        from rich import console, progress

        self._unit = unit
        terminal = console.Console()
        bar = [progress.BarColumn(bar_width=20)] if terminal.width >= 105 else []
        self._bar = progress.Progress(
            progress.TextColumn("{task.completed}/{task.total}"),
            *bar,
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(compact=True),
            console=terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, figures="")
        self._bar.start()

    def step(self, record: Record) -> None:
        """Moves the bar."""
        figures = describe(record, self._unit)
        self._bar.update(self._task, completed=record["step"], figures=figures)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()


def start(*, total: int, done: int, every: int, unit: str) -> Progress:
    """A live bar where the output is a terminal and rich is installed, else plain lines."""
    if sys.stdout.isatty():
        try:
            return Live(total=total, done=done, unit=unit)
        except ImportError:
            pass
    return Plain(total=total, every=every, unit=unit)
