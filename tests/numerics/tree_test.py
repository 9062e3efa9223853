"""Trees: casts touch floats alone, norms hold at any magnitude, patterns name modules."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmp.numerics import tree as trees


def test_cast_floating_leaves_everything_else_alone():
    key = jax.random.key(0)
    before = {
        "float": jnp.ones(2),
        "half": np.ones(2, np.float16),
        "int": jnp.ones(2, jnp.int32),
        "bool": np.ones(2, bool),
        "complex": jnp.ones(2, jnp.complex64),
        "key": key,
        "number": 1.5,
        "text": "x",
        "none": None,
        "abstract": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    after = trees.cast_floating(before, jnp.bfloat16)
    for name in ("float", "half", "abstract"):
        assert after[name].dtype == jnp.bfloat16
    for name in ("int", "bool", "complex", "key", "number", "text", "none"):
        assert after[name] is before[name]


def test_cast_rounds_to_nearest_even_like_the_reference():
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        got = jax.jit(lambda x, d=dtype: trees.cast_floating(x, d))(x)
        np.testing.assert_array_equal(np.asarray(got), x.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1e-36, 1e-25, 1e-12, 1e-5, 1.0, 20.0, 1e12, 1e25, 1e36])
def test_norm_matches_float64_at_every_magnitude(dtype, magnitude):
    x = (np.random.default_rng(1).uniform(0.5, 1, size=1000) * magnitude).astype(dtype)
    norm, finite = jax.jit(trees.norm_and_finite)({"a": x[:600].reshape(20, 30), "b": x[600:]})
    want = np.linalg.norm(x.astype(np.float64))
    np.testing.assert_allclose(float(norm), want, rtol=1e-5)
    assert bool(finite)


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=8))
def test_finite_means_what_numpy_says(values):
    x = np.array(values, np.float32)
    norm, finite = trees.norm_and_finite({"x": x})
    assert bool(finite) == np.isfinite(x).all() == bool(trees.all_finite({"x": x}))
    if finite:
        want = np.linalg.norm(x.astype(np.float64))
        # Above float32's range the norm is inf, below its normal range zero.
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(float(norm), np.float32(want), rtol=1e-5, atol=1.2e-38)


def test_half_precision_sums_that_overflow_or_vanish_in_their_own_dtype():
    np.testing.assert_allclose(
        trees.global_norm(jnp.full(1000, 20, jnp.float16)), 632.4555, rtol=1e-6
    )
    small = jnp.full(1000, 1e-5, jnp.float16)
    np.testing.assert_allclose(
        trees.global_norm(small), np.linalg.norm(np.asarray(small, np.float64)), rtol=1e-5
    )


def test_trees_without_floating_leaves():
    for empty in ({}, None, {"i": jnp.arange(3)}):
        norm, finite = trees.norm_and_finite(empty)
        assert norm == 0 and finite
    assert trees.all_finite({})


def test_select_keeps_bits_and_keys():
    a = {"x": jnp.array([-0.0, jnp.nan]), "key": jax.random.key(1), "n": jnp.int32(3)}
    b = {"x": jnp.array([1.0, 2.0]), "key": jax.random.key(2), "n": jnp.int32(4)}
    got = trees.select_tree(jnp.array(True), a, b)
    assert np.signbit(got["x"][0]) and jnp.isnan(got["x"][1])
    assert got["key"] == a["key"]
    chex.assert_trees_all_equal(trees.select_tree(jnp.array(False), a, b)["x"], b["x"])
    with pytest.raises(AssertionError, match="boolean scalar"):
        trees.select_tree(jnp.ones(1, bool), a, b)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("**/LayerNorm_*", "encoder/LayerNorm_0/scale", True),
        ("**/LayerNorm_*", "LayerNorm_0/scale", True),
        ("LayerNorm_*", "encoder/LayerNorm_0/scale", False),
        ("*/head", "model/head/kernel", True),
        ("*/head", "a/b/head/kernel", False),
        ("**/kernel", "a/b/kernel", True),
        ("**", "a", True),
        ("**/attention/*", "block/attention/query/kernel", True),
        ("head", "header/kernel", False),
        ("layer_?", "layer_10", False),
    ],
)
def test_match_path(pattern, path, matches):
    assert trees.match_path(pattern, path) is matches


def test_paths_are_readable_for_dicts_lists_and_attributes():
    tree = {"a": [jnp.ones(1), jax.ShapeDtypeStruct((1,), jnp.float32)]}
    assert [name for name, _ in trees.named_leaves(tree)] == ["a/0", "a/1"]
