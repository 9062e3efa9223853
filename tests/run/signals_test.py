"""SIGTERM and Ctrl-C in a real process: it saves, exits with 75, and resumes to the same bits."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxmp.run import metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVERY = 500, 125


def command(workdir):
    script, config = ROOT / "scripts" / "train.py", ROOT / "configs" / "digits_mlp_float16.py"
    settings = {
        "steps": STEPS, "batch_size": 64, "workdir": workdir, "model.width": 32,
        "checkpoint.every": EVERY, "eval.every": 200, "log.report": False,
    }  # fmt: skip
    pairs = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(script), str(config), *pairs]


def start(workdir, cache):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache),
    }
    return subprocess.Popen(
        command(workdir),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(workdir, cache):
    process = start(workdir, cache)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def stopped_by(number, workdir, cache, after):
    """Starts a run, sends it a signal once `after` steps are recorded; returns (exit code, output)."""
    process, path = start(workdir, cache), workdir / "metrics.jsonl"
    while process.poll() is None and len(metrics.read(path)) < after:
        time.sleep(0.005)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def records(workdir, name="metrics.jsonl"):
    lines = (json.loads(line) for line in (workdir / name).read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in lines]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    cache, workdir = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("reference") / "run"
    finished(workdir, cache)
    assert any(path.is_file() for path in cache.rglob("*"))  # compiled programs are kept
    return workdir, cache


def assert_same(workdir, undisturbed):
    for file in ("metrics.jsonl", "eval.jsonl"):
        assert records(workdir, file) == records(undisturbed, file)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(reference, tmp_path):
    undisturbed, cache = reference
    stopped_at = 0
    for name in ("SIGTERM", "SIGINT"):
        asked_at = stopped_at + 30
        code, said = stopped_by(signal.Signals[name], tmp_path / "run", cache, asked_at)
        assert code == 75, said
        assert f"stopped by {name} and saved at step" in said and "Traceback" not in said
        assert not stopped_at or f"resuming behind step {stopped_at}" in said
        stopped_at = records(tmp_path / "run")[-1]["step"]
        assert asked_at <= stopped_at < STEPS
        assert (tmp_path / "run" / "checkpoints" / str(stopped_at)).is_dir()
    assert f"resuming behind step {stopped_at}" in finished(tmp_path / "run", cache)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_killed_without_notice_it_goes_on_as_well_and_compiles_what_the_cache_lost(
    reference, tmp_path
):
    undisturbed, cache = reference
    for after in (20, EVERY + 20):  # before the first checkpoint and behind it
        code, said = stopped_by(signal.SIGKILL, tmp_path / "run", cache, after)
        assert code == -signal.SIGKILL, said
    for entry in [path for path in cache.rglob("*-cache") if path.is_file()]:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    finished(tmp_path / "run", cache)
    assert_same(tmp_path / "run", undisturbed)
