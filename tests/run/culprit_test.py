"""When a run looks for the operation that broke a step, and what it then writes and says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxmp.nn.models.mlp import MLPConfig
from jaxmp.run import build, culprit, data, loop, metrics
from jaxmp.run.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    LossScaleConfig,
    OptimizerConfig,
)

TINY = Config(
    model=MLPConfig(width=8, depth=1),
    data=data.DigitsConfig(shift=1),
    steps=40,
    batch_size=16,
    policy="mixed_float16",
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0, skip_outliers=2.0),
    loss_scale=LossScaleConfig(initial=2.0**22),
    checkpoint=CheckpointConfig(every=0),
    eval=EvalConfig(every=0),
    log=LogConfig(every=1, report=False, flow=0),
)
STATIC = dataclasses.replace(TINY, loss_scale=LossScaleConfig(kind="static", initial=2.0**22))


def record(loss=1.0, norm=1.0, scale=2.0**10, step=1):
    return {"step": step, "loss": loss, "grad_norm": norm, "loss_scale": scale}


@pytest.fixture(scope="module")
def started():
    """A run whose scale is static and too large, and its state."""
    parts = build.build(STATIC)
    return parts, jax.jit(parts.init)()


def test_a_run_looks_once_at_what_nothing_could_mend(tmp_path, capsys):
    """Overflows that the scale mends come first, then an outlier, which are left alone; then NaNs."""
    source = build.build(TINY).source
    changes = {
        37: lambda x: x * 4,
        38: lambda x: np.where(x > 0.9, np.nan, x),
        39: lambda x: x * np.nan,
    }

    def batch_at(index):
        batch = source.batch_at(index)
        return batch | {"inputs": changes.get(index, lambda x: x)(batch["inputs"])}

    config = dataclasses.replace(TINY, workdir=str(tmp_path))
    outcome = loop.train(config, source=dataclasses.replace(source, batch_at=batch_at))
    assert (outcome.exit_code, outcome.step) == (0, 40)
    records = metrics.read(tmp_path / "metrics.jsonl")
    finite = [r["grad_norm"] is not None for r in records]
    skipped = [r["skipped"] for r in records]
    assert not finite[0] and skipped[0] and not skipped[20]  # the scale came down
    assert finite[37] and skipped[37]  # the outlier

    told = json.loads((tmp_path / "blame.json").read_text())
    assert (told["step"], told["parameters"]) == (39, "as in the step")
    blame = told["blame"]
    assert (blame["kind"], blame["path"]) == ("argument", "batch/inputs")
    text, said = (tmp_path / "blame.txt").read_text(), capsys.readouterr().out
    assert text == told["paragraph"] + "\n" and text.count("\n") == 1
    assert text.startswith(
        "step 39: the loss is not finite, which no loss scale can mend. The argument"
    )
    assert said.count("no loss scale can mend") == 1 and told["paragraph"] in said


def test_an_operation_of_the_backward_pass_is_named(started, tmp_path):
    parts, state = started
    watcher = culprit.Culprit(parts, tmp_path)
    overflown = record(norm=np.inf, scale=2.0**22)
    assert watcher.see(record(), state, None) == ""
    note = watcher.see(overflown, state, None)
    told = json.loads((tmp_path / "blame.json").read_text())
    blame = told["blame"]
    assert "the gradients are not finite and the loss scale does not adapt" in told["reason"]
    assert (blame["direction"], blame["output"]["dtype"]) == ("backward", "float16")
    assert blame["path"].startswith("MLP/") and "lower the loss scale" in blame["cause"]
    assert note == f"{told['paragraph']} ({tmp_path / 'blame.txt'})"
    assert watcher.see(overflown, state, None) == ""


def test_a_state_that_has_moved_on_is_said_to_have(started, tmp_path):
    parts, state = started
    applied = {"skipped": np.array(False)}
    watcher = culprit.Culprit(parts, tmp_path)
    assert "had updated already.)" in watcher.see(record(np.nan, scale=2.0**22), state, applied)
    # With another scale it does not happen again, and that is said.
    note = culprit.Culprit(parts, tmp_path).see(record(np.nan, scale=1.0), state, applied)
    assert "had updated already, it was finite" in note
    told = json.loads((tmp_path / "blame.json").read_text())
    assert told["blame"] is None and told["parameters"] == "one update later"


def test_it_can_be_turned_off_and_its_own_failure_is_a_note(started, tmp_path, monkeypatch):
    parts, state = started

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(culprit, "search", fail)
    broken = record(norm=np.inf)
    note = culprit.Culprit(parts, tmp_path).see(broken, state, None)
    assert note.startswith("step 1: the gradients are not finite")
    assert note.endswith("The search for the operation failed: MemoryError: no room")
    quiet = dataclasses.replace(STATIC, log=dataclasses.replace(STATIC.log, blame=False))
    off = culprit.Culprit(dataclasses.replace(parts, config=quiet), tmp_path)
    assert off.see(broken, state, None) == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config, records, lost",
    [
        (TINY, [record(norm=np.inf)] * 24, [False] * 24),
        (TINY, [record(norm=np.nan)] * 25, [False] * 24 + [True]),
        (TINY, [record(norm=np.inf), record()] * 20, [False] * 40),
        (TINY, [record(norm=np.inf, scale=1.0)], [True]),
        (TINY, [record(), record(loss=np.nan, norm=np.nan)], [False, True]),
        (TINY, [record(loss=None, norm=None)], [True]),  # as it is read from a file
        (STATIC, [record(), record(norm=np.inf)], [False, True]),
        (dataclasses.replace(TINY, policy="mixed_bfloat16"), [record(norm=np.inf)], [True]),
    ],
)
def test_loss_scaling_has_its_chance_first(config, records, lost):
    chance = culprit.Chance(config)
    assert [bool(chance.lost(r)) for r in records] == lost
