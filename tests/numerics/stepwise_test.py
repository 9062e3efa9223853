"""A program run step by step gives what it gives under jit, and shows its operations in their order."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import jaxpr as programs
from jaxmp.numerics import observe, stepwise


def stepwise_run(fn, *args, act=lambda eqn, site, at, operands, results: results, **how):
    program, unflatten = programs.trace(fn)(*args)
    places = observe.sites(program)
    return unflatten(stepwise.run(program, programs.array_leaves(args, {}), places, act, **how))


def loops(x, key):
    """All constructs: scans both ways, one with nothing to scan, branches, a while, jit, remat, keys."""

    @jax.checkpoint
    def body(carry, row):
        carry = jax.lax.cond(row[0] > 1, jnp.sin, jnp.cos, carry + row)
        return carry, (carry * 2, jnp.int32(row[0]))

    last, (ys, numbers) = jax.lax.scan(body, x[0], x, reverse=True)
    keys = jax.lax.scan(lambda k, _: (jax.random.fold_in(k, 1), k), key, length=2)[1]
    empty = jax.lax.scan(lambda c, row: (c, row * 2), 0.0, x[:0])[1]
    last = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: jax.jit(jnp.exp)(c) + 0.5, last)
    return {"last": last, "ys": ys, "numbers": numbers, "empty": empty}, jax.vmap(
        lambda k: jax.random.uniform(k, [2])
    )(keys)


def test_it_gives_what_the_program_gives():
    args = (jnp.arange(6.0).reshape(3, 2), jax.random.key(1))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    found, expected = stepwise_run(loops, *args), jax.jit(loops)(*args)
    jax.tree.map(close, found, expected)
    gradient = jax.grad(
        lambda x: jnp.sum(
            jax.lax.scan(jax.checkpoint(lambda c, row: (jnp.sin(c) * row, None)), x[0], x)[0]
        )
    )
    close(stepwise_run(gradient, args[0]), gradient(args[0]))


def test_operations_are_shown_with_their_place_and_can_be_changed():
    seen = []

    def act(eqn, site, at, operands, results):
        if site.primitive not in ("sin", "cos"):
            return results
        assert site.inputs[0].shape == operands[0].shape and eqn.primitive.name == site.primitive
        seen.append((site.primitive, site.loops, at))
        return [x * 0 for x in results] if at == (0, 1) else results

    def fn(x):
        inner = lambda c, row: (jnp.sin(row), None)
        outer = lambda c, rows: (jax.lax.scan(inner, c, rows)[0], jnp.cos(c))
        return jax.lax.scan(outer, x[0, 0], x, reverse=True)

    x = jnp.ones([2, 2])
    last, _ = stepwise_run(fn, x, act=act)
    twice = ("scan", "scan")
    assert seen == [
        ("sin", twice, (1, 0)),
        ("sin", twice, (1, 1)),
        ("cos", ("scan",), (1,)),
        ("sin", twice, (0, 0)),
        ("sin", twice, (0, 1)),
        ("cos", ("scan",), (0,)),
    ]
    assert last == 0 and fn(x)[0] != 0


def test_a_while_can_be_ended():
    rounds = []

    def act(eqn, site, at, operands, results):
        rounds.append(at)
        return results

    endless = lambda x: jax.lax.while_loop(lambda c: c < 1, lambda c: c * 2, x)
    stepwise_run(endless, jnp.float32(0), act=act, may_loop=lambda: len(rounds) < 5)
    assert rounds == [(0,), (1,), (2,), (3,), (4,)]
