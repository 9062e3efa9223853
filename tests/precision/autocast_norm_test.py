"""Norms of 16-bit activations: computed in float32, and summed as seldom as their derivatives allow."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.precision.autocast import autocast, full_precision

RNG = np.random.default_rng(0)
# Numbers that bfloat16 holds, so that a product with the identity gives them back.
X = RNG.integers(-64, 65, size=(6, 5, 8)).astype(np.float32) / 32 + 3
SCALE, BIAS = (RNG.normal(size=8).astype(np.float32) for _ in range(2))
G = RNG.normal(size=X.shape).astype(np.float32)


def written_out(axes: tuple[int, ...]) -> Callable:
    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        mean, variance = (f(x, axes, keepdims=True) for f in (jnp.mean, jnp.var))
        return (x - mean) * (scale * jax.lax.rsqrt(variance + 1e-5)) + bias

    return norm


def centered_first(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The difference is read by the variance as well, and is the second factor."""
    centered = x - jnp.mean(x, (0, 1))
    return scale * jax.lax.rsqrt(jnp.mean(centered**2, (0, 1))) * centered + bias


def running(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return (x - np.full(8, 3.0, np.float32)) * scale + bias


def module(kind: Callable, **fields) -> Callable:
    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        variables = {"params": {"scale": scale, "bias": bias}}
        return kind(**fields).apply(variables, x, mutable=["batch_stats"])[0]

    return norm


# And whether autocast spares a sum over the activations.
NORMS: dict[str, tuple[Callable, bool]] = {
    "BatchNorm": (module(nn.BatchNorm, use_running_average=False), True),
    "GroupNorm": (module(nn.GroupNorm, num_groups=2), True),
    "LayerNorm": (module(nn.LayerNorm), False),
    "written out": (written_out((0, 1)), True),
    "over the last axis": (written_out((2,)), False),
    "centered first": (centered_first, False),
    "running statistics": (running, False),
}


def of_activations(norm: Callable) -> Callable:
    return lambda x, scale, bias: norm(x @ jnp.eye(8, dtype=x.dtype), scale, bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", [norm for norm, _ in NORMS.values()], ids=NORMS)
def test_value_and_both_derivatives_are_those_of_float64(norm, dtype):
    def all_of_it(fn, g, *args):
        out, pullback = jax.vjp(fn, *args)
        return (out, *pullback(g), jax.jvp(fn, args, args)[1])

    wrapped = autocast(of_activations(norm), dtype)
    found = jax.jit(lambda *args: all_of_it(wrapped, *args))(G, X, SCALE, BIAS)
    with jax.enable_x64(True):
        wide = (a.astype(np.float64) for a in (G, X, SCALE, BIAS))
        expected = jax.jit(lambda *args: all_of_it(of_activations(norm), *args))(*wide)
    # The cotangent of the activations is 16-bit; all else is a matter of float32 sums.
    tolerances = (1e-5, 2**-8, 1e-5, 1e-5, 2**-8)
    for ours, theirs, tolerance in zip(found, map(np.asarray, expected), tolerances, strict=True):
        assert ours.dtype == jnp.float32 and theirs.dtype == np.float64
        assert np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(theirs)


def sums(fn: Callable) -> int:
    """The different arrays as large as the activations that a step of a norm sums."""
    loss = lambda *args: jnp.vdot(fn(*args), G)
    eqns = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(X, SCALE, BIAS).eqns
    summed = [e.invars[0] for e in eqns if e.primitive.name == "reduce_sum"]
    return len({id(v) for v in summed if v.aval.shape == X.shape})


@pytest.mark.parametrize(("norm", "spares"), NORMS.values(), ids=NORMS)
def test_a_cotangent_is_summed_once_for_mean_and_bias(norm, spares):
    fn = of_activations(norm)
    plain = sums(fn)
    assert plain - sums(autocast(fn, "bfloat16")) == spares
    assert sums(autocast(full_precision(fn), "bfloat16")) == plain
