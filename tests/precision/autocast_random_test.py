"""Random programs with control flow: autocast of them traces, differentiates and agrees."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxmp.precision.autocast import autocast

N = 4
WEIGHT = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)) * 0.4, jnp.float32)
KEY = jax.random.key(7)

# Each maps a square matrix with entries of about one to another such. All are smooth or
# piecewise linear: a comparison that rounding can flip would be a jump, not an error.
PIECES: dict[str, Callable] = {
    "product": lambda x: x @ WEIGHT,
    "einsum": lambda x: jnp.einsum("ij,kj->ik", x, WEIGHT),
    "square product": lambda x: 0.3 * x @ x.T,
    "add": lambda x: x + WEIGHT,
    "bias": lambda x: x + WEIGHT[0],
    "scale": lambda x: 0.5 * x,
    "multiply": lambda x: x * jnp.cos(x),
    "divide": lambda x: x / (1.0 + x * x),
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "softmax": jax.nn.softmax,
    "log softmax": lambda x: 0.3 * jax.nn.log_softmax(x),
    "exp": lambda x: jnp.exp(-jnp.abs(x)),
    "norm": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1),
    "batch norm": lambda x: (
        (x - x.mean(0, keepdims=True)) * lax.rsqrt(x.var(0, keepdims=True) + 0.1) + WEIGHT[:1]
    ),
    "rms": lambda x: x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 0.1),
    "transpose": lambda x: x.T,
    "concatenate": lambda x: jnp.concatenate([x[2:], x[:2]]),
    "roll": lambda x: jnp.roll(x, 1, axis=0),
    "gather": lambda x: x[jnp.array([3, 1, 0, 1])],
    "scatter": lambda x: x.at[1].add(x[0]),
    "update": lambda x: lax.dynamic_update_slice(x, WEIGHT[:1], (2, 0)),
    "cumsum": lambda x: 0.4 * jnp.cumsum(x, 0),
    "where": lambda x: jnp.where(jnp.arange(N) % 2 == 0, x, 0.1 * x),
    "dropout": lambda x: jnp.where(jax.random.bernoulli(KEY, 0.8, x.shape), x / 0.8, 0.0),
    "sum": lambda x: x + 0.2 * x.sum(0),
    "maximum": lambda x: jnp.maximum(x, 0.3 * x),
    "clip": lambda x: jnp.clip(x, -3.0, 3.0),
    "stop": lambda x: x + lax.stop_gradient(0.1 * x),
    "cast": lambda x: x + (0.1 * x).astype(jnp.float16).astype(jnp.float32),
}


def wrap(kind: str, body: Callable) -> Callable:
    """A construct of JAX around a function of a matrix."""
    if kind == "jit":
        return jax.jit(body)
    if kind == "remat":
        return jax.checkpoint(body)
    if kind == "scan":
        return lambda x: lax.scan(
            lambda c, w: (body(0.5 * c + w), None), x, jnp.stack([WEIGHT, -WEIGHT])
        )[0]
    if kind == "sum over scan":
        step = lambda c, w: (c + 0.5 * body(w), None)
        return lambda x: x + lax.scan(step, jnp.zeros((N, N)), jnp.stack([WEIGHT, x]))[0]
    if kind == "fori":
        return lambda x: lax.fori_loop(0, 2, lambda _, c: 0.5 * body(c), x)
    if kind == "cond":
        return lambda x: lax.cond(jnp.array(True), body, lambda y: 2.0 * y, x)
    if kind == "vmap":
        return lambda x: jax.vmap(lambda scale: body(scale * x))(jnp.array([0.5, 1.0])).sum(0)
    rule = jax.custom_vjp(body)
    rule.defvjp(lambda x: (body(x), x), lambda x, g: jax.vjp(body, x)[1](g))
    return rule


CONSTRUCTS = ["jit", "remat", "scan", "sum over scan", "fori", "cond", "vmap", "custom_vjp"]
piece = st.sampled_from(sorted(PIECES))
program = st.recursive(
    st.lists(piece, min_size=1, max_size=4),
    lambda inner: st.lists(
        st.one_of(piece, st.tuples(st.sampled_from(CONSTRUCTS), inner)), min_size=1, max_size=4
    ),
    max_leaves=6,
)


def build(steps: list) -> Callable:
    """The function that a drawn program stands for."""
    parts = [PIECES[s] if isinstance(s, str) else wrap(s[0], build(s[1])) for s in steps]

    def fn(x: jax.Array) -> jax.Array:
        for part in parts:
            x = part(x)
        return x

    return fn


def check(steps: list, dtype: str) -> None:
    fn = build(steps)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, N)), jnp.float32)
    tangent = jnp.asarray(np.random.default_rng(2).normal(size=(N, N)), jnp.float32)

    def both(f: Callable) -> Callable:
        def evaluated(x: Any) -> tuple:
            out, pullback = jax.vjp(f, x)
            return out, pullback(tangent)[0]

        return jax.jit(evaluated)

    expected, found, outside = (
        both(fn)(x),
        both(autocast(fn, dtype))(x),
        autocast(both(fn), dtype)(x),
    )
    # An ill-conditioned program magnifies roundings: perturb its input by one to see how much.
    nudge = 1 + jnp.finfo(dtype).eps * jnp.sign(tangent)
    slack = [jnp.linalg.norm(a - b) for a, b in zip(both(fn)(x * nudge), expected)]
    unit = float(jnp.finfo(dtype).eps)
    for got in (found, outside):
        for a, b, room in zip(got, expected, slack):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            allowed = 40 * (unit * (1 + jnp.linalg.norm(b)) + room)
            assert jnp.linalg.norm(a - b) <= allowed


quick = settings(
    max_examples=int(os.environ.get("JAXMP_RANDOM_PROGRAMS", "8")),  # each compiles four programs
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@quick
@given(program, st.sampled_from(["bfloat16", "float16"]))
def test_random_programs(steps: list, dtype: str) -> None:
    check(steps, dtype)
