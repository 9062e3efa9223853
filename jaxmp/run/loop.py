"""The run: build, resume, step, evaluate, save, report. The same call again goes on where it stopped.

What is on the disk at any moment agrees with the newest checkpoint: the records of a step are there
before the checkpoint that contains it, and those behind a checkpoint are dropped when a run resumes
from it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import time
from typing import Any

import jax

from jaxmp.run import (
    build,
    checkpoint,
    culprit,
    data,
    hosts,
    instruments,
    metrics,
    progress,
    signals,
    validate,
    workdir,
)
from jaxmp.run import config as configs
from jaxmp.run.config import Config, ConfigError
from jaxmp.run.watch import RunFailed, Watch
from jaxmp.training import mesh as meshes

METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"
INSTRUMENTS_FILE = "instruments.jsonl"
"""Gradients by depth, every `log.flow` steps."""
FIRST_KEYS = ("loss", "grad_norm", "loss_scale", "skipped", "learning_rate")
"""What every record has, in this order behind `step`; the model's own metrics and the speed follow."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    """Batches trained on, over all starts."""
    exit_code: int
    """0 finished, 1 given up, 75 stopped by a signal and saved."""
    evaluation: dict[str, Any]
    """The newest evaluation on held-out data; {} before the first."""
    message: str
    """The end in a sentence."""


def train(
    config: Config,
    *,
    name: str = "run",
    source: data.Source | None = None,
    stop: signals.StopRequest | None = None,
) -> Outcome:
    """Runs the experiment in its work directory, from its newest checkpoint if there is one.

    `source` is read in place of what `config.data` describes. `stop` is asked after every step;
    once set, the run saves and returns with exit code 75. Raises ConfigError for a user's mistake,
    CheckpointError when checkpoints cannot be written or are all damaged.
    """
    validate.check(config)
    hosts.check_alike(configs.to_json(config))
    stop = signals.StopRequest() if stop is None else stop
    where = pathlib.Path(config.workdir or f"runs/{name}").expanduser()
    parts = build.build(config, source)
    workdir.prepare(where)
    hosts.check_shared(where)
    with _store(where, config) as store:
        if store.steps():
            workdir.check_same_run(where, config)
        start = time.perf_counter()
        abstract, step = build.compile_step(parts)
        compiled = time.perf_counter() - start
        state, done = _restore(store, abstract, config)
        hosts.first(lambda: workdir.remember(where, config))
        shown = _progress(config, done, parts.source.unit)
        with contextlib.closing(shown):
            recorder = Recorder(parts, where, done, shown)
            for note in (*store.notes, _opening(parts, name, where, abstract, done, compiled)):
                shown.note(note)
            state = build.first_state(parts) if state is None else state
            with contextlib.closing(recorder):
                outcome = _steps(parts, step, state, done, store, recorder, stop)
        if outcome.exit_code != signals.EXIT_INTERRUPTED and config.log.report:
            hosts.first(lambda: _report(where, name, shown))
    return outcome


def _steps(
    parts: build.Experiment,
    step: build.Step,
    state: Any,
    done: int,
    store: checkpoint.CheckpointStore,
    recorder: Recorder,
    stop: signals.StopRequest,
) -> Outcome:
    """The loop itself: steps `done + 1` to the last, or to where it is asked to stop or fails."""
    config, saved = parts.config, done
    evaluate = meshes.in_turn(jax.jit(parts.evaluate))
    flow = meshes.in_turn(build.whole_jit(parts, instruments.flow_of(parts)))
    validation = tuple(build.place_whole(parts, batch) for batch in parts.source.validation)
    meta = {"config": configs.to_json(config)}
    recorder.ready()
    start = time.perf_counter()
    try:
        for index in range(done, config.steps):
            if hosts.stopping(stop, done):
                break
            batch = build.place(parts, parts.source.batch_at(index))
            state, step_metrics = step(state, batch)
            done = index + 1
            recorder.step(done, step_metrics, state)
            if _due(done, config.log.flow):
                recorder.flow(done, flow(state, batch))
            last = done == config.steps
            if last or _due(done, config.eval.every):
                recorder.flush()
                held_out = build.evaluate_all(evaluate, state, validation)
                recorder.evaluation(done, held_out)
            stopping = hosts.stopping(stop, done)
            if last or stopping or store.due(done):
                recorder.sync()
                store.save(done, state, meta, wait=last or stopping)
                saved = done
            recorder.ready()
        if saved < done:
            recorder.sync()
            store.save(done, state, meta, wait=True)
    except RunFailed as failure:
        return Outcome(failure.step, 1, recorder.newest, str(failure))
    if done < config.steps:
        place = f"and saved at step {done}" if done else "before the first step"
        message = f"stopped by {stop.signal} {place}; the same command goes on."
        return Outcome(done, signals.EXIT_INTERRUPTED, recorder.newest, message)
    spent = progress.duration(time.perf_counter() - start)
    return Outcome(
        done, 0, recorder.newest, f"step {done} done in {spent}: {describe(recorder.newest)}"
    )


class Recorder:
    """Takes each step's metrics from the device one step late, and writes, shows and judges them."""

    def __init__(
        self, parts: build.Experiment, where: pathlib.Path, done: int, shown: progress.Progress
    ) -> None:
        """Opens the files behind step `done`."""
        config, source = parts.config, parts.source
        self._key = source.unit + "_per_second"
        self._units = config.batch_size * source.units_per_example
        self._shown = shown
        self._steps, self._evals, self._board = metrics.Nowhere(), metrics.Nowhere(), None
        self._instruments: metrics.Writer = metrics.Nowhere()
        if hosts.is_first():
            self._instruments = metrics.JsonLines(where / INSTRUMENTS_FILE, after=done)
            self._steps = metrics.JsonLines(where / METRICS_FILE, after=done)
            self._evals = metrics.JsonLines(where / EVAL_FILE, after=done)
        if hosts.is_first() and config.log.tensorboard:
            self._board = metrics.TensorBoard(where / "tensorboard", after=done)
        self._watch = Watch(config)
        self._culprit = culprit.Culprit(parts, where)
        self._watchdog = hosts.Watchdog(config.log.stall)
        # One short of what ends a run: it went on after these.
        newest = collections.deque[Any](maxlen=config.loss_scale.patience - 1)
        newest.extend(metrics.read(where / METRICS_FILE) if hosts.is_first() else ())
        for record in hosts.first(lambda: newest):
            self._watch.see(record)
        evaluations = hosts.first(lambda: metrics.read(where / EVAL_FILE)[-1:])
        self.newest: dict[str, Any] = next(iter(evaluations), {})
        self._pending: tuple[int, Any] | None = None
        self._state: Any = None
        self._flow: tuple[int, Any] | None = None
        self._clock = time.perf_counter()

    def step(self, number: int, values: dict[str, jax.Array], state: Any) -> None:
        """Takes metrics and state of a step that may still be running; records the step before."""
        before, self._pending, self._state = self._pending, (number, values), state
        if before is not None:
            self._record(*before)

    def flow(self, number: int, flows: Any) -> None:
        """Takes the gradients by depth at a step that `step` took; they are recorded with it."""
        self._flow = number, flows

    def flush(self) -> None:
        """Waits for the newest step and records it. Raises RunFailed if the run has gone wrong."""
        if self._pending is not None:
            (number, values), self._pending = self._pending, None
            self._record(number, values)

    def sync(self) -> None:
        """As `flush`, and all records are on the disk when it returns."""
        self.flush()
        for writer in (self._steps, self._evals, self._instruments):
            writer.sync()

    def ready(self) -> None:
        """Starts the clock anew if nothing is in flight, so that pauses do not count as steps."""
        if self._pending is None:
            self._clock = time.perf_counter()

    def evaluation(self, number: int, values: dict[str, float]) -> None:
        """Records and shows an evaluation after step `number`."""
        self.newest = {"step": number, **values}
        self._evals.write(self.newest)
        if self._board is not None:
            self._board.write({"step": number, **{f"eval_{k}": v for k, v in values.items()}})
        self._shown.note(f"step {number}  held out: {describe(self.newest)}")

    def close(self) -> None:
        """Closes the files."""
        self._watchdog.close()
        for writer in (self._steps, self._evals, self._instruments, self._board):
            if writer is not None:
                writer.close()

    def _record(self, number: int, values: dict[str, jax.Array]) -> None:
        fetched = {key: value.item() for key, value in jax.device_get(values).items()}
        self._watchdog.beat(number)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        record = {"step": number, **{key: fetched.pop(key) for key in FIRST_KEYS}, **fetched}
        record[self._key] = self._units / max(seconds, 1e-9)
        self._steps.write(record)
        if self._board is not None:
            self._board.write(record)
        if self._flow is not None and self._flow[0] == number:
            (_, flows), self._flow = self._flow, None
            by_depth = {"step": number, **instruments.scalars(*jax.device_get(flows))}
            self._instruments.write(by_depth)
            if self._board is not None:
                self._board.write(by_depth)
        self._shown.step(record)
        if note := self._culprit.see(record, self._state, self._pending and self._pending[1]):
            self._shown.note(note)
            self._clock = time.perf_counter()
        self._watch.see(record)


def _progress(config: Config, done: int, unit: str) -> progress.Progress:
    if not hosts.is_first():
        return progress.Silent()
    return progress.start(total=config.steps, done=done, every=config.log.every, unit=unit)


def describe(evaluation: dict[str, Any]) -> str:
    """An evaluation in words: "loss 0.2461, accuracy 93.9%"."""
    words = []
    for key, value in evaluation.items():
        if key != "step":
            name = key.replace("_", " ")
            words.append(
                f"{name} {value:.1%}" if key.endswith("accuracy") else f"{name} {value:.4f}"
            )
    return ", ".join(words) or "not evaluated yet"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _store(where: pathlib.Path, config: Config) -> checkpoint.CheckpointStore:
    settings = config.checkpoint
    try:
        return checkpoint.open_store(
            where / "checkpoints",
            every=settings.every,
            keep=settings.keep,
            keep_every=settings.keep_every,
        )
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"workdir: {error}") from error


def _restore(
    store: checkpoint.CheckpointStore, abstract: Any, config: Config
) -> tuple[Any | None, int]:
    """(state, or None for a fresh start; batches done). Raises ConfigError for another model's."""
    try:
        restored = store.restore_latest(abstract)
    except checkpoint.CheckpointMismatchError as error:
        raise ConfigError(f"workdir: {error}") from error
    if restored is None:
        return None, 0
    if restored.step > config.steps:
        raise ConfigError(
            f"steps={config.steps}, but the run in this workdir has done {restored.step}; "
            f"write --steps {restored.step} or more, or another --workdir."
        )
    return restored.state, restored.step


def _opening(
    parts: build.Experiment,
    name: str,
    where: pathlib.Path,
    abstract: Any,
    done: int,
    compiled: float,
) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    resumed = f", resuming behind step {done}" if done else ""
    kind = configs.loss_scale_kind(parts.config)
    where_to = f" on mesh {parts.config.mesh}" if parts.config.mesh else ""
    where_to += f" of {hosts.count()} processes" if hosts.count() > 1 else ""
    return (
        f"{name}: {type(parts.config.model).__name__.removesuffix('Config')} with {size:,} parameters, "
        f"{parts.source.about}\n"
        f"policy {parts.config.policy}, loss scale {kind}, "
        f"{parts.config.steps} steps of {parts.config.batch_size} "
        f"in {where}{where_to}{resumed} (compiled in {progress.duration(compiled)})"
    )


def _report(where: pathlib.Path, name: str, shown: progress.Progress) -> None:
    from jaxmp.run import report

    try:
        shown.note(f"report: {report.write(where, name)}")
    except ImportError:
        shown.note(
            "no report: it needs matplotlib (pip install matplotlib); metrics.jsonl has the figures."
        )
