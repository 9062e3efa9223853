"""The residual network and its BatchNorm against plain NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.nn import layers, linen
from jaxmp.nn.models import ResNet, ResNetConfig

BASIC = ResNetConfig(num_classes=5, stages=(1, 2), width=8)
BOTTLENECK = dataclasses.replace(BASIC, block="bottleneck")
IMAGES = np.random.default_rng(1).normal(size=(4, 9, 8, 3)).astype(np.float32)


def forward(ref, config, params, stats, images, train):
    """Gives the logits and the new running statistics."""
    p, stats = ref.float64(params), ref.float64(stats)
    new = {}

    def normalise(names, x):
        p_here, stats_here, new_here = p, stats, new
        for name in names:
            p_here, stats_here = p_here[name], stats_here[name]
        for name in names[:-1]:
            new_here = new_here.setdefault(name, {})
        y, new_here[names[-1]] = ref.batch_norm(p_here, stats_here, x, train)
        return y

    x = np.maximum(normalise(["stem_norm"], ref.conv(p["stem"], images, 1)), 0)
    strides = [2 if s > 0 and b == 0 else 1 for s, n in enumerate(config.stages) for b in range(n)]
    conv_strides = (lambda s: (s, 1)) if config.block == "basic" else (lambda s: (1, s, 1))
    for index, stride in enumerate(strides):
        block, y = f"ResidualBlock_{index}", x
        for conv, conv_stride in enumerate(conv_strides(stride)):
            y = np.maximum(y, 0) if conv else y
            y = ref.conv(p[block][f"Conv_{conv}"], y, conv_stride)
            y = normalise([block, f"BatchNorm_{conv}"], y)
        if "shortcut" in p[block]:
            x = normalise([block, "shortcut_norm"], ref.conv(p[block]["shortcut"], x, stride))
        x = np.maximum(x + y, 0)
    return ref.dense(p["head"], x.mean((1, 2))), new


@functools.cache
def compiled(model, train):
    return jax.jit(lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"]))


def run(model, variables, images, train=False):
    """Gives the logits and the new variables; compiled, since op by op a ResNet takes seconds."""
    return compiled(model, train)(variables, images)


@pytest.mark.parametrize("config", (BASIC, BOTTLENECK), ids=("basic", "bottleneck"))
@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
def test_logits_and_statistics_are_those_of_float64(reference, perturbed, config, train):
    model = ResNet(config)
    params, state = perturbed(model, IMAGES)
    _, state = run(model, {"params": params, **state}, IMAGES + 1, train=True)
    logits, new_state = run(model, {"params": params, **state}, IMAGES, train)
    images = np.asarray(IMAGES, np.float64)
    expected, expected_stats = forward(
        reference, config, params, state["batch_stats"], images, train
    )
    np.testing.assert_allclose(logits, expected, atol=5e-5, rtol=5e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
    jax.tree.map(close, dict(new_state["batch_stats"]), expected_stats)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_16_bit_logits_are_close(perturbed, agrees_in_16_bits, dtype):
    params, state = perturbed(ResNet(BASIC), IMAGES)
    agrees_in_16_bits(ResNet(BASIC), params, state, IMAGES, dtype, ulps=2)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_running_statistics_stay_float32(perturbed, dtype):
    params, state = perturbed(ResNet(BASIC), IMAGES)
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    images = IMAGES.astype(dtype)
    _, new = jax.eval_shape(compiled(ResNet(BASIC), True), {"params": half, **state}, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    assert jax.tree.structure(dict(new)) == jax.tree.structure(state)


def test_statistics_of_channels_far_from_zero():
    # About the running mean the deviations survive; about zero, 3000^2 + 1 is lost in float32.
    x = jnp.asarray(np.random.default_rng(0).normal(3e3, 1.0, (512, 4)), jnp.float32)
    norm = layers.BatchNorm()
    variables = norm.init(jax.random.key(0), x, False)
    stats = {"mean": jnp.full(4, 2999.0), "var": jnp.ones(4)}
    y, new = norm.apply({**variables, "batch_stats": stats}, x, True, mutable=["batch_stats"])
    expected = np.asarray(x, np.float64)
    variance = 10 * (np.asarray(new["batch_stats"]["var"]) - 0.9)
    np.testing.assert_allclose(variance, expected.var(0), rtol=1e-5)
    expected = (expected - expected.mean(0)) / np.sqrt(expected.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_blocks_start_as_the_identity(perturbed, initial):
    """With norms as they start and any kernels: the first block's differ between the two models."""
    norms = lambda params: {
        name: {part: p for part, p in block.items() if part.startswith("BatchNorm")}
        for name, block in params.items()
        if name.startswith("ResidualBlock")
    }
    logits = []
    for blocks in (1, 2):
        model = ResNet(ResNetConfig(stages=(blocks,)))
        params, state = perturbed(model, IMAGES)
        started = initial(model, IMAGES, norms)
        assert len(started) == blocks and all(started.values())
        for name, norm in started.items():
            params[name] |= norm
        params["ResidualBlock_0"]["Conv_0"]["kernel"] *= blocks
        if blocks == 1:
            ends = {name: params[name] for name in ("stem", "stem_norm", "head")}
        logits.append(run(model, {"params": params | ends, **state}, IMAGES)[0])
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-6)


def test_resnet50_has_its_published_size():
    config = ResNetConfig(1000, (3, 4, 6, 3), 64, "bottleneck", "imagenet")
    images = jnp.zeros((1, 64, 64, 3))
    params, _ = jax.eval_shape(lambda: linen.init(ResNet(config), jax.random.key(0), images))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032


def test_the_imagenet_stem_quarters_the_image(perturbed):
    model = ResNet(dataclasses.replace(BASIC, stem="imagenet"))
    params, state = perturbed(model, np.zeros((1, 32, 32, 3), np.float32))
    assert params["stem"]["kernel"].shape == (7, 7, 3, 8)
    logits, _ = run(model, {"params": params, **state}, np.ones((2, 32, 32, 3), np.float32))
    assert logits.shape == (2, 5)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="'wide' is unknown; choose one of basic, bottleneck"):
        ResNetConfig(block="wide")
    with pytest.raises(ValueError, match="stem 'big' is unknown; choose one of small, imagenet"):
        ResNetConfig(stem="big")
    with pytest.raises(ValueError, match="at least one block"):
        ResNetConfig(stages=(1, 0))
