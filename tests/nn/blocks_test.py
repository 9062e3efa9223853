"""Blocks found in models, one by one, make up what the models compute."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmp.nn import blocks, linen
from jaxmp.nn.models import GPT, GPTConfig, ResNet, ResNetConfig


@functools.cache
def small_gpt():
    model = GPT(GPTConfig(vocab_size=11, context=6, width=8, depth=3, heads=2))
    tokens = jnp.arange(12).reshape(2, 6) % 11
    params, _ = linen.init(model, jax.random.key(0), tokens)
    return model, {"params": params}, tokens


def test_blocks_are_those_that_eat_floats_in_the_order_they_run():
    model, variables, tokens = small_gpt()
    found = blocks.blocks_of(model.apply, variables, tokens)
    assert "tokens" not in [block.name for block in found]
    transformer = [block for block in found if block.kind == "TransformerBlock"]
    assert [b.name for b in transformer] == [f"TransformerBlock_{i}" for i in range(3)]
    for block, after in itertools.pairwise(transformer):
        np.testing.assert_allclose(jax.jit(block.apply)(block.input), after.input, rtol=1e-5)
    one = jax.jit(transformer[0].apply)(transformer[0].input[:1])  # fewer examples than the model's
    np.testing.assert_allclose(one, transformer[1].input[:1], rtol=1e-5)


def test_a_swapped_input_gives_what_the_rest_of_the_model_makes_of_it():
    model, variables, tokens = small_gpt()
    found = {block.name: block for block in blocks.blocks_of(model.apply, variables, tokens)}
    last = found["TransformerBlock_2"].input
    swap = lambda name, x: last if name == "TransformerBlock_2" else x
    swapped = jax.jit(blocks.with_inputs(model.apply, swap))
    # Other tokens come in, but the last block is fed with what these gave.
    np.testing.assert_allclose(
        swapped(variables, tokens[::-1]), jax.jit(model.apply)(variables, tokens), rtol=1e-5
    )


def test_taps_at_block_inputs_receive_the_derivative_with_respect_to_them():
    class Line(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Dense(3, use_bias=False)(x)
            return jnp.sum(x)

    model, x = Line(), jnp.ones((1, 3))
    variables = model.init(jax.random.key(0), x)
    taps = {name: jnp.zeros((1, 3)) for name in ("Dense_0", "Dense_1")}

    def loss(taps):
        return blocks.with_inputs(model.apply, lambda name, x: x + taps[name])(variables, x)

    grads = jax.grad(loss)(taps)
    first, second = (variables["params"][f"Dense_{i}"]["kernel"] for i in range(2))
    np.testing.assert_allclose(grads["Dense_1"][0], second.sum(1), rtol=1e-6)
    np.testing.assert_allclose(grads["Dense_0"][0], first @ second.sum(1), rtol=1e-6)


def test_a_model_with_running_statistics_and_arguments():
    model = ResNet(ResNetConfig(width=4, stages=(1, 1)))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8))
    params, model_state = linen.init(model, jax.random.key(0), x)
    found = blocks.blocks_of(model.apply, {"params": params, **model_state}, x, train=False)
    pair = [block for block in found if block.kind == "ResidualBlock"]
    assert [block.name for block in pair] == ["ResidualBlock_0", "ResidualBlock_1"]
    np.testing.assert_allclose(jax.jit(pair[0].apply)(pair[0].input), pair[1].input, rtol=1e-5)


def test_a_block_that_is_called_twice_has_two_names():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3)
            return layer(layer(x))

    model, x = Twice(), jnp.ones((1, 3))
    found = blocks.blocks_of(model.apply, model.init(jax.random.key(0), x), x)
    assert [block.name for block in found] == ["Dense_0", "Dense_0#1"]
    np.testing.assert_allclose(found[0].apply(x), found[1].input, rtol=1e-6)


def test_a_scanned_and_rematerialised_stack_is_one_block():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(3)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return nn.Dense(1)(scanned(name="layers")(nn.Dense(3, name="first")(x), None)[0])

    model, x = Stack(), jnp.ones((1, 3))
    found = blocks.blocks_of(model.apply, model.init(jax.random.key(0), x), x)
    # The stack returns a pair, as scans do, which is no single array.
    assert [block.name for block in found] == ["first", "Dense_0"]
