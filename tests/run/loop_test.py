"""The run: resumes to the same bits, writes each step once, stops when asked and when hopeless."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxmp.nn.models.mlp import MLPConfig
from jaxmp.nn.models.resnet import ResNetConfig
from jaxmp.run import build, checkpoint, data, loop, metrics
from jaxmp.run.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    EvalConfig,
    LogConfig,
    LossScaleConfig,
    OptimizerConfig,
)
from jaxmp.run.signals import StopRequest

TINY = Config(
    model=MLPConfig(width=16, depth=1, dropout=0.1),
    data=data.DigitsConfig(shift=1),
    steps=10,
    batch_size=32,
    policy="mixed_float16",
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=2, weight_decay=0.1, ema=0.9),
    loss_scale=LossScaleConfig(initial=2.0**22, period=3),  # overflows at first, grows later
    checkpoint=CheckpointConfig(every=4),
    eval=EvalConfig(every=5),
    log=LogConfig(every=5, report=False),
)
CNN = dataclasses.replace(
    TINY,
    model=ResNetConfig(stages=(1,), width=4),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, clip=0.0),
    accumulate=2,
)
pytestmark = pytest.mark.usefixtures("built_once")

CONFIGS = {"mlp with dropout and average": TINY, "cnn with BatchNorm, accumulated": CNN}


class Crash(BaseException):
    """What ends a run without its leave."""


def source_of(config, at_step, do):
    """The config's data, with `do()` called when the batch after `at_step` steps is asked for."""
    source = build.build(config).source

    def batch_at(step):
        if step == at_step:
            do()
        return source.batch_at(step)

    return dataclasses.replace(source, batch_at=batch_at)


def run_in(directory, config=TINY, **how):
    return loop.train(dataclasses.replace(config, workdir=str(directory)), **how)


def raise_crash():
    raise Crash


def records(directory, name="metrics.jsonl"):
    """All records but their speed, which no two runs share."""
    found = metrics.read(directory / name)
    return [{k: v for k, v in r.items() if not k.endswith("per_second")} for r in found]


def final_state(directory, config=TINY):
    abstract, _ = build.abstract_arguments(build.build(config))
    with checkpoint.open_store(directory / "checkpoints") as store:
        restored = store.restore_latest(abstract)
    return restored.step, restored.state


def assert_same_run(one, other, config):
    assert records(one) == records(other)
    assert records(one, "eval.jsonl") == records(other, "eval.jsonl")
    (step, state), (other_step, other_state) = final_state(one, config), final_state(other, config)
    assert step == other_step == config.steps
    as_bits = lambda leaf: np.asarray(
        jax.random.key_data(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(as_bits(a), as_bits(b)), state, other_state
    )


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compiled programs are kept between runs: quicker, and one more thing that may not change bits."""
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def undisturbed(request, tmp_path_factory):
    """A config and the directory of a run of it that nothing interrupted."""
    directory = tmp_path_factory.mktemp("undisturbed")
    outcome = run_in(directory, request.param)
    assert (outcome.step, outcome.exit_code) == (10, 0)
    return request.param, directory


def test_each_step_has_one_record_with_what_was_promised(undisturbed):
    config, directory = undisturbed
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line in lines:
        assert set(line) >= {
            "loss",
            "grad_norm",
            "loss_scale",
            "skipped",
            "learning_rate",
            "examples_per_second",
        }
    assert [r["step"] for r in records(directory, "eval.jsonl")] == [5, 10]
    # The schedule stands still while steps are skipped.
    rates, skipped = [r["learning_rate"] for r in lines], [r["skipped"] for r in lines]
    applied = np.cumsum([0, *(not s for s in skipped)])
    schedule = build.schedule_of(config)
    assert rates == [float(schedule(n)) for n in applied[:-1]]
    assert any(skipped) and not all(skipped)


@pytest.mark.parametrize("after", [1, 4, 7])
def test_stopped_and_resumed_is_bit_identical(undisturbed, tmp_path, after):
    config, reference = undisturbed
    stop = StopRequest()
    outcome = run_in(
        tmp_path, config, stop=stop, source=source_of(config, after, lambda: stop.ask("SIGTERM"))
    )
    # The signal came while step after + 1 was prepared: that step is finished and saved.
    assert (outcome.step, outcome.exit_code) == (after + 1, 75)
    assert "SIGTERM" in outcome.message
    assert run_in(tmp_path, config).exit_code == 0
    assert_same_run(tmp_path, reference, config)


@pytest.mark.parametrize("after", [2, 6, 9])
def test_crashed_and_resumed_is_bit_identical(undisturbed, tmp_path, after):
    config, reference = undisturbed
    with pytest.raises(Crash):
        run_in(tmp_path, config, source=source_of(config, after, raise_crash))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 0.')  # a half-written line
    assert run_in(tmp_path, config).exit_code == 0
    assert_same_run(tmp_path, reference, config)


def test_gradients_by_depth_are_recorded_each_once_and_change_nothing(undisturbed, tmp_path):
    config, reference = undisturbed
    with_flow = dataclasses.replace(config, log=dataclasses.replace(config.log, flow=3))
    stop = StopRequest()
    source = source_of(with_flow, 6, lambda: stop.ask("SIGTERM"))
    assert run_in(tmp_path, with_flow, stop=stop, source=source).step == 7
    with (tmp_path / "instruments.jsonl").open("a") as file:
        file.write('{"step": 9}\n')  # behind the checkpoint
    run_in(tmp_path, with_flow)
    found = records(tmp_path, "instruments.jsonl")
    assert [record["step"] for record in found] == [3, 6, 9]
    assert found[0]["grad_rms/head"] is None  # the loss scale overflows at first
    assert all(record["flow/head"] > 0 and record["grad_rms/head"] > 0 for record in found[1:])
    assert_same_run(tmp_path, reference, config)


def test_records_are_on_disk_before_the_checkpoint_that_contains_them(tmp_path, monkeypatch):
    seen = []
    save = checkpoint.CheckpointStore.save

    def looking(self, step, *args, **kwargs):
        seen.append((step, len(records(tmp_path)), len(records(tmp_path, "eval.jsonl"))))
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint.CheckpointStore, "save", looking)
    run_in(tmp_path)
    assert seen == [(4, 4, 0), (8, 8, 1), (10, 10, 2)]


def test_a_signal_before_the_first_step_leaves_nothing_behind(tmp_path):
    stop = StopRequest()
    stop.ask("SIGINT")
    outcome = run_in(tmp_path, stop=stop)
    assert (outcome.step, outcome.exit_code) == (0, 75)
    assert run_in(tmp_path).step == 10


def test_a_finished_run_is_left_alone_and_can_be_prolonged(tmp_path):
    first = run_in(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = run_in(tmp_path)
    assert again.step == 10 and again.evaluation == first.evaluation
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    longer = run_in(tmp_path, dataclasses.replace(TINY, steps=12))
    assert longer.step == 12 and [r["step"] for r in records(tmp_path)] == list(range(1, 13))
    with pytest.raises(
        ConfigError, match="steps=10, but the run in this workdir has done 12; write --steps 12"
    ):
        run_in(tmp_path)


def test_a_directory_belongs_to_one_experiment(tmp_path):
    run_in(tmp_path, dataclasses.replace(TINY, steps=4))
    other = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, width=8))
    with pytest.raises(
        ConfigError, match=r"model.width=8 here, but workdir=.* holds a run with model.width=16"
    ):
        run_in(tmp_path, other)
    (tmp_path / "config.json").unlink()  # then the checkpoint itself says no, by the leaf's name
    with pytest.raises(ConfigError, match="Dense_0"):
        run_in(tmp_path, other)


def test_a_directory_without_checkpoints_can_be_used_again(tmp_path):
    with pytest.raises(Crash):
        run_in(tmp_path, source=source_of(TINY, 2, raise_crash))
    assert run_in(tmp_path, dataclasses.replace(TINY, seed=1, steps=4)).exit_code == 0
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_costs_its_steps_and_no_more(undisturbed, tmp_path, capsys):
    config, reference = undisturbed
    run_in(tmp_path, config)
    (victim,) = [
        p
        for p in (tmp_path / "checkpoints" / "10").rglob("*")
        if p.is_file() and p.name == "metadata"
    ][:1]
    victim.write_bytes(b"")
    assert run_in(tmp_path, config).exit_code == 0
    assert "10.corrupt" in capsys.readouterr().out
    assert_same_run(tmp_path, reference, config)


@pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
def test_a_loss_that_stays_infinite_ends_the_run_with_a_sentence(tmp_path, policy):
    patient = dataclasses.replace(
        TINY,
        steps=50,
        policy=policy,
        loss_scale=LossScaleConfig(patience=6),
        checkpoint=CheckpointConfig(every=3),
    )
    source = build.build(patient).source

    def batch_at(step):
        batch = source.batch_at(step)
        return batch | {"inputs": batch["inputs"] + np.float32(np.inf if step >= 5 else 0)}

    outcome = run_in(tmp_path, patient, source=dataclasses.replace(source, batch_at=batch_at))
    assert outcome.exit_code == 1
    assert outcome.message.startswith(
        "step 11: the last 6 steps were all skipped, and the loss itself is not finite"
    )
    assert [r["loss"] for r in records(tmp_path)[5:11]] == [None] * 6  # strict JSON
    assert all(np.isfinite(r["loss"]) for r in records(tmp_path)[:5])


def test_one_bad_batch_is_skipped_and_the_run_goes_on(tmp_path):
    config = dataclasses.replace(TINY, loss_scale=LossScaleConfig())
    source = build.build(config).source

    def batch_at(step):
        batch = source.batch_at(step)
        return batch | {"inputs": batch["inputs"] * np.float32(np.nan if step == 4 else 1)}

    outcome = run_in(tmp_path, config, source=dataclasses.replace(source, batch_at=batch_at))
    assert outcome.exit_code == 0
    assert [r["skipped"] for r in records(tmp_path)] == [step == 4 for step in range(10)]
    assert np.isfinite(outcome.evaluation["loss"]) and np.isfinite(outcome.evaluation["ema_loss"])


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboardX")
    run_in(
        tmp_path, dataclasses.replace(TINY, steps=3, log=LogConfig(tensorboard=True, report=False))
    )
    assert any(p.name.startswith("events") for p in (tmp_path / "tensorboard").iterdir())
