"""Two processes on loopback: the bits of one with two devices; they fail, stall, stop and resume together."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxmp.run import hosts, metrics, signals
from jaxmp.run.config import ConfigError
from jaxmp.training import mesh as meshes

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/digits_mlp_float32.py"
STEPS, EVERY = 30, 10
SETTINGS = {
    "steps": STEPS, "batch_size": 64, "model.width": 32, "mesh": "data=2",
    "checkpoint.every": EVERY, "eval.every": 15, "log.report": False,
}  # fmt: skip

# train.py, with a fault planted in the data: FAULT is kind:step:process. One that raises waits for AFTER.
FAULTY = """
import dataclasses, os, sys, time
import jax
from jaxmp.run import cli, data

kind, at, who = os.environ["FAULT"].split(":")
load = data.load

def faulty(*args, **how):
    source = load(*args, **how)

    def batch_at(step):
        time.sleep(0.02)
        if step == int(at) and jax.process_index() == int(who):
            while kind == "raise":
                time.sleep(0.05)
                if not os.path.exists(os.environ["AFTER"]):
                    continue
                raise ZeroDivisionError("planted")
            time.sleep(float(kind))
        return source.batch_at(step)

    return dataclasses.replace(source, batch_at=batch_at)

data.load = faulty
sys.exit(cli.main())
"""


def words(settings, workdir):
    settings = SETTINGS | settings | {"workdir": workdir}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def environment(cache, devices=1, **more):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "XDG_CACHE_HOME": str(cache),
        **more,
    }


def free_port(least=0):
    with socket.socket() as probe:
        while least:
            with contextlib.suppress(OSError):
                probe.bind(("", random.randrange(least, 65536)))
                break
        else:
            probe.bind(("", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass
class Pair:
    """Two processes of one run, and what they say."""

    processes: list
    logs: list

    def ends(self, seconds):
        """(exit codes, seconds until both were gone); a process that outlives `seconds` is None."""
        start = time.monotonic()
        for process in self.processes:
            try:
                process.wait(max(0.01, seconds - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return None, self.said()
        return [process.returncode for process in self.processes], self.said()

    def said(self):
        return [log.read_text() for log in self.logs]


def start(arguments, where, env, program=(str(ROOT / "scripts" / "train.py"), CONFIG)):
    """Starts two processes that find each other on a free port."""
    joined = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
    processes, logs = [], []
    for index in range(2):
        logs.append(where / f"log-{index}")
        with logs[-1].open("w") as log:
            command = [sys.executable, *program, *arguments, *joined, str(index)]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            )
    return Pair(processes, logs)


def wait_for(pair, condition):
    while not condition():
        assert all(p.poll() is None for p in pair.processes), pair.said()
        time.sleep(0.01)


def recorded(workdir):
    return len(metrics.read(workdir / "metrics.jsonl"))


def records(workdir, name="metrics.jsonl"):
    found = metrics.read(workdir / name)
    return [{k: v for k, v in r.items() if not k.endswith("per_second")} for r in found]


def fingerprints(workdir, step):
    record = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return {name: leaf["fingerprint"] for name, leaf in record["leaves"].items()}


# Under SLURM, srun starts the tasks of a step with these variables; here both run on this machine.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=0 ]] && shift
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; a=$?; wait $second; b=$?
exit $((a > b ? a : b))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache):
    """The directory of a whole run on two processes, started by the script for SLURM."""
    place = tmp_path_factory.mktemp("two")
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/bash\necho "scontrol $@"\n'}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    job = str(free_port(61440) - 61440 + 4096)  # JAX makes the port of it
    env = environment(
        cache, PATH=f"{place}:{os.environ['PATH']}", PYTHON=sys.executable, SLURM_JOB_ID=job
    )
    script = [str(ROOT / "scripts" / "launch_slurm.sh"), CONFIG, *words({}, place / "run")]
    done = subprocess.run(
        script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "run", done.stdout


@pytest.fixture(scope="module")
def failed(tmp_path_factory, cache):
    """The directory of a run whose process 1 raised at step 25, and how both ended."""
    place = tmp_path_factory.mktemp("failed")
    saved = place / "run" / "checkpoints" / "20" / "MANIFEST.sha256"
    env = environment(cache, FAULT="raise:25:1", AFTER=str(saved))
    pair = start(words({}, place / "run"), place, env, ("-c", FAULTY, CONFIG))
    wait_for(pair, lambda: recorded(place / "run") >= 24)
    return place / "run", *pair.ends(10)


# One process of eight devices computes everything else there is to compare with.
PROGRAM = """
import dataclasses, sys
from jaxmp.run import cli, loop

base = cli.parse(sys.argv[1:-3])[0]
cli.use_compilation_cache()
whole, two, eight = sys.argv[-3:]
for workdir, mesh in ((whole, "data=2"), (two, "data=2"), (eight, "data=8")):
    loop.train(dataclasses.replace(base, workdir=workdir, mesh=mesh))
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache, failed):
    """Directories of one process: a whole run on 2 devices; `failed` resumed on 2 devices, and on 8."""
    place = tmp_path_factory.mktemp("one")
    for name in ("resumed on 2", "resumed on 8"):
        shutil.copytree(failed[0], place / name)
    names = [str(place / name) for name in ("whole", "resumed on 2", "resumed on 8")]
    command = [sys.executable, "-c", PROGRAM, CONFIG, *words({}, place / "unused"), *names]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(cache, 8), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done.stdout


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one_with_two_devices(two, one):
    run, said = two
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert records(run, name) == records(one[0] / "whole", name)
    assert [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    for step in range(EVERY, STEPS + 1, EVERY):
        assert fingerprints(run, step) == fingerprints(one[0] / "whole", step)
    assert said.count("held out") == 2 and said.count(f"step {STEPS} done") == 1  # one speaks
    assert "on mesh data=2 of 2 processes" in said


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_within_ten_seconds(failed):
    run, codes, said = failed
    assert codes is not None and all(codes), said
    assert "ZeroDivisionError: planted" in said[1] and "process 1 failed:" in said[1]
    assert "ZeroDivisionError" not in said[0]
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit())[-1] == "20"


@pytest.mark.slow
def test_saved_on_two_processes_it_resumes_on_two_and_on_eight_devices(failed, one):
    place, said = one
    # Restoring compares each leaf's fingerprint with the one that two processes wrote.
    assert said.count("resuming behind step 20") == 2
    assert records(place / "resumed on 2") == records(place / "whole")
    assert fingerprints(place / "resumed on 2", STEPS) == fingerprints(place / "whole", STEPS)
    assert fingerprints(place / "resumed on 8", 20) == fingerprints(place / "whole", 20)
    eight, whole = records(place / "resumed on 8"), records(place / "whole")
    assert eight[:20] == whole[:20]
    # Another order of the data would show in the first digit.
    losses = [[r["loss"] for r in found[20:]] for found in (eight, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_a_stall_is_noticed_and_a_signal_to_one_saves_the_same_step_on_all(tmp_path, cache):
    env = environment(cache, FAULT="3:5:1")  # process 1 sleeps for three seconds at step 5
    run = tmp_path / "run"
    settings = {"steps": 3000, "log.stall": 1.0, "eval.every": 0, "checkpoint.every": 1000}
    pair = start(words(settings, run), tmp_path, env, ("-c", FAULTY, CONFIG))
    wait_for(pair, lambda: recorded(run) >= 8)
    pair.processes[1].send_signal(signal.SIGUSR1)
    asked = time.monotonic()
    codes, said = pair.ends(20)
    assert codes == [75, 75], said
    assert time.monotonic() - asked < 6 + 5  # the news takes a second or so, saving at most five
    found = re.findall(r"stopped by SIG\w+ and saved at step (\d+)", said[0])
    assert len(found) == 1 and "saved at step" not in said[1]
    assert recorded(run) == int(found[0]) and (run / "checkpoints" / found[0]).is_dir()
    for index in (0, 1):
        assert f"process {index}: no step was finished for" in said[index]
    # The stacks of this stall; on a slow machine saving may be told as another one.
    stacks = [
        re.search(r"the last was 4; .*?thread MainThread:\n(.*?)\n\n", s, re.S)[1] for s in said
    ]
    assert all("in _steps" in stack for stack in stacks), said
    assert "in batch_at" in stacks[1] and "in batch_at" not in stacks[0], said  # where it hangs


# Watches two processes, of which this one's interpreter is held by C code for two seconds.
HELD = """
import ctypes, time
from jaxmp.run import hosts

hosts.count, hosts.HELD_SECONDS = lambda: 2, 0.5

def held():
    ctypes.PyDLL(None).usleep(2_000_000)

dog = hosts.Watchdog(0.5)
time.sleep(0.1)
held()
dog.close()
"""


def test_a_thread_that_holds_the_interpreter_cannot_keep_the_watchdog_silent():
    done = subprocess.run(
        [sys.executable, "-c", HELD], capture_output=True, text=True, check=True, timeout=60
    )
    first, _, told = done.stderr.partition("process 0: no step was finished for")
    assert "Timeout" in first and "in held" in first and "MainThread" in told


# What the processes must agree on, and how they learn that they do not.
DISAGREE = """
import pathlib, sys
import jax, numpy as np
from jaxmp.run import checkpoint, config, hosts
from jaxmp.training import mesh as meshes

where = pathlib.Path(sys.argv[1])
[address, index] = sys.argv[3], int(sys.argv[7])
hosts.join(hosts.Launch(address, 2, index))

def raised(kind, action):
    try:
        action()
    except kind as error:
        return str(error)

def planted():
    raise ValueError("planted" if index == 0 else "not called here")

print("gather", hosts.gather({"index": index, "long": "x" * (10 + 1000 * index)})[1]["index"])
print("first", hosts.first(lambda: index), raised(ValueError, lambda: hosts.first(planted)))
print("alike", raised(config.ConfigError, lambda: hosts.check_alike({"a": 1, "steps": index})))
hosts.check_shared(where)
hosts.SEEN_SECONDS = 0.3
own = where / f"own-{index}"
own.mkdir()
print("shared", raised(config.ConfigError, lambda: hosts.check_shared(own)))
mesh = meshes.make_mesh("data=2")
print("rows", meshes.local_rows(mesh, 6).tolist())
print("rows of tensor", meshes.local_rows(meshes.make_mesh("tensor=2"), 4).tolist())
spread = lambda values: jax.make_array_from_callback((4,), meshes.replicated(mesh), values.__getitem__)
same, unlike = np.arange(4.0), np.arange(4.0) + 1e-7 * index
with checkpoint.open_store(where / "checkpoints") as store:
    store.save(1, {"same": spread(same), "w": spread(same)}, {}, wait=True)
    bad = {"same": spread(same), "w": spread(unlike.astype(np.float32))}
    print("state", raised(checkpoint.CheckpointError, lambda: store.save(2, bad, {})))
sys.exit(hosts.finish(lambda: 0))
"""


@pytest.mark.slow
def test_processes_that_disagree_are_told_so_alike(tmp_path, cache):
    pair = start([], tmp_path, environment(cache), ("-c", DISAGREE, str(tmp_path)))
    codes, said = pair.ends(60)
    assert codes == [0, 0], said
    lines = [
        [x for x in text.splitlines() if not x.startswith(("[Gloo]", "WARN"))] for text in said
    ]
    assert lines[0][:3] == lines[1][:3]
    assert lines[0][0] == "gather 1" and lines[0][1] == "first 0 planted"
    assert "steps=1 on process 1 and steps=0 on process 0" in lines[0][2]
    for index in (0, 1):
        assert (
            lines[index][3].startswith("shared workdir=")
            and "process 1 does not" in lines[index][3]
        )
        assert lines[index][4] == f"rows {[[0, 1, 2], [3, 4, 5]][index]}"
        assert lines[index][5] == "rows of tensor [0, 1, 2, 3]"
        assert "leaf w on process 1 is not what it is on process 0" in lines[index][6]
    assert not (tmp_path / "checkpoints" / "2").exists()


LAUNCHES = {
    "no port": (hosts.Launch("localhost", 2, 0), "HOST:PORT"),
    "no number": (hosts.Launch("localhost:1", 2), "--process (not given)"),
    "out of range": (hosts.Launch("localhost:1", 2, 2), "--processes 2 --process 2"),
    "no coordinator": (hosts.Launch(process=0, processes=2), "without --coordinator"),
    "no cluster": (hosts.Launch("auto"), "did not find each other"),
}


@pytest.mark.parametrize(("launch", "advice"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_launch_that_cannot_be_is_a_sentence(launch, advice, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", planted_initialize)
    with pytest.raises(ConfigError, match=re.escape(advice)):
        hosts.join(launch)


def planted_initialize(*args, **how):
    raise ValueError("coordinator_address should be defined.")


SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}  # fmt: skip
ENVIRONMENTS = {
    "none": ({}, False),
    "srun": (SLURM, True),
    "srun of one task": (SLURM | {"SLURM_NTASKS": "1"}, False),
    "an allocation without srun": ({k: v for k, v in SLURM.items() if "STEP" not in k}, False),
    "a slice of GKE": ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""}, True),
    "one host of GKE": ({"TPU_WORKER_HOSTNAMES": "a", "JAX_PLATFORMS": ""}, False),
    "a pod without TPU": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
}


@pytest.mark.parametrize(("variables", "found"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_a_cluster_is_found_where_there_is_one_and_nowhere_else(variables, found, monkeypatch):
    for name in [*SLURM, "TPU_WORKER_HOSTNAMES"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    assert hosts.found_cluster() is found
    assert hosts.join(hosts.Launch()) is found and len(calls) == found
    assert hosts.join(hosts.Launch("none")) is False and len(calls) == found


def test_one_process_agrees_with_itself_at_no_cost(tmp_path):
    assert hosts.gather("x") == ["x"] and hosts.first(lambda: 3) == 3 and hosts.is_first()
    hosts.check_alike({"steps": 1})
    hosts.check_shared(tmp_path / "not even there")
    stop = signals.StopRequest()
    assert not hosts.stopping(stop, 1)
    stop.ask("SIGTERM")
    assert hosts.stopping(stop, 1)
    with pytest.raises(ZeroDivisionError):
        hosts.finish(lambda: 1 // 0)
    assert hosts.finish(lambda: 7) == 7


def test_all_rows_belong_to_a_process_alone():
    assert meshes.local_rows(meshes.make_mesh("data=1"), 5).tolist() == [0, 1, 2, 3, 4]
