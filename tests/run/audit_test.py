"""The audit's page, of a run that has records and one that has none, and what it refuses."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.diagnose import flow, magnitudes, range_table, suggest
from jaxmp.run import audit, build, cli, instruments, loop, metrics

pytest.importorskip("matplotlib")

MLP = str(pathlib.Path(__file__).parents[2] / "configs" / "digits_mlp_float16.py")
SIZES = (
    "--model.width 8 --model.depth 1 --batch_size 4 --steps 6 --optimizer.warmup 2 --log.flow 2 "
    "--log.report False --checkpoint.every 4"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The command line of a run that was trained."""
    directory = tmp_path_factory.mktemp("run")
    arguments = [MLP, *SIZES, "--workdir", str(directory)]
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
    assert len(pictures) == text.count("data:image/png;base64,") == 4
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert f"digits_mlp_float16, at step {config.steps}" in text
    skipped = sum(r["skipped"] for r in metrics.read(directory / "metrics.jsonl"))
    assert f"<b>{skipped} of 6</b><span>skipped steps</span>" in text
    assert "Dense_0" in text and "The model has no attention" in text
    assert "<span>bfloat16</span>" in text
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


def found_with(advice, attention=()):
    """An audit of two modules, of which the first has no gradient."""
    dead = flow.GradientFlow(("a", "b"), jnp.array([0.0, 1.0]), (1, 1))
    tensor = range_table.Range("gradient", "a", magnitudes.measure(jnp.ones(3), ("float16",)))
    return audit.Audit(
        step=None,
        ranges=audit.ranges.RangeAudit(("float16",), (tensor,), suggestions={"float16": advice}),
        at_inputs=dead,
        by_module=dead,
        gains={"a": gain(3.0), "b": gain(12.0)},
        whole=gain(30.0),
        degree=audit.spectrum.Homogeneity(jnp.float32(1), jnp.float32(0)),
        attention=list(attention),
    )


def gain(value):
    return audit.layer_gains.Gains(jnp.float32(value))


ADVICE = suggest.Suggestion("float16", 2.0**12, (), (), True, True, True, (0.1, 0.0))
KEPT = (("**/big", "float32"),)


@pytest.mark.parametrize(
    ("advice", "words"),
    [
        (ADVICE, "fits, scale 2^12"),
        (dataclasses.replace(ADVICE, overrides=KEPT), "fits, 1 in float32, scale 2^12"),
        (dataclasses.replace(ADVICE, holds=False), "does not fit"),
    ],
)
def test_cards_name_what_does_not_fit_and_what_is_dead(advice, words):
    shown = audit.cards(found_with(advice), [])
    assert shown["float16"] == words
    assert shown["gradients"] == "dead" and shown["largest stretch, b"] == "12×"


def test_a_page_without_records_says_what_attention_does(tmp_path, trained):
    sharp = instruments.Attention("layer_1", entropy=1.5, least_entropy=0.01, max_logit=80.0)
    even = instruments.Attention("layer_0", entropy=1.6, least_entropy=1.5, max_logit=2.0)
    advice = dataclasses.replace(ADVICE, overrides=KEPT)
    page = audit.write(tmp_path, "x", trained[1], found_with(advice, [even, sharp]), tmp_path)
    text = page.read_text()
    assert "a row of layer_1 looks at one key alone, and the logits of layer_1 reach 80" in text
    assert "float16 holds them with **/big in float32 and with a loss scale of 2^12" in text
    assert "dead: a. The gradient is exactly zero." in text and "b stretches most, 12 times" in text
    assert f"There are no records in {tmp_path} yet" in text
    assert len(list(tmp_path.glob("*.png"))) == 4
