"""The arithmetic of the models: 16 bits in memory and into products, float32 where sums are long.

Every function returns the dtype of its first argument unless it says otherwise, so no layer can
turn a 16-bit model into a float32 one by accident. Two habits make the step lean as well as safe:

- Derivatives are written as `jax.custom_jvp` rules, linear in the tangent. Reverse mode is their
  transpose, forward mode works too (`custom_vjp` would forbid it).
- A rule reads its saved argument behind `optimization_barrier`. XLA may drop a float32 -> bfloat16
  -> float32 pair of casts; without the barrier it then keeps the float32 value for the backward
  pass, twice the bytes of the 16-bit one that is in memory anyway.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn")


def common_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Gives the narrowest dtype that holds all of them, asked for aloud, so even in strict mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Gives float32, or `dtype` itself if it is wider."""
    return common_dtype(dtype, jnp.float32)


def _wide(x: Array) -> Array:
    """Gives x in float32, or unchanged if it is wider."""
    return x.astype(wide_dtype(x.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def _dot(equation: str, x: Array, y: Array, output_dtype: DTypeLike) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=output_dtype)


@_dot.defjvp
def _dot_jvp(equation, output_dtype, primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    # Products of the operands' dtype, widened afterwards: their transpose narrows the cotangent
    # first. JAX's own transpose would multiply float32 cotangents by 16-bit operands, a float32
    # GEMM on a GPU.
    tangent = jnp.einsum(equation, dx, y) + jnp.einsum(equation, x, dy)
    return _dot(equation, x, y, output_dtype), tangent.astype(output_dtype)


def dot(equation: str, x: Array, y: Array, output_dtype: DTypeLike | None = None) -> Array:
    """Gives `einsum(equation, x, y)` whose backward products have operands of the forward's dtype.

    `output_dtype` (default: the operands') may be float32 for 16-bit operands: the sum is then not
    rounded to 16 bits, and the cotangent is, before it is multiplied. Operands of two dtypes are
    promoted to the wider one.
    """
    dtype = common_dtype(x.dtype, y.dtype)
    return _dot(equation, x.astype(dtype), y.astype(dtype), jnp.dtype(output_dtype or dtype))


@jax.custom_jvp
def add_bias(x: Array, bias: Array) -> Array:
    """Gives x + bias, broadcast, in x's dtype; the gradient of the bias is summed in float32."""
    return x + bias.astype(x.dtype)


@add_bias.defjvp
def _add_bias_jvp(primals, tangents):
    (x, bias), (dx, dbias) = primals, tangents
    tangent = (_wide(dx) + _wide(dbias)).astype(x.dtype)
    # Transposed, the sum for the bias starts from the 16-bit cotangent that the products read.
    return add_bias(x, bias), lax.optimization_barrier(tangent)


@jax.custom_jvp
def embed(table: Array, indices: Array) -> Array:
    """Gives the rows `table[indices]`; the gradient of the table is summed in float32.

    A common token is met thousands of times in a batch, and a bfloat16 sum stands still once it is
    256 times its next term.
    """
    return jnp.take(table, indices, axis=0)


@embed.defjvp
def _embed_jvp(primals, tangents):
    (table, indices), (dtable, _) = primals, tangents
    return embed(table, indices), jnp.take(_wide(dtable), indices, axis=0).astype(table.dtype)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """Gives GELU in its tanh form, computed in float32; only x is kept for the backward pass.

    0.5 x (1 + tanh(u)) is written x sigmoid(2u), which does not cancel for negative x.
    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    x32 = _wide(x)
    return (x32 * jax.nn.sigmoid(_gelu_argument(x32))).astype(x.dtype)


_GELU_FACTOR = 2 * math.sqrt(2 / math.pi)


def _gelu_argument(x: Array) -> Array:
    return _GELU_FACTOR * (x + 0.044715 * x * x * x)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    x32 = _wide(lax.optimization_barrier(x))
    gate = jax.nn.sigmoid(_gelu_argument(x32))
    inner = _GELU_FACTOR * (1 + 3 * 0.044715 * x32 * x32)
    slope = gate * (1 + x32 * (1 - gate) * inner)
    return gelu(x), (slope * _wide(dx)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float = 1e-5) -> Array:
    """Gives x normalised over its last axis, times scale, plus bias; statistics in float32.

    x: [..., D]; scale, bias: [D]. What is kept for the backward pass is x in its own dtype and two
    float32 numbers per row. Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.
    """
    mean, inverse = _row_statistics(x, epsilon)
    return ((_wide(x) - mean) * inverse * _wide(scale) + _wide(bias)).astype(x.dtype)


def _row_statistics(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Gives the mean and 1/sqrt(variance + epsilon) of each row, [..., 1], in float32."""
    x32 = _wide(x)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    return mean, lax.rsqrt(variance + epsilon)


@layer_norm.defjvp
def _layer_norm_jvp(epsilon, primals, tangents):
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    mean, inverse = _row_statistics(x, epsilon)
    normal = (_wide(lax.optimization_barrier(x)) - mean) * inverse
    dx32 = _wide(dx)
    dnormal = dx32 - jnp.mean(dx32, axis=-1, keepdims=True)
    dnormal = inverse * (dnormal - normal * jnp.mean(normal * dx32, axis=-1, keepdims=True))
    tangent = dnormal * _wide(scale) + normal * _wide(dscale) + _wide(dbias)
    return layer_norm(x, scale, bias, epsilon), tangent.astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, epsilon: float = 1e-5) -> Array:
    """Gives x / sqrt(mean(x^2) + epsilon) * scale over its last axis; the mean in float32.

    x: [..., D]; scale: [D]. Kept for the backward pass: x in its own dtype, one float32 number per row.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return (_wide(x) * _inverse_rms(x, epsilon) * _wide(scale)).astype(x.dtype)


def _inverse_rms(x: Array, epsilon: float) -> Array:
    return lax.rsqrt(jnp.mean(jnp.square(_wide(x)), axis=-1, keepdims=True) + epsilon)


@rms_norm.defjvp
def _rms_norm_jvp(epsilon, primals, tangents):
    (x, scale), (dx, dscale) = primals, tangents
    inverse = _inverse_rms(x, epsilon)
    normal = _wide(lax.optimization_barrier(x)) * inverse
    dx32 = _wide(dx)
    dnormal = inverse * (dx32 - normal * jnp.mean(normal * dx32, axis=-1, keepdims=True))
    tangent = dnormal * _wide(scale) + normal * _wide(dscale)
    return rms_norm(x, scale, epsilon), tangent.astype(x.dtype)


@jax.custom_jvp
def swiglu(gate: Array, up: Array) -> Array:
    """Gives silu(gate) * up, computed in float32; only the two arguments are kept for the backward pass.

    Source: Shazeer 2020, arXiv 2002.05202.
    """
    gate32 = _wide(gate)
    return (gate32 * jax.nn.sigmoid(gate32) * _wide(up)).astype(gate.dtype)


@swiglu.defjvp
def _swiglu_jvp(primals, tangents):
    (gate, up), (dgate, dup) = primals, tangents
    gate32, up32 = (_wide(lax.optimization_barrier(x)) for x in (gate, up))
    share = jax.nn.sigmoid(gate32)
    slope = share * (1 + gate32 * (1 - share))
    tangent = slope * up32 * _wide(dgate) + gate32 * share * _wide(dup)
    return swiglu(gate, up), tangent.astype(gate.dtype)


def rotary(x: Array, base: float = 10000.0) -> Array:
    """Gives x [B, T, N, H] with the pair (i, i + H/2) of each head turned by position * base^(-2i/H).

    So a query and a key that are turned alike see only the distance between them. Angles are float32
    whatever x is: 16 bits cannot count positions above 256. Source: Su et al. 2021, arXiv 2104.09864.
    """
    length, size = x.shape[1], x.shape[-1]
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(_wide(x), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def batch_norm(
    x: Array, mean: Array, variance: Array, scale: Array, bias: Array, epsilon: float = 1e-5
) -> Array:
    """Gives (x - mean) / sqrt(variance + epsilon) * scale + bias in x's dtype, float32 inside.

    x: [..., C]; the rest [C]. Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    factor = lax.rsqrt(_wide(variance) + epsilon) * _wide(scale)
    return ((_wide(x) - _wide(mean)) * factor + _wide(bias)).astype(x.dtype)


def _attention_weights(logits: Array, scale: float, causal: bool, dtype: DTypeLike) -> Array:
    """Gives softmax(scale * logits) over the last axis in `dtype`, computed in float32.

    logits: [..., T, S]; `causal` lets query t see keys up to t + S - T.
    """
    logits = _wide(logits) * scale
    if causal:
        queries, keys = logits.shape[-2:]
        row = lax.broadcasted_iota(jnp.int32, (queries, keys), 0)
        column = lax.broadcasted_iota(jnp.int32, (queries, keys), 1)
        logits = jnp.where(column <= row + (keys - queries), logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1).astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _attend(logits: Array, value: Array, scale: float, causal: bool) -> Array:
    """Gives softmax(scale * logits) value: logits [B, N, T, S], value [B, S, N, H]."""
    weights = _attention_weights(logits, scale, causal, value.dtype)
    return dot("bnts,bsnh->btnh", weights, value)


@_attend.defjvp
def _attend_jvp(scale, causal, primals, tangents):
    (logits, value), (dlogits, dvalue) = primals, tangents
    weights = _attention_weights(logits, scale, causal, value.dtype)
    out = dot("bnts,bsnh->btnh", weights, value)
    # With P the weights and Z the logits, d(PV) = (P dZ) V - rowsum(P dZ) (PV) + P dV. Written so,
    # the transpose finds the softmax's row sums from the small [B, T, N, H] arrays
    # (as in FlashAttention, arXiv 2205.14135) and reads the [T, S] ones once, not twice.
    saved = lax.optimization_barrier(weights)  # zero where masked: no second mask
    weighted = _wide(saved) * (_wide(dlogits) * scale)
    row_sums = jnp.moveaxis(jnp.sum(weighted, axis=-1, keepdims=True), 1, 2)
    tangent = dot("bnts,bsnh->btnh", weighted.astype(value.dtype), value)
    # Not `weights`: a library that pads its operands would keep the forward's padded copy as well.
    tangent = tangent + dot("bnts,bsnh->btnh", saved, dvalue)
    return out, (_wide(tangent) - row_sums * _wide(out)).astype(out.dtype)


def attention(
    query: Array, key: Array, value: Array, *, causal: bool, implementation: str = "xla"
) -> Array:
    """Gives softmax(query key^T / sqrt(H)) value for each head, the softmax in float32.

    query [B, T, N, H]; key and value [B, S, K, H] of the same dtype; result [B, T, N, H]. K divides N:
    N/K queries in a row share one key and value (grouped-query attention, arXiv 2305.13245).
    `implementation` is a choice written in a config, never read off the local device:
    "xla" runs everywhere and keeps the [B, N, T, S] weights, in 16 bits, for the backward pass;
    "cudnn" is the fused kernel of NVIDIA GPUs, which needs 16-bit inputs, keeps no weights and
    has no forward-mode derivative.
    """
    if implementation == "xla":
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
        logits = dot("btnh,bsnh->bnts", query, key, wide_dtype(query.dtype))
        return _attend(logits, value, query.shape[-1] ** -0.5, causal)
    if implementation != "cudnn":
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"choose one of {', '.join(ATTENTION_IMPLEMENTATIONS)}."
        )
    if query.dtype.itemsize != 2:
        raise ValueError(
            f"cudnn attention takes float16 or bfloat16, not {query.dtype}; compute in 16 bits "
            'or choose the implementation "xla".'
        )
    return _fused_attention(query, key, value, causal)


def _fused_attention(query: Array, key: Array, value: Array, causal: bool) -> Array:
    """cuDNN's attention; its backward pass takes even lengths, so odd ones get a row that nobody sees."""
    settings: Any = {"is_causal": causal, "implementation": "cudnn"}
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    if queries % 2 or keys % 2:
        even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
        query, key, value = even(query), even(key), even(value)
        settings["query_seq_lengths"] = jnp.full(batch, queries, jnp.int32)
        settings["key_value_seq_lengths"] = jnp.full(batch, keys, jnp.int32)
    return jax.nn.dot_product_attention(query, key, value, **settings)[:, :queries]


@jax.custom_jvp
def softmax_cross_entropy(logits: Array, targets: Array) -> Array:
    """Gives the mean of log(sum(exp(logits))) - logits[target] over all positions, in float32.

    logits [..., V] of any float dtype; targets [...] integers in [0, V). Nothing of size V is kept
    for the backward pass but the logits themselves, in their own dtype.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}; "
            f"expected integers of shape {logits.shape[:-1]}."
        )
    log_normalizer, picked = _log_normalizer_and_target(logits, targets)
    return jnp.mean(log_normalizer - picked)


def _log_normalizer_and_target(logits: Array, targets: Array) -> tuple[Array, Array]:
    top = jnp.max(_wide(logits), axis=-1)
    log_normalizer = top + jnp.log(jnp.sum(jnp.exp(_wide(logits) - top[..., None]), axis=-1))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_normalizer, _wide(picked)


@softmax_cross_entropy.defjvp
def _softmax_cross_entropy_jvp(primals, tangents):
    (logits, targets), (dlogits, _) = primals, tangents
    log_normalizer, picked = _log_normalizer_and_target(logits, targets)
    # Float32 logits are in memory as they are. A barrier would only keep XLA from reading them out of
    # the padded array in which a GPU library's product leaves an odd vocabulary: a copy of all.
    narrow = logits.dtype.itemsize < 4
    saved = _wide(lax.optimization_barrier(logits)) if narrow else logits
    # Comparing with every class fuses into the pass over the logits; the transpose of picking one
    # is a scatter, which would write and read all of them once more.
    classes = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    slope = jnp.exp(saved - log_normalizer[..., None])
    slope = slope - (classes == targets[..., None]).astype(slope.dtype)
    count = max(log_normalizer.size, 1)
    return jnp.mean(log_normalizer - picked), jnp.sum(slope * (_wide(dlogits) / count))


def accuracy(logits: Array, targets: Array) -> Array:
    """Gives the share of positions whose largest logit is the target's, float32."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: Array, factor: float) -> Array:
    """Gives x; its cotangent is multiplied by the static `factor` in the cotangent's own dtype.

    So a factor of 2**-20 on a float16 activation flushes small gradients to zero, as a long chain
    of small Jacobians would, and loss scaling is what brings them back.
    """
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(factor, primals, tangents):
    (x,), (dx,) = primals, tangents
    return x, dx * jnp.asarray(factor, dx.dtype)
