"""Rounding of JAX arrays to a narrower format without leaving their dtype.

`jax.lax.reduce_precision` is no simulator of a format: it flushes every subnormal (all 2,046 of
float16) and reserves the top exponent whatever the format. Nor is a cast there and back under jit:
XLA may drop it. The rounding here works on the bits as integers, so no compiler folds it, and no
hardware that flushes subnormals spoils it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.numerics.formats import Reserved, check_reserved, format_of


def quantize(
    x: jax.Array,
    exponent_bits: Any,
    mantissa_bits: Any,
    *,
    bias: Any = None,
    reserved: Reserved = "ieee",
    subnormals: bool = True,
    saturate: bool = False,
) -> jax.Array:
    """Rounds x to the format of given field widths, ties to even; shape and dtype stay x's.

    The widths may be traced, so one compiled function serves a whole sweep. Beyond the range comes
    what `reserved` says (see `FloatFormat`): inf, NaN, or the largest number. NaN stays NaN. The
    derivative is that of the identity (straight-through), in both modes.

    Args:
      x: floating-point array; float64 is rounded as such, narrower ones by way of float32.
      exponent_bits: 2 to 8 (11 for float64), an integer or an integer array that broadcasts to x.
      mantissa_bits: 0 to 23 (52 for float64), likewise.
      bias: default 2^(exponent_bits - 1) - 1.
      reserved: which codes are no numbers. The full exponent width goes with "ieee" alone, since
        float32 (float64) itself ends there.
      subnormals: False flushes what is below the smallest normal number to zero, after rounding.
      saturate: the largest number instead of inf or NaN.

    Raises:
      ValueError: if x is not floating-point or a width that is known does not fit it.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize rounds floating-point arrays, but this one is {x.dtype}.")
    check_reserved(reserved)
    container = format_of("float64" if x.dtype == jnp.float64 else "float32")
    for what, width, low, high in (
        ("exponent_bits", exponent_bits, 2, container.exponent_bits),
        ("mantissa_bits", mantissa_bits, 0, container.mantissa_bits),
    ):
        if isinstance(width, int) and not low <= width <= high:
            raise ValueError(
                f"{what} is {width}; for an array of {x.dtype} it must be {low} to {high}."
            )
    integer = jnp.int64 if container.bits == 64 else jnp.int32
    e, m = (jnp.asarray(n).astype(integer) for n in (exponent_bits, mantissa_bits))
    b = (1 << (e - 1)) - 1 if bias is None else jnp.asarray(bias).astype(integer)
    rounded = _round(x.astype(container.name), e, m, b, reserved, subnormals, saturate)
    return rounded.astype(x.dtype)


def simulate_cast(x: jax.Array, format: Any, *, saturate: bool = False) -> jax.Array:
    """Returns in x's own dtype the numbers that a cast of x to `format` (a name or dtype) gives.

    As `quantize`; formats without a NaN keep NaN here, where an `ml_dtypes` cast makes it zero.
    """
    fmt = format_of(format)
    if not fmt.signed:
        raise ValueError(f"{fmt.name} is unsigned, which quantize is not; use numerics.encode.")
    return quantize(
        x, fmt.exponent_bits, fmt.mantissa_bits,
        bias=fmt.bias, reserved=fmt.reserved, saturate=saturate,
    )  # fmt: skip


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _round(x, e, m, bias, reserved, subnormals, saturate):
    """`quantize` for float32 and float64; e, m and bias are integers as wide as x."""
    container = format_of(x.dtype)
    width, infinity = container.mantissa_bits, container.max_code + 1
    bits = jax.lax.bitcast_convert_type(x, e.dtype)
    magnitude = bits & jnp.iinfo(e.dtype).max
    sign = bits ^ magnitude

    # magnitude = significand + (field - 1) 2^width for normal and subnormal numbers alike.
    field = jnp.maximum(magnitude >> width, 1)
    significand = magnitude - ((field - 1) << width)
    lowest = container.bias - bias + 1  # field, in x, of the format's smallest normal number
    drop = jnp.clip(width - m + jnp.maximum(lowest - field, 0), 0, width + 2)  # bits below an ulp
    ulp = jnp.left_shift(1, drop)
    kept, rest = significand >> drop, 2 * (significand & (ulp - 1))
    up = (rest > ulp) | ((rest == ulp) & (kept % 2 == 1))
    significand = (kept + up.astype(e.dtype)) << drop
    result = jnp.where(significand == 0, 0, significand + ((field - 1) << width))
    if not subnormals:
        result = jnp.where(result < lowest << width, 0, result)

    all_ones = jnp.left_shift(1, e + m) - 1
    top = {"ieee": all_ones - jnp.left_shift(1, m), "nan": all_ones - 1}.get(reserved, all_ones)
    fraction = top & (jnp.left_shift(1, m) - 1)
    largest = (((top >> m) + container.bias - bias) << width) + (fraction << (width - m))
    largest = jnp.minimum(largest, container.max_code)
    nan = infinity | (1 << (width - 1))
    beyond = largest if saturate or reserved == "none" else infinity if reserved == "ieee" else nan
    result = jnp.where(result > largest, beyond, result)
    result = jnp.where(magnitude > infinity, magnitude, result)
    if reserved == "negative_zero":
        sign = jnp.where(result == 0, 0, sign)
    return jax.lax.bitcast_convert_type(sign | result, x.dtype)


@_round.defjvp
def _round_jvp(reserved, subnormals, saturate, primals, tangents):
    x, e, m, bias = primals
    return _round(x, e, m, bias, reserved, subnormals, saturate), tangents[0]
