"""The chain: closed forms for decay, clipping, schedules and averages; float32 moments; recipes."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp import optim

RNG = np.random.default_rng(0)


def run(tx, params, grads, steps):
    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(grads, state, params)
    return params, state


def first_updates(tx, grads, params):
    """The updates of a fresh chain."""
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(
        grads, params
    )


def test_decoupled_decay_is_a_product_whatever_adam_does():
    """At zero gradient w_T / w_0 = prod(1 - rate_t * decay); L2 inside Adam moves by the rate."""
    rate = optim.warmup_cosine(1e-2, 50, 10)
    ones, zeros = ({"w": np.full((2, 2), x, np.float32)} for x in (1, 0))
    got, _ = run(optim.adamw(rate, weight_decay=0.1), ones, zeros, 50)
    rates = jax.jit(jax.vmap(rate))(np.arange(50))
    want = math.prod(1 - float(r) * 0.1 for r in rates.tolist())
    np.testing.assert_allclose(got["w"], want, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("rate", "decay"), [(1e-2, 0.1), (1e-3, 0.1)])
def test_weights_settle_where_decay_balances_random_steps(rate, decay):
    """RMS(w) -> sqrt(rate / (2 decay)) under Adam with gradients of random sign."""
    tx = optim.adamw(rate, b1=0.0, b2=0.999, weight_decay=decay, clip=None, mask=None)
    params = np.zeros((64, 64), np.float32)

    def body(carry, key):
        params, state = carry
        updates, state = tx.update(jax.random.rademacher(key, (64, 64), jnp.float32), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def trained(key):
        keys = jax.random.split(key, int(4 / (rate * decay)))
        return jax.lax.scan(body, (params, tx.init(params)), keys)[0][0]

    size = np.sqrt(np.mean(np.square(trained(jax.random.key(0)))))
    np.testing.assert_allclose(size, math.sqrt(rate / (2 * decay)), rtol=0.1)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_adams_first_step_is_the_sign_of_the_gradient(scale):
    grads = {"w": RNG.normal(size=(4, 4)).astype(np.float32) * np.float32(scale)}
    updates = first_updates(optim.adamw(1e-2, weight_decay=0.0, clip=None), grads, grads)
    # -rate * g / (|g| + eps): the sign, until the gradient nears eps.
    g = np.float64(grads["w"])
    np.testing.assert_allclose(updates["w"], -1e-2 * g / (np.abs(g) + 1e-8), rtol=1e-5)


def test_the_master_keeps_updates_that_half_precision_loses():
    """1000 updates of -1e-4 on 1.0: float16 and bfloat16 stand still, float32 arrives at 0.9."""
    add = lambda dtype: jax.lax.fori_loop(
        0, 1000, lambda _, w: w - jnp.asarray(1e-4, dtype), jnp.ones([], dtype)
    )
    assert add(jnp.float16) == 1.0 and add(jnp.bfloat16) == 1.0
    np.testing.assert_allclose(add(jnp.float32), 0.9, atol=2e-5)


def test_moments_are_float32_for_bfloat16_parameters_and_follow_the_float64_reference():
    params = {"w": np.ones((3, 3), jnp.bfloat16)}
    grads = {"w": np.full((3, 3), 1e-3, jnp.bfloat16)}
    tx = optim.adamw(1e-3, b2=0.999, clip=None)
    _, state = run(tx, params, grads, 300)
    moments = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
    (adam,) = [m for m in moments if isinstance(m, optax.ScaleByAdamState)]
    chex.assert_trees_all_equal_dtypes(adam.nu, {"w": jnp.zeros([], jnp.float32)})
    g = float(grads["w"][0, 0])
    np.testing.assert_allclose(adam.nu["w"], g * g * (1 - 0.999**300), rtol=1e-5)


def test_global_norm_clipping_against_float64_and_for_half_gradients():
    grads = {"a": jnp.full(600, 20, jnp.float16), "b": jnp.full((20, 20), -20, jnp.float16)}
    clip = optim.clip_by_global_norm(1.0)
    got, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(np.float64(got["a"]), 20 / 632.4555, rtol=1e-3)
    small = {"a": jnp.array([3e-4, 4e-4])}
    same, _ = clip.update(small, clip.init(small))
    chex.assert_trees_all_equal(same, small)


@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 2, 4), (5,), ()])
def test_unit_norm_clipping_against_a_loop(shape):
    w = np.asarray(RNG.normal(size=shape), np.float32) * 0.1
    g = np.asarray(RNG.normal(size=shape), np.float32)
    clip = optim.clip_by_unit_norm(0.01)
    got = first_updates(clip, g, w)
    units = [(...,)] if len(shape) < 2 else [(..., j) for j in range(shape[-1])]
    want = np.array(g, np.float64)
    for unit in units:
        limit = 0.01 * max(np.linalg.norm(np.atleast_1d(w[unit]).ravel()), 1e-3)
        want[unit] *= min(1.0, limit / np.linalg.norm(np.atleast_1d(g[unit]).ravel()))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_unit_norm_clipping_agrees_with_optax_and_keeps_zero_gradients_zero():
    w, g, zeros = *RNG.normal(size=(2, 8, 5)).astype(np.float32), np.zeros((8, 5), np.float32)
    ours, theirs = optim.clip_by_unit_norm(0.01), optax.adaptive_grad_clip(0.01)
    np.testing.assert_allclose(first_updates(ours, g, w), first_updates(theirs, g, w), rtol=1e-5)
    chex.assert_trees_all_equal(first_updates(ours, zeros, zeros), zeros)


def test_value_clipping_and_its_errors():
    clip = optim.clip_by_value(0.5)
    np.testing.assert_array_equal(
        clip.update(jnp.array([-2.0, 0.25, 9.0]), None)[0], [-0.5, 0.25, 0.5]
    )
    for make in (optim.clip_by_value, optim.clip_by_global_norm, optim.clip_by_unit_norm):
        with pytest.raises(ValueError, match="above 0"):
            make(0.0)


PEAK, END = 3e-3, 1.7e-5


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (optim.warmup_cosine(PEAK, 100, 10, start=1e-6, end=END), True),
        (optim.warmup_stable_decay(PEAK, 100, 10, 30, start=1e-6, end=END), True),
        (optim.warmup_constant(PEAK, 10, start=1e-6), False),
        (optim.warmup_rsqrt(PEAK, 10, start=1e-6), False),
    ],
    ids=["cosine", "stable_decay", "constant", "rsqrt"],
)
def test_schedules_meet_their_end_points_exactly(schedule, ends):
    rate = jax.jit(schedule)
    assert rate(0) == np.float32(1e-6) and rate(10) == np.float32(PEAK)
    np.testing.assert_allclose(rate(5), (1e-6 + PEAK) / 2, rtol=1e-6)
    if ends:
        assert rate(100) == rate(1000) == np.float32(END)
    assert schedule(0).dtype == np.float32


def test_schedules_follow_their_formulas():
    t = np.arange(10, 101)
    over = lambda schedule: jax.jit(jax.vmap(schedule))(t)
    cosine = over(optim.warmup_cosine(PEAK, 100, 10))
    np.testing.assert_allclose(cosine, PEAK * 0.5 * (1 + np.cos(np.pi * (t - 10) / 90)), atol=1e-9)
    np.testing.assert_allclose(
        over(optim.warmup_rsqrt(PEAK, 10)), PEAK * np.sqrt(10 / t), rtol=1e-6
    )
    stable = over(optim.warmup_stable_decay(PEAK, 100, 10, 40))
    np.testing.assert_allclose(stable, PEAK * np.minimum(1, (100 - t) / 40), rtol=1e-5, atol=1e-9)
    assert optim.warmup_cosine(PEAK, 10, 0)(0) == np.float32(PEAK)


def test_impossible_schedules_are_refused():
    for make in (
        lambda: optim.warmup_cosine(1e-3, 10, 10),
        lambda: optim.warmup_stable_decay(1e-3, 10, 5, 6),
        lambda: optim.warmup_rsqrt(1e-3, 0),
        lambda: optim.warmup_constant(1e-3, -1),
    ):
        with pytest.raises(ValueError, match="warm-up"):
            make()


def test_decay_mask_takes_matrices_and_leaves_norms_biases_and_embeddings():
    leaf = lambda *shape: jnp.zeros(shape)
    params = {
        "Embed_0": {"embedding": leaf(9, 3)},
        "wpe": leaf(5, 3),
        "Block_0": {
            "LayerNorm_0": {"scale": leaf(3), "bias": leaf(3)},
            "Dense_0": {"kernel": leaf(3, 3), "bias": leaf(3)},
            "Conv_0": {"kernel": leaf(3, 3, 1, 4)},
        },
        "scanned": {
            "RMSNorm_0": {"scale": leaf(6, 3)},
            "mlp": {"kernel": leaf(6, 3, 3), "bias": leaf(6, 3)},
        },
        "upscale": {"kernel": leaf(2, 2)},
    }
    want = jax.tree.map(lambda _: False, params)
    want["Block_0"]["Dense_0"]["kernel"] = want["Block_0"]["Conv_0"]["kernel"] = True
    want["scanned"]["mlp"]["kernel"] = want["upscale"]["kernel"] = True
    assert optim.decay_mask(params) == want
    with_embeddings = optim.decay_mask(params, embeddings=True)
    assert with_embeddings["Embed_0"]["embedding"] and with_embeddings["wpe"]


def test_the_average_of_parameters_follows_its_recurrence():
    params = {"w": jnp.ones((2, 2))}
    tx = optim.sgd(0.1, momentum=0.0, ema=0.9)
    state, ema, w = tx.init(params), 1.0, 1.0
    for _ in range(5):
        updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
        params = optax.apply_updates(params, updates)
        w -= 0.1
        ema = 0.9 * ema + 0.1 * w
    np.testing.assert_allclose(optim.ema_of(state)["w"], ema, rtol=1e-6)
    assert optim.ema_of(optax.adam(0.1).init(params)) is None


def test_recipes_name_their_evidence_and_take_overrides():
    for name, chosen in optim.RECIPES.items():
        numbers = {"learning_rate", "warmup_fraction", "weight_decay", "clip", *chosen.settings}
        missing = numbers - {"b1"} - set(chosen.evidence)
        assert not missing, f"{name}: no evidence for {missing}"
    w = {"w": jnp.ones((2, 2))}
    tx = optim.recipe("cnn", 10, learning_rate=0.5, warmup=0, weight_decay=0.0, momentum=0.0)
    updates, _ = tx.update(w, tx.init(w), w)
    np.testing.assert_allclose(updates["w"], -0.5)
    with pytest.raises(ValueError, match="transformer, cnn"):
        optim.recipe("rnn", 10)
