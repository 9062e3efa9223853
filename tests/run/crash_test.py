"""Killed at any moment and started again, a run ends as if nothing had happened."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def crash_test(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "crash_test.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_killed_runs_end_as_the_undisturbed_one():
    # The full test, twenty kills, is the script's default.
    result = crash_test("--kills", "2", "--steps", "60")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 the same" in result.stdout
