"""The multilayer perceptron against plain NumPy in float64."""

import dataclasses

import numpy as np
import pytest

from jaxmp.nn.models import MLP, MLPConfig, mlp

SMALL = MLPConfig(num_classes=5, width=32, depth=2)
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_logits_are_those_of_float64(reference, perturbed, apply, activation):
    model = MLP(dataclasses.replace(SMALL, activation=activation))
    params, model_state = perturbed(model, IMAGES)
    assert model_state == {}
    p, x = reference.float64(params), np.asarray(IMAGES, np.float64).reshape(3, 64)
    act = {"relu": lambda x: np.maximum(x, 0), "gelu": reference.gelu, "tanh": np.tanh}[activation]
    for layer in range(2):
        x = act(reference.dense(p[f"Dense_{layer}"], x))
    expected = reference.dense(p["head"], x)
    logits = apply(model, {"params": params}, IMAGES)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_16_bit_logits_are_close(perturbed, agrees_in_16_bits, dtype):
    params, state = perturbed(MLP(SMALL), IMAGES)
    agrees_in_16_bits(MLP(SMALL), params, state, IMAGES, dtype, ulps=2)


def test_flat_inputs_are_the_same_as_images(perturbed, apply):
    params, _ = perturbed(MLP(SMALL), IMAGES)
    inputs = IMAGES, IMAGES.reshape(3, 64)
    image, flat = (apply(MLP(SMALL), {"params": params}, x) for x in inputs)
    np.testing.assert_array_equal(image, flat)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="'swish' is unknown; choose one of relu, gelu, tanh"):
        MLPConfig(activation="swish")
    with pytest.raises(ValueError, match=r"dropout -1 is not in \[0, 1\)"):
        MLPConfig(dropout=-1)
