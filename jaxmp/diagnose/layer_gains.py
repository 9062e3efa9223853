"""Layers whose stretching of small changes has a closed form: no Jacobian product is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Gains(NamedTuple):
    """How far a function stretches small changes, one number for each point it was measured at."""

    values: Array
    """Of any shape: one for each example or token, or a single one."""

    @property
    def max(self) -> Array:
        """The largest over all points."""
        return jnp.max(self.values)

    @property
    def p99(self) -> Array:
        """What 99% of the points stay below."""
        return jnp.quantile(self.values, 0.99)

    @property
    def median(self) -> Array:
        """That of the typical point."""
        return jnp.median(self.values)

    def __float__(self) -> float:
        return float(self.max)

    def __str__(self) -> str:
        if self.values.size == 1:
            return f"{float(self):.4g} (local, at this input)"
        return (
            f"max {float(self):.4g}, p99 {float(self.p99):.4g}, median {float(self.median):.4g} "
            f"over {self.values.size} points (local)"
        )


def layer_norm_gain(x: Array, epsilon: float = 1e-5) -> Gains:
    """Gives 1 / sqrt(var + epsilon) for each token: LayerNorm's largest singular value there.

        J = (I - 1 1^T / D - c c^T / (D (var + epsilon))) / sqrt(var + epsilon),   c = x - mean

    has this value D - 2 times, and 1/sqrt(epsilon) is its supremum, met where all features are equal:
    316 for 1e-5, 1000 for 1e-6. x [..., D] is what the norm is given, of any float dtype; the learned
    scale is left out. The variance is of float32 (float64) at any magnitude.
    """
    x = _wide(x)
    scale = _largest(x)
    centred = x / scale - jnp.mean(x / scale, axis=-1, keepdims=True)
    return _inverse_root(scale * _rms(centred), epsilon)


def rms_norm_gain(x: Array, epsilon: float = 1e-5) -> Gains:
    """Gives 1 / sqrt(mean(x^2) + epsilon) for each token: RMSNorm's largest singular value there.

    As `layer_norm_gain`, but without centring, so the value occurs D - 1 times.
    """
    return _inverse_root(_rms(_wide(x)), epsilon)


def center_norm_gain(features: int, scale: Array | None = None) -> Array:
    """Gives D / (D - 1) max|scale|, a bound on CenterNorm's stretching everywhere.

    CenterNorm is scale * D / (D - 1) * (x - mean(x)), linear; the bound is met if all of scale's
    entries are equal. It is a little above 1: 24 layers of 64 features make 1.46.

    Source: Qi et al. 2023 (LipsFormer), arXiv 2304.09856.
    """
    if features < 2:
        raise ValueError(f"CenterNorm needs at least 2 features; came {features}.")
    largest = jnp.float32(1) if scale is None else jnp.max(jnp.abs(_wide(scale)))
    return largest * (features / (features - 1))


def dense_norm(kernel: Array) -> Array:
    """Gives the largest singular value of a dense layer's kernel [inputs, outputs], by an SVD.

    A linear layer's Jacobian is its kernel (transposed, as outputs are rows of a Jacobian), the same
    at every input.
    """
    if kernel.ndim != 2:
        raise ValueError(
            f"dense_norm takes a matrix [inputs, outputs]; came shape {kernel.shape}. Reshape the axes "
            "that are summed over into the first; for convolutions use conv_singular_values."
        )
    wide = _wide(kernel)
    scale = jnp.max(_largest(wide))
    return scale * jnp.linalg.svd(wide / scale, compute_uv=False)[0]


def conv_singular_values(
    kernel: Array,
    image: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    groups: int = 1,
) -> Array:
    """Gives all singular values of a convolution with circular padding, descending.

    The Fourier transform turns it into one small matrix [outputs, inputs] for each frequency; their
    singular values together are the layer's. A stride folds the frequencies that it makes
    indistinguishable into one wider matrix. Zero padding (`SAME`) stays at or below the largest.

    Args:
      kernel: [*window, inputs / groups, outputs], as Flax keeps it, any number of spatial axes.
      image: the spatial size of the input; at least the window's, a multiple of the strides.
      groups: `feature_group_count`; depthwise where it equals the number of inputs.

    Returns:
      Of each frequency's matrix min(rows, columns) values, in float32 (float64 for float64 kernels);
      their squares sum to prod(image / strides) |kernel|^2.

    Source: Sedghi, Gupta and Long 2019, arXiv 1805.10408.
    """
    axes = len(image)
    strides = (strides,) * axes if isinstance(strides, int) else tuple(strides)
    _check_convolution(kernel.shape, tuple(image), strides, groups)
    *window, inputs, outputs = kernel.shape
    padding = [(0, n - k) for n, k in zip(image, window)]
    padded = jnp.pad(_wide(kernel), [*padding, (0, 0), (0, 0)])
    spectrum = jnp.fft.fftn(padded, axes=range(axes))
    # Frequency w of the image is copy a of frequency w' of the result, with w = a n/s + w'.
    sizes = [size for n, s in zip(image, strides) for size in (s, n // s)]
    folded = spectrum.reshape(*sizes, inputs, groups, outputs // groups)
    copies, kept = range(0, 2 * axes, 2), range(1, 2 * axes, 2)
    order = (*kept, 2 * axes + 1, *copies, 2 * axes, 2 * axes + 2)
    matrices = folded.transpose(order).reshape(-1, math.prod(strides) * inputs, outputs // groups)
    values = jnp.linalg.svd(matrices, compute_uv=False).ravel() / math.sqrt(math.prod(strides))
    return jnp.flip(jnp.sort(values))


def _check_convolution(
    shape: tuple[int, ...], image: tuple[int, ...], strides: tuple[int, ...], groups: int
) -> None:
    if len(shape) != len(image) + 2 or len(strides) != len(image):
        raise ValueError(
            f"kernel of shape {shape} with strides {strides} does not fit an image of {len(image)} "
            f"spatial axes; expected [*window, inputs / groups, outputs] and a stride for each axis."
        )
    window = shape[:-2]
    if any(k > n or n % s for k, n, s in zip(window, image, strides)):
        raise ValueError(
            f"window {window} with strides {strides} on an image of {image}: under circular padding "
            "the image must be at least as large as the window and a multiple of the strides; choose "
            "another image size, the largest singular value hardly depends on it."
        )
    if groups < 1 or shape[-1] % groups:
        raise ValueError(f"{shape[-1]} outputs cannot be split into {groups} groups.")


class AttentionStatistics(NamedTuple):
    """What `attention_statistics` measures of each row of attention weights."""

    entropy: Array
    """[..., T] in nats, between 0 (one key takes all) and ln S; NaN where every key is masked."""
    max_logit: Array
    """[..., T], the largest logit of the row; -inf where every key is masked."""

    def __str__(self) -> str:
        entropy = np.asarray(self.entropy)
        return (
            f"attention entropy {np.nanmean(entropy):.3g} nats on average, least "
            f"{np.nanmin(entropy):.3g}; largest logit {np.max(self.max_logit):.4g} "
            f"({entropy.size} rows, {np.isnan(entropy).sum()} without a valid entropy)"
        )


def attention_logits(query: Array, key: Array, scale: float | None = None) -> Array:
    """Gives scale * query key^T [..., N, T, S] in float32, as softmax attention computes them.

    query [..., T, N, H] and key [..., S, N, H] as `jax.nn.dot_product_attention` takes them; scale is
    1/sqrt(H) unless given.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return factor * jnp.einsum("...tnh,...snh->...nts", _wide(query), _wide(key))


def attention_statistics(logits: Array, mask: Array | None = None) -> AttentionStatistics:
    """Gives the entropy of softmax(logits) and the largest logit, row by row.

        entropy = log Z - sum p z,   with z = logits - max, Z = sum exp z, p = exp(z) / Z

    Both terms are positive, so a small entropy does not cancel. logits [..., T, S] before the softmax;
    mask broadcasts to them, True where a key may be attended to. Logits of -inf count as masked.
    Entropies that fall towards 0 while logits grow announce divergence (Zhai et al. 2023, arXiv
    2303.06296; Dehghani et al. 2023, arXiv 2302.05442).
    """
    logits = _wide(logits)
    allowed = logits != -jnp.inf
    allowed = allowed if mask is None else allowed & mask
    peak = jnp.max(logits, axis=-1, where=allowed, initial=-jnp.inf)
    z = jnp.where(allowed, logits - peak[..., None], 0)
    weights = jnp.where(allowed, jnp.exp(z), 0)
    total = jnp.sum(weights, axis=-1)
    entropy = jnp.log(total) - jnp.sum(weights * z, axis=-1) / total
    return AttentionStatistics(jnp.where(jnp.any(allowed, axis=-1), entropy, jnp.nan), peak)


def entropy_lower_bound(logit_norm: float, keys: int) -> float:
    """Gives the least entropy that a softmax over `keys` logits of Euclidean norm `logit_norm` has.

        ln(1 + (N - 1) b) + s sqrt(N (N - 1)) b / (1 + (N - 1) b),   b = exp(-s sqrt(N / (N - 1)))

    It is met by one logit s sqrt((N - 1) / N) among N - 1 of -s / sqrt(N (N - 1)). With the spectral
    norm of query and key projections in hand it says from when on attention may collapse.

    Source: Zhai et al. 2023 (sigma-reparametrisation), arXiv 2303.06296, theorem 3.1.
    """
    if keys < 2 or logit_norm < 0:
        raise ValueError(
            f"An entropy bound needs at least 2 keys and a norm that is not negative; came {keys} "
            f"keys and a norm of {logit_norm}."
        )
    others = keys - 1
    beta = math.exp(-logit_norm * math.sqrt(keys / others))
    total = 1 + others * beta
    return math.log(total) + logit_norm * math.sqrt(keys * others) * beta / total


def _wide(x: Array) -> Array:
    """x in float32, or unchanged if it is float64: squares and sums of 16 bits leave their range."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _largest(x: Array) -> Array:
    """The largest |x| of each row, [..., 1], and 1 for rows of zeros."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.where(largest > 0, largest, 1)


def _rms(x: Array) -> Array:
    """The root mean square of each row, [..., 1], right at any magnitude."""
    scale = _largest(x)
    return scale * jnp.sqrt(jnp.mean(jnp.square(x / scale), axis=-1, keepdims=True))


def _inverse_root(deviation: Array, epsilon: float) -> Gains:
    # hypot squares nothing, so it neither overflows nor flushes.
    return Gains(jnp.squeeze(1 / jnp.hypot(deviation, math.sqrt(epsilon)), axis=-1))
