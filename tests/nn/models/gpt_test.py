"""The GPT against plain NumPy in float64, and what makes it GPT-2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.nn import linen
from jaxmp.nn.models import GPT, GPT2_124M, GPTConfig

SMALL = GPTConfig(vocab_size=17, context=12, width=24, depth=2, heads=3)
TOKENS = np.random.default_rng(1).integers(0, 17, (2, 10)).astype(np.int32)


def forward(reference, config, params, tokens):
    p = reference.float64(params)
    x = p["tokens"]["embedding"][tokens] + p["positions"][: tokens.shape[1]]
    for layer in range(config.depth):
        block = p[f"TransformerBlock_{layer}"]
        x = reference.transformer_block(block, x, config.heads, causal=True)
    x = reference.layer_norm(p["final_norm"], x)
    return x @ (p["tokens"]["embedding"].T if config.tied else p["head"]["kernel"])


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_logits_are_those_of_float64(reference, perturbed, apply, tied):
    config = dataclasses.replace(SMALL, tied=tied)
    params, model_state = perturbed(GPT(config), TOKENS)
    assert model_state == {}
    logits = apply(GPT(config), {"params": params}, TOKENS)
    expected = forward(reference, config, params, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_16_bit_logits_are_close(perturbed, agrees_in_16_bits, dtype):
    params, state = perturbed(GPT(SMALL), TOKENS)
    agrees_in_16_bits(GPT(SMALL), params, state, TOKENS, dtype, ulps=3)


def test_a_token_sees_only_those_before_it(perturbed, apply):
    params, _ = perturbed(GPT(SMALL), TOKENS)
    changed = TOKENS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 17
    before, after = (
        np.asarray(apply(GPT(SMALL), {"params": params}, t)) for t in (TOKENS, changed)
    )
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.all(np.any(before[:, 6:] != after[:, 6:], axis=-1))


def test_gpt2_has_its_published_size():
    shapes = jax.eval_shape(lambda: linen.init(GPT(GPT2_124M), jax.random.key(0), TOKENS))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808


def test_initial_values(initial):
    config = GPTConfig(vocab_size=500, context=64, width=128, depth=8, heads=4)
    pick = lambda params: (params["TransformerBlock_3"], params["tokens"]["embedding"])
    block, embedding = initial(GPT(config), TOKENS, pick)
    deviation = lambda x: float(np.std(np.asarray(x)))
    for kernel in (block["SelfAttention_0"]["qkv"], block["Dense_0"]):
        assert deviation(kernel["kernel"]) == pytest.approx(0.02, rel=0.02)
    for kernel in (block["SelfAttention_0"]["out"], block["Dense_1"]):  # 1/sqrt(2 * depth) = 1/4
        assert deviation(kernel["kernel"]) == pytest.approx(0.005, rel=0.02)
    assert deviation(embedding) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_logits_follow_the_activations_by_choice(perturbed, apply, tied):
    model = GPT(dataclasses.replace(SMALL, logits="compute", tied=tied))
    params, _ = perturbed(model, TOKENS)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert apply(model, {"params": params}, TOKENS).dtype == jnp.bfloat16


def test_parameters_are_made_where_cudnn_is_not(perturbed, initial):
    model = GPT(dataclasses.replace(SMALL, attention="cudnn"))
    initial(model, TOKENS, lambda params: params["final_norm"])
    params, _ = perturbed(model, TOKENS)
    with pytest.raises(ValueError, match="cudnn attention takes float16 or bfloat16"):
        model.apply({"params": params}, TOKENS)


@pytest.mark.parametrize(
    "change,message",
    (
        ({"heads": 5}, "width 24 cannot be split among 5 heads"),
        ({"attention": "flash"}, "'flash' is unknown; choose one of auto, xla, cudnn"),
        ({"dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\)"),
        ({"logits": "half"}, "'half' is unknown; choose one of float32, compute"),
    ),
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="13 tokens is longer than the context 12"):
        linen.init(GPT(SMALL), jax.random.key(0), jnp.zeros((1, 13), jnp.int32))
