"""Leaves: every form goes to a plain array and comes back as itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.run import leaves

LEAVES = {
    "float32": (jnp.arange(6.0).reshape(2, 3), "float32[2,3]"),
    "bfloat16": (jnp.ones(4, jnp.bfloat16), "bfloat16[4]"),
    "weak": (jnp.full((3,), 2.0), "float32[3]"),
    "weak scalar": (jnp.asarray(2), "int32[]"),
    "key": (jax.random.key(3), "key<threefry2x32>[]"),
    "keys": (jax.random.split(jax.random.key(3, impl="rbg"), 2), "key<rbg>[2]"),
    "old key": (jax.random.PRNGKey(3), "uint32[2]"),
    "numpy": (np.arange(3.0), "float64[3]"),
    "numpy scalar": (np.float64(0.1), "float64[]"),
    "bool": (True, "bool[]"),
    "int": (2**40, "int64[]"),
    "float": (0.1, "float64[]"),
    "complex": (1j, "complex128[]"),
    "empty": (jnp.zeros((0, 2), jnp.bfloat16), "bfloat16[0,2]"),
}


@pytest.mark.parametrize("name", LEAVES)
def test_there_and_back(name):
    leaf, kind = LEAVES[name]
    assert str(leaves.kind_of(leaf)) == kind
    stored = np.array(leaves.to_array(leaf))
    request = leaves.to_request(leaf)
    assert (request.shape, request.dtype) == (stored.shape, stored.dtype)
    if isinstance(request, jax.ShapeDtypeStruct):
        stored = jax.device_put(stored, request.sharding)
    back = leaves.from_array(leaf, stored if stored.size else None)
    assert type(back) is type(leaf)
    assert leaves.kind_of(back) == leaves.kind_of(leaf)
    assert getattr(back, "weak_type", False) == getattr(leaf, "weak_type", False)
    np.testing.assert_array_equal(leaves.to_array(back), leaves.to_array(leaf))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "weak", "key", "keys"])
def test_abstract_leaves_say_the_same(name):
    leaf, kind = LEAVES[name]
    abstract = jax.eval_shape(lambda: leaf)
    assert str(leaves.kind_of(abstract)) == kind
    assert leaves.to_request(abstract) == leaves.to_request(leaf)
    back = leaves.from_array(abstract, jnp.array(leaves.to_array(leaf)))
    assert leaves.kind_of(back) == leaves.kind_of(leaf)
    assert getattr(back, "weak_type", False) == getattr(leaf, "weak_type", False)


@pytest.mark.parametrize("leaf", ["text", object(), np.array(["a"]), np.array(None)])
def test_other_objects_are_refused(leaf):
    with pytest.raises(ValueError, match="arrays and numbers only"):
        leaves.kind_of(leaf)
