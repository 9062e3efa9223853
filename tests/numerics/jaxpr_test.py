"""Programs are traced, entered and rebuilt as they were, on every supported JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxmp.numerics import custom_rules
from jaxmp.numerics import jaxpr as programs

X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32))


@jax.custom_jvp
def doubled(x: jax.Array) -> jax.Array:
    return 2 * x


doubled.defjvp(lambda primals, tangents: (2 * primals[0], 3 * tangents[0]))


@jax.custom_vjp
def tripled(x: jax.Array, n: jax.Array) -> jax.Array:
    return 3 * x + n


tripled.defvjp(lambda x, n: (3 * x + n, None), lambda _, g: (5 * g, None))


def mapped(x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")
    return jax.shard_map(
        lambda a: lax.psum(a * 2, "d"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
    )(x)


FUNCTIONS: dict[str, Callable] = {
    "plain": lambda x: jnp.sin(x) @ x,
    "jit": lambda x: jax.jit(lambda a: a + 1)(x) * 2,
    "scan": lambda x: lax.scan(lambda c, a: (c * x[0] + a, c.sum()), x[0], x, reverse=True),
    "while": lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ x), (0, x)),
    "cond": lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "switch": lambda x: lax.switch(2, [jnp.sin, jnp.cos, jnp.tan], x),
    "platforms": lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos),
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
    "custom_jvp": doubled,
    "custom_vjp": lambda x: tripled(x, jnp.arange(4)),
    "shard_map": mapped,
    "constants": lambda x: jax.checkpoint(lambda a: a * np.arange(4.0, dtype=np.float32))(x),
}


def replayed(fn: Callable) -> Callable:
    """The function, traced and run again operation by operation."""

    def run(program: programs.Program, args: Sequence) -> list:
        jaxpr = program.jaxpr
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args]))
        read = lambda v: v.val if programs.is_literal(v) else values[v]
        for eqn in jaxpr.eqns:
            with programs.location(eqn):
                values.update(zip(eqn.outvars, step(eqn, [read(v) for v in eqn.invars])))
        return [read(v) for v in jaxpr.outvars]

    def step(eqn: Any, operands: list) -> list:
        call = programs.call_of(eqn)
        if call is None:
            return programs.bind(eqn, operands)
        functions = [lambda *xs, b=b: run(b.program, xs) for b in call.bodies]
        if call.kind == "custom_jvp_call":
            return custom_rules.with_jvp(eqn, operands, functions[0], run)
        if call.kind == "custom_vjp_call":
            rule = lambda program, values, dtypes: run(program, values)
            return custom_rules.with_vjp(eqn, operands, functions[0], rule)
        return programs.rebind(eqn, call, operands, functions)

    def again(*args: Any, **kwargs: Any) -> Any:
        program, unflatten = programs.trace(fn)(*args, **kwargs)
        return unflatten(run(program, programs.array_leaves(args, kwargs)))

    return again


def total(fn: Callable) -> Callable:
    def loss(x: jax.Array) -> jax.Array:
        return sum(jnp.sum(a * 1.0) for a in jax.tree.leaves(fn(x)))

    return loss


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_run_again_gives_the_same(name: str) -> None:
    fn = FUNCTIONS[name]
    jax.tree.map(np.testing.assert_array_equal, replayed(fn)(X), fn(X))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(replayed(fn))(X), jax.jit(fn)(X))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "while"])
def test_its_gradient_is_the_same_either_way(name: str) -> None:
    fn = FUNCTIONS[name]
    gradients = lambda x: (
        jax.grad(total(fn))(x),
        jax.grad(total(replayed(fn)))(x),
        replayed(jax.grad(total(fn)))(x),
    )
    expected, outside, inside = jax.jit(gradients)(X)
    np.testing.assert_allclose(outside, expected, rtol=1e-6)
    np.testing.assert_allclose(inside, expected, rtol=1e-6)


def test_custom_rules_are_kept() -> None:
    np.testing.assert_array_equal(jax.grad(total(replayed(doubled)))(X), np.full((4, 4), 3.0))
    gradient = jax.grad(lambda x: replayed(tripled)(x, jnp.arange(4)).sum())(X)
    np.testing.assert_array_equal(gradient, np.full((4, 4), 5.0))
    assert jax.jvp(replayed(doubled), (X,), (X,))[1].dtype == jnp.float32


def test_scan_counts_and_carries() -> None:
    program, _ = programs.trace(FUNCTIONS["scan"])(X)
    eqn = next(e for e in program.jaxpr.eqns if e.primitive.name == "scan")
    consts, carried = programs.scan_counts(eqn.params)
    assert carried == 1
    assert programs.call_of(eqn).carries == ((0, consts),)


def test_static_arguments_and_results() -> None:
    def fn(x: jax.Array, flag: bool, *, name: str) -> tuple:
        return (x if flag else -x), name, None, 3

    program, unflatten = programs.trace(fn)(X, True, name="n")
    assert len(program.jaxpr.invars) == 1
    assert unflatten(["x"]) == ("x", "n", None, 3)


def test_scope_strips_transformations() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jnp.sum(jnp.sin(x) @ x)

    program, _ = programs.trace(jax.grad(fn))(X)
    scopes = {programs.scope(e) for e in program.jaxpr.eqns if e.primitive.name == "dot_general"}
    assert scopes == {"outer/inner"}


def test_dead_operations_go_and_effects_stay() -> None:
    def fn(x: jax.Array) -> jax.Array:
        _ = jnp.sin(x) @ x
        jax.debug.callback(lambda v: None, x)
        return x + 1

    program, _ = programs.trace(fn)(X)
    kept = [e.primitive.name for e in custom_rules.without_dead(program).jaxpr.eqns]
    assert "dot_general" not in kept and "add" in kept and len(kept) == 2
