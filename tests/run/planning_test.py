"""Plans from the command line: this machine's own compiler stands in for those that are absent."""

import json
import pathlib

import jax
import pytest

from jaxmp.run import build, cli, planning

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MLP = str(CONFIGS / "digits_mlp_bfloat16.py")


def test_a_plan_says_what_the_step_holds_and_writes_it_as_json(tmp_path, capsys):
    where = tmp_path / "plan.json"
    assert planning.main([MLP, "--target", "cpu", "--json", str(where)]) == 0
    said = capsys.readouterr().out
    row = json.loads(where.read_text())
    config, _ = cli.parse([MLP])
    params = jax.eval_shape(build.build(config).init).params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert row["parameters"] == count
    assert row["memory"]["parameters"] == 4 * count
    assert row["memory"]["optimizer"] >= 8 * count  # two moments
    assert f"{count:,}" in said and "digits_mlp_bfloat16" in said


def test_accumulating_needs_less_memory_at_a_time():
    config, _ = cli.parse([MLP, "--batch_size", "512"])
    parts, _ = cli.parse([MLP, "--batch_size", "512", "--accumulate", "8"])
    whole, accumulated = (planning.estimate(c, "cpu") for c in (config, parts))
    assert accumulated.peak_bytes < whole.peak_bytes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([MLP, "--target", "gpu-h1000"], ["--target", "gpu-h100"]),
        ([MLP, "--target"], ["--target takes one value", "gpu-h100"]),
        ([MLP, "--target", "cpu", "--btch_size", "4"], ["--btch_size", "--batch_size"]),
        (["--target", "cpu"], ["usage: plan.py"]),
        (["configs/none.py"], ["does not exist"]),
        (["--steps", "3"], ["plan.py configs/NAME.py"]),
    ],
    ids=["unknown target", "no value", "typo", "no config", "no file", "wrong order"],
)
def test_a_mistake_is_told_in_a_few_lines(arguments, words, capsys):
    assert planning.main(arguments) == 2
    said = "".join(capsys.readouterr())
    assert all(word in said for word in words), said
    assert "Traceback" not in said


def test_a_target_without_its_compiler_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert planning.main([MLP, "--target", "tpu-v5e"]) == 2
    assert 'pip install "jaxmp[tpu]"' in capsys.readouterr().err
