"""Floating-point formats: what their bit fields can hold, derived with exact arithmetic.

A code of a format is sign | exponent field e (E bits) | fraction field f (M bits). It stands for

    (-1)^sign * (1 + f / 2^M) * 2^(e - bias)        e > 0   (normal: implicit leading 1)
    (-1)^sign * (0 + f / 2^M) * 2^(1 - bias)        e = 0   (subnormal: implicit leading 0)

and everything below follows from E, M, the bias and the reserved codes. Often told wrong, so told
here:

- The exponent is biased; no bit of it is a sign. In float16 the fields 0 and 31 are reserved, so
  exponents go from 1 - 15 = -14 to 30 - 15 = 15. A sign bit would give -15 to 15.
- max(float16) is (2 - 2^-10) * 2^15 = 65504: significand times a power of two, not 15 * 1.999.
- max(float32) is (2 - 2^-23) * 2^127 = 3.4e38. The 1.7e38 one meets is 2^127 alone.
- The smallest positive float16, 2^-24 = 2^-10 * 2^-14, is a subnormal: it has no implicit 1.
- Rounding decides what flushes to zero: magnitudes up to and including 2^-25, not 2^-24. And what
  overflows: 65504 is the largest float16, but only from 65520 on does a number become inf.
- bfloat16 is not an IEEE 754 format but float32 with the low 16 bits rounded off. Both have the
  same smallest normal; the largest float32 overflows in bfloat16, and the subnormals differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, get_args

import ml_dtypes  # noqa: F401  (teaches numpy the names of the small formats)
import numpy as np

Reserved = Literal["ieee", "nan", "negative_zero", "none"]


def check_reserved(reserved: str) -> None:
    """Raises ValueError unless `reserved` is one of the choices that `FloatFormat` describes."""
    allowed = get_args(Reserved)
    if reserved not in allowed:
        raise ValueError(f"reserved is {reserved!r}; it must be one of {', '.join(allowed)}.")


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format; all its limits are derived from these fields.

    The properties are Python floats and exact, since every format here fits into float64.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int  # stored ones; the implicit bit is not counted
    bias: int  # the exponent is the exponent field minus this
    reserved: Reserved = "ieee"
    """Which codes are no finite numbers. "ieee": the top exponent field, infinities and NaN. "nan"
    (formats called fn): all ones, NaN. "negative_zero" (fnuz): the code of -0, NaN. "none"."""
    signed: bool = True
    has_zero: bool = True  # whether exponent field 0 means zero and subnormals
    ieee754: bool = False  # an interchange format of IEEE 754

    def __post_init__(self):
        check_reserved(self.reserved)

    @property
    def bits(self) -> int:
        """Bits that carry information (19 for tf32, which is stored in 32)."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """The code of `max`. Sign bit aside, codes are ordered as the numbers they stand for."""
        if self.reserved == "ieee":
            return ((2**self.exponent_bits - 1) << self.mantissa_bits) - 1
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - (self.reserved == "nan")

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number: float16 has -14."""
        return self.has_zero - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number: float16 has 15."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @property
    def max(self) -> float:
        """The largest finite number, (2 - 2^-M) * 2^max_exponent when all fractions are numbers."""
        one = 2**self.mantissa_bits
        return math.ldexp(one + self.max_code % one, self.max_exponent - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """2^min_exponent; below it every halving costs a bit of precision."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number, 2^(min_exponent - M); some hardware flushes it to zero."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits * self.has_zero)

    @property
    def epsilon(self) -> float:
        """2^-M, the distance from 1 to the next number; rounding errs by half of it at most."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def overflow_threshold(self) -> float:
        """The smallest float64 magnitude that leaves the range when rounded: 65520 for float16.

        It becomes inf, or NaN without infinities, or `max` where no code is reserved. The tie
        between `max` and the number that would follow goes to the even significand: out of range,
        but for float8_e4m3fn, where 464 rounds to 448 and the threshold is just above 464.
        """
        half_step = math.ldexp(0.5, self.max_exponent - self.mantissa_bits)
        odd = self.mantissa_bits == 0 or self.max_code % 2 == 1
        return self.max + half_step if odd else math.nextafter(self.max + half_step, math.inf)

    @property
    def flush_threshold(self) -> float:
        """The largest float64 magnitude that rounds to zero: 2^-25 for float16 (a tie, to even)."""
        return self.smallest_subnormal / 2 if self.has_zero else 0.0

    @property
    def binades(self) -> float:
        """log2(max / smallest_subnormal): 40.0 for float16, 261.0 bfloat16, 277.0 float32."""
        return math.log2(self.max) - math.log2(self.smallest_subnormal)

    @property
    def decades(self) -> float:
        """log10(max / smallest_subnormal)."""
        return self.binades * math.log10(2)

    @property
    def has_infinities(self) -> bool:
        """Whether overflow gives an infinity."""
        return self.reserved == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether the format can say "not a number"."""
        return self.reserved != "none"

    def ulp(self, x: float) -> float:
        """The distance between neighbouring numbers of the format in the binade of x."""
        exponent = math.frexp(x)[1] - 1 if x and math.isfinite(x) else self.min_exponent
        exponent = min(max(exponent, self.min_exponent), self.max_exponent)
        return math.ldexp(1.0, exponent - self.mantissa_bits)


FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat("float64", 11, 52, 1023, ieee754=True),
        FloatFormat("float32", 8, 23, 127, ieee754=True),
        FloatFormat("tf32", 8, 10, 127),
        FloatFormat("bfloat16", 8, 7, 127),
        FloatFormat("float16", 5, 10, 15, ieee754=True),
        FloatFormat("float8_e5m2", 5, 2, 15),
        FloatFormat("float8_e4m3fn", 4, 3, 7, "nan"),
        FloatFormat("float8_e4m3", 4, 3, 7),
        FloatFormat("float8_e3m4", 3, 4, 3),
        FloatFormat("float8_e5m2fnuz", 5, 2, 16, "negative_zero"),
        FloatFormat("float8_e4m3fnuz", 4, 3, 8, "negative_zero"),
        FloatFormat("float8_e4m3b11fnuz", 4, 3, 11, "negative_zero"),
        FloatFormat("float8_e8m0fnu", 8, 0, 127, "nan", signed=False, has_zero=False),
        FloatFormat("float6_e3m2fn", 3, 2, 3, "none"),
        FloatFormat("float6_e2m3fn", 2, 3, 1, "none"),
        FloatFormat("float4_e2m1fn", 2, 1, 1, "none"),
    )
}
"""The formats known here, by the names that numpy and ml_dtypes give them."""


def _short(name: str) -> str:
    """One spelling for float16, fp16 and f16; float8_e4m3fn and F8E4M3FN; tensorfloat32, tf32."""
    name = name.strip().lower().replace("_", "").replace("-", "")
    return name.replace("tensorfloat", "tf").replace("float", "f").replace("fp", "f")


_BY_SHORT = {_short(name): f for name, f in FORMATS.items()}
_BY_SHORT |= {s[2:]: f for s, f in _BY_SHORT.items() if s[:2] in ("f8", "f6", "f4")}  # e4m3fn


def format_of(dtype_or_name: Any) -> FloatFormat:
    """Returns the format of a dtype, a scalar type (`jnp.bfloat16`) or a name.

    Names are those of `FORMATS` in any usual spelling: float16, fp16, f16; bf16; tf32; e4m3fn.

    Raises:
      ValueError: for what is no floating-point format known here, with the nearest names.
    """
    if isinstance(dtype_or_name, FloatFormat):
        return dtype_or_name
    name = str(dtype_or_name)
    if dtype_or_name is not None and not isinstance(dtype_or_name, str):  # dtype(None) is float64
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype_or_name).name
    short = _short(name)
    if short in _BY_SHORT:
        return _BY_SHORT[short]
    near = []
    if isinstance(dtype_or_name, str):
        near = [s for s in _BY_SHORT if len(short) > 1 and s.startswith(short)]
        near = near[:3] or difflib.get_close_matches(short, _BY_SHORT, 3, 0.7)
    near = near or ["f32", "bf16", "f16", "f8e4m3fn", "f8e5m2"]
    hint = dict.fromkeys(_BY_SHORT[s].name for s in near)
    raise ValueError(f"{name!r} is not a floating-point format; try {' or '.join(hint)}.")


def decode(bits: Any, format: Any) -> np.ndarray:
    """Returns the numbers that integer codes stand for, exact, in float64; NaN for every NaN code.

    Args:
      bits: non-negative integers below 2^format.bits, of any shape.
      format: anything that `format_of` accepts.
    """
    fmt = format_of(format)
    codes = np.asarray(bits)
    if codes.size and codes.dtype.kind not in "iu":
        raise ValueError(f"decode takes codes, which are integers, but these are {codes.dtype}.")
    codes = codes.astype(np.uint64)
    if codes.size and int(codes.max()) >= 2**fmt.bits:
        raise ValueError(f"{hex(codes.max())} is no code of {fmt.name}, which has {fmt.bits} bits.")
    sign_bit = 1 << (fmt.bits - 1) if fmt.signed else 0
    code = (codes & np.uint64(~sign_bit % 2**64)).astype(np.int64)
    field, fraction = code >> fmt.mantissa_bits, code & (2**fmt.mantissa_bits - 1)
    subnormal = (field == 0) & fmt.has_zero
    significand = np.where(subnormal, fraction, fraction + 2**fmt.mantissa_bits)
    exponent = np.where(subnormal, 1, field) - (fmt.bias + fmt.mantissa_bits)
    with np.errstate(over="ignore"):  # float64's own inf codes
        values = np.ldexp(significand.astype(np.float64), exponent)
    values = np.where(code > fmt.max_code, np.nan, values)
    if fmt.has_infinities:
        values = np.where(code == fmt.max_code + 1, np.inf, values)
    negative = (codes & np.uint64(sign_bit)) != 0
    if fmt.reserved == "negative_zero":
        values = np.where(negative & (code == 0), np.nan, values)
    return np.where(negative, -values, values)


def encode(values: Any, format: Any) -> np.ndarray:
    """Returns the codes of the numbers nearest to `values`, ties to even, as unsigned integers.

    Beyond the range comes inf, or NaN in formats without infinities, or the largest number where
    nothing is reserved, as `ml_dtypes` casts; there NaN, which has no code, gives a zero. e8m0fnu
    has neither sign nor zero: values <= 0 give NaN, tiny ones its smallest number. Rounds once,
    from float64; `ml_dtypes` casts float64 by way of float32 and so can round twice.

    Args:
      values: numbers, taken as float64, of any shape.
      format: anything that `format_of` accepts.
    """
    fmt = format_of(format)
    x = np.asarray(values).astype(np.float64)
    magnitude = np.where(np.isfinite(x), np.abs(x), 0.0)
    exponent = np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, fmt.min_exponent)
    exponent = np.maximum(exponent, fmt.min_exponent).astype(np.int64)
    # In units of the last place; a carry out of the significand moves the exponent field by itself.
    units = np.rint(np.ldexp(magnitude, fmt.mantissa_bits - exponent)).astype(np.int64)
    code = ((exponent - fmt.min_exponent) << fmt.mantissa_bits) + units
    if not fmt.has_zero:
        code = np.maximum(code - 2**fmt.mantissa_bits, 0)

    beyond = fmt.max_code + (fmt.reserved in ("ieee", "nan"))
    nan = {"ieee": beyond | 1 << max(fmt.mantissa_bits - 1, 0), "nan": beyond}.get(fmt.reserved, 0)
    overflow, invalid = np.isinf(x) | (code > fmt.max_code), np.isnan(x)
    negative = np.signbit(x)
    if fmt.reserved == "negative_zero":
        invalid, overflow = invalid | overflow, np.zeros_like(overflow)
        negative = np.where(invalid, True, negative & (code != 0))
    if fmt.reserved == "none":
        negative = negative ^ invalid  # ml_dtypes: NaN becomes -0, -NaN becomes 0
    if not fmt.signed:
        invalid, negative = invalid | (x <= 0), np.zeros_like(negative)
    code = np.where(invalid, nan, np.where(overflow, beyond, code)).astype(np.uint64)
    code = code | negative.astype(np.uint64) << np.uint64(fmt.bits - 1)
    return code.astype(next(f"u{n}" for n in (1, 2, 4, 8) if fmt.bits <= 8 * n))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a format holds a number: the fields of its code, the value they spell, and the error."""

    format: FloatFormat
    x: float  # the number asked for
    value: float  # the number held instead, exact
    bits: int  # its code, with the fields that follow
    sign: int
    exponent_field: int
    fraction: int
    kind: str  # "normal", "subnormal", "zero", "infinity" or "nan"
    exponent: int | None  # of the power of two; None for infinity and nan
    ulp: float  # the format's step at x
    error_ulp: float  # (value - x) / ulp; within +-0.5 unless x overflows

    def __str__(self) -> str:
        fmt = self.format
        field = f"{self.exponent_field:0{fmt.exponent_bits}b}"
        fraction = f"{self.fraction:0{fmt.mantissa_bits}b}" if fmt.mantissa_bits else "(none)"
        lines = [
            f"{self.x!r} in {fmt.name} is {_exact(self.value)}",
            f"  code      0x{self.bits:0{(fmt.bits + 3) // 4}x}, {self.kind}",
            f"  sign      {self.sign}" if fmt.signed else "  sign      (none)",
        ]
        if self.exponent is None:
            return "\n".join([*lines, f"  exponent  {field}, reserved", f"  fraction  {fraction}"])
        lead = int(self.kind == "normal")
        shown, note = (self.exponent_field, "") if lead else (1, " (field 0 counts as 1)")
        significand = (-1) ** self.sign * (lead + self.fraction / 2**fmt.mantissa_bits)
        return "\n".join(
            [
                *lines,
                f"  exponent  {field}: {shown} - {fmt.bias} = {self.exponent}{note}",
                f"  fraction  {fraction}: {lead} + {self.fraction}/2^{fmt.mantissa_bits}",
                f"  value     {significand!r} * 2^{self.exponent}",
                f"  error     {self.error_ulp:+.6g} ulp of {self.ulp!r}",
            ]
        )


def _exact(value: float) -> str:
    """All decimals of a float64 where they fit on a line, else as many as tell it from others."""
    digits = str(Decimal(value)) if math.isfinite(value) else repr(value)
    return digits if len(digits) <= 60 else f"{value!r} (to float64's decimals)"


def explain(x: Any, format: Any) -> Explanation:
    """Returns how `format` holds the number x; `print` it to see the bit fields and the error.

    `explain(0.1, "bf16").value` is exactly 0.10009765625, +0.2 ulp off.
    """
    fmt, x = format_of(format), float(x)
    bits = int(encode(x, fmt))
    value = float(decode(bits, fmt))
    code = bits % 2 ** (fmt.exponent_bits + fmt.mantissa_bits)
    field, fraction = divmod(code, 2**fmt.mantissa_bits)
    kind = "subnormal" if field == 0 and fmt.has_zero else "normal"
    kind = "zero" if value == 0 else "nan" if math.isnan(value) else kind
    kind = "infinity" if math.isinf(value) else kind
    ulp = fmt.ulp(x)
    if math.isfinite(x) and math.isfinite(value):
        error = float((Fraction(value) - Fraction(x)) / Fraction(ulp))
    else:
        error = 0.0 if value == x else value - x
    return Explanation(
        format=fmt, x=x, value=value, bits=bits, sign=bits >> (fmt.bits - 1) if fmt.signed else 0,
        exponent_field=field, fraction=fraction, kind=kind, ulp=ulp, error_ulp=error,
        exponent=max(field, int(fmt.has_zero)) - fmt.bias if math.isfinite(value) else None,
    )  # fmt: skip


def compare(*formats: Any) -> str:
    """Returns a table of the ranges of `formats` (default: all), one line each."""
    columns = ("max", "smallest_normal", "smallest_subnormal", "epsilon", "binades", "decades")
    rows = [["format", "bits", "E", "M", "IEEE 754", *(c.replace("_", " ") for c in columns)]]
    for fmt in map(format_of, formats or FORMATS):
        limits = [getattr(fmt, c) for c in columns]
        rows.append(
            [fmt.name, str(fmt.bits), str(fmt.exponent_bits), str(fmt.mantissa_bits)]
            + ["yes" if fmt.ieee754 else "no", *(f"{v:.5g}" for v in limits[:4])]
            + [f"{v:.1f}" for v in limits[4:]]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = lambda row: "  ".join(
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
    )
    return "\n".join(map(line, rows))
