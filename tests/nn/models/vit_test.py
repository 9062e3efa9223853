"""The vision transformer against plain NumPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmp.nn import linen
from jaxmp.nn.models import VisionTransformer, ViTConfig, vit

SMALL = ViTConfig(num_classes=5, patch=2, width=24, depth=2, heads=3)
IMAGES = np.random.default_rng(1).normal(size=(3, 6, 8, 2)).astype(np.float32)


def forward(reference, config, params, images):
    p, size = reference.float64(params), config.patch
    batch, height, width, _ = images.shape
    patches = [
        images[:, i : i + size, j : j + size].reshape(batch, -1)
        for i in range(0, height, size)
        for j in range(0, width, size)
    ]
    x = reference.dense(p["patch"], np.stack(patches, axis=1).astype(np.float64))
    if config.pool == "class_token":
        token = np.broadcast_to(p["class_token"], (batch, 1, config.width))
        x = np.concatenate([token, x], axis=1)
    x = x + p["positions"]
    for layer in range(config.depth):
        block = p[f"TransformerBlock_{layer}"]
        x = reference.transformer_block(block, x, config.heads, causal=False)
    x = reference.layer_norm(p["final_norm"], x)
    x = x[:, 0] if config.pool == "class_token" else x.mean(1)
    return reference.dense(p["head"], x)


@pytest.mark.parametrize("pool", vit.POOLINGS)
def test_logits_are_those_of_float64(reference, perturbed, apply, pool):
    config = dataclasses.replace(SMALL, pool=pool)
    params, model_state = perturbed(VisionTransformer(config), IMAGES)
    assert model_state == {}
    logits = apply(VisionTransformer(config), {"params": params}, IMAGES)
    expected = forward(reference, config, params, np.asarray(IMAGES))
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("pool", vit.POOLINGS)
def test_16_bit_logits_are_close(perturbed, agrees_in_16_bits, dtype, pool):
    model = VisionTransformer(dataclasses.replace(SMALL, pool=pool))
    params, state = perturbed(model, IMAGES)
    agrees_in_16_bits(model, params, state, IMAGES, dtype, ulps=4)


def test_grey_images_need_no_channel_axis(perturbed, apply):
    grey = IMAGES[..., :1]
    params, _ = perturbed(VisionTransformer(SMALL), grey)
    with_axis, without = (
        apply(VisionTransformer(SMALL), {"params": params}, x) for x in (grey, grey[..., 0])
    )
    np.testing.assert_array_equal(with_axis, without)


def test_the_untrained_model_predicts_all_classes_alike(perturbed, initial, apply):
    model = VisionTransformer(SMALL)
    params, _ = perturbed(model, IMAGES)
    params["head"] = initial(model, IMAGES, lambda params: params["head"])
    np.testing.assert_array_equal(apply(model, {"params": params}, IMAGES), 0)


def test_spectral_init_gives_every_kernel_before_the_head_the_norm_1():
    config = dataclasses.replace(SMALL, spectral_init=True)
    params, _ = linen.init(VisionTransformer(config), jax.random.key(0), IMAGES)
    del params["head"]
    kernels = [p for path, p in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"]
    assert len(kernels) == 1 + 4 * SMALL.depth
    for kernel in kernels:
        assert np.linalg.norm(kernel, ord=2) == pytest.approx(1, rel=1e-5)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="'max' is unknown; choose one of mean, class_token"):
        dataclasses.replace(SMALL, pool="max")
    with pytest.raises(ValueError, match="block 'ln' is unknown; choose one of pre_ln, post_ln"):
        dataclasses.replace(SMALL, block="ln")
    with pytest.raises(ValueError, match=r"drop_path 1.0 is not in \[0, 1\); 0 switches it off"):
        dataclasses.replace(SMALL, drop_path=1.0)
    with pytest.raises(ValueError, match="6x8 pixels cannot be cut into patches of 4"):
        linen.init(
            VisionTransformer(dataclasses.replace(SMALL, patch=4)), jax.random.key(0), IMAGES
        )
