"""The float64 reference, and models with every parameter away from its initial zeros and ones."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.nn import linen


@pytest.fixture(scope="session")
def reference():
    """The module `reference.py` beside this file."""
    path = pathlib.Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("model_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def perturbed():
    """A function giving (params, model_state) of a model, all parameters moved at random."""

    @functools.cache
    def start(model, shape, dtype):
        return linen.init(model, jax.random.key(0), jnp.zeros(shape, dtype))

    def make(model, inputs):
        params, model_state = start(model, inputs.shape, inputs.dtype)
        rng = np.random.default_rng(0)
        move = lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
        return jax.tree.map(move, params), model_state

    return make


@pytest.fixture
def agrees_in_16_bits():
    """A function asserting that 16-bit logits are within `ulps` of the largest float32 one."""

    def check(model, params, model_state, inputs, dtype, ulps):
        def logits(dtype):
            cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            variables = {"params": jax.tree.map(cast, params), **model_state}
            out = jax.jit(model.apply)(variables, cast(inputs))
            assert out.dtype == jnp.float32
            return np.asarray(out)

        exact = logits(jnp.float32)
        unit = float(jnp.finfo(dtype).eps) * np.abs(exact).max()
        assert np.abs(logits(dtype) - exact).max() < ulps * unit

    return check
