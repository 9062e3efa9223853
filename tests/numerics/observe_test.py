"""Observed programs give what the programs give, and one record an operation, wherever it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmp.numerics import jaxpr as programs
from jaxmp.numerics.observe import Probe, Site, narrowed_inputs, observe, sites


def counts_and_sums(depth: int = 2) -> Probe:
    """Runs, the sum of the first result, and the position of the last run at each level."""

    def look(site: Site, operands, results) -> tuple:
        del site, operands
        total = jnp.sum(results[0]).astype(jnp.float32)
        return jnp.int32(1), total, jnp.full([depth], -1, jnp.int32)

    def merge(site, earlier, newer, level, position):
        del site
        runs, total, _ = (a + b for a, b in zip(earlier, newer))
        here = newer[2].at[level].set(position)
        return runs, total, jnp.where(newer[0] > 0, here, earlier[2])

    def start(site):
        del site
        return jnp.int32(0), jnp.float32(0), jnp.full([depth], -1, jnp.int32)

    return Probe(start, look, merge)


def observed(fn, *args):
    """(outputs, {primitive: [(site, record)]}) of a function, under jit."""
    program, _ = programs.trace(fn)(*args)
    run = jax.jit(lambda *xs: observe(program, xs, counts_and_sums()))
    outs, records = run(*programs.array_leaves(args, {}))
    found: dict = {}
    for site, record in zip(sites(program), records, strict=True):
        found.setdefault(site.primitive, []).append((site, record))
    return outs, found


def test_each_run_of_a_loop_is_seen_and_named_by_its_position():
    def fn(x):
        def body(carry, row):
            return jnp.sin(carry) + row, jnp.exp(row)

        last, ys = jax.lax.scan(body, x[0], x, reverse=True)
        return jax.lax.fori_loop(0, 3, lambda i, c: jnp.cos(c), last), ys

    x = jnp.arange(8.0).reshape(4, 2)
    outs, found = observed(fn, x)
    for out, expected in zip(outs, fn(x)):
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    ((site, (runs, total, position)),) = found["exp"]
    assert (site.loops, int(runs), position.tolist()) == (
        ("scan",),
        4,
        [0, -1],
    )  # reversed: last is 0
    np.testing.assert_allclose(total, np.exp(x).sum(), rtol=1e-6)
    ((site, (runs, _, position)),) = found["cos"]
    assert (len(site.loops), int(runs), position.tolist()) == (1, 3, [2, -1])


def test_nested_loops_keep_a_position_for_each_level():
    def fn(x):
        inner = lambda c, v: (c + jnp.tanh(v), None)
        outer = lambda c, row: (jax.lax.scan(inner, c, row)[0], None)
        return jax.lax.scan(outer, 0.0, x)[0]

    _, found = observed(fn, jnp.ones((3, 5)))
    ((site, (runs, _, position)),) = found["tanh"]
    assert site.loops == ("scan", "scan")
    assert (int(runs), position.tolist()) == (15, [2, 4])


@pytest.mark.parametrize("chosen", [0, 1])
def test_only_the_branch_that_ran_has_records(chosen):
    def fn(x, which):
        return jax.lax.switch(which, [jnp.sin, lambda v: jnp.cos(jnp.cos(v))], x)

    outs, found = observed(fn, jnp.float32(0.3), jnp.int32(chosen))
    np.testing.assert_allclose(outs[0], fn(jnp.float32(0.3), chosen), rtol=1e-6)
    assert [int(r[0]) for _, r in found["sin"]] == [1 - chosen]
    assert [int(r[0]) for _, r in found["cos"]] == [chosen, chosen]


class Block(nn.Module):
    """A layer whose logarithm lies in a scope of its own."""

    @nn.compact
    def __call__(self, x):
        with jax.named_scope("inside"):
            return jnp.log1p(jnp.square(nn.Dense(4)(x))), None


class Stack(nn.Module):
    """Scanned and rematerialised blocks, as large models have them."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return jnp.mean(scanned(name="layers")(x)[0])


def test_a_scanned_and_rematerialised_stack_shows_paths_phases_and_lines():
    model, x = Stack(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)
    fn = jax.value_and_grad(lambda p: model.apply(p, x))
    outs, found = observed(fn, params)
    expected, _ = jax.tree.flatten(fn(params))
    for out, value in zip(outs, expected):
        np.testing.assert_allclose(out, value, rtol=1e-5)
    logs = {site.phase: (site, int(record[0])) for site, record in found["log1p"]}
    assert set(logs) <= {"forward", "recomputed"} and "forward" in logs
    site, runs = logs["forward"]
    assert runs == 3
    assert site.scope == "Stack/layers/inside"
    assert "observe_test.py" in site.source and "(__call__)" in site.source
    products = [(site.phase, site.scope) for site, _ in found["dot_general"]]
    assert ("backward", "Stack/layers/inside/Dense_0") in products


def test_float16_results_are_seen_before_a_fusion_hides_their_overflow():
    x = jnp.full([4], 60000.0, jnp.float16)
    _, found = observed(lambda v: v * 2 / 4, x)
    ((_, (_, total, _)),) = found["mul"]
    assert np.isinf(total)


def test_custom_derivatives_and_inner_jits_are_walked_through():
    fn = jax.jit(jax.grad(lambda x: jnp.sum(jax.nn.relu(jax.nn.silu(x)))))
    x = jnp.array([-1.0, 0.5, 2.0])
    outs, found = observed(fn, x)
    np.testing.assert_allclose(outs[0], fn(x), rtol=1e-6)
    assert "logistic" in found and "jit" not in found


def test_a_site_knows_the_inputs_it_reads_and_where_its_results_are_narrowed():
    def fn(params, x):
        h = jax.jit(lambda w, v: v @ w.T)(params["w"], x)
        with jax.named_scope("tail"):
            return jnp.reshape(jnp.sin(h), [-1]).astype(jnp.float16) + params["b"][0]

    args = ({"b": jnp.ones([1], jnp.float16), "w": jnp.ones([3, 2])}, jnp.ones([4, 2]))
    program, _ = programs.trace(fn)(*args)
    found = {site.primitive: site for site in sites(program)}
    assert found["dot_general"].reads == {1, 2}  # w, moved inside the jit, and x
    assert found["add"].reads == {0}
    assert found["sin"].narrowed == (("float16", "tail"),)
    assert found["dot_general"].narrowed == ()
    narrowing = lambda w: jax.jit(lambda v: v.T.astype(jnp.bfloat16))(w)
    assert narrowed_inputs(programs.trace(narrowing)(args[1])[0]) == [(("bfloat16", ""),)]


def test_what_is_for_gradients_alone_is_backward_wherever_it_is_done():
    """The derivative of a power is computed in the forward phase, also in a scan, and under remat anew."""

    def told(fn, of=jax.value_and_grad):
        program, _ = programs.trace(of(fn))(jnp.ones([3]))
        found = [s for s in sites(program) if s.primitive in ("pow", "reduce_sum")]
        return [(s.primitive, s.phase, s.direction) for s in found]

    power = lambda x: x**0.3
    scan = lambda body: (
        lambda x: jnp.sum(jax.lax.scan(lambda c, _: (body(c), None), x, length=3)[0])
    )
    forward, ahead = ("pow", "forward", "forward"), ("pow", "forward", "backward")
    total = ("reduce_sum", "forward", "forward")
    for of in (jax.value_and_grad, jax.grad):
        assert told(lambda x: jnp.sum(power(x)), of) == [forward, ahead, total]
        assert told(scan(power), of) == [forward, ahead, total]
    anew = ("pow", "recomputed", "backward")
    assert told(scan(jax.checkpoint(power))) == [forward, total, anew]
    assert told(lambda x: jnp.sum(power(x)), lambda fn: fn) == [forward, total]
