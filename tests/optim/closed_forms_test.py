"""What Adam, decay, clipping and float32 state do, held to closed forms and to the mistakes they prevent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp import optim
from jaxmp.precision import DynamicLossScale, StaticLossScale


def first_update(tx, grads, params=None):
    params = jax.tree.map(jnp.ones_like, grads) if params is None else params
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("decay", [0.03, 0.3, 3.0])
def test_decay_inside_adam_is_cancelled_by_its_division(decay):
    """At zero gradient L2 moves a weight by the rate whatever its strength; decoupled, by rate * decay."""
    inside = optax.chain(optax.add_decayed_weights(decay), optax.adam(1e-2))
    decoupled = optim.adamw(1e-2, weight_decay=decay, mask=None)
    zero = {"w": jnp.zeros((2, 2))}
    np.testing.assert_allclose(first_update(inside, zero)["w"], -1e-2, rtol=1e-5)
    np.testing.assert_allclose(first_update(decoupled, zero)["w"], -1e-2 * decay, rtol=1e-6)


@pytest.mark.parametrize("g", [1e-6, 1e-8, 1e-9, 1e-10])
def test_adam_is_blind_to_the_gradients_scale_until_epsilon(g):
    """|u| / rate = g / (g + eps): 0.990, 0.500, 0.0909, 0.0099 at eps = 1e-8."""
    tx = optim.adamw(1.0, eps=1e-8, weight_decay=0.0, clip=None)
    update = first_update(tx, {"w": jnp.float32(g)})["w"]
    np.testing.assert_allclose(-update, g / (g + 1e-8), rtol=1e-4)


@pytest.mark.parametrize("curvature", [1.0, 100.0])
def test_adams_second_moment_is_no_second_derivative(curvature):
    """On c w^2 / 2 from w = 1 Adam's first step is 0.1 for every c; Newton's arrives at once."""
    slope = jax.grad(lambda w: curvature * w**2 / 2)
    w = jnp.float32(1.0)
    tx = optim.adamw(0.1, weight_decay=0.0, clip=None)
    np.testing.assert_allclose(first_update(tx, {"w": slope(w)})["w"], -0.1, rtol=1e-6)
    assert w - slope(w) / jax.grad(slope)(w) == 0


def test_clipping_before_unscaling_clips_by_the_scale():
    """At S = 2^10 the clip to norm 1 shrinks a gradient of norm 0.005 to 1 / S."""
    grads = {"w": jnp.array([3e-3, 4e-3])}
    scaled = jax.tree.map(lambda g: g * 2.0**10, grads)
    clip = optim.clip_by_global_norm(1.0)
    right = optim.with_loss_scale(clip, StaticLossScale(2.0**10))
    wrong = optax.chain(clip, optim.with_loss_scale(optax.identity(), StaticLossScale(2.0**10)))
    np.testing.assert_allclose(first_update(right, scaled)["w"], [3e-3, 4e-3], rtol=1e-6)
    np.testing.assert_allclose(first_update(wrong, scaled)["w"], [5.859e-4, 7.812e-4], rtol=1e-3)


def test_clipping_an_infinity_makes_a_nan_so_the_check_comes_first():
    grads = {"w": jnp.array([jnp.inf, 1.0])}
    clip = optim.clip_by_global_norm(1.0)
    np.testing.assert_array_equal(first_update(clip, grads)["w"], [np.nan, 0.0])
    guarded = optim.with_loss_scale(clip, DynamicLossScale())
    np.testing.assert_array_equal(first_update(guarded, grads)["w"], [0.0, 0.0])


def test_adam_masks_a_missing_unscale_until_gradients_near_epsilon():
    """At 1e-3 a forgotten division by 2^10 changes the update by less than 1e-4 of it, at 1e-9 tenfold."""
    adam = optax.scale_by_adam(eps=1e-8)
    change = {}
    for g in (1e-3, 1e-9):
        right, forgotten = (first_update(adam, jnp.float32(s * g)) for s in (1.0, 2.0**10))
        change[g] = float(forgotten / right) - 1
    assert abs(change[1e-3]) < 1e-4
    np.testing.assert_allclose(change[1e-9], (1.024e-6 / 1.034e-6) / (1e-9 / 1.1e-8) - 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "ratio"), [("float16", 2**11), ("bfloat16", 2**8), ("float32", 2**24)]
)
def test_a_weight_stands_still_at_this_multiple_of_its_update(dtype, ratio):
    """w + w / ratio rounds back to w for w = 1, a tie to even; a little more does not."""
    one = jnp.ones([], dtype)
    update = jnp.asarray(1 / ratio, dtype)
    more = jnp.asarray(1.01 / ratio, dtype)
    assert one + update == one
    assert one + more > one


def test_parameters_and_adam_in_pure_float16_are_lost_by_step_two_and_float32_state_holds():
    """In float16 eps = 1e-8 is 0 and (1 - b2) g^2 vanishes below g = 5.5e-3, so the division is by zero."""
    params = {"w": jnp.ones((2, 2), jnp.float16)}
    grads = {"w": jnp.array([[1e-3, 0.0], [2e-3, 1e-4]], jnp.float16)}

    def after_two(tx):
        weights, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
        return np.asarray(weights["w"], np.float32)

    lost = after_two(optax.adam(1e-3))
    assert np.isnan(lost[0, 1]) and not np.isfinite(lost).any()
    held = after_two(optim.adamw(1e-3, weight_decay=0.0))
    np.testing.assert_allclose(held, [[0.998, 1.0], [0.998, 0.998]], atol=1e-3)
