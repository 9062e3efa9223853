"""The guarded update: exact at powers of two, whole when held, at home in any chain."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp import optim
from jaxmp.numerics import tree as trees
from jaxmp.precision import DynamicLossScale, StaticLossScale

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.0])}
GRADS = {"w": jnp.array([[0.3, -0.1], [0.2, 5.0]]), "b": jnp.array([1e-7, 2.0])}
BAD = {"w": GRADS["w"].at[0, 0].set(jnp.inf), "b": GRADS["b"]}


def inner():
    return optax.chain(
        optim.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(optim.warmup_cosine(1e-2, 20, 5, start=1e-3)),
        optim.params_ema(0.9),
    )


def scaled(grads, scale):
    return jax.tree.map(lambda g: g * scale, grads)


@pytest.mark.parametrize("scale", [2.0**-3, 2.0**7, 2.0**15, 2.0**30])
def test_any_power_of_two_gives_the_bits_of_the_chain_without_scaling(scale):
    plain, tx = inner(), optim.with_loss_scale(inner(), StaticLossScale(scale))
    plain_state, state = plain.init(PARAMS), tx.init(PARAMS)
    for _ in range(3):
        want, plain_state = plain.update(GRADS, plain_state, PARAMS)
        got, state = tx.update(scaled(GRADS, scale), state, PARAMS)
        chex.assert_trees_all_equal(got, want)
        chex.assert_trees_all_equal(state.inner_state, plain_state)


def test_the_scale_that_was_used_divides_also_on_the_step_where_it_grows():
    tx = optim.with_loss_scale(optax.identity(), DynamicLossScale(2.0**4, period=2))
    state = tx.init(PARAMS)
    for expected in (2.0**4, 2.0**4, 2.0**5, 2.0**5, 2.0**6):
        scale = optim.loss_scale_of(state)
        assert scale == expected
        updates, state = tx.update(scaled(GRADS, scale), state, PARAMS)
        chex.assert_trees_all_equal(updates, GRADS)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_non_finite_gradient_holds_everything_but_the_scale_and_its_counters(bad):
    tx = optim.with_loss_scale(inner(), DynamicLossScale(2.0**8))
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(scaled(GRADS, 2.0**8), state, PARAMS)
    grads = {**GRADS, "b": GRADS["b"].at[1].set(bad)}
    updates, after = jax.jit(tx.update)(grads, state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert optim.loss_scale_of(after) == 2.0**7
    assert (after.skipped, after.skipped_in_a_row) == (1, 1)
    _, after = tx.update(scaled(GRADS, 2.0**7), after, PARAMS)
    assert (after.skipped, after.skipped_in_a_row) == (1, 0)


def test_a_non_finite_loss_skips_but_leaves_the_scale_alone():
    tx = optim.with_loss_scale(inner(), DynamicLossScale(2.0**8))
    state = tx.init(PARAMS)
    updates, after = tx.update(BAD, state, PARAMS, value=jnp.float32(jnp.inf))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert optim.loss_scale_of(after) == 2.0**8 and after.skipped == 1
    chex.assert_trees_all_equal(after.loss_scale.counter, state.loss_scale.counter)


def test_gradients_whose_squares_overflow_float32_are_clipped_not_skipped():
    tx = optim.with_loss_scale(optim.clip_by_global_norm(1.0))
    grads = {"w": jnp.array([3e25, 4e25])}
    updates, state = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["w"], [0.6, 0.8], rtol=1e-6)
    assert state.skipped == 0


def test_the_scale_is_found_however_deep_and_only_once():
    tx = optim.with_loss_scale(optax.adam(1e-3), DynamicLossScale(2.0**9))
    nested = optax.chain(optax.masked(optax.chain(optax.identity(), tx), True), optax.identity())
    assert optim.loss_scale_of(nested.init(PARAMS)) == 2.0**9
    assert optim.loss_scale_of(optax.adam(1e-3).init(PARAMS)) == 1.0
    assert optim.loss_scale_of(optax.MultiSteps(tx, 2).init(PARAMS)) == 2.0**9
    with pytest.raises(ValueError, match="2 loss scales"):
        optim.loss_scale_of((tx.init(PARAMS), tx.init(PARAMS)))


def test_finite_check_and_clip_share_one_norm_in_the_compiled_program():
    """The norm of the guard and that of the clip are the same expression; XLA keeps one."""

    def reductions(fn, *args):
        return jax.jit(fn).lower(*args).compile().as_text().count(" reduce(")

    tx = optim.with_loss_scale(optim.clip_by_global_norm(1.0), DynamicLossScale())
    state = jax.eval_shape(tx.init, PARAMS)
    one_norm = reductions(trees.norm_and_finite, PARAMS)
    assert reductions(tx.update, PARAMS, state, PARAMS) == one_norm > 0


def test_it_compiles_once_with_a_python_float_as_start():
    tx = optim.with_loss_scale(optax.sgd(0.1), DynamicLossScale(2.0**15))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda g, s, p: tx.update(g, s, p), n=1))
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = update(GRADS, state, PARAMS)
