"""The learning-rate scan: its score against published figures, its runs against plain ones, its mistakes."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from configs import digits_mlp_float32
from jaxmp.nn.models.mlp import MLPConfig
from jaxmp.run import build, cli, loop, scan
from jaxmp.run.config import ConfigError, EvalConfig, LogConfig

ROOT = pathlib.Path(__file__).parents[2]
MLP = str(ROOT / "configs" / "digits_mlp_float32.py")
CONFIG = dataclasses.replace(
    digits_mlp_float32.get_config(),
    model=MLPConfig(width=16, depth=1),
    steps=6,
    batch_size=32,
    log=LogConfig(report=False),
)


@pytest.mark.parametrize(
    ("losses", "want"),
    [
        ([0.161, 2.30, 2.30], 1.43),
        ([0.188, 0.129, 2.17], 0.70),
        ([0.083, 0.011, 0.329], 0.13),
        ([0.031, 0.005, 0.297], 0.11),
        ([0.031, 0.005, math.nan], 0.774),
        ([0.031, 0.005, math.inf], 0.774),
        ([0.031, 0.005, 8e10], 0.774),
        ([3.0, 9.0, math.nan], 0.0),
    ],
)
def test_sensitivity_is_the_mean_excess_over_the_best_and_divergence_counts_as_a_guess(
    losses, want
):
    assert scan.sensitivity(losses, math.log(10)) == pytest.approx(want, abs=6e-3)
    both = np.stack([losses, losses], axis=1)
    assert scan.sensitivity(both, math.log(10)) == pytest.approx(want, abs=6e-3)


def test_seeds_are_averaged_before_the_best_rate_is_chosen():
    # The best single run is at the first rate, the best mean at the second.
    assert scan.sensitivity([[0.0, 2.0], [0.5, 0.5]], 10.0) == pytest.approx(0.25)


def test_a_trial_is_the_run_that_training_at_that_rate_and_seed_gives(tmp_path):
    trials = scan.scan(CONFIG, [1e-3, 4e-3], [0, 3])
    assert [(t.rate, t.seed) for t in trials] == [(1e-3, 0), (1e-3, 3), (4e-3, 0), (4e-3, 3)]
    config = dataclasses.replace(
        scan.at(CONFIG, 4e-3, 3), workdir=str(tmp_path), eval=EvalConfig(every=0)
    )
    outcome = loop.train(config)
    for key, value in trials[-1].held_out.items():
        assert outcome.evaluation[key] == pytest.approx(value, rel=1e-5), key
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert trials[-1].loss == pytest.approx(last["loss"], rel=1e-5)


def test_all_rates_share_one_compiled_step_which_carries_the_rate():
    parts = scan.with_rate(build.build(CONFIG))
    abstract, step = build.compile_step(parts)
    assert abstract[0].dtype == np.float32
    batch, moved = parts.source.batch_at(0), {}
    for rate in (1e-3, 1e-1):
        _, state = parts.init()
        (kept, _), metrics = step((np.float32(rate), state), batch)
        assert kept == np.float32(rate)
        moved[rate] = metrics["learning_rate"]
    # The warm-up rounds to none of six steps, so the first rate is the peak.
    assert moved == {rate: np.float32(rate) for rate in moved}


def test_float16_scans_too_and_a_rate_that_breaks_the_run_counts_as_a_guess(tmp_path):
    config = dataclasses.replace(CONFIG, policy="mixed_float16")
    trials = scan.scan(config, [0.03, 1e6], [0])
    scan.write(tmp_path, "float16", config, trials)
    record = json.loads((tmp_path / "lr_scan.json").read_text())
    assert record["uniform_loss"] == pytest.approx(math.log(10))
    good, broken = (t["loss"] for t in record["trials"])
    assert broken is None or broken > record["uniform_loss"]
    assert good < record["uniform_loss"]
    want = (record["uniform_loss"] - good) / 2
    assert record["sensitivity"] == pytest.approx(want, rel=1e-6)
    assert (tmp_path / "lr_scan.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_scans_and_writes(tmp_path, capsys):
    command = [MLP, "--rates", "1e-3", "3e-3", "--steps", "3", "--model.width", "16"]
    command += ["--workdir", str(tmp_path)]
    assert scan.main(command) == 0
    said = capsys.readouterr().out
    assert "rate 0.003 seed 1" in said and "learning-rate sensitivity" in said
    record = json.loads((tmp_path / "lr_scan.json").read_text())
    assert [(t["rate"], t["seed"]) for t in record["trials"]] == [
        (1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1)
    ]  # fmt: skip
    assert record["config"]["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: lr_scan.py"),
        ([MLP, "--rates"], "--rates lacks its values"),
        ([MLP, "--rates", "fast"], "--rates cannot hold 'fast'"),
        ([MLP, "--rates", "-1"], "above 0"),
        ([MLP, "--rates", "nan"], "finite"),
        ([MLP, "--rates", "inf"], "finite"),
        ([MLP, "--seeds", "0.5"], "whole numbers"),
        ([MLP, "--seeds", "-1"], "seed=-1"),
        ([MLP, "--stebs", "3"], "--stebs is not a setting"),
        (["configs/none.py"], "does not exist"),
        ([MLP, "--workdir", "/proc/none"], "cannot be written"),
        ([MLP, "--overrides", "nothing", "float32"], "overrides"),
    ],
    ids=lambda value: " ".join(value[1:])[:20] if isinstance(value, list) else None,
)
def test_mistakes_are_sentences_with_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert scan.main(arguments) == cli.EXIT_USAGE
    said = capsys.readouterr()
    assert words in said.err + said.out
    assert "Traceback" not in said.err


def test_a_scan_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        scan.scan(CONFIG, [], [0])
