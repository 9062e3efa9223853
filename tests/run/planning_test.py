"""Plans from the command line: this machine's own compiler stands in for those that are absent."""

import dataclasses
import importlib
import json
import pathlib
import sys

import jax
import pytest

from jaxmp import plan
from jaxmp.plan import targets
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


def test_what_a_compiler_refuses_does_not_fit(monkeypatch, tmp_path, capsys):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 35.6G of 15.75G hbm."
        )

    monkeypatch.setattr(planning, "_compile", refuse)
    where = tmp_path / "plan.json"
    assert planning.main([MLP, "--target", "cpu", "--json", str(where)]) == 1
    said = capsys.readouterr().out
    assert "does NOT fit cpu" in said and "Used 35.6G of 15.75G" in said
    assert "try --accumulate 2" in said and "try --mesh fsdp=-1" in said
    row = json.loads(where.read_text())
    assert row["fits"] is False and "35.6G" in row["refused"]


def test_ways_out_are_those_that_the_config_leaves_open():
    gpt = str(CONFIGS / "gpt2_124m_bfloat16.py")
    config, _ = cli.parse([gpt, "--mesh", "data=8", "--batch_size", "32"])
    assert [way.split(":")[0] for way in planning.ways_out(config)[:3]] == [
        "--accumulate 2",
        "--model.remat full",
        "--mesh fsdp=-1",
    ]
    assert planning.ways_out(config, state_alone=True) == planning.ways_out(config)[2:]
    config, _ = cli.parse([gpt, "--mesh", "fsdp=8", "--accumulate", "4", "--model.remat", "full"])
    assert len(planning.ways_out(config)) == 1


def test_what_is_kept_is_told_as_written():
    """Of an MLP: inputs, and what each hidden layer gives its activation function and its product."""
    settings = ["--model.width", "32", "--model.depth", "2", "--batch_size", "64"]
    for more, rows in (["--accumulate", "1"], 64), (["--accumulate", "4"], 16):
        config, _ = cli.parse([MLP, *settings, *more])
        parts = build.build(config)
        found = planning.kept(parts, *build.abstract_arguments(parts))
        numbers = 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
        assert found["compute copy, this device's part"] == 2 * numbers
        assert found["activations"] % rows == 0
        assert rows * 2 * 2 * 32 <= found["activations"] <= rows * (4 * 2 * 32 * 2 + 12 * 10)


def test_several_devices_need_a_mesh(monkeypatch, capsys):
    monkeypatch.setattr(targets, "devices", lambda name: jax.devices() * 8)
    assert planning.main([MLP, "--target", "gpu-h100:8"]) == 2
    assert "--mesh fsdp=8" in capsys.readouterr().err


SMALL = [
    str(CONFIGS / "gpt2_124m_bfloat16.py"),
    *("--model.vocab_size 512 --model.width 256 --model.depth 4 --model.heads 4").split(),
    *("--batch_size 64 --data.sequence_length 512").split(),
]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_peak_falls_when_told_to():
    """On four GPUs: cut the state, compute again, take smaller microbatches."""
    missing = targets.missing_wheel("gpu-h100")
    if missing:
        pytest.skip(missing)

    def plan(*settings):
        config, _ = cli.parse([*SMALL, *settings])
        return planning.estimate(config, "gpu-h100:4")

    copied, cut = plan("--mesh", "data=4"), plan("--mesh", "fsdp=4")
    again, parts = (
        plan("--mesh", "fsdp=4", *more.split()) for more in ("--model.remat full", "--accumulate 4")
    )
    assert copied.peak_bytes > cut.peak_bytes > again.peak_bytes
    assert cut.peak_bytes > parts.peak_bytes
    state = ("parameters", "optimizer")
    assert sum(cut.memory[s] for s in state) < 1.1 / 4 * sum(copied.memory[s] for s in state)
    for found in (copied, cut, again, parts):
        assert found.program.wide_products == ()
        gathers = {dtype for kind, dtype in found.program.traffic_by_kind if kind == "all-gather"}
        assert gathers <= {"bfloat16"}


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_run_on_one_device_moves_what_the_step_by_hand_moves():
    """Its metrics, schedule and mesh of one included."""
    missing = targets.missing_wheel("gpu-h100")
    if missing:
        pytest.skip(missing)
    config, _ = cli.parse([*SMALL, "--model.vocab_size", "8192"])
    found = planning.estimate(config, "gpu-h100").program
    sys.path.insert(0, str(CONFIGS.parent / "scripts"))
    bench = importlib.import_module("bench")
    model = dataclasses.replace(config.model, attention="cudnn", context=512)
    workload = bench.Workload(model, config.batch_size)
    init, step = bench.build("hand bfloat16", workload)
    state = jax.eval_shape(lambda: init(bench.initial_params(workload)))
    by_hand = plan.compile_for(step, state, workload.batch(), "gpu-h100")
    assert found.bytes_accessed <= 1.02 * by_hand.bytes_accessed


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_layers_gathered_in_their_loop_move_eight_bytes_a_parameter():
    missing = targets.missing_wheel("tpu-v5e")
    if missing:
        pytest.skip(missing)
    llama = str(CONFIGS / "llama_1b_bfloat16.py")
    small = "--model.width 512 --model.mlp_width 1536 --model.heads 4 --model.kv_heads 2 --model.depth 4"
    config, _ = cli.parse(
        [llama, *small.split(), *("--model.vocab_size 2048 --data.sequence_length 512").split()]
    )
    found = planning.estimate(config, "tpu-v5e:4x4")
    sent = found.program.traffic_by_kind
    assert {dtype for kind, dtype in sent if kind == "all-gather"} == {"bfloat16"}
    # 2 bytes forward, 2 for the backward pass that computes again, 4 for float32 gradients; what is no
    # layer is gathered once. Were one activation gathered, there would be more.
    assert sum(size for _, size in sent.values()) <= 8 * found.parameters
    whole = sum(size for (kind, _), (_, size) in sent.items() if kind == "all-gather")
    assert whole <= 4 * found.parameters
