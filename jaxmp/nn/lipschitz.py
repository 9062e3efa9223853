"""Layers that bound how much they stretch: the parts of LipsFormer and its kin, as pure functions.

A function's Lipschitz constant is the largest singular value that its Jacobian takes anywhere.
LayerNorm's is 1/sqrt(epsilon) and dot-product attention has none; each function here states its own.
As in `functional`, results have the dtype of the first argument, and sums are float32 inside.
Source, where no other is named: Qi et al. 2023, "LipsFormer", arXiv 2304.09856.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmp.nn import functional as F


def _wide(x: Array) -> Array:
    return x.astype(F.wide_dtype(x.dtype))


def center_norm(x: Array, scale: Array, bias: Array) -> Array:
    """Gives scale * D/(D-1) * (x - mean(x)) + bias over the last axis, D > 1 wide.

    Lipschitz constant D/(D-1) * max|scale|, a little above max|scale|: nothing is divided by a
    deviation. Linear without the bias, so homogeneous of degree 1.
    """
    width = x.shape[-1]
    if width < 2:
        raise ValueError(f"center_norm of {width} channel is always zero; it takes two or more.")
    x32 = _wide(x)
    centred = (x32 - jnp.mean(x32, axis=-1, keepdims=True)) * (width / (width - 1))
    return (centred * _wide(scale) + _wide(bias)).astype(x.dtype)


def rms_norm(x: Array, scale: Array, epsilon: float = 1e-6) -> Array:
    """Gives scale * x / sqrt(mean(x^2) + epsilon) over the last axis.

    With unit scale the Jacobian's largest singular value is 1/sqrt(mean(x^2) + epsilon), so the
    Lipschitz constant is 1/sqrt(epsilon); |result| <= sqrt(D) * max|scale|.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    x32 = _wide(x)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * _wide(scale)).astype(x.dtype)


def unit_rows(x: Array, epsilon: float = 1e-6) -> Array:
    """Gives x / sqrt(|x|^2 + epsilon) over the last axis: shorter than 1, and smooth at zero.

    Lipschitz constant 1/sqrt(epsilon), reached at x = 0.
    """
    x32 = _wide(x)
    squares = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(squares + epsilon)).astype(x.dtype)


def cosine_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool,
    nu: float = 1.0,
    tau: float = 10.0,
    epsilon: float = 1e-6,
    implementation: str = "xla",
) -> Array:
    """Gives nu * softmax(tau q k^T) v for each head, q, k and v being the `unit_rows` of the arguments.

    Shapes and `implementation` as for `functional.attention`. Logits stay within tau, rows of the
    result within nu, and the function is Lipschitz: its constant grows as 1/sqrt(epsilon), the only
    knob, and is met where a token is zero. This takes the values' normalisation too, which the
    paper states and its released code leaves out: without it the Jacobian at a zero token grows with
    the size of the others. Away from zero it is homogeneous of degree 0.
    """
    query, key = cosine_operands(query, key, tau=tau, epsilon=epsilon)
    value = unit_rows(value, epsilon)
    mixed = F.attention(query, key, value, causal=causal, implementation=implementation)
    return mixed * jnp.asarray(nu, mixed.dtype)


def cosine_operands(
    query: Array, key: Array, *, tau: float = 10.0, epsilon: float = 1e-6
) -> tuple[Array, Array]:
    """Gives a query and a key with query key^T / sqrt(H) = tau * cosine: what `attention` then takes."""
    query, key = unit_rows(query, epsilon), unit_rows(key, epsilon)
    return query * jnp.asarray(tau * query.shape[-1] ** 0.5, query.dtype), key


def qk_norm(
    query: Array, key: Array, query_scale: Array, key_scale: Array, epsilon: float = 1e-6
) -> tuple[Array, Array]:
    """Gives the query and the key, [..., H], each as `rms_norm` of itself with its own scale [H].

    So |q k^T| / sqrt(H) <= sqrt(H) * max|query_scale| * max|key_scale|: attention's logits are capped
    by its parameters whatever comes in. Source: Dehghani et al. 2023, arXiv 2302.05442.
    """
    return rms_norm(query, query_scale, epsilon), rms_norm(key, key_scale, epsilon)


def weighted_residual(x: Array, branch: Array, alpha: Array) -> Array:
    """Gives x + alpha * branch, alpha [D] learned, one for each channel.

    Started at 1/L in each of L layers of Lipschitz constant 1, the product of the layers' constants
    is at most (1 + 1/L)^L <= e, however deep the stack.
    """
    return (_wide(x) + _wide(alpha) * _wide(branch)).astype(x.dtype)


def drop_path(x: Array, rate: ArrayLike, key: Array) -> Array:
    """Gives x with whole examples (rows of axis 0) zeroed at `rate`, the others divided by 1 - rate.

    The mean over keys is x. `rate` lies in [0, 1). Source: Huang et al. 2016, arXiv 1603.09382.
    """
    keep = 1 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, (_wide(x) / keep).astype(x.dtype), jnp.zeros([], x.dtype))


def drop_path_rates(depth: int, last: float) -> tuple[float, ...]:
    """Gives the rate of each of `depth` blocks: exactly 0 at the first to exactly `last`, on a line."""
    return tuple(last * (block / max(depth - 1, 1)) for block in range(depth))


class SingularPair(NamedTuple):
    """Estimates of the first left and right singular vectors of a kernel [D, F], both of length 1."""

    u: Array
    """[D], float32."""
    v: Array
    """[F], float32."""


def singular_pair(kernel: Array, key: Array, steps: int = 20) -> SingularPair:
    """Gives a first estimate from a random direction by `steps` power iterations."""
    matrix = _wide(kernel)
    u = jax.random.normal(key, matrix.shape[:1], matrix.dtype)
    start = SingularPair(_unit(u), jnp.zeros(matrix.shape[1:], matrix.dtype))
    return power_step(kernel, start, steps)


def power_step(kernel: Array, pair: SingularPair, steps: int = 1) -> SingularPair:
    """Gives the pair after `steps` power iterations on the kernel, without a gradient.

    One step for each update follows a kernel that moves slowly; the error shrinks by the square
    of the ratio of the second singular value to the first. State in, state out.
    """
    matrix = lax.stop_gradient(_wide(kernel))

    def step(_: int, pair: SingularPair) -> SingularPair:
        v = _unit(jnp.einsum("df,d->f", matrix, pair.u))
        return SingularPair(_unit(jnp.einsum("df,f->d", matrix, v)), v)

    return lax.fori_loop(0, steps, step, lax.stop_gradient(pair))


def _unit(x: Array) -> Array:
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x)), jnp.finfo(x.dtype).tiny))


def singular_value(kernel: Array, pair: SingularPair) -> Array:
    """Gives u^T kernel v, float32: never above the largest singular value, and near it once the pair is."""
    u, v = lax.stop_gradient(pair)
    return jnp.einsum("d,df,f->", u, _wide(kernel), v)


def sigma_reparametrise(kernel: Array, gamma: Array, pair: SingularPair) -> Array:
    """Gives gamma * kernel / sigma, sigma = u^T kernel v: the learned scalar gamma is its norm.

    The kernel sets the direction alone (degree 0), so its gradient is orthogonal to it:
    <kernel, gradient> = 0, whatever u and v, which are constants here. A zero kernel has no
    direction and gives NaN. Source: Zhai et al. 2023, arXiv 2303.06296.
    """
    factor = _wide(gamma) / singular_value(kernel, pair)
    return (_wide(kernel) * factor).astype(kernel.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def soft_cap(x: Array, cap: float) -> Array:
    """Gives cap * tanh(x / cap): within +-cap, near x for small x, Lipschitz constant 1.

    Source: Bello et al. 2017, arXiv 1611.09940; Gemma 2, arXiv 2408.00118.
    """
    return (cap * jnp.tanh(_wide(x) / cap)).astype(x.dtype)


@soft_cap.defjvp
def _soft_cap_jvp(cap, primals, tangents):
    (x,), (dx,) = primals, tangents
    out = soft_cap(x, cap)
    # In terms of the result, which what follows keeps anyway.
    slope = 1 - jnp.square(_wide(lax.optimization_barrier(out)) / cap)
    return out, (slope * _wide(dx)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def z_loss(logits: Array, coefficient: float = 1e-4) -> Array:
    """Gives coefficient * mean(logZ^2), Z = sum(exp(logits)) over the last axis, in float32.

    Added to cross-entropy, which does not see a common shift of the logits, it keeps them near
    logZ = 0. Gradient: 2 * coefficient * logZ * softmax(logits) / positions.
    Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311.
    """
    log_z = jax.nn.logsumexp(_wide(logits), axis=-1)
    return coefficient * jnp.mean(jnp.square(log_z))


@z_loss.defjvp
def _z_loss_jvp(coefficient, primals, tangents):
    (logits,), (dlogits,) = primals, tangents
    log_z = jax.nn.logsumexp(_wide(logits), axis=-1, keepdims=True)
    # From the logits themselves, in their own dtype: nothing else of their size is kept.
    softmax = jnp.exp(_wide(lax.optimization_barrier(logits)) - log_z)
    slope = (2 * coefficient / max(log_z.size, 1)) * log_z * softmax
    return coefficient * jnp.mean(jnp.square(log_z)), jnp.sum(slope * _wide(dlogits))
