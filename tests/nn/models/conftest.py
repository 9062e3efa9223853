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
    """A function giving (params, model_state) of a model, all parameters away from 0 and 1.

    The shapes are the model's own and the numbers NumPy's: compiling a model's initialisation takes
    seconds. The state is as it starts, a mean of 0 and a variance of 1.
    """

    def make(model, inputs):
        init = lambda: linen.init(model, jax.random.key(0), inputs)
        params, model_state = jax.eval_shape(init)
        rng = np.random.default_rng(0)
        # About the deviation of kernels as they start and 0.1 more: those of language models, 0.02.
        wide = 0.1 if np.issubdtype(inputs.dtype, np.integer) else 0.2

        def draw(path, x):
            centre, spread = float(path[-1].key == "scale"), wide if x.ndim > 1 else 0.1
            return (centre + spread * rng.normal(size=x.shape)).astype(x.dtype)

        start = lambda path, x: np.full(x.shape, path[-1].key == "var", x.dtype)
        tree_map = jax.tree_util.tree_map_with_path
        return tree_map(draw, params), tree_map(start, model_state)

    return make


@pytest.fixture(scope="session")
def initial():
    """A function giving the part that `pick` takes of a model's initial parameters.

    Only that part is compiled: XLA leaves the rest out.
    """

    def make(model, inputs, pick):
        return jax.jit(lambda: pick(linen.init(model, jax.random.key(0), inputs)[0]))()

    return make


@pytest.fixture(scope="session")
def apply():
    """A function giving a model's logits, its `apply` compiled once for all tests."""
    compiled = functools.cache(lambda model: jax.jit(model.apply))
    return lambda model, variables, inputs: compiled(model)(variables, inputs)


@pytest.fixture
def agrees_in_16_bits(apply):
    """A function asserting that 16-bit logits are within `ulps` of the largest float32 one."""

    def check(model, params, model_state, inputs, dtype, ulps):
        def logits(dtype):
            cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            variables = {"params": jax.tree.map(cast, params), **model_state}
            out = apply(model, variables, cast(inputs))
            assert out.dtype == jnp.float32
            return np.asarray(out)

        exact = logits(jnp.float32)
        unit = float(jnp.finfo(dtype).eps) * np.abs(exact).max()
        assert np.abs(logits(dtype) - exact).max() < ulps * unit

    return check
