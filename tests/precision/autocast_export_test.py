"""Programs exported for sizes that are not known yet: symbols for the batch and the number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxmp.precision.autocast import autocast

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(32, size=(3, 9), dtype=np.int32)
IMAGES = RNG.uniform(size=(3, 8, 8, 2)).astype(np.float32)


class Block(nn.Module):
    """Attention and a gelu, with all that autocast runs as one: softmax, norms, activations."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        h = nn.Dense(32)(nn.RMSNorm()(x))
        return x + nn.Dense(16)(nn.gelu(h) * self.param("gate", nn.initializers.ones, ())), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        axes, keys = {"params": 0}, {"params": True}
        stack = nn.scan(Block, variable_axes=axes, split_rngs=keys, in_axes=nn.broadcast, length=2)
        x = nn.Embed(32, 16)(tokens) * jnp.sqrt(16.0)
        return nn.Dense(32)(stack()(x, nn.make_causal_mask(tokens))[0])


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3))(images))
        return nn.Dense(4)(nn.max_pool(nn.relu(x), (2, 2), (2, 2)).mean((1, 2)))


MODELS = {
    "batch and tokens": (Decoder(), TOKENS, "batch, tokens"),
    "images": (Convolutions(), IMAGES, "batch, 8, 8, 2"),
}


def loss_of(model: nn.Module) -> Callable:
    def loss(params: Any, inputs: jax.Array) -> jax.Array:
        logits, _ = model.apply({"params": params}, inputs, mutable=["batch_stats"])
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

    return loss


def distance(found: Any, exact: Any) -> float:
    """Of two trees, relative to the second one's norm."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return float(np.linalg.norm(flat(found) - flat(exact)) / np.linalg.norm(flat(exact)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", ["grad of autocast", "autocast of grad"])
def test_exported_for_any_size(name, order):
    model, inputs, symbols = MODELS[name]
    loss = loss_of(model)
    exact = jax.jit(jax.grad(loss))
    run = jax.grad(autocast(loss)) if order.startswith("grad") else autocast(jax.grad(loss))
    params = model.init(jax.random.key(0), inputs)["params"]
    given = jax.ShapeDtypeStruct(export.symbolic_shape(symbols), inputs.dtype)
    program = export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(params, given)
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", program.mlir_module())
    assert len(products) >= 8
    assert all(re.search(r"-> tensor<[^>]*xbf16>", line) for line in products)
    for batch in (inputs, np.concatenate([inputs, inputs[:, ::-1]])):
        found, expected = program.call(params, batch), exact(params, batch)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
        assert distance(found, expected) < 2**-6
