"""The parts of a run, and the experiment that float16 fails without loss scaling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_mlp_float32, digits_mlp_replicas_float16
from jaxmp.numerics import tree as trees
from jaxmp.run import build
from jaxmp.run.config import LossScaleConfig, OptimizerConfig

REPLICAS = digits_mlp_replicas_float16.get_config()


def trained(config, steps=None):
    """(state before, state after, mean held-out metrics, the last step's metrics)."""
    parts = build.build(config)
    _, step = build.compile_step(parts)
    init = jax.jit(parts.init)
    state = init()
    for index in range(steps or config.steps):
        state, metrics = step(state, parts.source.batch_at(index))
    held_out = build.evaluate_all(jax.jit(parts.evaluate), state, parts.source.validation)
    return init(), state, held_out, metrics


def test_without_loss_scaling_no_weight_moves_by_a_bit():
    config = dataclasses.replace(REPLICAS, loss_scale=LossScaleConfig("none"))
    before, after, held_out, _ = trained(config)
    assert int(after.step) == 400  # not skipped: applied, and nothing
    # The ten biases behind the last product are out of the flood: their gradient is summed in float32.
    moved = [
        trees.path_string(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before.params),
            jax.tree.leaves(after.params),
            strict=True,
        )
        if np.any(old != new)
    ]
    assert moved == ["head/bias"]
    assert held_out["accuracy"] < 0.2


@pytest.mark.slow
def test_with_dynamic_loss_scaling_it_matches_float32_over_seeds():
    mean = {}
    for policy in ("mixed_float16", "float32"):
        config = dataclasses.replace(REPLICAS, policy=policy)
        parts = [build.build(dataclasses.replace(config, seed=seed)) for seed in range(3)]
        _, step = build.compile_step(parts[0])  # a seed is data, not program
        evaluate, accuracy = jax.jit(parts[0].evaluate), []
        for one in parts:
            state = one.init()
            for index in range(config.steps):
                state, _ = step(state, one.source.batch_at(index))
            held_out = build.evaluate_all(evaluate, state, one.source.validation)
            accuracy.append(held_out["accuracy"])
        mean[policy] = np.mean(accuracy)
    assert mean["mixed_float16"] > 0.90
    assert abs(mean["mixed_float16"] - mean["float32"]) < 0.01


@pytest.mark.parametrize("replicas", [2**10, 2**19])
def test_replicas_scale_the_gradient_exactly_and_the_loss_not_at_all(replicas):
    logits = jax.random.normal(jax.random.key(0), (64, 10))
    targets = jnp.arange(64) % 10
    one = jax.value_and_grad(build.replicated_loss(1))(logits, targets)
    many = jax.value_and_grad(build.replicated_loss(replicas))(logits, targets)
    assert one[0] == many[0]
    np.testing.assert_array_equal(one[1], many[1] * replicas)


def test_in_float32_replicas_change_nothing():
    config = dataclasses.replace(digits_mlp_float32.get_config(), batch_size=64)
    one, many = (trained(dataclasses.replace(config, replicas=r), steps=5) for r in (1, 2**19))
    # Not bit by bit: XLA may fuse a product into a sum in one program and not in the other.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    jax.tree.map(close, one[1].params, many[1].params)
    close(one[3]["grad_norm"], many[3]["grad_norm"])


def update_norms(gradient_norms, **settings):
    """The norms of what the config's chain makes of gradients, by plain descent at a rate of 1."""
    plain = OptimizerConfig("sgd", learning_rate=1.0, schedule="constant", momentum=0.0)
    config = dataclasses.replace(
        digits_mlp_float32.get_config(), optimizer=dataclasses.replace(plain, **settings)
    )
    tx = build.transformation(config, build.schedule_of(config))
    params = {"w": jnp.array([3.0, 4.0])}
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for norm in gradient_norms:
        updates, state = update({"w": norm * jnp.array([0.6, 0.8])}, state, params)
        found.append(float(jnp.linalg.norm(updates["w"])))
    return np.array(found)


# Thirty gradients of norm 1, but for two of 1.1, and a last one of 100.
SPIKE = [1.0] * 10 + [1.1] * 2 + [1.0] * 18 + [100.0]


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"clip": 0.0}, 100.0),
        ({"clip": 2.0}, 2.0),
        ({"clip": 0.5, "clip_by": "value"}, 0.5 * 2**0.5),
        ({"clip": 0.01, "clip_by": "unit"}, 0.01 * 5),
        ({"clip": 0.5, "clip_by": "quantile"}, 1.0),
        ({"clip": 0.0, "skip_outliers": 10.0}, 0.0),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_config_says_against_a_spike_is_done(settings, last):
    np.testing.assert_allclose(update_norms(SPIKE, **settings)[-1], last, rtol=1e-5)


def test_a_zscore_clips_a_spike_to_the_neighbourhood_of_the_mean():
    *before, last = update_norms(SPIKE, clip=2.5, clip_by="zscore")
    np.testing.assert_allclose(before, SPIKE[:-1], rtol=1e-5)
    assert 1.0 < last < 1.01


@pytest.mark.parametrize("schedule", ["cosine", "rsqrt", "constant", "stable_decay"])
def test_schedules_begin_at_zero_and_reach_their_peak(schedule):
    config = dataclasses.replace(
        digits_mlp_float32.get_config(),
        optimizer=OptimizerConfig(learning_rate=0.3, schedule=schedule, warmup=10),
        steps=100,
    )
    rate = build.schedule_of(config)
    assert rate(0) == 0 and rate(10) == np.float32(0.3)
    assert (
        rate(100) == (0 if schedule in ("cosine", "stable_decay") else rate(100)) and rate(60) > 0
    )
    if schedule == "stable_decay":
        assert rate(80) == np.float32(0.3) and 0 < rate(90) < 0.3


def test_the_step_is_donated_and_its_state_stays_float32():
    config = dataclasses.replace(REPLICAS, batch_size=16)
    parts = build.build(config)
    _, step = build.compile_step(parts)
    state = jax.jit(parts.init)()
    kernel = jax.tree.leaves(state.params)[-1]
    new, _ = step(state, parts.source.batch_at(0))
    assert kernel.is_deleted()
    floating = [leaf for leaf in jax.tree.leaves(new) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floating} == {"float32"}


def test_evaluation_weighs_rows_not_batches():
    batches = ({"targets": np.zeros(3)}, {"targets": np.zeros(1)})
    evaluate = lambda state, batch: {"loss": jnp.float32(len(batch["targets"]))}
    assert build.evaluate_all(evaluate, None, batches) == {"loss": (3 * 3 + 1) / 4}
