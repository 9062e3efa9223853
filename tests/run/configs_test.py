"""Every shipped config: its docstring is a contract, and it trains: small ones do, large ones are traced."""

import ast
import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from jaxmp.run import build, cli, loop, metrics
from jaxmp.run import config as configs
from jaxmp.run.config import EvalConfig, LogConfig
from jaxmp.run.data import TextConfig

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
SMALLER = {"depth": 1, "width": 32}
SIZES = {  # published parameters: GPT-2, Mistral 7B, He et al. 2016, Dosovitskiy et al. 2021
    "gpt2_124m": 124_439_808,
    "llama_7b": 7_241_732_096,
    "imagenet_resnet50": 25_557_032,
    "imagenet_vit_b16": 86_567_656,
}


LARGE = [f"{name}_bfloat16" for name in ("llama_1b", *SIZES)]
TASKS = ("digits_mlp", "digits_vit", "text_gpt")  # each in three precisions
# Those that train: large ones are traced instead, and the others of a task differ by their policy.
TRAINED = [
    f
    for f in FILES
    if f.stem not in LARGE
    if f.stem.rpartition("_")[0] not in TASKS or f.stem.endswith("_float16")
]


def test_the_configs_that_were_promised_are_there():
    precisions = ("float32", "bfloat16", "float16")
    wanted = {f"{task}_{p}" for task in TASKS for p in precisions}
    assert {f.stem for f in FILES} >= wanted | {
        "digits_resnet_float16",
        "digits_mlp_replicas_float16",
        *LARGE,
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_docstring_is_a_contract(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    for promise in (
        "Trains:",
        f"Command: python scripts/train.py configs/{path.name}",
        "Hardware and time:",
        "Expected:",
    ):
        assert promise in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_name_tells_its_precision(path):
    config = cli.load(path)
    assert path.stem.endswith("_" + configs.policy_of(config).compute_dtype.name)
    assert config.workdir == ""


@pytest.mark.parametrize("task", TASKS)
def test_the_precisions_of_a_task_differ_by_their_policy_alone(task):
    one, *others = (
        dataclasses.replace(cli.load(f), policy="")
        for f in FILES
        if f.stem.rpartition("_")[0] == task
    )
    assert len(others) == 2 and all(other == one for other in others)


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_it_trains_two_steps(path, tmp_path):
    config = cli.load(path)
    fields = {field.name for field in dataclasses.fields(config.model)}
    small = {k: v for k, v in SMALLER.items() if "depth" in fields and k in fields}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **small),
        optimizer=dataclasses.replace(config.optimizer, warmup=0),
        steps=2,
        batch_size=16,
        workdir=str(tmp_path),
        eval=EvalConfig(every=0),
        log=LogConfig(report=False),
    )
    outcome = loop.train(config, name=path.stem)
    assert (outcome.step, outcome.exit_code) == (2, 0)
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert np.isfinite([first["loss"], second["loss"], first["grad_norm"]]).all()
    assert first["loss_scale"] == (
        1 if "float16" not in path.stem.replace("bfloat16", "") else config.loss_scale.initial
    )
    # Of a vocabulary's logits it would take one more pass over all of them.
    assert ("accuracy" in first) != isinstance(config.data, TextConfig)
    assert not first["skipped"] and first["learning_rate"] == np.float32(
        config.optimizer.learning_rate
    )


def test_the_default_experiment_is_of_the_size_it_says():
    state = jax.eval_shape(build.build(cli.load(ROOT / "configs" / "digits_vit_bfloat16.py")).init)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(state.params)), -3) == 115_000


@pytest.mark.parametrize("stem", LARGE)
def test_a_large_one_takes_a_step_at_its_published_size_without_being_made(stem):
    parts = build.build(cli.load(ROOT / "configs" / f"{stem}.py"))
    state, batch = build.abstract_arguments(parts)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert size == SIZES.get(stem.removesuffix("_bfloat16"), size)
    leaves = jax.tree.leaves((state, batch))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    after, metrics = jax.eval_shape(parts.step, state, batch)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)
    assert metrics["loss"].dtype == "float32" and {"grad_norm", "learning_rate"} <= set(metrics)
    assert jax.eval_shape(parts.evaluate, state, batch)["loss"].shape == ()
