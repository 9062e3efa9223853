"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to stop after its step; a second Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 75
"""The exit code of a run that saved on a signal: EX_TEMPFAIL, "try again later" (sysexits.h)."""


SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
"""Those that ask a run to stop."""


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.passed_on = False
        """Whether the other processes of the run know; see `hosts.stopping`."""

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, name: str) -> None:
        """Asks to stop; a second Ctrl-C raises KeyboardInterrupt."""
        if name == "SIGINT" and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = name


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Within the block SIGTERM, SIGUSR1 and SIGINT set the request that it yields; the old handlers come
    back after it.

    Handlers belong to the main thread: in another one the request is never set by a signal.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        request.ask(signal.Signals(number).name)

    watched = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in watched}
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
