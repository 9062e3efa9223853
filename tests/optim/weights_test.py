"""Caps on weights: params + updates obey them, by NumPy's norms and singular values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp import optim

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
nines = lambda *shape: np.full(shape, 9, np.float32)
PARAMS = {
    "dense": {"kernel": normal(12, 7), "bias": nines(7)},
    "blocks": {"kernel": normal(3, 8, 6), "bias": nines(3, 6)},
    "conv": {"kernel": normal(3, 3, 4, 5)},
}
UPDATES = jax.tree.map(lambda p: np.float32(0.1) * normal(*p.shape), PARAMS)


def matrices(params):
    """Every matrix that is capped, as NumPy arrays [in, out] in float64."""
    return [
        np.asarray(params["dense"]["kernel"], np.float64),
        *np.asarray(params["blocks"]["kernel"], np.float64),
        np.asarray(params["conv"]["kernel"], np.float64).reshape(-1, 5),
    ]


@functools.partial(jax.jit, static_argnums=0)
def first_step(tx, params, updates):
    """The updates of a fresh chain, the parameters after them, and its state."""
    updates, state = tx.update(updates, tx.init(params), params)
    return updates, optax.apply_updates(params, updates), state


def applied(tx, params, updates):
    with jax.numpy_dtype_promotion("strict"):
        return first_step(tx, params, updates)[1]


SPECTRAL = optim.clip_spectral_norm(1.0, stacked=("blocks",))


@pytest.mark.parametrize("per", ["unit", "matrix"])
def test_weights_obey_a_norm_per_unit_or_matrix(per):
    after = applied(optim.clip_weights(1.5, per=per, stacked=("blocks",)), PARAMS, UPDATES)
    axis = 0 if per == "unit" else None
    for got, old, step in zip(*map(matrices, (after, PARAMS, UPDATES))):
        moved = old + step
        norm = np.linalg.norm(moved, axis=axis)
        np.testing.assert_allclose(got, moved * np.minimum(1, 1.5 / norm), rtol=1e-5, atol=1e-6)
        assert np.all(np.linalg.norm(got, axis=axis) <= 1.5 * (1 + 1e-6))
    for name in ("dense", "blocks"):
        chex.assert_trees_all_equal(
            after[name]["bias"], PARAMS[name]["bias"] + UPDATES[name]["bias"]
        )


@pytest.mark.parametrize(
    "make", [optim.clip_weights, optim.clip_spectral_norm], ids=["norm", "spectral"]
)
def test_below_the_cap_updates_keep_their_bits_and_without_parameters_it_says_so(make):
    tx = make(1e3)
    updates, *_ = first_step(tx, PARAMS, UPDATES)
    chex.assert_trees_all_equal(updates, UPDATES)
    with pytest.raises(ValueError, match="state, params"):
        tx.update(UPDATES, jax.eval_shape(tx.init, PARAMS))
    with pytest.raises(ValueError, match="above 0"):
        make(-1.0)


def test_singular_values_obey_the_cap_in_every_layer_of_a_stack():
    after = applied(SPECTRAL, PARAMS, UPDATES)
    for got in matrices(after):
        np.testing.assert_allclose(np.linalg.svd(got)[1][0], 1.0, rtol=1e-2)
    # The directions stay: every matrix is scaled as a whole.
    got, moved = matrices(after)[0], matrices(PARAMS)[0] + matrices(UPDATES)[0]
    ratios = np.linalg.svd(got)[1] / np.linalg.svd(moved)[1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
    zero = {"kernel": np.zeros((4, 3), np.float32)}
    chex.assert_trees_all_equal(applied(SPECTRAL, zero, zero), zero)


def test_one_warm_started_step_keeps_up_with_weights_that_drift():
    """Random steps of a hundredth of the weights' size for 200 updates: the cap is exceeded by under 1%."""
    tx = optim.clip_spectral_norm(1.0)
    start = normal(48, 32)
    start = start / np.linalg.norm(start, 2)

    def body(carry, direction):
        w, state = carry
        drift = 0.01 * jnp.linalg.norm(w) / (48 * 32) ** 0.5 * direction
        update, state = tx.update(drift, state, w)
        w = w + update
        return (w, state), jnp.linalg.norm(w, 2)

    drifts = jax.jit(lambda w, directions: jax.lax.scan(body, (w, tx.init(w)), directions)[1])
    sigmas = np.asarray(drifts(start, normal(200, 48, 32)))
    assert np.all(sigmas < 1.01)
    assert np.all(sigmas[10:] > 0.95), "the cap is what holds it"


def test_a_convolution_exceeds_its_kernels_matrix_by_at_most_the_root_of_its_taps():
    """The circular convolution's norm by FFT, one small matrix a frequency."""
    after = applied(SPECTRAL, PARAMS, UPDATES)
    kernel = np.asarray(after["conv"]["kernel"], np.float64)
    norm = np.linalg.svd(np.fft.fft2(kernel, (16, 16), axes=(0, 1)))[1].max()
    assert 1.0 < norm <= np.sqrt(9) * 1.01


def test_caps_stand_behind_the_rate_and_before_the_average_in_a_whole_chain():
    _, after, state = first_step(optim.adamw(1e-2, cap=SPECTRAL, ema=0.5), PARAMS, UPDATES)
    for got, mean, old in zip(*map(matrices, (after, optim.ema_of(state), PARAMS))):
        np.testing.assert_allclose(np.linalg.svd(got)[1][0], 1.0, rtol=1e-2)
        np.testing.assert_allclose(mean, (old + got) / 2, rtol=1e-5, atol=1e-6)
