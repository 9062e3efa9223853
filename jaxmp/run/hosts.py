"""A run on several processes: how they join, agree, stop together, and how none outlives the others.

Every process runs the same program on its own devices; JAX's distributed runtime joins them, with
process 0 as coordinator. What concerns a person or a file (progress, metrics, report) process 0 does
alone; it decides what depends on the disk, and the others hear of it through `first`. With one
process all of this does nothing and costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import glob
import importlib.util
import os
import pathlib
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from jaxmp.run.config import ConfigError
from jaxmp.run.signals import EXIT_INTERRUPTED, StopRequest

T = TypeVar("T")

HEARTBEAT_SECONDS = 10
"""A process that was not heard of for so long is dead, and the runtime ends the others."""
PARTING_SECONDS = 2.0
"""How long a process that gives up waits for others that give up for the same reason."""
HELD_SECONDS = 60.0
"""How much longer than a stall's limit a thread may hold the interpreter before its stack is written."""
SEEN_SECONDS = 10.0
"""How long a file of process 0 may take to be seen by the others, through caches of a network disk."""

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a process finds the others."""

    coordinator: str = ""
    """HOST:PORT of process 0; "auto": JAX finds it (SLURM, TPU, Open MPI, Kubernetes); "none": alone;
    "": as auto where SLURM or a TPU says so, else alone."""
    processes: int | None = None
    """How many there are; None where JAX finds out."""
    process: int | None = None
    """Which of them this is, from 0."""


def join(launch: Launch) -> bool:
    """Connects to the other processes, if there are any; must come before JAX starts its devices.

    True if connected. Raises ConfigError where the launch is incomplete or the others do not come.
    """
    alone = launch.coordinator == "none" or (not launch.coordinator and not found_cluster())
    numbers = (launch.processes, launch.process)
    if alone and numbers != (None, None):
        raise ConfigError(
            "--processes and --process were given without --coordinator; write the address of "
            "process 0 and a free port there, such as --coordinator 10.0.0.1:1234."
        )
    if alone:
        return False
    address = None if launch.coordinator in ("", "auto") else launch.coordinator
    if address is not None:
        _check_numbers(address, *numbers)
    try:
        jax.distributed.initialize(
            address,
            *numbers,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            cluster_detection_method=None if address is None else "deactivate",
        )
    except (ValueError, RuntimeError) as error:
        if not launch.coordinator:  # a TPU of one host
            return False
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--coordinator {launch.coordinator}: the processes did not find each other ({reason}). "
            "Start them all, each with its own --process, and check that the port is free on the "
            "first and can be reached from the others."
        ) from error
    return True


def found_cluster() -> bool:
    """Whether the environment says that this is one of several processes, or on a TPU, where JAX knows.

    Never inside an allocation of SLURM without `srun`, or with one task.
    """
    if all(name in os.environ for name in _SLURM):
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return False
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")  # set by GKE
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "," in hosts or bool(chips and importlib.util.find_spec("libtpu"))


def _check_numbers(address: str, processes: int | None, process: int | None) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"--coordinator {address} is no address; write HOST:PORT of process 0, such as "
            "10.0.0.1:1234, or auto, or none."
        )
    if processes is None or process is None or not 0 <= process < processes:
        given = f"--processes {processes} --process {process}".replace("None", "(not given)")
        raise ConfigError(
            f"--coordinator needs the number of processes and which of them this is, from 0; "
            f"given: {given}; write for example --processes 2 --process 1."
        )


def finish(action: Callable[[], int]) -> int:
    """What `action` returns, at the end of a program whose processes may have joined.

    A process that fails says why and is gone at once, and so takes the others down: the runtime's own
    farewell would wait for them, and they for it.
    """
    try:
        code = action()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        with contextlib.suppress(Exception):
            print(f"process {jax.process_index()} failed:", file=sys.stderr)
        traceback.print_exc()
        _vanish(1)
    if jax.distributed.is_initialized():
        _part(code)
    return code


def _part(code: int) -> None:
    """Says farewell to the others; if this process gave up it may be the only one."""
    if code not in (0, EXIT_INTERRUPTED):
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(PARTING_SECONDS)
        _vanish(code)
    jax.distributed.shutdown()


def _vanish(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def gather(value: T) -> list[T]:
    """The value that each process gave, in their order. All must call it at the same place."""
    if count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size)))
    room = 1 << (int(sizes.max()) - 1).bit_length()  # few sizes, so few programs
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [pickle.loads(np.asarray(row)[:size].tobytes()) for row, size in zip(rows, sizes)]


def first(action: Callable[[], T]) -> T:
    """What `action` returns or raises on process 0, which alone calls it; on every process."""
    if count() == 1:
        return action()
    value, error = None, None
    if is_first():
        try:
            value = action()
        except Exception as caught:
            error = caught
    value, told = gather((value, error))[0]
    if error is not None or told is not None:
        raise error or told  # pyright: ignore[reportGeneralTypeIssues]
    return value  # pyright: ignore[reportReturnType]


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError, on every process, if one was started with other settings than process 0."""
    told = gather(dict(settings))
    for index, other in enumerate(told):
        for key in (*told[0], *other):
            here, there = told[0].get(key, "unset"), other.get(key, "unset")
            if here != there:
                raise ConfigError(
                    f"{key}={there} on process {index} and {key}={here} on process 0; "
                    "start all processes with the same command."
                )


def check_shared(directory: pathlib.Path) -> None:
    """Raises ConfigError, on every process, unless all see the directory that process 0 sees."""
    if count() == 1:
        return
    name = first(lambda: f".seen-by-all-{uuid.uuid4().hex}")
    if is_first():
        (directory / name).touch()
    deadline = time.monotonic() + SEEN_SECONDS
    while not (seen := (directory / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(directory)  # makes a network disk look again
    blind = [index for index, sees in enumerate(gather(seen)) if not sees]
    if is_first():
        (directory / name).unlink()
    if blind:
        raise ConfigError(
            f"workdir={str(directory)!r} is not the same directory on all hosts: process {blind[0]} "
            "does not see what process 0 wrote there; write --workdir with one that all share."
        )


def stopping(stop: StopRequest, step: int) -> bool:
    """Whether the run is to stop behind `step`: the same answer on every process.

    Of several processes any may be asked. All must call this after every step; the runtime spreads
    the news and chooses a step that none has passed. JAX handles SIGTERM itself, so another signal
    is passed on as one.
    """
    if count() == 1:
        return bool(stop)
    from jax.experimental import multihost_utils

    if stop and not stop.passed_on:
        stop.passed_on = True
        os.kill(os.getpid(), signal.SIGTERM)
    reached = multihost_utils.reached_preemption_sync_point(step)
    if reached and not stop:
        stop.ask("SIGTERM")
        stop.passed_on = True
    return reached


class Watchdog:
    """Writes the stacks of all threads to stderr when no step was finished for `limit` seconds.

    And again every `limit` seconds. Nothing is ended: a long compilation looks the same. With one process,
    or a limit of 0, there is none.

    The thread that watches keeps putting off a timer of `faulthandler`. That goes off where a thread holds
    the interpreter, so that nothing else could write: only then do stacks stand still, and to read moving
    ones without the interpreter's lock can end the process.
    """

    def __init__(self, limit: float):
        self._beats, self._step = 0, 0
        self._over = threading.Event()
        self._limit = limit
        self._thread = None
        if limit > 0 and count() > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, step: int) -> None:
        """A step was finished."""
        self._beats, self._step = self._beats + 1, step

    def close(self) -> None:
        """Watches no longer."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        seen, since, told = -1, time.monotonic(), 0
        while True:
            faulthandler.dump_traceback_later(self._limit + HELD_SECONDS, repeat=True)
            if seen != self._beats:
                seen, since, told = self._beats, time.monotonic(), 0
            elif (still := time.monotonic() - since) > self._limit * (told + 1):
                told += 1
                print(
                    f"process {jax.process_index()}: no step was finished for {still:.0f} s, the last "
                    f"was {self._step}; the stacks of its threads:\n{_stacks()}",
                    file=sys.stderr,
                    flush=True,
                )
            if self._over.wait(min(self._limit / 8, 5.0)):
                faulthandler.cancel_dump_traceback_later()
                return


def _stacks() -> str:
    """The stacks of all threads, outermost call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
