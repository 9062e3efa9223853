"""Policies: strings round-trip, overrides find their modules, mistakes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmp

DTYPES = ["bfloat16", "float16", "float32", "float64"]
PATTERNS = st.text("abcXYZ_0123456789*/?", min_size=1, max_size=12)


@given(
    st.tuples(*[st.sampled_from(DTYPES)] * 3),
    st.lists(st.tuples(PATTERNS, st.sampled_from(DTYPES)), max_size=3),
)
def test_strings_round_trip(dtypes, overrides):
    policy = jaxmp.Policy(*dtypes, overrides=overrides)
    assert jaxmp.get_policy(str(policy)) == policy
    assert hash(jaxmp.get_policy(str(policy))) == hash(policy)


@pytest.mark.parametrize(
    ("text", "dtypes"),
    [
        ("params=float32, compute=bfloat16 ,output=float32", "float32 bfloat16 float32"),
        ("mixed_float16", "float32 float16 float32"),
        ("mixed_bfloat16", "float32 bfloat16 float32"),
        ("c=f16", "float32 float16 float16"),
        ("p=f16", "float16 float16 float16"),
        ("bf16", "bfloat16 bfloat16 bfloat16"),
    ],
)
def test_the_grammar(text, dtypes):
    policy = jaxmp.get_policy(text)
    got = [policy.param_dtype, policy.compute_dtype, policy.output_dtype]
    assert [d.name for d in got] == dtypes.split()


@pytest.mark.parametrize("text", ["float17", "params=float33", "precision=float16", "mixed_int8"])
def test_mistakes_are_named(text):
    with pytest.raises(ValueError, match=f"Unknown (dtype|key).*{text.split('=')[0][:5]}|float33"):
        jaxmp.get_policy(text)


PARAMS = {
    "Block_0": {"LayerNorm_0": {"scale": jnp.ones(3)}, "Dense_0": {"kernel": jnp.ones((3, 3))}},
    "head": {"kernel": jnp.ones((3, 2)), "steps": jnp.arange(3)},
}


def test_overrides_cast_modules_and_parameters_by_path():
    policy = jaxmp.Policy(
        "float32", "float16", "float32", overrides={"**/LayerNorm_*": "float32", "head": "bfloat16"}
    )
    cast = policy.cast_to_compute(PARAMS)
    dtypes = jax.tree.map(lambda x: x.dtype.name, cast)
    assert dtypes == {
        "Block_0": {"LayerNorm_0": {"scale": "float32"}, "Dense_0": {"kernel": "float16"}},
        "head": {"kernel": "bfloat16", "steps": "int32"},
    }
    # Inputs have no path; they take the compute dtype.
    assert policy.cast_to_compute(jnp.ones(3)).dtype == np.float16


def test_the_last_matching_override_decides():
    policy = jaxmp.get_policy("c=bf16,@**=f16,@head=f32")
    assert policy.cast_to_compute(PARAMS)["head"]["kernel"].dtype == np.float32
    assert policy.dtype_at("Block_0/Dense_0/kernel") == np.float16


def test_an_override_that_matches_nothing_is_an_error_that_names_it():
    policy = jaxmp.Policy("float32", "float16", "float32", overrides={"**/RMSNorm_*": "float32"})
    with pytest.raises(
        ValueError, match=r"'\*\*/RMSNorm_\*' matched no parameter.*Block_0/Dense_0"
    ):
        policy.cast_to_compute(PARAMS)


def test_casting_is_differentiable_and_gradients_come_back_in_the_master_dtype():
    policy = jaxmp.get_policy("mixed_float16")
    grads = jax.grad(lambda p: jnp.sum(policy.cast_to_compute(p) ** 2).astype(jnp.float32))(
        jnp.array([0.5, 3.0])
    )
    assert grads.dtype == np.float32
    np.testing.assert_array_equal(grads, [1.0, 6.0])
