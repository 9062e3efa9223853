"""What a loop keeps for its backward pass: products and sums, not the arithmetic between them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmp.numerics import jaxpr as programs
from jaxmp.precision.autocast import autocast, full_precision

RNG = np.random.default_rng(0)
TOKENS, WIDTH, HIDDEN, LAYERS = 16, 8, 32, 3
X, UP, DOWN, SCALE = (
    RNG.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5
    for shape in (
        (TOKENS, WIDTH),
        (LAYERS, WIDTH, HIDDEN),
        (LAYERS, HIDDEN, WIDTH),
        (LAYERS, WIDTH),
    )
)


def layer(x: jax.Array, weights: tuple, after: Callable = lambda y: y) -> jax.Array:
    up, down, scale = weights
    centered = x - jnp.mean(x, -1, keepdims=True)
    normed = centered * lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5) * (1 + scale)
    return after(x + jax.nn.gelu(normed @ up) @ down)


def scanned(x: jax.Array, weights: tuple, layer: Callable = layer) -> jax.Array:
    return jnp.sum(lax.scan(lambda x, w: (layer(x, w), None), x @ np.eye(WIDTH), weights)[0] ** 2)


def unrolled(x: jax.Array, weights: tuple) -> jax.Array:
    x = x @ np.eye(WIDTH)
    for i in range(LAYERS):
        x = layer(x, jax.tree.map(lambda w: w[i], weights))  # noqa: B023
    return jnp.sum(x**2)


WEIGHTS = (UP, DOWN, SCALE)


def operations(fn: Callable, *args) -> list:
    return list(programs.operations(jax.make_jaxpr(fn)(*args).jaxpr))


def kept(fn: Callable) -> list[tuple[str, int]]:
    """The dtypes and sizes of the activations that each layer leaves to its backward pass."""
    gradient = jax.grad(fn, argnums=(0, 1))
    forward = next(e for e in operations(gradient, X, WEIGHTS) if e.primitive.name == "scan")
    rows = [v.aval for v in forward.outvars if v.aval.shape[:2] == (LAYERS, TOKENS)]
    return sorted((a.dtype.name, a.size // (LAYERS * TOKENS)) for a in rows if a.size > a.shape[0])


def test_a_layer_keeps_its_input_its_inner_product_and_two_sums_for_each_row():
    activations = [("bfloat16", WIDTH), ("bfloat16", HIDDEN)]
    assert kept(autocast(scanned)) == [*activations, ("float32", 1), ("float32", 1)]
    assert len(kept(scanned)) > 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_its_derivatives_are_as_exact_as_those_of_layers_that_keep_all(dtype):
    def derivatives(fn: Callable, args: tuple) -> list:
        gradient = jax.grad(fn, argnums=(0, 1))
        return jax.tree.leaves(
            jax.jit(lambda *x: (gradient(*x), jax.jvp(gradient, x, x)[1]))(*args)
        )

    args = (X, WEIGHTS)
    ours, theirs = (derivatives(autocast(fn, dtype), args) for fn in (scanned, unrolled))
    with jax.enable_x64(True):
        exact = derivatives(unrolled, jax.tree.map(lambda a: a.astype(np.float64), args))
    for a, b, c in zip(ours, theirs, map(np.asarray, exact), strict=True):
        assert a.dtype == jnp.float32 and c.dtype == np.float64
        assert np.linalg.norm(a - c) < 1.3 * np.linalg.norm(b - c) < 0.1 * np.linalg.norm(c)


def test_no_product_is_computed_again():
    products = lambda fn: sum(
        e.primitive.name == "dot_general" for e in operations(jax.grad(fn), X, WEIGHTS)
    )
    assert products(autocast(scanned)) == products(scanned)


def test_a_parameter_of_a_loop_is_rounded_once_for_both_passes():
    def recurrent(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(lax.scan(lambda h, x: (jnp.tanh(x + h @ w), None), jnp.zeros(8), x)[0])

    gradient = jax.jit(jax.grad(autocast(recurrent), argnums=1))
    text = gradient.lower(X, DOWN[0, :8]).as_text()
    assert text.count("(tensor<8x8xf32>) -> tensor<8x8xbf16>") == 1


def test_what_the_user_rematerialises_or_watches_is_left_as_it_is():
    def checkpoints(fn: Callable) -> int:
        names = [e.primitive.name for e in operations(autocast(fn), X, WEIGHTS)]
        return sum(name in ("remat2", "checkpoint") for name in names)

    seen = []

    def watched(y: jax.Array) -> jax.Array:
        jax.debug.callback(lambda v: seen.append(v.dtype.name), y)
        return y

    asked = lambda x, w: scanned(x, w, jax.checkpoint(layer))
    looked_at = lambda x, w: scanned(x, w, lambda x, w: layer(x, w, watched))
    assert [checkpoints(fn) for fn in (scanned, asked, looked_at)] == [1, 1, 0]
    jax.block_until_ready(jax.grad(autocast(looked_at))(X, WEIGHTS))
    jax.effects_barrier()
    assert seen == ["float32"] * LAYERS


def test_a_region_in_float32_is_computed_again_in_float32():
    found = jax.jit(jax.grad(autocast(full_precision(scanned))))(X, WEIGHTS)
    expected = jax.jit(jax.grad(scanned))(X, WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
