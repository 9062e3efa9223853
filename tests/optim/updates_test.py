"""Limits on an update's root mean square, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp import optim

RNG = np.random.default_rng(0)


def test_update_clipping_divides_each_array_by_its_own_rms():
    updates = {"large": jnp.asarray(RNG.normal(size=(5, 4)) * 3, jnp.float32), "small": jnp.ones(3)}
    tx = optim.clip_update_rms(0.5)
    with jax.numpy_dtype_promotion("strict"):
        got, _ = tx.update(updates, tx.init(updates))
    for name, update in updates.items():
        rms = np.sqrt(np.mean(np.float64(update) ** 2))
        np.testing.assert_allclose(got[name], update / max(1, rms / 0.5), rtol=1e-6)
    same, _ = optim.clip_update_rms(1.0).update(updates, optax.EmptyState())
    np.testing.assert_array_equal(same["small"], updates["small"])
    with pytest.raises(ValueError, match="above 0"):
        optim.clip_update_rms(0.0)


def test_stable_adam_against_the_papers_recurrence_in_float64():
    """A quiet signal comes back 30 times as loud: moments and factor, step by step."""
    b1, b2, eps = 0.9, 0.99, 1e-8
    tx = optim.scale_by_stable_adam(b1, b2, eps)
    shape = (4, 3)
    state, m, v = tx.init(jnp.zeros(shape)), np.zeros(shape), np.zeros(shape)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(tx.update)
    largest = 0.0
    for t in range(1, 41):
        g = RNG.normal(size=shape) * (30 if t > 30 else 1)
        got, state = update(jnp.asarray(g, jnp.float32), state)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        v_hat = v / (1 - b2**t)
        stale = np.sqrt(np.mean(g * g / np.maximum(v_hat, eps * eps)))
        largest = max(largest, stale)
        want = m / (1 - b1**t) / (np.sqrt(v_hat) + eps) / max(1, stale)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)
    assert largest > 3


def test_where_gradients_keep_their_size_it_is_adam():
    g = jnp.asarray(RNG.choice([-1.0, 1.0], size=(6, 5)), jnp.float32)
    tx, adam = optim.scale_by_stable_adam(0.9, 0.99), optax.scale_by_adam(0.9, 0.99)
    state, adam_state = tx.init(g), adam.init(g)
    for _ in range(5):
        got, state = tx.update(g, state)
        want, adam_state = adam.update(g, adam_state)
        np.testing.assert_allclose(got, want, rtol=1e-5)
