"""The audit's page, of a run that has records and one that has none, and what it refuses."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.diagnose import flow, suggest
from jaxmp.run import audit, build, cli, loop, metrics

pytest.importorskip("matplotlib")

GPT = str(pathlib.Path(__file__).parents[2] / "configs" / "text_gpt_float16.py")
SIZES = (
    "--model.width 16 --model.depth 2 --model.heads 2 --model.context 16 --data.sequence_length 16 "
    "--batch_size 4 --steps 6 --optimizer.warmup 2 --log.flow 2 --log.report False --checkpoint.every 4"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The command line of a run that was trained."""
    directory = tmp_path_factory.mktemp("run")
    arguments = [GPT, *SIZES, "--workdir", str(directory)]
    config, _ = cli.parse(arguments)
    assert loop.train(config).exit_code == 0
    return arguments, config, directory


def test_a_page_of_a_run_at_its_newest_checkpoint(trained, capsys):
    arguments, config, directory = trained
    before = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert audit.main([*arguments, "--checkpoint"]) == 0
    where = pathlib.Path(capsys.readouterr().out.strip().splitlines()[-1])
    text = where.read_text()
    assert where == directory / "audit" / "report.html"
    assert "http" not in text  # self-contained
    pictures = sorted(where.parent.glob("*.png"))
    assert len(pictures) == text.count("data:image/png;base64,") == 5
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert f"text_gpt_float16, at step {config.steps}" in text
    skipped = sum(r["skipped"] for r in metrics.read(directory / "metrics.jsonl"))
    assert f"<b>{skipped} of 6</b><span>skipped steps</span>" in text
    assert "TransformerBlock_1" in text and "<span>bfloat16</span>" in text
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == before


def test_states_are_the_runs_own(trained):
    _, config, directory = trained
    parts = build.build(config)
    _, compiled = build.compile_step(parts)
    step, start = audit.state_at(parts, directory, None)
    assert step is None
    state = start
    for index in range(4):
        state, _ = compiled(state, parts.source.batch_at(index))
    step, restored = audit.state_at(parts, directory, ["4"])
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--checkpoint", "7"], "There is no checkpoint 7 in .*; there are 4, 6"),
        (["--checkpoint", "last"], "--checkpoint cannot be 'last'; write the step"),
        (["--checkpoint", "--model.width", "32"], "is of another model"),
        (["--checkpiont"], "--checkpiont is not a setting"),
    ],
    ids=["absent", "no number", "another model", "typo"],
)
def test_mistakes_are_sentences(trained, more, words, capsys):
    assert audit.main([*trained[0], *more]) == cli.EXIT_USAGE
    said = capsys.readouterr().err
    assert re.search(words, said) and "Traceback" not in said


def test_verdicts_name_what_does_not_fit_and_what_is_dead():
    small = {"scale": 2.0**12, "kept": (("**/big", "float32"),), "holds": True}
    cases = {
        "fits, scale 2^12": small | {"kept": ()},
        "fits, 1 in float32, scale 2^12": small,
        "does not fit": small | {"holds": False},
    }
    dead = flow.GradientFlow(("a", "b"), jnp.array([0.0, 1.0]), (1, 1))
    for words, case in cases.items():
        advice = suggest.Suggestion(
            "float16", case["scale"], case["kept"], (), True, True, case["holds"], (0.1, 0.0)
        )
        found = audit.Audit(
            step=None,
            ranges=dataclasses.replace(empty_ranges(), suggestions={"float16": advice}),
            at_inputs=dead,
            by_module=dead,
            gains={"a": gain(3.0), "b": gain(12.0)},
            whole=gain(30.0),
            degree=audit.spectrum.Homogeneity(jnp.float32(1), jnp.float32(0)),
            attention=[],
        )
        shown = audit.cards(found, [])
        assert shown["float16"] == words
        assert shown["gradients"] == "dead" and shown["largest stretch, b"] == "12×"


def empty_ranges():
    return audit.ranges.RangeAudit(("float16",), ())


def gain(value):
    return audit.layer_gains.Gains(jnp.float32(value))
