"""Norms of 16-bit activations: computed in float32, and summed as seldom as their derivatives allow."""

from __future__ import annotations

import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.numerics import jaxpr as programs
from jaxmp.precision.autocast import autocast, full_precision

RNG = np.random.default_rng(0)
# Numbers that bfloat16 holds, so that a product with the identity gives them back.
X = RNG.integers(-64, 65, size=(6, 5, 8)).astype(np.float32) / 32 + 3
SCALE, BIAS = (RNG.normal(size=8).astype(np.float32) for _ in range(2))
G = RNG.normal(size=X.shape).astype(np.float32)


def written_out(axes: tuple[int, ...]) -> Callable:
    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        mean = jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axes, keepdims=True)
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


# And how many sums over the activations autocast spares, in general and on a GPU.
NORMS: dict[str, tuple[Callable, tuple[int, int]]] = {
    "BatchNorm": (module(nn.BatchNorm, use_running_average=False), (1, 2)),
    "GroupNorm": (module(nn.GroupNorm, num_groups=2), (1, 2)),
    "LayerNorm": (module(nn.LayerNorm), (0, 0)),
    "written out": (written_out((0, 1)), (1, 2)),
    "over the last axis": (written_out((2,)), (0, 0)),
    "centered first": (centered_first, (0, 0)),
    "running statistics": (running, (0, 1)),
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


def sums(fn: Callable, platform: str) -> int:
    """The different arrays as large as the activations that a step of a norm sums there."""
    loss = lambda *args: jnp.vdot(fn(*args), G)
    step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(X, SCALE, BIAS)
    lines = step.lower(lowering_platforms=(platform,)).as_text().splitlines()
    size = "x".join(map(str, X.shape))
    found = [re.search(rf"reduce\((%\w+) .* : \(tensor<{size}x", line) for line in lines]
    return len({match[1] for match in found if match})


@pytest.mark.parametrize(("platform", "which"), [("cpu", 0), ("tpu", 0), ("cuda", 1)])
@pytest.mark.parametrize(("norm", "spares"), NORMS.values(), ids=NORMS)
def test_a_cotangent_is_summed_once_for_mean_and_bias(norm, spares, platform, which):
    fn = of_activations(norm)
    plain = sums(fn, platform)
    assert plain >= 2
    assert plain - sums(autocast(fn, "bfloat16"), platform) == spares[which]
    assert sums(autocast(full_precision(fn), "bfloat16"), platform) == plain


@pytest.mark.parametrize("name", ["BatchNorm", "GroupNorm", "LayerNorm"])
def test_what_a_norm_gives_is_16_bit_on_its_way_to_a_product_alone(name):
    norm = of_activations(NORMS[name][0])
    weight = np.ones((8, 3), np.float32)

    def run_in(tail: Callable) -> str:
        def fn(*args: jax.Array) -> jax.Array:
            y = norm(*args)
            return tail(y * jax.lax.logistic(y))

        traced = jax.make_jaxpr(autocast(fn, "bfloat16"))(X, SCALE, BIAS).jaxpr
        found = [e for e in programs.operations(traced) if e.primitive.name == "logistic"]
        (dtype,) = {eqn.outvars[0].aval.dtype.name for eqn in found}
        return dtype

    assert run_in(lambda y: y @ weight) == "bfloat16"
    assert run_in(lambda y: y.mean(1) @ weight) == "bfloat16"
    assert run_in(lambda y: jnp.log(1 + jnp.abs(y)) @ weight) == "float32"
    for tail in (lambda y: y, lambda y: jnp.maximum(y, 0), lambda y: (y, y @ weight)):
        given = jax.tree.leaves(autocast(lambda *args, f=tail: f(norm(*args)))(X, SCALE, BIAS))[0]
        assert np.any(given != given.astype("bfloat16"))


def test_a_residual_stream_that_starts_at_a_norm_is_16_bit():
    """As one that starts at a product is: it goes to norms, and through them to products."""
    norm, weight = NORMS["LayerNorm"][0], np.ones((8, 8), np.float32)

    def stream(*args: jax.Array) -> jax.Array:
        stream = norm(*args)
        for _ in range(2):
            stream = stream + norm(stream, *args[1:]) @ weight
        return stream @ weight

    traced = jax.make_jaxpr(autocast(stream, "bfloat16"))(X, SCALE, BIAS).jaxpr
    sums = [eqn for eqn in programs.operations(traced) if eqn.primitive.name == "add"]
    of_streams = [e for e in sums if all(v.aval.shape == X.shape for v in e.invars)]
    assert [eqn.outvars[0].aval.dtype for eqn in of_streams] == ["bfloat16"] * 2
