"""A softmax that a product eats, and the mask before it: what is kept and picked from is 16-bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxmp.precision.autocast import autocast, full_precision

RNG = np.random.default_rng(0)
X, V, G = (RNG.normal(size=shape).astype(np.float32) for shape in ((12, 12), (12, 5), (12, 5)))

DROPS = RNG.uniform(size=(12, 12)) < 0.9


def reads_the_sum(x: jax.Array, v: jax.Array) -> jax.Array:
    above = jnp.exp(x - jnp.max(x, -1, keepdims=True))
    below = jnp.sum(above, -1, keepdims=True)
    return (above / below) @ v + jnp.log(below)


def reads_the_exponentials(x: jax.Array, v: jax.Array) -> jax.Array:
    above = jnp.exp(x)
    return (above / jnp.sum(above, -1, keepdims=True)) @ v + jnp.mean(above)


# And whether all of it is one operation to autocast: nobody looks inside.
SOFTMAXES: dict[str, tuple[Callable, bool]] = {
    "rows": (lambda x, v: jax.nn.softmax(x) @ v, True),
    "columns": (lambda x, v: jax.nn.softmax(x, axis=0) @ v, True),
    # Divided by one number, which a product takes as a scale.
    "the whole array": (lambda x, v: jax.nn.softmax(x, axis=(0, 1)) @ v, False),
    "scaled and masked": (
        lambda x, v: jax.nn.softmax(jnp.where(np.tri(12, dtype=bool), 0.3 * x, -jnp.inf)) @ v,
        True,
    ),
    "some dropped": (
        lambda x, v: (jax.nn.softmax(x) * (jnp.asarray(DROPS).astype(jnp.float32) / 0.9)) @ v,
        True,
    ),
    "without a maximum": (
        lambda x, v: (jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True)) @ v,
        False,
    ),
    "its sum read": (reads_the_sum, False),
    "its exponentials read": (reads_the_exponentials, False),
}


def kept(fn: Callable, dtype: str) -> list[str]:
    """The dtypes of the floating-point arrays as large as the logits that the backward pass needs.

    A `where` keeps an array of zeros as well, with and without autocast.
    """
    _, pullback = jax.vjp(autocast(fn, dtype), X, V)
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == X.shape]
    return sorted(leaf.dtype.name for leaf in large if leaf.dtype != bool and leaf.any())


@pytest.mark.parametrize(("fn", "fused"), SOFTMAXES.values(), ids=SOFTMAXES)
def test_value_and_both_derivatives_are_those_of_float64(fn, fused):
    agrees_with_float64(fn, X)


def agrees_with_float64(
    fn: Callable, x: np.ndarray, v: np.ndarray = V, within: float = 2**-7
) -> None:
    """Compares the value of fn(x, v), its pullback of G and its derivative along x."""

    def all_of_it(fn, x, v, g):
        out, pullback = jax.vjp(fn, x, v)
        return (out, *pullback(g), jax.jvp(lambda x: fn(x, v), (x,), (x,))[1])

    found = jax.jit(lambda *args: all_of_it(autocast(fn), *args))(x, v, G)
    with jax.enable_x64(True):
        wide = (a.astype(np.float64) for a in (x, v, G))
        expected = jax.jit(lambda *args: all_of_it(fn, *args))(*wide)
    for ours, theirs in zip(found, map(np.asarray, expected), strict=True):
        assert ours.dtype == jnp.float32 and theirs.dtype == np.float64
        assert np.linalg.norm(ours - theirs) < within * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", [name for name, (_, fused) in SOFTMAXES.items() if fused])
def test_the_backward_pass_keeps_the_result_and_its_exponentials_in_16_bits(name):
    arrays = 3 if name == "some dropped" else 2  # what drops some as well
    assert kept(SOFTMAXES[name][0], "bfloat16") == ["bfloat16"] * arrays


def test_on_a_gpu_alone_each_pass_takes_its_own_sum():
    attention = autocast(SOFTMAXES["rows"][0], "bfloat16")
    traced = jax.jit(jax.grad(lambda x: jnp.vdot(attention(x, V), G))).trace(X)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu", "cpu")}
    barriers = {p: text.count("stablehlo.optimization_barrier") for p, text in texts.items()}
    assert barriers == {"cuda": 1, "tpu": 0, "cpu": 0}


@pytest.mark.parametrize("logits", [lambda x: x, lambda x: x @ x.T], ids=["given", "a product"])
def test_on_a_gpu_it_is_the_exponent_that_the_backward_pass_sees_apart(logits):
    """Apart from the maximum, that is, which both passes share."""
    loss = lambda x: jnp.vdot(autocast(lambda x, v: jax.nn.softmax(logits(x)) @ v)(x, V), G)
    text = jax.jit(jax.grad(loss)).trace(X).lower(lowering_platforms=("cuda",)).as_text()
    made = dict(re.findall(r"(%\w+) = stablehlo.(\w+)", text))
    exponents = re.findall(r"stablehlo.exponential (%\w+) : tensor<12x12xf32>", text)
    assert [made[name] for name in exponents] == ["multiply"]  # by what hides it


# How many logits there are in a row, and whether XLA's kernels for a GPU take it as one, to the product.
ROWS = {64: True, 65: False, 72: False, 100: False, 104: True, 128: True, 132: False, 192: True}


@pytest.mark.parametrize(("length", "whole"), ROWS.items())
def test_on_a_gpu_the_exponentials_of_a_row_are_kept_or_computed_again(length, whole):
    x, v = np.ones((12, length), np.float32), np.ones((length, 5), np.float32)
    loss = lambda x, v: jnp.vdot(autocast(SOFTMAXES["rows"][0])(x, v), G)
    text = jax.jit(jax.grad(loss, (0, 1))).trace(x, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.exponential") == (2 if whole else 1)
    assert text.count("stablehlo.optimization_barrier") == 1


@pytest.mark.parametrize("length", [33, 64, 65, 72, 104])
def test_rows_of_any_length_have_the_derivatives_of_float64(length):
    x, v = (RNG.normal(size=shape).astype(np.float32) for shape in ((12, length), (length, 5)))
    agrees_with_float64(SOFTMAXES["rows"][0], x, v)


def test_a_row_may_hold_one_logit():
    moved = jax.grad(lambda x: autocast(SOFTMAXES["rows"][0])(x, V[:1]).sum())(X[:, :1])
    np.testing.assert_array_equal(moved, 0)


def test_in_float16_it_keeps_float32_as_well():
    assert "float32" in kept(SOFTMAXES["rows"][0], "float16")


def test_in_a_region_left_alone_it_keeps_float32():
    alone = lambda x, v: full_precision(jax.nn.softmax)(x) @ v
    assert kept(alone, "bfloat16") == ["bfloat16", "float32"]  # that of 16 bits for v
    above = full_precision(lambda x: jnp.exp(x - jnp.max(x, -1, keepdims=True)))

    def in_part(x, v):
        terms = above(x)
        return (terms / jnp.sum(terms, -1, keepdims=True)) @ v

    assert "float32" in kept(in_part, "bfloat16")


def test_what_the_caller_gets_is_no_16_bit_softmax():
    out = jax.jit(autocast(lambda x, v: (jax.nn.softmax(x), jax.nn.softmax(x) @ v)))(X, V)
    np.testing.assert_allclose(out[0].sum(-1), 1, rtol=1e-6)


# On a TPU

MASK = np.tri(12, dtype=bool)
ONE_ROW_LESS = MASK & (np.arange(12) != 3)[:, None]
LOWEST = np.finfo(np.float32).min


def attention(v, logits):
    return jax.nn.softmax(logits) @ v


def capped(x: jax.Array) -> jax.Array:
    return 5 * jnp.tanh(x @ x.T / 5)


# And whether x - max and its exponential are written in 16 bits there.
ON_A_TPU: dict[str, tuple[Callable, bool]] = {
    "a product": (lambda x, v: attention(v, x @ x.T), True),
    "masked": (lambda x, v: attention(v, jnp.where(MASK, x @ x.T, LOWEST)), True),
    "a maximum by hand": (lambda x, v: by_hand(x @ x.T, v), True),
    "capped": (lambda x, v: attention(v, capped(x)), True),
    "capped and masked": (lambda x, v: attention(v, jnp.where(MASK, capped(x), LOWEST)), True),
    "capped, masked by -inf": (
        lambda x, v: attention(v, jnp.where(MASK, capped(x), -jnp.inf)),
        True,
    ),
    "masked by numbers": (
        lambda x, v: attention(v, jnp.where(MASK.astype(np.float32), x @ x.T, LOWEST)),
        True,
    ),
    "masked by a sum": (
        lambda x, v: attention(v, x @ x.T + jnp.where(MASK, 0, LOWEST)),
        False,
    ),
    "given": (lambda x, v: attention(v, x), False),
    "scaled": (lambda x, v: attention(v, x @ x.T / 3), False),
    "a float32 product": (lambda x, v: attention(v, full_precision(jnp.dot)(x, x.T)), False),
    "another shift": (
        lambda x, v: shifted(x @ x.T, v, jax.nn.logsumexp(x @ x.T, -1, keepdims=True)),
        False,
    ),
    "the maximum of all": (lambda x, v: shifted(x @ x.T, v, jnp.max(x @ x.T)), False),
}


def shifted(x: jax.Array, v: jax.Array, shift: jax.Array) -> jax.Array:
    above = jnp.exp(x - shift)
    return above / jnp.sum(above, -1, keepdims=True) @ v


def by_hand(x: jax.Array, v: jax.Array) -> jax.Array:
    return shifted(x, v, jnp.max(x, -1)[:, None])


def exponentials(fn: Callable, platform: str, *args: np.ndarray) -> set[str]:
    """The dtypes of the exponentials of matrices in the program for a platform."""
    text = jax.jit(autocast(fn)).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"stablehlo.exponential .*: tensor<\d+x\d+x(\w+)>", text))


@pytest.mark.parametrize(("fn", "narrow"), ON_A_TPU.values(), ids=ON_A_TPU)
def test_on_a_tpu_alone_the_exponential_is_written_in_16_bits(fn, narrow):
    assert exponentials(fn, "tpu", X, V) == {"bf16" if narrow else "f32"}
    for platform in ("cuda", "cpu"):
        assert exponentials(fn, platform, X, V) == {"f32"}


def test_on_a_tpu_long_rows_are_written_in_float32():
    fn = lambda x, v: attention(v, x @ v.T)
    arrays = {rows: np.ones((rows, 2), np.float32) for rows in (2048, 4096)}
    dtypes = [exponentials(fn, "tpu", X[:, :2], arrays[rows]) for rows in arrays]
    assert dtypes == [{"bf16"}, {"f32"}]


@pytest.mark.parametrize("name", [name for name, (_, narrow) in ON_A_TPU.items() if narrow])
def test_what_runs_on_a_tpu_is_a_softmax(name, as_on_a_tpu):
    # Two roundings more than above, of logits of 2 at most: the product's and the cap's.
    agrees_with_float64(ON_A_TPU[name][0], X / 3, within=2**-6)
    assert as_on_a_tpu


@pytest.mark.parametrize("fill", [LOWEST, -np.inf])
def test_a_row_masked_altogether_is_on_a_tpu_what_it_is_elsewhere(fill, as_on_a_tpu):
    fn = lambda x, v: attention(v, jnp.where(ONE_ROW_LESS, capped(x), fill))
    np.testing.assert_allclose(autocast(fn)(X, V), fn(X, V), rtol=0.05, atol=0.02)
    assert as_on_a_tpu


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Runs what is for a TPU, here; holds what was."""
    ran = []

    def choose(*args, default, tpu=None, **_):
        ran.extend([tpu] if tpu else [])
        return (tpu or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return ran


# The masks before it


def dtypes_of(name: str, fn: Callable, *args: np.ndarray) -> list[str]:
    """The dtype of the last operand of each operation of this name, however deep."""
    found = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == name:
                found.append(eqn.invars[-1].aval.dtype.name)
            for inner in core.jaxprs_in_params(eqn.params):
                walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


@pytest.mark.parametrize("fill", [LOWEST, -1e9, -np.inf])
def test_masked_logits_stay_16_bit(fill):
    masked = lambda x, v: jax.nn.softmax(jnp.where(MASK, x @ x.T, fill)) @ v
    assert dtypes_of("select_n", autocast(masked, "bfloat16"), X, V) == ["bfloat16"]
    stacked = lambda x, v: jax.lax.scan(lambda c, _: (masked(c, v) @ v.T, None), x, None, 2)
    assert dtypes_of("select_n", autocast(stacked, "bfloat16"), X, V) == ["bfloat16"]
    if fill == LOWEST:
        assert "float32" in dtypes_of("select_n", autocast(masked, "float16"), X, V)


@pytest.mark.parametrize(
    "bias",
    [
        lambda mask: jnp.where(mask, 0.0, LOWEST),
        lambda mask: (1 - mask.astype(jnp.float32)) * LOWEST,
        lambda mask: jax.lax.select(mask, jnp.zeros((12, 12)), jnp.full((12, 12), -1e9)),
    ],
)
def test_an_added_mask_does_what_a_selected_one_does(bias):
    added = lambda x, v, mask: jax.nn.softmax(x @ x.T + bias(mask)) @ v
    chosen = lambda x, v, mask: jax.nn.softmax(jnp.where(mask, x @ x.T, LOWEST)) @ v
    assert dtypes_of("add", autocast(added), X, V, MASK) == ["bfloat16"]

    def derived(fn, mask):
        out, pullback = jax.vjp(lambda x, v: autocast(fn)(x, v, mask), X, V)
        return (out, *pullback(G))

    for ours, theirs in zip(derived(added, MASK), derived(chosen, MASK)):
        np.testing.assert_array_equal(ours, theirs)
    # Of a row that is masked altogether both make the mean; gradients flow through a sum alone.
    np.testing.assert_array_equal(*(derived(fn, ONE_ROW_LESS)[0] for fn in (added, chosen)))


def test_a_mask_may_be_filled_with_what_a_branch_chooses():
    def masked(x, v, lowest):
        fill = jax.lax.cond(lowest, lambda: LOWEST, lambda: np.float32(-1e9))
        return jax.nn.softmax(jnp.where(ONE_ROW_LESS, x @ x.T, fill)) @ v, fill * jnp.ones(2)

    for lowest in (True, False):
        (found, filled), (expected, fill) = (fn(X, V, lowest) for fn in (autocast(masked), masked))
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.02)
        np.testing.assert_allclose(filled, fill, rtol=2**-8)


def test_an_added_array_that_is_given_is_added_in_float32():
    bias = np.asarray(RNG.normal(size=(12, 12)), np.float32)
    added = lambda x, v: jax.nn.softmax(x @ x.T + bias) @ v
    assert dtypes_of("add", autocast(added), X, V) == ["float32"]


def test_a_constant_is_exact_where_it_stays_float32():
    """What the caller gets, compares with, or computes in float32 is filled as it was written."""
    functions = (
        lambda x: jnp.where(MASK, x, LOWEST),
        lambda x: jnp.where(MASK, x @ x, LOWEST),
        lambda x: jnp.where(MASK, x @ x, 0.1),
        full_precision(lambda x: jnp.where(MASK, jnp.maximum(x @ x, LOWEST), LOWEST)),
        lambda x: jnp.pad(jnp.exp(x), ((0, 0), (1, 0)), constant_values=LOWEST)[:, :12],
    )
    for fn in functions:
        found, expected = np.asarray(autocast(fn)(X)), np.asarray(fn(X))
        constants = (
            expected[expected == expected[0, -1]] if fn is not functions[-1] else expected[:, 0]
        )
        assert constants.size > 11
        assert set(found[np.isin(expected, constants)].tolist()) == set(constants.tolist())


def test_a_padding_of_16_bits_is_finite():
    pooled = lambda x: jax.lax.reduce_window(
        jnp.pad(x @ x, 1, constant_values=LOWEST), -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID"
    )
    assert np.isfinite(jax.jit(autocast(lambda x: pooled(x)[:6, :6] @ x[:6]))(X)).all()
