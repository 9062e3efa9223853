"""SIGTERM and Ctrl-C ask a run to stop after its step; asking twice by Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 75
"""The exit code of a run that saved on a signal: EX_TEMPFAIL, "try again later" (sysexits.h)."""


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, name: str) -> None:
        """Asks to stop; a second Ctrl-C raises KeyboardInterrupt."""
        if name == "SIGINT" and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = name


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGINT set the request it yields; the old handlers come back after it.

    Handlers belong to the main thread: in another one the request is never set by a signal.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        request.ask(signal.Signals(number).name)

    watched = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in watched}
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
