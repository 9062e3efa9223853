"""Spectral initialisation against dense operators, formed from all unit images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.nn import init

# One program for each kernel's shape: op by op, each of them would compile a dozen.
convolution_norm = jax.jit(init.convolution_norm, static_argnames=("image", "stride", "groups"))


def initialised(initializer, shape, dtype):
    return np.asarray(jax.jit(initializer, static_argnums=(1, 2))(jax.random.key(0), shape, dtype))


def convolve(images, kernel, stride, circular):
    """Cross-correlates images [N, H, W, C] with a kernel [h, w, C, F], one shift at a time."""
    height, width = kernel.shape[:2]
    before = (0, 0) if circular else ((height - 1) // 2, (width - 1) // 2)
    pads = [(b, size - 1 - b) for b, size in zip(before, (height, width))]
    rows, columns = images.shape[1:3]
    images = np.pad(images, [(0, 0), *pads, (0, 0)], mode="wrap" if circular else "constant")
    out = sum(
        images[:, i : i + rows, j : j + columns] @ kernel[i, j]
        for i in range(height)
        for j in range(width)
    )
    return out[:, ::stride, ::stride]


def operator_norm(kernel, image, *, stride=1, groups=1, circular=True):
    """The largest singular value of the convolution's whole matrix, group by group, in float64."""
    size = image[0] * image[1] * kernel.shape[2]
    unit_images = np.eye(size).reshape(size, *image, kernel.shape[2])
    return max(
        np.linalg.norm(convolve(unit_images, part, stride, circular).reshape(size, -1), ord=2)
        for part in np.split(np.asarray(kernel, np.float64), groups, axis=-1)
    )


CASES = {
    "3x3": ((3, 3, 6, 10), (8, 8), 1, 1),
    "depthwise 7x7": ((7, 7, 1, 12), (9, 8), 1, 12),
    "grouped": ((3, 3, 2, 8), (6, 6), 1, 4),
    "strided": ((3, 3, 4, 6), (8, 8), 2, 1),
    "patches": ((2, 2, 3, 8), (8, 8), 2, 1),
    "1x1": ((1, 1, 5, 7), (4, 4), 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_norm_of_a_convolution_is_that_of_its_matrix(name):
    shape, image, stride, groups = CASES[name]
    with jax.enable_x64(True):
        kernel = np.random.default_rng(0).normal(size=shape)
        norm = convolution_norm(kernel, image=image, stride=stride, groups=groups)
        expected = operator_norm(kernel, image, stride=stride, groups=groups)
        np.testing.assert_allclose(norm, expected, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_kernels_start_with_operator_norm_1_and_no_more_with_zero_padding(name):
    shape, image, stride, groups = CASES[name]
    initializer = init.spectral(image=image, stride=stride, groups=groups)
    kernel = initialised(initializer, shape, "float32")
    norm = operator_norm(kernel, image, stride=stride, groups=groups)
    assert norm == pytest.approx(1, rel=1e-5)
    if stride == 1:
        assert operator_norm(kernel, image, groups=groups, circular=False) < 1 + 1e-5


@pytest.mark.parametrize("name", ("3x3", "depthwise 7x7"))
def test_the_reshaped_kernel_has_another_norm(name):
    shape, image, _, groups = CASES[name]
    kernel = np.random.default_rng(0).normal(size=shape)
    reshaped = np.linalg.norm(kernel.reshape(-1, shape[-1]), ord=2)
    assert operator_norm(kernel, image, groups=groups) > 1.2 * reshaped


def test_frequencies_sampled_more_finely_are_no_smaller():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype("float32")
    norms = [float(convolution_norm(kernel, image=(n, n))) for n in (4, 8, 16, 32)]
    assert sorted(norms) == norms


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_matrices_start_with_norm_1_in_the_dtype_asked_for(dtype):
    base = jax.nn.initializers.normal(3.0)
    kernel = initialised(init.spectral(base), (24, 40), dtype)
    assert kernel.dtype == dtype
    norm = np.linalg.norm(kernel.astype(np.float64), ord=2)
    of_svd = 24 * float(jnp.finfo("float32").eps)  # in float32, with 24 singular values
    assert norm == pytest.approx(1, rel=max(float(jnp.finfo(dtype).eps), of_svd))
    plain = initialised(base, (24, 40), "float32")
    np.testing.assert_allclose(
        kernel.astype(np.float64) * np.linalg.norm(plain, ord=2),
        plain,
        rtol=2 * float(jnp.finfo(dtype).eps),
        atol=1e-6,
    )


def test_wrong_shapes_are_named():
    kernel = np.ones((3, 3, 2, 2), np.float32)
    with pytest.raises(ValueError, match=r"or \[height, width, in, out\], not one of shape \(3,\)"):
        init.spectral(jax.nn.initializers.ones)(jax.random.key(0), (3,))
    with pytest.raises(ValueError, match="3x3 is larger than the image 2x8"):
        init.convolution_norm(kernel, image=(2, 8))
    with pytest.raises(ValueError, match="stride 3 must divide the image 8x8"):
        init.convolution_norm(kernel, image=(8, 8), stride=3)
