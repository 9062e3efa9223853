"""Closed forms of single layers against dense Jacobians in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.diagnose import layer_gains as gains
from jaxmp.diagnose import spectrum
from jaxmp.nn import functional as F

# One program for each shape: op by op, each of them would compile a dozen.
layer_norm_gain = jax.jit(gains.layer_norm_gain, static_argnums=1)
rms_norm_gain = jax.jit(gains.rms_norm_gain, static_argnums=1)
conv_singular_values = jax.jit(
    gains.conv_singular_values, static_argnames=("image", "strides", "groups")
)
attention_logits = jax.jit(gains.attention_logits, static_argnums=2)
attention_statistics = jax.jit(gains.attention_statistics)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def _rng_normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _layer_norm_jacobian(x, epsilon):
    """LayerNorm's Jacobian in its closed form, float64."""
    centred = x - x.mean()
    v = np.mean(centred**2) + epsilon
    projection = np.eye(len(x)) - 1 / len(x) - np.outer(centred, centred) / (len(x) * v)
    return projection / np.sqrt(v)


# Norms.


@jax.jit
@jax.jacrev
def _layer_norm_derivative(x):
    return F.layer_norm(x, jnp.ones(64), jnp.zeros(64), 1e-6)


@pytest.mark.parametrize("scale", [100.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 0.0])
def test_layer_norm_gain_is_the_largest_singular_value(scale):
    """LayerNorm stretches by 1/sqrt(var + eps), D - 2 times over; eps/(var+eps)^1.5 along x."""
    x, epsilon = _rng_normal(0, 64) * scale, 1e-6
    jacobian = _layer_norm_jacobian(x, epsilon)
    values = np.linalg.svd(jacobian, compute_uv=False)
    gain = layer_norm_gain(x.astype(np.float32), epsilon)
    np.testing.assert_allclose(float(gain), values[0], rtol=1e-5)
    np.testing.assert_allclose(values[:62], values[0], rtol=1e-9)
    with jax.enable_x64(True):
        dense = _layer_norm_derivative(x)
        np.testing.assert_allclose(dense, jacobian, rtol=0, atol=1e-10 * values[0])
    if scale:
        direction = (x - x.mean()) / np.linalg.norm(x - x.mean())
        v = np.var(x) + epsilon
        along = np.linalg.norm(jacobian @ direction)
        np.testing.assert_allclose(along, epsilon / v**1.5, rtol=1e-6)


@pytest.mark.parametrize(("epsilon", "supremum"), [(1e-5, 316.2278), (1e-6, 1000.0)])
def test_the_epsilon_bounds_the_gain(epsilon, supremum):
    """The supremum is 1/sqrt(eps), where all features are equal."""
    for gain in (
        layer_norm_gain(np.ones(64, np.float32), epsilon),
        rms_norm_gain(np.zeros(64, np.float32), epsilon),
    ):
        np.testing.assert_allclose(float(gain), supremum, rtol=1e-6)


def test_rms_norm_gain_is_the_largest_singular_value():
    """RMSNorm stretches by 1/sqrt(mean square + eps), token by token."""
    x = _rng_normal(1, 3, 16)
    norm = lambda x: x / jnp.sqrt(jnp.mean(x**2) + 1e-5)
    with jax.enable_x64(True):
        jacobians = jax.jit(jax.vmap(jax.jacrev(norm)))(x)
        want = np.linalg.norm(np.asarray(jacobians), ord=2, axis=(1, 2))
    found = rms_norm_gain(x.astype(np.float32))
    np.testing.assert_allclose(found.values, want, rtol=1e-5)
    np.testing.assert_allclose(found.max, want.max(), rtol=1e-5)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_gains_hold_where_squares_leave_float32(magnitude):
    x = _rng_normal(2, 5, 32).astype(np.float32) * np.float32(magnitude)
    wide = x.astype(np.float64)
    for found, variance in (
        (layer_norm_gain(x, 0.0), np.var(wide, axis=1)),
        (rms_norm_gain(x, 0.0), np.mean(wide**2, axis=1)),
    ):
        np.testing.assert_allclose(found.values, variance**-0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gains_of_sixteen_bit_activations_are_float32(dtype):
    """Squares of 300 overflow float16, and the mean of 4096 numbers needs more than 8 bits."""
    x = jnp.asarray(_rng_normal(3, 4, 4096) * 300, dtype)
    want = np.asarray(x, np.float64).var(axis=1) ** -0.5
    np.testing.assert_allclose(gains.layer_norm_gain(x).values, want, rtol=1e-5)


def test_center_norm_stretches_slightly():
    """CenterNorm's constant is D/(D-1): 64/63 for 64 features, 1.46 for 24 of them in a row."""
    features, scale = 64, _rng_normal(4, 64)
    centre = features / (features - 1) * (np.eye(features) - 1 / features)
    found = float(gains.center_norm_gain(features))
    np.testing.assert_allclose(found, np.linalg.norm(centre, 2), rtol=1e-6)
    np.testing.assert_allclose(found**24, 1.46, rtol=1e-3)
    bound = gains.center_norm_gain(features, jnp.asarray(scale, jnp.float32))
    assert bound >= np.linalg.norm(scale[:, None] * centre, 2)
    np.testing.assert_allclose(bound, 64 / 63 * np.abs(scale).max(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_norm_is_the_spectral_norm(dtype):
    """A linear layer's Jacobian is its weight, so its constant needs no autodiff."""
    kernel = _rng_normal(5, 12, 20).astype(jnp.dtype(dtype))
    want = np.linalg.norm(np.asarray(kernel, np.float64), 2)
    np.testing.assert_allclose(gains.dense_norm(kernel), want, rtol=1e-6)


# Convolutions.


def _circular(x, kernel, strides, groups):
    """A convolution with circular padding, by wrapping the image."""
    axes = x.ndim - 1
    padded = jnp.pad(x, [(0, k - 1) for k in kernel.shape[:axes]] + [(0, 0)], mode="wrap")
    space = "HWD"[:axes]
    return jax.lax.conv_general_dilated(
        padded[None],
        kernel,
        strides,
        "VALID",
        dimension_numbers=("N" + space + "C", space + "IO", "N" + space + "C"),
        feature_group_count=groups,
    )[0]


@pytest.mark.parametrize(
    ("window", "inputs", "outputs", "image", "strides", "groups"),
    [
        ((3, 3), 6, 10, (8, 8), (1, 1), 1),
        ((2, 3), 4, 4, (4, 6), (2, 3), 1),
        ((3, 3), 6, 6, (6, 4), (1, 1), 6),
        ((3, 3), 6, 4, (4, 4), (2, 1), 2),
        ((5,), 3, 2, (12,), (2,), 1),
    ],
    ids=["plain", "strided", "depthwise", "grouped and strided", "one axis"],
)
def test_convolution_spectrum_equals_the_dense_one(window, inputs, outputs, image, strides, groups):
    """The Fourier transform gives every singular value of a circular convolution exactly."""
    with jax.enable_x64(True):
        kernel = _rng_normal(6, *window, inputs // groups, outputs)
        x = _rng_normal(7, *image, inputs)
        jacobian = jax.jit(jax.jacrev(lambda x: _circular(x, kernel, strides, groups)))
        dense = np.asarray(jacobian(x)).reshape(-1, x.size)
        np.testing.assert_array_equal(dense.reshape(-1), np.asarray(jacobian(2 * x)).reshape(-1))
        found = conv_singular_values(kernel, image, strides=strides, groups=groups)
        want = np.linalg.svd(dense, compute_uv=False)
        np.testing.assert_allclose(found, want[: found.size], rtol=1e-9, atol=1e-12 * want[0])
        assert np.all(want[found.size :] < 1e-12 * want[0])
        positions = math.prod(image) / math.prod(strides)
        np.testing.assert_allclose(
            np.sum(np.square(found)), positions * np.sum(kernel**2), rtol=1e-9
        )


def test_zero_padding_stays_below_circular_padding():
    """With `SAME` padding the largest singular value is at most that of circular padding."""
    kernel = _rng_normal(8, 3, 3, 4, 5).astype(np.float32)
    same = lambda x: jax.lax.conv_general_dilated(
        x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    largest = jax.jit(lambda x: spectrum.lipschitz(same, x, steps=40))
    found = float(largest(np.ones((8, 8, 4), np.float32)))
    circular = float(conv_singular_values(kernel, (8, 8))[0])
    assert 0.8 * circular < found <= circular * (1 + 1e-6)


def test_a_reshaped_kernel_does_not_tell_a_convolutions_norm():
    """Spectral initialisation by the reshaped kernel leaves a 3x3 convolution's true norm above 1."""
    kernel = _rng_normal(9, 3, 3, 16, 16)
    kernel = kernel / np.linalg.norm(kernel.reshape(-1, 16), 2)
    assert np.asarray(conv_singular_values(kernel.astype(np.float32), (8, 8)))[0] > 1.2


# Attention.


def _entropy(logits):
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_entropy_and_largest_logit_row_by_row(dtype):
    logits = (_rng_normal(10, 2, 3, 7, 9) * 4).astype(jnp.dtype(dtype))
    found = gains.attention_statistics(logits)  # as a whole, compiled, it may leave out roundings
    np.testing.assert_allclose(found.entropy, _entropy(logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.max_logit, np.asarray(logits, np.float32).max(-1))


def test_equal_logits_have_the_entropy_ln_n_and_one_key_none():
    """H(0) = ln N."""
    flat, sharp = np.zeros((2, 1, 64), np.float32)
    sharp[0, 3] = 200
    np.testing.assert_allclose(attention_statistics(flat).entropy, math.log(64), rtol=1e-6)
    assert attention_statistics(sharp).entropy == 0


def test_masked_keys_count_as_absent():
    """A boolean mask, logits of -inf, and leaving the keys out say the same; an empty row is NaN."""
    logits = _rng_normal(11, 4, 6).astype(np.float32)
    mask = np.arange(6) < np.array([6, 3, 1, 0])[:, None]
    found = jax.device_get(attention_statistics(logits, mask))
    infinite = attention_statistics(np.where(mask, logits, np.float32(-np.inf)))
    np.testing.assert_array_equal(found.entropy, infinite.entropy)
    np.testing.assert_array_equal(found.max_logit, infinite.max_logit)
    np.testing.assert_allclose(found.entropy[1], _entropy(logits[1, :3]), rtol=1e-6)
    assert found.entropy[2] == 0 and np.isnan(found.entropy[3]) and found.max_logit[3] == -jnp.inf
    assert "4 rows, 1 without" in str(found)


@pytest.mark.parametrize(
    ("norm", "printed"), [(0.5, 4.1562), (2.0, 4.0411), (5.0, 1.8026), (10.0, 0.0292)]
)
def test_the_entropy_bound_is_attained_and_never_undercut(norm, printed):
    """Logits of norm s have at least the entropy of Zhai et al. 2023, met by one high among equals."""
    keys = 64
    bound = gains.entropy_lower_bound(norm, keys)
    extreme = np.full(keys, -norm / math.sqrt(keys * (keys - 1)))
    extreme[0] = norm * math.sqrt((keys - 1) / keys)
    np.testing.assert_allclose(np.linalg.norm(extreme), norm, rtol=1e-12)
    with jax.enable_x64(True):
        attained = float(attention_statistics(extreme).entropy)
    np.testing.assert_allclose(attained, bound, rtol=1e-6)
    np.testing.assert_allclose(bound, printed, atol=5.1e-5)
    z = _rng_normal(12, 2000, keys)
    z = z / np.linalg.norm(z, axis=1, keepdims=True) * norm
    assert np.asarray(attention_statistics(z.astype(np.float32)).entropy).min() > bound


def test_query_key_norm_and_cosine_attention_cap_the_logits():
    """Normalised queries and keys keep |logit| below sqrt(d), a cosine with temperature 10 below 10."""
    query, key = (np.float32(_rng_normal(s, 2, 5, 3, 8) * 50) for s in (13, 14))
    raw = attention_logits(query, key)
    want = np.einsum("btnh,bsnh->bnts", *(np.asarray(a, np.float64) for a in (query, key)))
    np.testing.assert_allclose(raw, want / math.sqrt(8), rtol=1e-4, atol=1e-2)
    rms = lambda x: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    largest = lambda logits: np.abs(logits).max()
    assert largest(raw) > 100
    assert largest(attention_logits(rms(query), rms(key))) <= math.sqrt(8) * (1 + 1e-6)
    assert largest(attention_logits(unit(query), unit(key), 10.0)) <= 10 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gains.dense_norm(jnp.ones((3, 3, 2, 2))), "takes a matrix"),
        (lambda: gains.center_norm_gain(1), "at least 2 features"),
        (lambda: gains.entropy_lower_bound(1.0, 1), "at least 2 keys"),
        (lambda: gains.conv_singular_values(jnp.ones((3, 3, 2, 2)), (8,)), "does not fit"),
        (lambda: gains.conv_singular_values(jnp.ones((3, 3, 2, 2)), (2, 8)), "at least as large"),
        (lambda: gains.conv_singular_values(jnp.ones((3, 2, 2)), (8,), strides=3), "multiple of"),
        (
            lambda: gains.conv_singular_values(jnp.ones((3, 2, 2)), (8,), groups=4),
            "cannot be split",
        ),
    ],
)
def test_refusals_are_sentences(call, message):
    with pytest.raises(ValueError, match=message):
        call()
