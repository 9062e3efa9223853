"""How large numbers are: counts by power of two, and what a format would lose of them.

    found = measure(x, ("float16", "bfloat16"))     # under jit; merge(a, b) adds two up
    found.shares("float16")                         # what would flush, go subnormal, overflow
    found.shares("float16", scale=2.0**15)          # the same of x * 2^15
    found.recovered("float16", scale=2.0**15)       # the share of the flushed that this brings back

Nothing is cast there and back and nothing is compared as a float: a compiler may drop such a cast, and
XLA flushes float32's subnormals in arithmetic. All is decided on the bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxmp.numerics import formats as number_formats
from jaxmp.numerics import tree as trees

LOWEST, HIGHEST = -149, 127
EXPONENTS = np.arange(LOWEST, HIGHEST + 1)
"""The powers of two that float32 holds, those of its subnormals too."""
_INFINITY = 0x7F800000


class Shares(NamedTuple):
    """Shares of the finite numbers that are not zero."""

    flush: float
    """Would round to zero: half the smallest subnormal or less."""
    subnormal: float
    """Below the smallest normal number, so with fewer bits; some hardware flushes these, too."""
    overflow: float
    """Would round out of range: from 65520 on in float16."""


@struct.dataclass
class Magnitudes:
    """The magnitudes of some numbers, in constant memory. A pytree; see `merge`.

    Each binade is cut where a threshold of a format can lie: the power of two itself stands alone (2^-25
    flushes in float16, and means over 2^k examples are such numbers), and so does what lies beyond
    each format's overflow threshold. Scaled by a power of two, a threshold still lies on a cut.
    """

    formats: tuple[str, ...] = struct.field(pytree_node=False)
    counts: Array
    """[3 + 277 * parts] uint32: zeros, infinities, NaN, then the parts of each binade, from 2^-149 up."""

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return int(_wide(self.counts).sum())

    @property
    def zeros(self) -> int:
        """How many are zero."""
        return int(self.counts[0])

    @property
    def not_finite(self) -> int:
        """How many are infinite or NaN."""
        return int(_wide(self.counts)[1:3].sum())

    @property
    def nans(self) -> int:
        """How many are NaN."""
        return int(self.counts[2])

    @property
    def numbers(self) -> int:
        """How many are finite and not zero; shares are of these."""
        return int(self.binades.sum())

    @property
    def binades(self) -> np.ndarray:
        """[277] int64: counts for each power of two in `EXPONENTS`."""
        return self._parts.sum(1)

    @property
    def _parts(self) -> np.ndarray:
        return _wide(self.counts)[3:].reshape(len(EXPONENTS), -1)

    def quantile(self, share: float) -> int:
        """The power of two that this share of the finite numbers other than zero does not exceed."""
        reached = np.cumsum(self.binades) >= max(share * self.numbers, 1)
        return int(EXPONENTS[np.argmax(reached)])

    def shares(self, format: Any, scale: float = 1.0) -> Shares:
        """What `format` would lose of the numbers times `scale`, a power of two.

        Exact, by the thresholds of rounding.

        Raises:
          ValueError: the format was not measured, or the scale is no power of two.
        """
        fmt, shift = number_formats.format_of(format), _log2(scale)
        if fmt.name not in self.formats:
            raise ValueError(
                f"{fmt.name} was not measured, only {', '.join(self.formats)}; name it in `formats`."
            )
        below = lambda exponent, part=0: self._below(exponent - shift, part)
        # The largest number that flushes is a tie, a power of two: it goes to zero, which is even.
        flush = below(round(math.log2(fmt.flush_threshold)), 1) if fmt.has_zero else 0
        limit, cuts = _cut(fmt), _cuts(self.formats)
        over = self.numbers - (
            below(fmt.max_exponent, 2 + cuts.index(limit)) if limit else below(fmt.max_exponent + 1)
        )
        subnormal = max(below(fmt.min_exponent) - flush, 0)
        return Shares(*(n / max(self.numbers, 1) for n in (flush, subnormal, over)))

    def _below(self, exponent: int, part: int) -> int:
        """How many numbers lie below a part of a binade."""
        parts = self._parts
        return int(parts.ravel()[: max((exponent - LOWEST) * parts.shape[1] + part, 0)].sum())

    def recovered(self, format: Any, scale: float) -> float:
        """The share of what `format` flushes that it would not flush after scaling; 1 if nothing is."""
        before = self.shares(format).flush
        return 1.0 if before == 0 else 1.0 - self.shares(format, scale).flush / before

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values: counts by power of two without the empty ones at both ends."""
        filled = np.flatnonzero(self.binades)
        first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, -1)
        return {
            "total": self.total, "zeros": self.zeros, "not_finite": self.not_finite,
            "first_exponent": first + LOWEST, "counts": self.binades[first : last + 1].tolist(),
            "shares": {name: self.shares(name)._asdict() for name in self.formats},
        }  # fmt: skip


def measure(x: Any, formats: Sequence[str]) -> Magnitudes:
    """The magnitudes of an array of float16, bfloat16, float32 or a float8; float64 is rounded first.

    Pure and jittable: one pass, and a few KB whatever the size (which should stay below 2^32).
    """
    none = empty(formats)
    place = _place(magnitude_codes(x).ravel(), _cuts(none.formats))
    counts = none.counts.at[place].add(jnp.uint32(1), mode="promise_in_bounds")
    return none.replace(counts=counts)  # pyright: ignore[reportAttributeAccessIssue]


def binades_of(x: Any) -> Array:
    """[277] uint32: counts of the finite numbers other than zero for each power of two."""
    return measure(x, ()).counts[3:].reshape(len(EXPONENTS), -1).sum(1, dtype=jnp.uint32)


def thresholds(format: Any) -> tuple[int, int, int]:
    """Float32 bits of magnitudes: the largest that flushes, the smallest normal, the smallest over."""
    fmt = number_formats.format_of(format)
    code = lambda x: int(np.float32(x).view(np.uint32))
    over = ((fmt.max_exponent + 127) << 23) + _cut(fmt) if _cut(fmt) else _INFINITY
    return code(fmt.flush_threshold), code(fmt.smallest_normal), over


def empty(formats: Sequence[str]) -> Magnitudes:
    """The magnitudes of nothing."""
    names = tuple(number_formats.format_of(name).name for name in formats)
    return Magnitudes(names, jnp.zeros([3 + len(EXPONENTS) * (2 + len(_cuts(names)))], jnp.uint32))


def merge(a: Magnitudes, b: Magnitudes) -> Magnitudes:
    """The magnitudes of the numbers of both."""
    return a.replace(counts=a.counts + b.counts)  # pyright: ignore[reportAttributeAccessIssue]


def total_of(found: Sequence[Magnitudes], formats: Sequence[str]) -> Magnitudes:
    """All of them in one, on the host and in int64, so that any number of them adds up."""
    none = empty(formats)
    counts: Any = sum((_wide(one.counts) for one in found), start=_wide(none.counts))
    return Magnitudes(none.formats, counts)


def magnitude_codes(x: Any) -> Array:
    """The float32 bits of |x| as uint32, without arithmetic that could flush a subnormal."""
    x = jnp.asarray(x)
    if x.dtype == jnp.float32:
        return jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    if x.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        return (bits & jnp.uint32(0x7FFF)) << 16
    if x.dtype == jnp.float16:
        return _from_float16(jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32))
    if not trees.is_floating(x):
        raise ValueError(f"Magnitudes are of floating-point arrays; got {x.dtype}.")
    if x.dtype.itemsize == 1:
        values = np.abs(
            number_formats.decode(
                np.arange(256) % 2 ** number_formats.format_of(x.dtype).bits, x.dtype
            )
        )
        table = jnp.asarray(values.astype(np.float32).view(np.uint32))
        return table[jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.int32)]
    return magnitude_codes(x.astype(jnp.float32))


def _from_float16(bits: Array) -> Array:
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    normal = ((exponent + jnp.uint32(112)) << 23) | (fraction << 13)
    # A float32 multiple of 2^-24 is a normal number, so this product is exact everywhere.
    small = fraction.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)
    subnormal = jax.lax.bitcast_convert_type(small, jnp.uint32)
    special = jnp.uint32(_INFINITY) | (fraction << 13)
    return jnp.where(exponent == 0, subnormal, jnp.where(exponent == 31, special, normal))


def _place(codes: Array, cuts: tuple[int, ...]) -> Array:
    """The place in `Magnitudes.counts` of each magnitude."""
    leading = jax.lax.clz(codes).astype(jnp.int32)  # 8 for the smallest normal number
    subnormal = codes < 1 << 23
    exponent = jnp.where(subnormal, 31 - leading, (codes >> 23).astype(jnp.int32) - 127 - LOWEST)
    shifted = codes << (jnp.maximum(leading, 8) - 8).astype(jnp.uint32)
    fraction = jnp.where(subnormal, shifted, codes) & jnp.uint32(0x7FFFFF)
    part = sum(((fraction >= cut).astype(jnp.int32) for cut in cuts), start=jnp.int32(fraction > 0))
    place = 3 + exponent * (2 + len(cuts)) + part
    special = jnp.where(codes == 0, 0, jnp.where(codes == _INFINITY, 1, 2))
    return jnp.where((codes == 0) | (codes >= _INFINITY), special, place)


def _cuts(names: Sequence[str]) -> tuple[int, ...]:
    """The float32 fractions, rising, from which on a format's last binade overflows."""
    return tuple(sorted({_cut(number_formats.format_of(name)) for name in names} - {0}))


def _cut(fmt: number_formats.FloatFormat) -> int:
    """The fraction of the smallest float32 in the format's last binade that rounds out of range.

    0 for a format that ends at the binade's end, float32 itself: there infinity alone is beyond.
    """
    significand = math.ldexp(fmt.overflow_threshold, -fmt.max_exponent)
    return math.ceil((significand - 1) * 2**23) % 2**23


def _wide(counts: Any) -> np.ndarray:
    return np.asarray(counts).astype(np.int64)


def _log2(scale: float) -> int:
    fraction, exponent = math.frexp(scale)
    if fraction != 0.5:
        raise ValueError(f"The scale {scale!r} is no power of two; powers of two scale exactly.")
    return exponent - 1
