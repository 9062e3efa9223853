"""Spectral initialisation: kernels that start with the operator norm 1, convolutions included."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, xavier_uniform
from jax.typing import DTypeLike

from jaxmp.nn import functional as F

DEFAULT_IMAGE = (32, 32)
"""Height and width at which a convolution's norm is taken if none is given."""


def spectral(
    initializer: Initializer | None = None,
    *,
    image: tuple[int, int] = DEFAULT_IMAGE,
    stride: int = 1,
    groups: int = 1,
) -> Callable[..., Array]:
    """Gives an initializer whose kernels are those of `initializer` divided by their operator norm.

    `initializer` is Xavier's uniform one by default. A kernel [D, F] is a matrix; a kernel
    [H, W, C/groups, F] is a convolution, see `convolution_norm` for the other arguments.
    Source: Qi et al. 2023, arXiv 2304.09856 (whose released code divides convolutions by the norm of
    the reshaped kernel, which is another number).
    """
    base = xavier_uniform() if initializer is None else initializer

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        kernel = base(key, shape, F.wide_dtype(dtype))
        if len(shape) not in (2, 4):
            raise ValueError(
                f"spectral initialisation takes a kernel [in, out] or [height, width, in, out], "
                f"not one of shape {tuple(shape)}."
            )
        if len(shape) == 2:
            norm = jnp.linalg.norm(kernel, ord=2)
        else:
            norm = convolution_norm(kernel, image=image, stride=stride, groups=groups)
        return (kernel / norm).astype(dtype)

    return init


def convolution_norm(
    kernel: Array,
    *,
    image: tuple[int, int] = DEFAULT_IMAGE,
    stride: int = 1,
    groups: int = 1,
) -> Array:
    """Gives the operator norm of a convolution with a kernel [H, W, C/groups, F], a scalar.

    Exact for images [*image, C] that are continued periodically: the Fourier transform turns the
    convolution into one small matrix for each frequency, and the norm is the largest of theirs.
    A stride s adds up s*s frequencies, which stack into one matrix. Zero padding ("SAME") is a part
    of the periodic convolution of a larger image, so its norm is no larger but for how finely
    `image` samples the frequencies. Source: Sedghi, Gupta and Long 2019, arXiv 1805.10408.
    """
    height, width, channels, features = kernel.shape
    if height > image[0] or width > image[1]:
        raise ValueError(
            f"a kernel of {height}x{width} is larger than the image {image[0]}x{image[1]}; "
            "pass an `image` at least as large."
        )
    if image[0] % stride or image[1] % stride or features % groups:
        raise ValueError(
            f"stride {stride} must divide the image {image[0]}x{image[1]}, "
            f"and groups {groups} the {features} features."
        )
    rows, columns = image[0] // stride, image[1] // stride
    spectrum = jnp.fft.fft2(kernel.astype(F.wide_dtype(kernel.dtype)), s=image, axes=(0, 1))
    # Axes: aliases and frequencies, vertical then horizontal; channels; groups; features of a group.
    spectrum = spectrum.reshape(stride, rows, stride, columns, channels, groups, features // groups)
    matrices = jnp.transpose(spectrum, (1, 3, 5, 0, 2, 4, 6)).reshape(
        rows, columns, groups, stride * stride * channels, features // groups
    )
    return jnp.max(jnp.linalg.svd(matrices, compute_uv=False)) / stride
