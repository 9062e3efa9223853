"""Activations that multiply their operand by something dear to compute of it: both passes compute it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.precision.autocast import autocast, full_precision

RNG = np.random.default_rng(0)
# Numbers that bfloat16 holds, so that a product with the identity gives them back.
X = RNG.integers(-96, 97, size=(6, 8)).astype(np.float32) / 32
EYE = np.eye(8, dtype=np.float32)


def gate(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jax.nn.sigmoid(b), b * jax.nn.sigmoid(a)], -1)


# And how many of them autocast runs as one.
ACTIVATIONS: dict[str, tuple[Callable, int]] = {
    "gelu": (jax.nn.gelu, 1),
    "exact gelu": (lambda x: jax.nn.gelu(x, approximate=False), 1),
    "silu": (jax.nn.silu, 1),
    "written out": (lambda x: x * jax.nn.sigmoid(1.702 * x), 1),
    "twice": (lambda x: jax.nn.silu(jax.nn.gelu(x) @ EYE.astype(x.dtype)), 2),
    "of the same": (lambda x: jax.nn.silu(x) - jax.nn.gelu(x), 2),
    "gated": (lambda x: jax.nn.silu(x) * (x @ EYE[::-1].astype(x.dtype)), 1),
    "gated, written out": (
        lambda x: (x[:, ::-1] @ EYE.astype(x.dtype)) * (x * jax.lax.logistic(x)),
        1,
    ),
    "gated, and read": (lambda x: (y := jax.nn.silu(x)) * x[::-1] + y, 1),
    # The derivative needs the result alone, or another array, or nothing dear.
    "tanh": (jnp.tanh, 0),
    "cap": (lambda x: 2 * jnp.tanh(x / 2), 0),
    "gate": (gate, 0),
    "hard": (jax.nn.hard_swish, 0),
    "part of it read": (lambda x: (y := jax.lax.logistic(x)) * x + y[::-1], 0),
}


def of_product(activation: Callable) -> Callable:
    return lambda x: activation(x @ EYE) @ EYE


def all_of_it(fn: Callable, x: jax.Array) -> tuple:
    """The value and the derivatives in a direction: forwards, backwards, and both, one after the other."""
    pull = lambda x: jax.vjp(fn, x)[1](jnp.ones_like(x))[0]
    return fn(x), pull(x), jax.jvp(fn, (x,), (x,))[1], jax.jvp(pull, (x,), (x,))[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fn", [fn for fn, _ in ACTIVATIONS.values()], ids=ACTIVATIONS)
def test_it_is_as_exact_as_a_model_of_16_bits_by_hand(fn, dtype):
    def by_hand(x: jax.Array) -> jax.Array:
        eye = EYE.astype(dtype)
        return (fn(x.astype(dtype) @ eye).astype(dtype) @ eye).astype(jnp.float32)

    ours, theirs = (
        jax.jit(lambda x, fn=fn: all_of_it(fn, x))(X)
        for fn in (autocast(of_product(fn), dtype), by_hand)
    )
    with jax.enable_x64(True):
        exact = jax.jit(lambda x: all_of_it(of_product(fn), x))(X.astype(np.float64))
    for a, b, c in zip(ours, theirs, map(np.asarray, exact), strict=True):
        assert a.dtype == jnp.float32 and c.dtype == np.float64
        rounding = jnp.finfo(dtype).eps * np.linalg.norm(c)
        assert np.linalg.norm(a - c) < 1.5 * np.linalg.norm(b - c) + rounding


@pytest.mark.parametrize(("fn", "count"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_on_a_gpu_alone_the_backward_pass_computes_it_by_itself(fn, count):
    def barriers(fn: Callable, platform: str) -> int:
        traced = jax.jit(jax.grad(lambda x: jnp.sum(fn(x)))).trace(X)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.optimization_barrier")

    ours = autocast(of_product(fn), "bfloat16")
    assert [barriers(ours, platform) for platform in ("cuda", "tpu", "cpu")] == [count, 0, 0]
    assert barriers(autocast(full_precision(of_product(fn)), "bfloat16"), "cuda") == 0
