"""Instruments on the shipped models, against the same figures found without them."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmp.run import build, cli, instruments

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def state_of(parts, spread):
    """The state before the first step, but for kernels of NumPy's: random ones take long to compile."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        if x.ndim > 1:
            return (spread * rng.normal(size=x.shape)).astype(x.dtype)
        return np.full(x.shape, path[-1].key == "scale", x.dtype)

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(parts.init).params)
    # XLA leaves the parameters' own initialisation out where nothing reads it.
    return jax.jit(lambda: parts.init().replace(params=None))().replace(params=params)


def experiment(name, *overrides, spread=0.2):
    config, _ = cli.parse([str(CONFIGS / f"{name}.py"), *overrides])
    parts = build.build(config)
    return parts, state_of(parts, spread), parts.source.batch_at(0)


@pytest.fixture(scope="module")
def mlp():
    return experiment("digits_mlp_float32", "--model.width", "16")


@pytest.fixture(scope="module")
def gpt():
    sizes = "--model.width 16 --model.depth 2 --model.heads 2 --model.context 16 --batch_size 4"
    # Weights as they start, of a deviation of 0.02, hardly attend; these do.
    return experiment(
        "text_gpt_float32", *sizes.split(), "--data.sequence_length", "16", spread=0.06
    )


@pytest.fixture(scope="module")
def mlp_flow(mlp):
    parts, state, batch = mlp
    return jax.jit(instruments.flow_of(parts))(state, batch)


def test_flow_at_block_inputs_is_the_gradient_there(mlp, mlp_flow):
    parts, state, batch = mlp
    at_inputs, by_module = mlp_flow
    params, inputs = state.params, np.reshape(batch["inputs"], (len(batch["targets"]), -1))

    def from_first(x):
        for name in ("Dense_0", "Dense_1"):
            x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
        logits = x @ params["head"]["kernel"] + params["head"]["bias"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][:, None], 1)
        return -jnp.mean(picked)

    measured = dict(zip(at_inputs.names, np.asarray(at_inputs.norm)))
    assert set(measured) == {"Dense_0", "Dense_1", "head"}
    norm = np.linalg.norm(jax.jit(jax.grad(from_first))(inputs))
    np.testing.assert_allclose(measured["Dense_0"], norm, rtol=1e-4)
    grads = jax.jit(jax.grad(lambda p: parts.loss(p, batch, state.rng, {})[0]))(params)
    rms = dict(zip(by_module.names, np.asarray(by_module.rms)))
    both = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads["head"])])
    np.testing.assert_allclose(rms["head"], np.sqrt(np.mean(both**2)), rtol=1e-4)


def test_a_loss_scale_does_not_show_in_the_flow():
    parts, state, batch = experiment("digits_mlp_float16", "--model.width", "16")
    plain = dataclasses.replace(
        parts.config,
        policy="float32",
        loss_scale=dataclasses.replace(parts.config.loss_scale, kind="none"),
    )
    exact = build.build(plain, parts.source)
    scaled, _ = jax.jit(instruments.flow_of(parts))(state, batch)
    unscaled, _ = jax.jit(instruments.flow_of(exact))(state_of(exact, 0.2), batch)
    np.testing.assert_allclose(scaled.norm, unscaled.norm, rtol=0.02)


def test_scalars_are_named_by_place(mlp_flow):
    found = instruments.scalars(*mlp_flow)
    assert {"flow/head", "grad_rms/Dense_0"} <= set(found)
    assert all(isinstance(value, float) for value in found.values())


def test_gains_are_the_norms_of_the_layers(mlp):
    parts, state, batch = mlp
    per_block, whole, _ = instruments.gains_of(parts, state, batch)
    for name, gains in per_block.items():
        sigma = np.linalg.norm(np.asarray(state.params[name]["kernel"]), 2)
        np.testing.assert_allclose(gains.values, sigma, rtol=0.02)
    assert float(whole) <= np.prod([float(g) for g in per_block.values()])  # relu does not stretch


def test_attention_of_each_layer_against_softmax_itself(gpt):
    parts, state, batch = gpt
    found = instruments.attention_of(parts, state, batch)
    assert [layer.layer for layer in found] == ["TransformerBlock_0", "TransformerBlock_1"]
    params = jax.tree.map(np.float64, state.params)
    block = params["TransformerBlock_0"]
    x = params["tokens"]["embedding"][np.asarray(batch["inputs"])]
    x = x + params["positions"][: x.shape[1]]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    norm = block["LayerNorm_0"]
    x = (x - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]
    qkv = x @ block["SelfAttention_0"]["qkv"]["kernel"] + block["SelfAttention_0"]["qkv"]["bias"]
    query, key, _ = (part.reshape(4, 16, 2, 8) for part in np.split(qkv, 3, -1))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
    logits = np.where(np.tril(np.ones((16, 16), bool)), logits, -np.inf)
    weights = scipy.special.softmax(logits, axis=-1)
    entropy = -np.sum(np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300)), 0), -1)
    np.testing.assert_allclose(found[0].entropy, entropy.mean(), rtol=1e-4)
    np.testing.assert_allclose(found[0].least_entropy, entropy[..., 1:].min(), rtol=1e-3)
    np.testing.assert_allclose(found[0].max_logit, logits.max(), rtol=1e-4)


def test_a_model_without_attention_has_none(mlp):
    assert instruments.attention_of(*mlp) == []
