"""Clipping and skipping by what norms have been: against plain loops, whole when held, never for ever."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp import optim
from jaxmp.numerics import tree as trees
from jaxmp.optim.outliers import RunningNorm
from jaxmp.precision import DynamicLossScale

PARAMS = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
RNG = np.random.default_rng(0)


def gradient(norm):
    """A gradient over PARAMS of that norm."""
    return jax.tree.map(lambda p: np.full(p.shape, norm / 3.0, np.float32), PARAMS)


@functools.cache
def compiled(tx):
    """Gives the update's gradient, its norm and the new state in one program."""

    def update(grads, state):
        updates, state = tx.update(grads, state)
        return updates, trees.global_norm(updates), state

    return jax.jit(update)


def norms_after(tx, norms):
    """The norms of the updates that `tx` makes of gradients with these norms, one after another."""
    state, seen = tx.init(PARAMS), []
    with jax.numpy_dtype_promotion("strict"):
        for norm in norms:
            _, after, state = compiled(tx)(gradient(norm), state)
            seen.append(float(after))
    return np.array(seen), state


def spiky(count):
    norms = np.exp(0.2 * RNG.normal(size=count))
    norms[30::17] *= 50
    return norms


def test_clipping_by_zscore_against_a_loop_in_float64():
    norms = spiky(100)
    got, state = norms_after(optim.clip_by_zscore(2.5, decay=0.97, warmup=25), norms)
    want, seen, mean, variance = [], [], 0.0, 0.0
    for count, norm in enumerate(norms):
        if count >= 25 and norm > mean + 2.5 * variance**0.5:
            z = (norm - mean) / variance**0.5
            norm = mean + variance**0.5 * 2.5**2 / z
        want.append(norm)
        if count < 25:
            seen.append(norm)
            mean, variance = np.mean(seen), np.var(seen)
        else:
            variance = 0.97 * (variance + 0.03 * (norm - mean) ** 2)
            mean = 0.97 * mean + 0.03 * norm
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert np.all(got[30::17] < norms[30::17] / 20), "a spike of 50 comes down near the mean"
    np.testing.assert_allclose([state.mean, state.variance], [mean, variance], rtol=1e-4)


def test_a_gradient_infinitely_far_out_is_brought_to_the_mean():
    norms = [*np.linspace(0.9, 1.1, 25), 1e12]
    got, _ = norms_after(optim.clip_by_zscore(), norms)
    np.testing.assert_allclose(got[-1], 1.0, rtol=1e-5)


def test_clipping_by_quantile_against_numpy():
    norms = spiky(100)
    got, _ = norms_after(optim.clip_by_quantile(0.9, window=40, warmup=10), norms)
    want = [
        min(norm, np.quantile(norms[max(0, i - 40) : i], 0.9)) if i >= 10 else norm
        for i, norm in enumerate(norms)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
@pytest.mark.parametrize(
    "tx", [optim.clip_by_zscore(), optim.clip_by_quantile()], ids=["zscore", "quantile"]
)
def test_what_is_not_finite_stays_so_and_is_not_learned_from(tx, bad):
    _, state = norms_after(tx, spiky(30))
    grads = {**gradient(1.0), "b": np.array([bad, 1.0, 1.0], np.float32)}
    updates, _, after = compiled(tx)(grads, state)
    assert not np.isfinite(updates["b"]).all()
    chex.assert_trees_all_equal(after, state)


def inner():
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(optim.warmup_cosine(1e-2, 100, 5, start=1e-3)),
        optim.params_ema(0.9),
    )


def test_without_outliers_it_is_the_chain_it_wraps_bit_by_bit():
    plain, tx = inner(), optim.skip_outliers(inner(), warmup=3)
    plain_state, state = plain.init(PARAMS), tx.init(PARAMS)
    for norm in np.exp(0.2 * RNG.normal(size=10)):
        want, plain_state = plain.update(gradient(norm), plain_state, PARAMS)
        got, state = tx.update(gradient(norm), state, PARAMS)
        chex.assert_trees_all_equal(got, want)
        chex.assert_trees_all_equal(state.inner_state, plain_state)
    assert state.skipped == 0


SKIPPING = optim.skip_outliers(inner())


@pytest.mark.parametrize("bad", [2000.0, np.inf, np.nan])
def test_a_skip_holds_the_chain_whole_and_is_counted(bad):
    state = SKIPPING.init(PARAMS)
    update = jax.jit(SKIPPING.update)
    for norm in np.linspace(0.8, 1.2, 26):
        _, state = update(gradient(norm), state, PARAMS)
    updates, after = update(gradient(bad), state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, PARAMS))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    chex.assert_trees_all_equal(after.norms, state.norms)
    assert (after.skipped, after.skipped_in_a_row) == (1, int(np.isfinite(bad)))
    _, after = update(gradient(1.0), after, PARAMS)
    assert (after.skipped, after.skipped_in_a_row) == (1, 0)


def test_a_change_of_regime_costs_its_patience_and_not_the_run():
    tx = optim.skip_outliers(optax.identity(), 10.0, warmup=5, patience=3)
    got, state = norms_after(tx, [1.0] * 6 + [100.0] * 6 + [5000.0] + [100.0] * 2)
    # After three skips the fourth is let through and the mean starts anew, so all that follow are usual;
    # the new start learns for five norms before it calls anything an outlier.
    want = [1.0] * 6 + [0.0] * 3 + [100.0] * 3 + [5000.0] + [100.0] * 2
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert state.skipped == 3
    new_start = (3 * 100 + 5000 + 100) / 5
    np.testing.assert_allclose(state.norms.mean, 0.97 * new_start + 0.03 * 100, rtol=1e-5)


def test_what_is_not_finite_uses_up_no_patience_and_is_never_let_through():
    tx = optim.skip_outliers(optax.identity(), warmup=5, patience=2)
    norms = [1.0] * 6 + [np.nan] * 9 + [100.0, np.inf, 100.0, np.inf, 1.0]
    got, state = norms_after(tx, norms)
    np.testing.assert_allclose(got, [1.0] * 6 + [0.0] * 13 + [1.0], rtol=1e-6)
    assert (state.skipped, state.skipped_in_a_row) == (13, 0)


def test_inside_loss_scaling_each_guard_counts_its_own():
    tx = optim.with_loss_scale(optim.skip_outliers(inner(), warmup=5), DynamicLossScale(2.0**10))
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for norm in (1, 1, 1, 1, 1, 1, 500, np.inf, 1):
        grads = gradient(norm * optim.loss_scale_of(state))
        before, (updates, state) = state, update(grads, state, PARAMS)
        if norm in (500, np.inf):
            chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, PARAMS))
            chain = lambda s: s.inner_state.inner_state
            chex.assert_trees_all_equal(chain(state), chain(before))
    assert (state.skipped, optim.skipped_outliers_of(state)) == (1, 1)
    # An outlier says nothing about the range of float16: only the infinity halved the scale.
    assert optim.loss_scale_of(state) == 2.0**9
    assert optim.skipped_outliers_of(optax.adam(1e-3).init(PARAMS)) == 0


def test_state_is_float32_and_compiles_once_for_half_precision_gradients():
    chain = optim.adamw(1e-3, clip=optim.clip_by_zscore(), guard=optim.skip_outliers)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = chain.init(params)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda g, s, p: chain.update(g, s, p), n=1))
    for _ in range(3):
        _, state = update(jax.tree.map(np.ones_like, params), state, params)
    floating = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floating) == {jnp.dtype("float32")}
    nodes = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, RunningNorm))
    assert [int(n.count) for n in nodes if isinstance(n, RunningNorm)] == [3, 3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.clip_by_zscore(0.0), "above 0"),
        (lambda: optim.clip_by_zscore(decay=1.0), "decay in"),
        (lambda: optim.clip_by_quantile(0.0), "quantile in"),
        (lambda: optim.clip_by_quantile(window=10), "window of 10"),
        (lambda: optim.skip_outliers(optax.identity(), warmup=0), "1 norm or more"),
        (lambda: optim.skip_outliers(optax.identity(), patience=0), "patience"),
    ],
    ids=["threshold", "decay", "quantile", "window", "warmup", "patience"],
)
def test_impossible_settings_are_told_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()
