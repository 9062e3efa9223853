"""The loss-scaling experiment: at a global batch of 2^26 plain float16 moves no bit, scaled it keeps up."""

import functools
import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
BATCHES = (2**20, 2**26)


@functools.cache
def experiment():
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("loss_scaling_experiment")


@pytest.mark.slow
def test_float16_needs_its_scale_and_with_it_equals_float32():
    float32 = experiment().run_row("float32", BATCHES[1:], 1)
    scaled = experiment().run_row("float16 + dynamic scaling", BATCHES, 1)
    plain = experiment().run_row("float16", BATCHES, 1)
    # |dL/dz| <= 2^-26 rounds to zero in float16, so nothing moves by a bit and the accuracy is chance.
    assert plain["moved"][1] == 0 and plain["nonzero"][1] == 0
    assert plain["accuracy"][1] < 0.2
    # At 2^20 nine in ten cotangents are lost, and Adam still makes up for it.
    assert plain["moved"][0] > 0.5 and 0 < plain["nonzero"][0] < 0.2
    np.testing.assert_allclose(scaled["accuracy"], float32["accuracy"].repeat(2, 0), atol=0.005)
    assert np.all(scaled["nonzero"] > 0.25)
    assert float32["nonzero"][0] > 0.99


def results(script):
    """Made-up results of the right shape."""
    fill = lambda value: np.full((len(script.GLOBAL_BATCHES), 2), value)
    row = {"accuracy": fill(0.97), "loss": fill(0.002), "nonzero": fill(0.5), "moved": fill(0.0)}
    return dict.fromkeys(script.ROWS, row)


def test_the_command_writes_figure_figures_and_table(tmp_path, monkeypatch, capsys):
    script = experiment()
    made_up = results(script)
    monkeypatch.setattr(script, "run_row", lambda name, batches, seeds: made_up[name])
    assert script.main(["--directory", str(tmp_path)]) == 0
    assert (tmp_path / "loss_scaling.png").read_bytes()[:4] == b"\x89PNG"
    stored = json.loads((tmp_path / "loss_scaling.json").read_text())
    assert stored["global_batches"][-1] == 2**26
    assert stored["results"]["float16"]["accuracy"][0] == [0.97, 0.97]
    said = capsys.readouterr().out
    assert "| 2^26 | 97.0% (0.002) |" in said
    assert "left 100% of its parameters" in said


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--seeds", "two"], ["--directory", "/proc/x"]]
)
def test_wrong_arguments_end_with_a_sentence_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        experiment().main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
