"""Kills training runs with SIGKILL at random moments, resumes them, and compares bit for bit.

    python scripts/crash_test.py [--config configs/NAME.py] [--kills 20] [--steps 200] [--every 5]
    python scripts/crash_test.py --processes 2   # on loopback, a CPU device each; any of them is killed

One run goes undisturbed. Each of the others is killed once, every second one while it saves a
checkpoint, and started again with the same command; of several processes one is killed, and the others
must be gone within 10 seconds. Its last state (every leaf, every bit) and its
records (loss, gradient norm, loss scale and skipped of every step, each step once) must equal those
of the undisturbed run. Prints a line for each kill; exits with 1 if one differs.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMPARED = ("step", "loss", "grad_norm", "loss_scale", "skipped")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run in a directory of its own."""

    directory: pathlib.Path
    config: str
    steps: int
    every: int
    processes: int = 1

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.directory / "checkpoints"

    def start(self) -> list[subprocess.Popen]:
        """Starts the run's processes, or resumes it: the command is the same."""
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), self.config]
        command += ["--steps", str(self.steps), "--checkpoint.every", str(self.every)]
        command += ["--workdir", str(self.directory), "--log.report", "False"]
        log = open(self.directory.with_suffix(".log"), "ab")  # noqa: SIM115
        if self.processes == 1:
            return [subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)]
        device = "--xla_force_host_platform_device_count=1"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": device}
        command += ["--mesh", f"data={self.processes}", "--processes", str(self.processes)]
        command += ["--coordinator", f"localhost:{free_port()}", "--process"]
        start = lambda i: subprocess.Popen(
            [*command, str(i)], cwd=ROOT, stdout=log, stderr=log, env=environment
        )
        return [start(i) for i in range(self.processes)]

    def finish(self, processes: list[subprocess.Popen]) -> None:
        """Waits for the end; fails with what the run printed if it does not get there."""
        if codes := [code for process in processes if (code := process.wait())]:
            log = self.directory.with_suffix(".log").read_text()
            raise SystemExit(f"The run in {self.directory} ended with exit codes {codes}:\n{log}")

    def state(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """The last checkpoint's leaves as (dtype, shape, bytes), read by Orbax alone."""
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        jax.config.update("jax_platforms", "cpu")
        place = self.checkpoints / str(self.steps) / "state"
        with ocp.StandardCheckpointer() as reader:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = {
                name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)
                for name, array in reader.metadata(place).item_metadata.items()
            }
            arrays = reader.restore(place, target)
        plain = {name: np.asarray(array) for name, array in arrays.items()}
        return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in plain.items()}

    def records(self) -> list[tuple]:
        """What must agree of each line of metrics.jsonl, in the order of the lines."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [tuple(json.loads(line)[key] for key in COMPARED) for line in lines]


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def undisturbed(run: Run) -> float:
    """Runs to the end; returns the seconds from the first sign of training to the end."""
    processes = run.start()
    wait_for(run.checkpoints, processes[0])
    begun = time.perf_counter()
    run.finish(processes)
    seconds = time.perf_counter() - begun
    if [record[0] for record in run.records()] != list(range(1, run.steps + 1)):
        raise SystemExit(f"The undisturbed run did not record steps 1 to {run.steps}, each once.")
    return seconds


def kill(run: Run, draw: random.Random, seconds: float, *, saving: bool) -> str:
    """Starts the run, kills it at a random moment and returns what that moment was."""
    processes = run.start()
    process = draw.choice(processes)
    if saving:
        step = draw.randrange(run.every, run.steps + 1, run.every)
        wait_for(run.checkpoints / f"{step}.saving", process)
        time.sleep(draw.uniform(0, 0.15))
    else:
        wait_for(run.checkpoints, process)
        time.sleep(draw.uniform(0, seconds))
    process.kill()
    if process.wait() != -signal.SIGKILL:
        run.finish(processes)
        return "after its end"
    for survivor in processes:
        survivor.wait(timeout=10)
    which = f"process {processes.index(process)} " if run.processes > 1 else ""
    return which + moment(run)


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    """Returns when the path exists or the process has ended."""
    while process.poll() is None and not path.exists():
        time.sleep(0.0005)


def moment(run: Run) -> str:
    """What the killed run left behind, in words."""
    if not run.checkpoints.exists():
        return "before training"
    folders = [path.name for path in run.checkpoints.iterdir() if path.name.isdigit()]
    newest = f"behind {max(map(int, folders))}" if folders else "behind no checkpoint"
    journals = [path.stem for path in run.checkpoints.glob("*.saving")]
    if not journals:
        return f"between saves, {newest}"
    step = journals[0]
    if list(run.checkpoints.glob(f"{step}.orbax-checkpoint-tmp*")):
        return f"while {step} was written, {newest}"
    return f"while {step} was {'sealed' if step in folders else 'begun'}, {newest}"


def difference(run: Run, reference: Run) -> str | None:
    """How a run's end differs from the undisturbed one's, in words, or None."""
    records, expected = run.records(), reference.records()
    if len(records) != len(expected):
        return f"{len(records)} records instead of {len(expected)}"
    for record, other in zip(records, expected, strict=True):
        if record != other:
            return f"step {other[0]}: {record} instead of {other}"
    state, expected_state = run.state(), reference.state()
    if state.keys() != expected_state.keys():
        return f"leaves {sorted(state.keys() ^ expected_state.keys())}"
    wrong = [name for name in state if state[name] != expected_state[name]]
    return f"leaves {wrong} differ" if wrong else None


def main() -> int:
    """Runs the whole test and returns the exit code."""
    parser = argparse.ArgumentParser(description="Kills runs, resumes them, compares.")
    parser.add_argument("--config", default="configs/digits_mlp_bfloat16.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with contextlib.ExitStack() as stack:
        place = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = (options.config, options.steps, options.every, options.processes)
        run = lambda name: Run(place / name, *settings)
        reference = run("undisturbed")
        seconds = undisturbed(reference)
        print(f"undisturbed: {options.steps} steps in {seconds:.1f} s", flush=True)
        same, in_saves, number = 0, 0, 0
        while number < options.kills:
            killed = run(f"killed-{number}")
            when = kill(killed, draw, seconds, saving=number % 2 == 1)
            if when != "after its end":  # else it was too fast for the draw: once more
                number += 1
                killed.finish(killed.start())
                wrong = difference(killed, reference)
                same, in_saves = same + (wrong is None), in_saves + ("while" in when)
                print(f"{number:3} killed {when}: {wrong or 'the same'}", flush=True)
            shutil.rmtree(killed.directory)
    print(f"{same} of {options.kills} the same, {in_saves} of them killed in the middle of a save")
    return int(same != options.kills)


if __name__ == "__main__":
    sys.exit(main())
