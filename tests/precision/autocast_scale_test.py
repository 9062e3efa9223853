"""A scale that 16 bits do not hold: rounded, it would be the same error in every element."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.precision.autocast import autocast, explain_autocast

RNG = np.random.default_rng(0)
X = RNG.uniform(1, 2, (64, 64)).astype(np.float32)
EYE = np.eye(64, dtype=np.float32)

# bfloat16's 0.9 is 0.8984, and its root of 96 is 9.8125: by 2**-9 less, and more.
SCALES = {
    "0.9": lambda x: 0.9 * x,
    "by 0.9": lambda x: x / 0.9,
    "a root": lambda x: x * np.sqrt(96),
    "by a computed root": lambda x: x / jnp.sqrt(96),
    "a computed inverse root": lambda x: x * jax.lax.rsqrt(96.0),
    "by a norm": lambda x: x / jnp.linalg.norm(jnp.arange(7.0)),  # the root of 91
    "by a norm + 1e-6": lambda x: x / (jnp.linalg.norm(jnp.arange(7.0)) + 1e-6),
    "three times a root": lambda x: x * (3 * jnp.sqrt(96.0)),
    "by the larger of a norm and 1": lambda x: x / jnp.maximum(jnp.linalg.norm(jnp.arange(7.0)), 1),
    "by a product of vectors": lambda x: x / jnp.vdot(jnp.arange(13.0), jnp.arange(13.0)),  # 650
    "0.9 within a loop": lambda x: jax.lax.fori_loop(0, 1, lambda _, y: 0.9 * y, x),
}


def between_products(scale, x):
    return scale(x @ EYE) @ EYE


def shared_error(found: jax.Array, exact: np.ndarray) -> float:
    """The mean relative error: of 4096 roundings about 2**-9 / 64, of a scale's rounding all of it."""
    return abs(float(np.mean(np.asarray(found, np.float64) / exact - 1)))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_scale_is_as_exact_as_it_was_written(scale, dtype):
    x = X.astype(dtype).astype(np.float32)  # so that no other rounding is shared
    exact = np.asarray(scale(np.ones(1, np.float64)))[0]
    run = autocast(lambda x: between_products(scale, x), dtype)
    found, pullback = jax.jit(lambda x: (run(x), jax.vjp(run, x)[1](x)[0]))(x)
    for values in (found, pullback):
        assert shared_error(values, exact * x.astype(np.float64)) < 2**-13


GIVEN = {
    "by it": (lambda x, n: x / n, 0.9),
    "the root of a temperature": (lambda x, n: x * jnp.sqrt(n), 0.9),
    "1 + it": (lambda x, n: x * (1 + n), 0.4),
    "of one dimension": (lambda x, n: x * n[None], 0.9),
    "a count": (lambda x, n: x / n.astype(jnp.int32), 650.0),
}


@pytest.mark.parametrize(("scale", "number"), GIVEN.values(), ids=GIVEN)
def test_a_number_that_is_given_scales_in_float32(scale, number):
    """A temperature, a learned gate of a residual: which number it is, nobody knows when it is compiled."""
    x = X.astype("bfloat16").astype(np.float32)
    run = autocast(lambda x, n: between_products(lambda y: scale(y, n), x))
    number = np.float32(number)
    exact = np.asarray(scale(np.ones((1, 1)), np.float64(number)))[0, 0]
    found, pullback = jax.jit(lambda x, n: (run(x, n), jax.vjp(lambda x: run(x, n), x)[1](x)[0]))(
        x, jnp.asarray(number)
    )
    for values in (found, pullback):
        assert shared_error(values, exact * x.astype(np.float64)) < 2**-13


def test_explain_says_why_a_number_scales_in_float32():
    temperature = lambda x, n: between_products(lambda y: y / n, x)
    text = explain_autocast(autocast(temperature), X, jnp.float32(0.9))
    (division,) = (line for line in text.splitlines() if " div " in line)
    assert re.search(r"float32 +1 x div +a number, or scaled by one", division)


def test_a_region_wholly_in_16_bits_rounds_its_numbers():
    def scaled(x):
        with jax.named_scope("wholly"):
            return x * (3 * jnp.sqrt(96.0))

    run = autocast(lambda x: between_products(scaled, x), overrides={"wholly": "bfloat16"})
    products = [e for e in jax.make_jaxpr(run)(X).eqns if e.primitive.name == "mul"]
    assert [v.aval.dtype for v in products[-1].invars] == ["bfloat16"] * 2


@pytest.mark.parametrize(("number", "computed_in"), [(0.125, "bfloat16"), (0.9, "float32")])
def test_a_scale_that_16_bits_hold_needs_no_cast(number, computed_in):
    program = jax.make_jaxpr(autocast(lambda x: between_products(lambda y: number * y, x)))(X)
    (product,) = (eqn for eqn in program.eqns if eqn.primitive.name == "mul")
    assert product.outvars[0].aval.dtype == computed_in


def test_a_tpu_divides_in_16_bits():
    """Dropout's division in float32 would cost it a tenth of a step's traffic."""
    run = autocast(lambda x: between_products(lambda y: y / 0.9, x))
    for platform, computed_in in (("tpu", "bf16"), ("cuda", "f32"), ("cpu", "f32")):
        lowered = jax.jit(run).trace(X).lower(lowering_platforms=(platform,)).as_text()
        (division,) = re.findall(r"stablehlo\.divide .*tensor<64x64x(\w+)>", lowered)
        assert division == computed_in


@pytest.mark.parametrize("root", [np.sqrt, jnp.sqrt], ids=["a number", "computed"])
def test_scaled_embeddings_start_a_16_bit_stream(root):
    """Gemma multiplies its embeddings by the root of the width; what follows is a stream as any other."""
    table, weight, tokens = X, EYE, np.arange(32)

    def stream(table: jax.Array, weight: jax.Array) -> jax.Array:
        x = table[tokens] * root(np.float32(64))
        for _ in range(2):
            x = x + x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) @ weight
        return x @ weight

    traced = jax.make_jaxpr(autocast(stream))(table, weight).jaxpr
    sums = [e for e in traced.eqns if e.primitive.name == "add" and e.outvars[0].aval.ndim == 2]
    of_streams = [e for e in sums if all(v.aval.shape == (32, 64) for v in e.invars)]
    assert [eqn.outvars[0].aval.dtype for eqn in of_streams] == ["bfloat16"] * 2
