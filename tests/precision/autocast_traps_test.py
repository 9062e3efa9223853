"""What an operation-by-operation autocast gets wrong if nobody looks: one test for each trap."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from jaxmp.precision import autocast_rules
from jaxmp.precision.autocast import autocast, explain_autocast, full_precision
from jaxmp.precision.policy import get_policy

X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 8)).astype(np.float32))
W = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, (8, 8)).astype(np.float32))
# Quicker than operation by operation, and with every rounding that the function asks for.
compiled = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})


def equations(fn: Callable, *args: Any) -> list:
    """Every operation that a function traces, however deep."""
    found = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            found.append(eqn)
            for inner in core.jaxprs_in_params(eqn.params):
                walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def dtypes_of(name: str, fn: Callable, *args: Any) -> list[str]:
    """The dtype of the first operand of each operation of this name."""
    return [e.invars[0].aval.dtype.name for e in equations(fn, *args) if e.primitive.name == name]


def carried(fn: Callable, *args: Any) -> list[str]:
    """The dtypes of what the first scan hands back."""
    scan = next(e for e in equations(fn, *args) if e.primitive.name == "scan")
    return [v.aval.dtype.name for v in scan.outvars]


def loss(fn: Callable) -> Callable:
    return lambda *args: jnp.sum(fn(*args) ** 2)


def both(fn: Callable, *args: Any, dtype: str = "bfloat16", of: Callable = lambda f: f) -> tuple:
    """What a function, or a transformation `of` it, gives under autocast and by itself."""
    return compiled(lambda *args: tuple(of(f)(*args) for f in (autocast(fn, dtype), fn)))(*args)


# The table


def test_every_primitive_has_a_decision() -> None:
    names = {
        getattr(place, attribute).name
        for place in (primitives, lax, lax.linalg)
        for attribute in dir(place)
        if attribute.endswith("_p") and hasattr(getattr(place, attribute), "name")
    }
    assert len(names) > 150
    assert not names - set(autocast_rules.TABLE)


def test_table_is_published() -> None:
    text = autocast_rules.as_markdown()
    assert "`dot_general`" in text and "`exp`" in text


# Outputs and weak types


def test_output_dtype_and_weak_type_are_those_of_the_function() -> None:
    fn = lambda x: (x @ x.T, x.sum() * 2, 1.0 * jnp.arange(3), lax.full_like(x, 2), "name", None, 3)
    found, expected = autocast(fn)(X), fn(X)
    assert found[4:] == expected[4:]
    for a, b in zip(found[:4], expected[:4]):
        assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)
    weak = jnp.asarray(2.0) if False else lax.add(1.0, 2.0)
    assert autocast(lambda: weak * 2)().weak_type == (weak * 2).weak_type


def test_python_scalars_do_not_promote() -> None:
    fn = lambda x: ((x @ W) * 2.0 + 1.0) @ W
    assert set(dtypes_of("mul", autocast(fn), X)) == {"bfloat16"}
    assert set(dtypes_of("add", autocast(fn), X)) == {"bfloat16"}


def test_output_dtype_can_be_chosen_and_a_policy_drives_it() -> None:
    assert autocast(jnp.dot, output_dtype="bfloat16")(X, W).dtype == jnp.bfloat16
    assert autocast(jnp.dot, "p=f32,c=bf16,o=bf16")(X, W).dtype == jnp.bfloat16
    assert autocast(jnp.dot, get_policy("mixed_float16"))(X, W).dtype == jnp.float32
    with pytest.raises(ValueError, match="computes in bfloat16 or float16"):
        autocast(jnp.dot, "float32")


# Products


def test_float32_product_of_16_bits_has_16_bit_backward() -> None:
    wide = lambda x, w: lax.dot(x, w, preferred_element_type=jnp.float32)
    fn = loss(lambda x, w: wide(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)))
    assert "float32" in dtypes_of("dot_general", jax.grad(fn, (0, 1)), X, W)
    assert set(dtypes_of("dot_general", jax.grad(autocast(fn), (0, 1)), X, W)) == {"bfloat16"}
    assert autocast(wide)(X, W).dtype == jnp.float32


def test_float16_logits_into_a_loss_are_yielded_in_float32() -> None:
    fn = lambda x, w: jnp.sum(jax.nn.logsumexp((x @ w) * 3e4, -1))
    product = next(
        e for e in equations(autocast(fn, "float16"), X, W) if e.primitive.name == "dot_general"
    )
    assert [v.aval.dtype.name for v in product.invars] == ["float16", "float16"]
    assert product.outvars[0].aval.dtype == jnp.float32
    big = lambda x, w: jnp.log(x @ w)
    assert jnp.isfinite(
        autocast(big, "float16")(jnp.full((2, 64), 60.0), jnp.full((64, 2), 60.0))
    ).all()
    gradient = jax.grad(autocast(fn, "float16"), (0, 1))
    assert set(dtypes_of("dot_general", gradient, X, W)) == {"float16"}


def test_highest_precision_is_a_wish() -> None:
    fn = lambda x: jnp.dot(x, W, precision=lax.Precision.HIGHEST)
    np.testing.assert_array_equal(autocast(fn)(X), fn(X))
    default = lambda x: jnp.dot(x, W, precision=lax.Precision.DEFAULT)
    assert dtypes_of("dot_general", autocast(default), X) == ["bfloat16"]


def test_float64_and_explicit_casts_are_respected() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 3)))
        assert x.dtype == jnp.float64
        np.testing.assert_array_equal(autocast(lambda x: jnp.exp(x @ x))(x), jnp.exp(x @ x))
    to_half = lambda x: (x.astype(jnp.float16) * 3).astype(jnp.float32)
    np.testing.assert_array_equal(autocast(to_half)(X), to_half(X))


def test_random_bits_and_dropout_masks_are_identical() -> None:
    key = jax.random.key(0)
    normal = lambda k, x: jax.random.normal(k, (64,)) + 0 * (x @ W).sum()
    np.testing.assert_array_equal(*both(normal, key, X))
    mask = lambda k, x: jnp.where(jax.random.bernoulli(k, 0.7, x.shape), x @ W, 0.0) == 0
    np.testing.assert_array_equal(*both(mask, key, X))


def test_positions_stay_exact() -> None:
    def fn(positions: jax.Array, frequencies: jax.Array) -> jax.Array:
        return jnp.sin(jnp.einsum("i,j->ij", positions.astype(jnp.float32), frequencies))

    args = jnp.arange(1000, 1010), jnp.asarray([1.0, 0.1])
    np.testing.assert_array_equal(autocast(fn)(*args), fn(*args))


# Range


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fill", [float(jnp.finfo(jnp.float32).min), -1e9, -1e30])
def test_a_fully_masked_row_is_no_nan(dtype: str, fill: float) -> None:
    def selected(x: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.where(mask, x @ x.T, fill)) @ x

    def added(x: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.softmax(x @ x.T + (1 - mask.astype(jnp.float32)) * fill) @ x

    mask = np.repeat(np.arange(4) != 1, 4).reshape(4, 4)
    fn = lambda x, mask: (selected(x, mask), added(x, mask))
    np.testing.assert_allclose(*both(fn, X, mask, dtype=dtype), atol=0.02)


def test_float16_small_constants_and_squares_survive() -> None:
    unit = lambda x, w: (x @ w) / (jnp.abs(x @ w) + 1e-8)
    zeros = np.zeros((4, 8), np.float32)
    assert np.isfinite(compiled(autocast(unit, "float16"))(zeros, W)).all()
    squares = lambda x, w: jnp.sqrt(jnp.mean((x @ w) ** 2))
    big = np.asarray(X) * np.float32(2e3)
    np.testing.assert_allclose(*both(squares, big, W, dtype="float16"), rtol=1e-2)
    product = lambda x, w: (lambda y: jnp.sum(y * y))(x @ w)
    np.testing.assert_allclose(*both(product, big, W, dtype="float16"), rtol=1e-2)


# Sums of a 16-bit value and a float32 one


def test_a_skip_connection_is_added_in_16_bits_unless_it_is_read_in_float32() -> None:
    branch = lambda x: jnp.exp(x @ W)  # float32
    skip = lambda x: ((x @ W) + branch(x)) @ W
    assert dtypes_of("add", autocast(skip), X) == ["bfloat16"]

    def sample(x: jax.Array) -> jax.Array:  # as a variational autoencoder draws its code
        mean = x @ W
        return jnp.sum((mean + branch(x)) @ W) + jnp.sum(mean**2)

    assert "bfloat16" not in dtypes_of("add", autocast(sample), X)


# Loops


def test_layer_stack_is_carried_in_16_bits() -> None:
    def stack(x: jax.Array, ws: jax.Array) -> jax.Array:
        x, _ = lax.scan(lambda c, w: (c + jax.nn.relu(c @ w), None), x @ ws[0], ws)
        return x @ ws[0]

    assert carried(autocast(stack), X, jnp.stack([W, W])) == ["bfloat16"]


def test_zeros_carry_of_a_product_becomes_16_bit() -> None:
    fn = lambda w: (
        lax.scan(lambda c, _: (jnp.tanh(c @ w + 1), None), jnp.zeros((4, 8)), None, 3)[0] @ w
    )
    assert carried(autocast(fn), W) == ["bfloat16"]


def test_sums_over_a_loop_stay_float32() -> None:
    def fn(x: jax.Array, ws: jax.Array) -> jax.Array:
        total = lax.scan(lambda c, w: (c + x.T @ (x @ w), None), jnp.zeros((8, 8)), ws)[0]
        return total

    assert carried(autocast(fn), X, jnp.stack([W, W])) == ["float32"]


def test_online_softmax_accumulators_stay_float32() -> None:
    def flash(q: jax.Array, blocks: jax.Array) -> jax.Array:
        def body(carry: tuple, k: jax.Array) -> tuple:
            top, norm, acc = carry
            s = q @ k.T
            new = jnp.maximum(top, s.max(-1, keepdims=True))
            p, fix = jnp.exp(s - new), jnp.exp(top - new)
            return (new, norm * fix + p.sum(-1, keepdims=True), acc * fix + p @ k), None

        init = jnp.full((4, 1), -jnp.inf), jnp.zeros((4, 1)), jnp.zeros((4, 8))
        (_, norm, acc), _ = lax.scan(body, init, blocks)
        return (acc / norm) @ W

    blocks = np.stack([W, np.asarray(W) * 2, -np.asarray(W)])
    assert carried(autocast(flash), X, blocks)[1:] == ["float32", "float32"]
    np.testing.assert_allclose(*both(flash, X, blocks), atol=0.02)


def test_branches_of_different_dtypes_agree_also_under_vmap() -> None:
    fn = lambda p, x: lax.cond(p, lambda x: jnp.exp(x @ W), lambda x: x @ W, x)
    several = np.array([True, False])
    np.testing.assert_allclose(*both(fn, several, np.stack([X, X]), of=jax.vmap), atol=0.03)


def test_while_with_an_integer_carry() -> None:
    fn = lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ W), (0, x))
    steps, y = autocast(fn)(X)
    assert (int(steps), y.dtype) == (3, jnp.float32)


# Gradients


def test_gradient_sums_are_float32() -> None:
    many = np.random.default_rng(3).uniform(0.9, 1.1, (4096, 8)).astype(np.float32)
    bias = lambda b: jnp.sum((many @ W + b) @ jnp.ones((8, 1)))
    found = compiled(jax.grad(autocast(bias)))(np.zeros(8, np.float32))
    np.testing.assert_allclose(found, np.full(8, 4096.0), rtol=1e-6)
    table = lambda t: jnp.sum(t[jnp.zeros(4096, int)] @ jnp.ones((8, 1)))
    found = compiled(jax.grad(autocast(table)))(W)
    np.testing.assert_allclose(found[0], np.full(8, 4096.0), rtol=1e-6)


def test_tied_weight_and_loop_weight_sum_cotangents_in_float32() -> None:
    inputs = jnp.abs(X)

    def tied(w: jax.Array) -> jax.Array:
        return sum(jnp.sum((inputs * (i + 1)) @ w) for i in range(8))

    def loop(w: jax.Array) -> jax.Array:
        return lax.scan(
            lambda c, i: (c + jnp.sum((inputs * i) @ w), None), 0.0, jnp.arange(1.0, 65.0)
        )[0]

    for fn in (tied, loop):
        gradient = jax.grad(autocast(fn))
        adds = [e for e in equations(gradient, W) if e.primitive.name == "add_any"]
        assert {v.aval.dtype.name for e in adds for v in e.outvars} <= {"float32"}
        np.testing.assert_allclose(*both(fn, W, of=jax.grad), rtol=4e-3)


def test_max_pool_gradient_compares_equal_dtypes() -> None:
    pool = lambda x: jnp.sum(jnp.max((x @ W).reshape(4, 4, 2), -1) @ W[:4])
    found, expected = both(pool, X, of=jax.grad)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_training_step_keeps_its_master_weights() -> None:
    def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, g = jax.value_and_grad(lambda w: jnp.mean((jnp.tanh(x @ w) @ w - 1) ** 2))(w)
        return w - 1e-4 * g, value

    def steps(w: jax.Array, xs: jax.Array) -> jax.Array:
        return lax.scan(step, w, xs)[0]

    for fn, batch in ((step, X), (steps, np.stack([X, X, X]))):
        found, expected = (jax.tree.leaves(new)[0] for new in both(fn, W, batch))
        assert float(np.max(np.abs(found - expected))) < 1e-5
        assert set(dtypes_of("dot_general", autocast(fn), W, batch)) == {"bfloat16"}


# Custom derivatives, effects, names


def test_custom_jvp_is_consistent_in_both_orders() -> None:
    f = autocast(lambda x: jax.nn.relu(x @ W) @ W)
    forward = lambda t: jax.jvp(f, (X,), (t,))[1]
    reverse = lambda g: (jax.linear_transpose(forward, X)(g)[0], jax.vjp(f, X)[1](g)[0])
    np.testing.assert_allclose(*compiled(lambda t: reverse(forward(t)))(X), atol=0.05)
    zero = jax.grad(lambda x: jax.nn.relu(x).sum())
    np.testing.assert_array_equal(autocast(zero)(np.zeros(3, np.float32)), np.zeros(3))


def test_remat_policy_and_names_are_kept() -> None:
    from jax.ad_checkpoint import checkpoint_name

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(checkpoint_name(x @ w, "kept")) @ w)

    def count(policy: Any) -> int:
        saved = jax.checkpoint(fn, policy=policy)
        return len(dtypes_of("dot_general", jax.grad(autocast(saved)), X, W))

    policies = jax.checkpoint_policies
    assert count(policies.save_only_these_names("kept")) < count(policies.nothing_saveable)


def test_rematerialisation_survives_autocast_of_a_gradient() -> None:
    fn = jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ W) @ W))))
    kept = [e for e in equations(autocast(fn), X) if e.primitive.name in ("remat2", "checkpoint")]
    assert kept and all(e.params["differentiated"] for e in kept)


def test_effects_keep_their_order_and_dtypes() -> None:
    seen = []

    def fn(x: jax.Array) -> jax.Array:
        y = x @ W
        jax.debug.callback(lambda v: seen.append(("first", v.dtype.name)), y, ordered=True)
        jax.debug.callback(lambda v: seen.append(("second", v.dtype.name)), y.sum(), ordered=True)
        return y

    jax.block_until_ready(jax.jit(autocast(fn))(X))
    jax.effects_barrier()
    assert seen == [("first", "float32"), ("second", "float32")]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        autocast(lambda x: jax.debug.print("first {:.0f}", (0 * (x @ W))[0, 0]))(X)
        jax.effects_barrier()
    assert "first 0" in out.getvalue()


def test_inner_jit_keeps_its_name_and_donation() -> None:
    inner = jax.jit(lambda x: x @ W + x, donate_argnums=0, inline=False)
    inner.__wrapped__.__name__ = "my_layer"
    call = next(
        e for e in equations(autocast(lambda x: inner(x * 2)), X) if e.primitive.name == "jit"
    )
    assert any(call.params["donated_invars"])
    assert "dot_general" in str(call.params["jaxpr"])


def test_source_lines_and_module_paths_survive() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with jax.named_scope("my_block"):
            return x @ W

    product = next(e for e in equations(autocast(fn), X) if e.primitive.name == "dot_general")
    assert "my_block" in str(product.source_info.name_stack)
    text = jax.jit(autocast(fn)).lower(X).as_text(debug_info=True)
    assert re.search(r"my_block", text) and "autocast_traps_test.py" in text


# Composition


def test_composes() -> None:
    f = lambda x: jnp.sum(jnp.tanh(x @ W) @ W)
    np.testing.assert_allclose(*both(f, X[:1], of=jax.hessian), atol=0.05)
    np.testing.assert_array_equal(autocast(jax.jit(f))(X), jax.jit(autocast(f))(X))
    closed = jax.grad(lambda s: autocast(lambda x: jnp.sum(s * (x @ W)))(X))(2.0)
    np.testing.assert_allclose(closed, jnp.sum(X @ W), atol=0.1)


def test_nested_autocast_is_idempotent() -> None:
    f = lambda x: jax.nn.softmax(x @ W) @ W
    once, twice = autocast(f), autocast(autocast(f))
    np.testing.assert_array_equal(once(X), twice(X))
    assert dtypes_of("dot_general", once, X) == dtypes_of("dot_general", twice, X)


def test_static_arguments_and_modules_pass() -> None:
    def fn(x: jax.Array, size: int, *, train: bool, activation: Callable) -> jax.Array:
        return activation(x[:size] @ W) if train else x

    assert autocast(fn)(X, 2, train=True, activation=jax.nn.relu).shape == (2, 8)


def test_arrays_are_cast_in_keyword_arguments_too() -> None:
    fn = lambda x, *, w: x @ w
    assert dtypes_of("dot_general", lambda x, w: autocast(fn)(x, w=w), X, W) == ["bfloat16"]
    assert dtypes_of("dot_general", lambda x, w: autocast(fn)(w=w, x=x), X, W) == ["bfloat16"]


# Overrides, regions, rules, explain


def scoped(x: jax.Array) -> jax.Array:
    with jax.named_scope("model"):
        with jax.named_scope("body"):
            x = jnp.tanh(x @ W)
        with jax.named_scope("head"):
            return jnp.exp(x @ W)


def test_overrides_by_place() -> None:
    fn = autocast(scoped, overrides={"**/head": "float32"})
    assert dtypes_of("dot_general", fn, X) == ["bfloat16", "float32"]
    gradient = jax.grad(loss(lambda x: scoped(x)))
    found = dtypes_of("dot_general", autocast(gradient, overrides={"model/head": "float32"}), X)
    assert sorted(found) == ["bfloat16", "bfloat16", "float32", "float32"]
    with pytest.raises(ValueError, match=r"'\*\*/hat' matched no place.*model/body"):
        autocast(scoped, overrides={"**/hat": "float32"})(X)
    low = autocast(scoped, overrides={"**/head": "bfloat16"})
    assert dtypes_of("exp", low, X) == ["bfloat16"]


def test_a_table_that_is_kept_in_float32_is_read_in_float32() -> None:
    def stream(table: jax.Array, positions: jax.Array, weight: jax.Array) -> jax.Array:
        with jax.named_scope("positions"):
            where = positions[np.arange(4)]
        return jax.nn.standardize(table[np.arange(4)] + where) @ weight

    for overrides, added_in in (({}, "bfloat16"), ({"positions": "float32"}, "float32")):
        added = dtypes_of("add", autocast(stream, overrides=overrides), W, W, W)
        assert next(name for name in added if "float" in name) == added_in


def test_rules_by_primitive() -> None:
    assert dtypes_of("tanh", autocast(scoped, rules={"tanh": "float32"}), X) == ["float32"]
    assert "float32" in dtypes_of(
        "dot_general", autocast(scoped, rules={"dot_general": "float32"}), X
    )
    with pytest.raises(ValueError, match="should be one of"):
        autocast(scoped, rules={"tanh": "wide"})


def test_full_precision_region() -> None:
    fn = lambda x: full_precision(lambda y: jnp.tanh(y @ W) @ W)(x @ W)
    assert dtypes_of("dot_general", autocast(fn), X) == ["bfloat16", "float32", "float32"]
    gradient = dtypes_of("dot_general", autocast(jax.grad(loss(fn))), X)
    assert (gradient.count("bfloat16"), gradient.count("float32")) == (2, 4)


def test_explain_names_places_counts_and_reasons() -> None:
    text = explain_autocast(autocast(scoped), X)
    assert "model/head" in text and "dot_general" in text and "tensor cores" in text
    assert re.search(r"float32 +1 x exp", text)
    with pytest.raises(ValueError, match="result of autocast"):
        explain_autocast(scoped, X)


def test_a_product_without_a_preferred_type_has_the_gradient_of_one_with_it():
    def fn(w, preferred):
        product = lax.dot_general(X, w, (((1,), (0,)), ((), ())), preferred_element_type=preferred)
        return jnp.sum(jax.nn.log_softmax(product)[:, 0])

    mixed = lambda preferred: jax.grad(autocast(lambda w: fn(w, preferred), "float16"))
    without, with_it = (compiled(mixed(preferred))(W) for preferred in (None, jnp.float32))
    np.testing.assert_array_equal(without, with_it)
    exact = compiled(jax.grad(lambda w: fn(w, None)))(W)
    np.testing.assert_allclose(without, exact, atol=4 * 2.0**-11 * float(np.max(np.abs(exact))))


def test_a_custom_vjp_that_captured_a_value_in_a_loop_under_vmap() -> None:
    weight = jnp.asarray(np.eye(4, dtype=np.float32) + np.float32(0.1))

    @jax.custom_vjp
    def rule(x):
        return jnp.sin(x @ weight)

    rule.defvjp(
        lambda x: (rule(x), x),
        lambda x, g: jax.vjp(lambda x: jnp.sin(x @ weight), x)[1](g),
    )

    def fn(x):
        scaled = lambda s: lax.fori_loop(0, 2, lambda _, c: 0.5 * rule(c), s * x)
        return jax.vmap(scaled)(jnp.array([0.5, 1.0])).sum()

    x = np.linspace(-1.0, 1.0, 16, dtype=np.float32).reshape(4, 4)
    exact = compiled(jax.grad(fn))(x)
    for mixed in (jax.grad(autocast(fn)), autocast(jax.grad(fn))):
        np.testing.assert_allclose(compiled(mixed)(x), exact, atol=0.01)
