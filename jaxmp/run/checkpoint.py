"""Checkpoints on disk that are whole or not there: written behind the run, verified bit by bit.

Orbax writes and reads; this module adds what it does not do. A directory of checkpoints holds

    120/             a checkpoint: Orbax's files, the metadata, and MANIFEST.sha256 over them all
    130.saving       a save that has begun and not ended: the metadata that step 130 will have
    110.corrupt/     a checkpoint found damaged, moved out of the way and otherwise untouched

The metadata (`120/meta/metadata`, JSON, see `record`) names each leaf's path, shape, dtype and
fingerprint, the versions of the libraries, and what the caller gave as `meta`.

A save goes: write 130.saving; Orbax commits 130/ by renaming a finished folder; write its manifest;
remove 130.saving. A process killed before the rename leaves no checkpoint 130. One killed after it
leaves 130/ without a manifest, accepted when every leaf agrees with its fingerprint.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxmp.run import hosts, leaves, manifest
from jaxmp.run import record as records


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is a sentence for the user."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """The stored state is of another model or optimizer than the one wanted."""


class CheckpointDamagedError(CheckpointError):
    """There were checkpoints and none is whole any more. All were set aside, none was deleted."""


class _Damage(Exception):
    """Why one checkpoint cannot be trusted."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back."""

    step: int
    state: Any
    """In the structure, and with the shardings, of the state that was asked for."""
    meta: dict[str, Any]
    """What the caller of `save` gave."""
    notes: list[str]
    """What the user should know: damage, interrupted saves, another JAX. Empty if all was well."""


def open_store(
    directory: str | os.PathLike[str], *, every: int = 1, keep: int = 3, keep_every: int = 0
) -> CheckpointStore:
    """The store of checkpoints in `directory`, which is created if it is not there.

    `due(step)` is true at multiples of `every` (0: never). The newest `keep` checkpoints are kept,
    and for ever those whose step is a multiple of `keep_every` (0: none). Close the store before
    the program ends. One run at a time may use a directory; that is for the caller to see to.

    The processes of a run that JAX has joined use it together, each calling the same methods: the
    directory must be on a disk that all share, where process 0 writes what Orbax does not.
    """
    if keep < 1 or every < 0 or keep_every < 0:
        raise ValueError(
            "Expected keep of at least 1 and every, keep_every of at least 0, "
            f"got {keep=}, {every=}, {keep_every=}."
        )
    return CheckpointStore(Path(directory).resolve(), every, keep, keep_every)


def read(
    directory: str | os.PathLike[str], abstract_state: Any, step: int | None = None
) -> Restored:
    """The checkpoint of a step, without one the newest, verified; a run may go on beside this.

    Nothing in the directory is changed or set aside. Raises CheckpointError, with what there is, where
    the checkpoint is absent or damaged, and CheckpointMismatchError as `restore_latest` does.
    """
    place = Path(directory).resolve()
    with CheckpointStore(place, 0, 1, 0, read_only=True) as store:
        steps = store.steps()
        if not steps or step not in (None, *steps):
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none at all"
            what = "no checkpoint" if step is None else f"no checkpoint {step}"
            raise CheckpointError(f"There is {what} in {place}; {there}.")
        step = steps[-1] if step is None else step
        wanted = records.named(abstract_state)
        try:
            arrays, record = store._read(step, wanted)
        except _Damage as damage:
            raise CheckpointError(
                f"Checkpoint {step} in {place} is damaged: {damage}. "
                f"There are {', '.join(map(str, steps))}."
            ) from damage
        return Restored(step, _filled(abstract_state, wanted, arrays), record["meta"], [])


class CheckpointStore:
    """Saves states of a run by step, and restores the newest that is whole; see `open_store`."""

    def __init__(
        self, directory: Path, every: int, keep: int, keep_every: int, read_only: bool = False
    ):
        self.directory = directory
        self.notes: list[str] = []
        """All there was to tell, also when `restore_latest` found nothing to restore."""
        self._every, self._keep, self._keep_every = every, keep, keep_every
        self._manager: Any = None
        self._finishing: tuple[int, concurrent.futures.Future[None]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if read_only:
            return
        directory.mkdir(parents=True, exist_ok=True)
        for step in hosts.first(self._clear_interrupted):
            self.notes.append(
                f"the run was killed while it saved checkpoint {step}; "
                "the unfinished files were removed"
            )

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        # Of several processes one that fails must not wait for the others to finish the save with it.
        if kind is None or hosts.count() == 1:
            self.close()

    def due(self, step: int) -> bool:
        """True at the steps to save at."""
        return self._every > 0 and step % self._every == 0

    def steps(self) -> list[int]:
        """The checkpoints completely written, oldest first. A save under way does not count."""
        return [s for s in self._folders() if (self._folder(s) / manifest.NAME).exists()]

    def save(self, step: int, state: Any, meta: dict[str, Any], *, wait: bool = False) -> None:
        """Stores a state, returning once it is copied; the writing goes on behind.

        With `wait`, returns when it is on disk. The state may be donated or overwritten right
        afterwards. `meta` must be JSON. If `step` is the newest checkpoint already, it is not
        written again: the state of a run at a step is always the same.

        Fails with CheckpointError when the save before this one failed, such as on a full disk,
        and when there is a checkpoint of a later step.
        """
        self.wait()
        newest = hosts.first(lambda: max(self._folders(), default=-1))
        if step < newest:
            raise CheckpointError(
                f"Step {step} cannot be saved in {self.directory}: checkpoint {newest} is later."
            )
        if step > newest:
            self._begin(step, state, meta)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way is on disk; fails with CheckpointError if it failed."""
        if self._finishing is None:
            return
        (step, finishing), self._finishing = self._finishing, None
        try:
            finishing.result()
        except Exception as error:
            self._give_up(step, error)

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole, or None if none was ever finished.

        `abstract_state` is a tree of arrays or ShapeDtypeStructs. Leaves come back with its
        shardings, on the first local device where it names none. A damaged checkpoint is renamed
        to N.corrupt and the one before it is tried; `notes` says so.

        Fails with CheckpointMismatchError when a leaf's path, shape or dtype is another (nothing
        is cast, nothing set aside), and with CheckpointDamagedError when all are damaged.
        """
        self.wait()
        wanted = records.named(abstract_state)
        for step in reversed(hosts.first(self._folders)):
            arrays, record, damage = {}, {}, ""
            try:
                arrays, record = self._read(step, wanted)
            except _Damage as found:
                damage = str(found)
            if damage := next(filter(None, hosts.gather(damage)), ""):
                self._set_aside(step, damage)
                continue
            if not self._sealed(step):
                hosts.first(lambda step=step: self._seal(step))
                self.notes.append(
                    f"the run was killed while it finished checkpoint {step}; "
                    "all of it is there and agrees with its fingerprints"
                )
            self._note_resume(step, record["versions"])
            state = _filled(abstract_state, wanted, arrays)
            return Restored(step, state, record["meta"], list(self.notes))
        self._refuse_to_begin_anew()
        return None

    def close(self) -> None:
        """Waits for the save under way and lets the directory go; fails as `wait` does."""
        try:
            self.wait()
            if self._manager is not None:
                self._manager.close()
        finally:
            self._manager = None
            self._thread.shutdown()

    # Writing.

    def _begin(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        named = records.named(state)
        arrays = {name: leaves.to_array(leaf) for name, leaf in named.items()}
        record = records.describe(step, named, arrays, meta)
        self._check_one_state(step, record["leaves"])
        # Orbax refuses arrays without elements; the metadata says all there is to say about them.
        stored = {name: array for name, array in arrays.items() if array.size}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(record)
        )
        try:
            text = records.text(record)
            hosts.first(lambda: manifest.write_atomically(self._journal(step), text))
            # False, without a word, when Orbax believes that a later step is stored.
            if not self._orbax().save(step, args=items):
                raise RuntimeError("Orbax declined to save it")
        except Exception as error:
            self._give_up(step, error)
        self._finishing = step, self._thread.submit(self._finish, step, self._orbax())

    def _finish(self, step: int, manager: Any) -> None:
        """Seals the step once Orbax has committed it. Runs on the store's own thread."""
        manager.wait_until_finished()
        if hosts.is_first():
            self._seal(step)

    def _seal(self, step: int) -> None:
        manifest.write(self._folder(step))
        self._journal(step).unlink(missing_ok=True)

    def _give_up(self, step: int, error: Exception) -> NoReturn:
        """Clears a failed save away, so that a later one can succeed, and tells the caller."""
        manager, self._manager = self._manager, None
        if manager is not None and hosts.count() == 1:  # else it may wait for the others
            with contextlib.suppress(Exception):  # It repeats the failure that is told below.
                manager.close()
        if hosts.is_first():
            self._clear_interrupted()
        steps = self.steps()
        before = f"Checkpoint {steps[-1]} is untouched." if steps else "There is none before it."
        raise CheckpointError(
            f"Checkpoint {step} could not be written to {self.directory}: {_reason(error)}. "
            f"{before} Make room there or choose another directory, then start again to resume."
        ) from error

    def _check_one_state(self, step: int, described: dict[str, Any]) -> None:
        """Fails if a leaf that several processes hold is not the same on all of them."""
        told = hosts.gather({name: leaf["fingerprint"] for name, leaf in described.items()})
        for index, prints in enumerate(told):
            for name, digits in prints.items():
                if digits != told[0][name]:
                    raise CheckpointError(
                        f"Checkpoint {step} was not written: leaf {name} on process {index} is not "
                        "what it is on process 0, so the run has fallen apart. Start it again, which "
                        "resumes from the checkpoint before; if it comes back, suspect the hardware."
                    )

    # Reading.

    def _read(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The stored arrays by name, and the record; _Damage if a bit is not what was written."""
        import orbax.checkpoint as ocp

        # A save cut short after its commit has no manifest yet: there the fingerprints decide.
        sealed = self._sealed(step)
        if sealed and (damage := hosts.first(lambda: manifest.difference(self._folder(step)))):
            raise _Damage(damage)
        record = self._ask_orbax(step, sealed, meta=ocp.args.JsonRestore()).meta
        if not sealed and records.text(record) != self._journal(step).read_text():
            raise _Damage("its metadata is not what was to be written")
        if difference := records.mismatch(record, wanted):
            raise CheckpointMismatchError(
                f"Checkpoint {step} in {self.directory} is of another model or optimizer: "
                f"{difference}. Use the settings it was written with, or another directory."
            )
        requests = {name: leaves.to_request(leaf) for name, leaf in wanted.items()}
        requests = {name: request for name, request in requests.items() if request.size}
        arrays = self._ask_orbax(step, sealed, state=ocp.args.StandardRestore(requests)).state
        if name := records.changed_leaf(record, arrays):
            raise _Damage(f"leaf {name} differs from its fingerprint")
        return arrays, record

    def _ask_orbax(self, step: int, sealed: bool, **items: Any) -> Any:
        import orbax.checkpoint as ocp

        try:
            return self._orbax().restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            if not sealed:
                raise _Damage(f"Orbax cannot read it: {_reason(error)}") from error
            # Every file is as it was written. Whatever is wrong (memory, versions) is elsewhere.
            raise CheckpointError(
                f"Checkpoint {step} in {self.directory} is undamaged, but Orbax cannot read it: "
                f"{_reason(error)}."
            ) from error

    def _set_aside(self, step: int, damage: str) -> None:
        finished = self._sealed(step)
        place = hosts.first(lambda: self._move(step, "corrupt" if finished else "unfinished"))
        if self._manager is not None:
            self._manager.reload()  # Else it would decline to save before this step is passed.
        state = "is damaged" if finished else "was not finished when the run was killed"
        self.notes.append(f"checkpoint {step} {state}: {damage}; set aside as {place.name}")

    def _move(self, step: int, name: str) -> Path:
        place, number = self.directory / f"{step}.{name}", 1
        while place.exists():
            number += 1
            place = self.directory / f"{step}.{name}-{number}"
        self._folder(step).rename(place)
        self._journal(step).unlink(missing_ok=True)
        return place

    def _note_resume(self, step: int, versions: dict[str, str]) -> None:
        if self.notes and "; set aside as " in self.notes[-1]:
            self.notes[-1] += f"; resuming from {step}"
        if versions["jax"] != jax.__version__:
            self.notes.append(
                f"checkpoint {step} was written with jax {versions['jax']} and this is jax "
                f"{jax.__version__}: the state is the same, bit for bit, but later steps may "
                "differ from those of the other version in their last bits"
            )

    def _refuse_to_begin_anew(self) -> None:
        """Fails if there were whole checkpoints once: to give them up is for the user to decide."""
        aside = sorted(place.name for place in self.directory.glob("*.corrupt*"))
        if aside:
            raise CheckpointDamagedError(
                f"No checkpoint in {self.directory} is whole any more; they were set aside as "
                f"{', '.join(aside)}. Put back a good copy of one under its number, or begin anew "
                "in another directory." + "".join(f"\n{note}" for note in self.notes)
            )

    # The directory.

    def _orbax(self) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            policies = [ocp.checkpoint_managers.LatestN(self._keep)]
            if self._keep_every:
                policies += [ocp.checkpoint_managers.EveryNSteps(self._keep_every)]
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
                create=False,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _journal(self, step: int) -> Path:
        return self.directory / f"{step}.saving"

    def _sealed(self, step: int) -> bool:
        return hosts.first(lambda: not self._journal(step).exists())

    def _folders(self) -> list[int]:
        """Steps that have a folder, oldest first, finished or not, whole or not."""
        places = self.directory.iterdir() if self.directory.is_dir() else ()
        names = (place.name for place in places if place.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def _clear_interrupted(self) -> list[int]:
        """Removes what saves left that never reached their commit; returns their steps."""
        for place in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(place)
        interrupted = []
        for journal in self.directory.glob("*.saving"):
            folder = self._folder(int(journal.stem))
            if not folder.exists():
                interrupted.append(int(journal.stem))
            if not folder.exists() or (folder / manifest.NAME).exists():
                journal.unlink()
        return sorted(interrupted)


def _filled(abstract_state: Any, wanted: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """The state, of the arrays by name."""
    found = [leaves.from_array(leaf, arrays.get(name)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), found)


def _reason(error: BaseException) -> str:
    """The first line of what an error says, or that the disk is full."""
    text = str(error).strip()
    if "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")
