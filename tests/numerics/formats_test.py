"""Formats against ml_dtypes and the hardware's own casts: limits, every code, rounding, text."""

import decimal
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmp.numerics import formats

WITH_DTYPE = [name for name in formats.FORMATS if name != "tf32"]
NARROW = [name for name in WITH_DTYPE if name not in ("float32", "float64")]


def dtype_of(name):
    return np.dtype(name)


def all_codes(name):
    fmt = formats.FORMATS[name]
    return np.arange(2**fmt.bits, dtype=np.uint16 if fmt.bits > 8 else np.uint8)


def float32_samples(size, seed=0):
    """Float32 numbers: uniform bits, then moderate ones, then ties, then what lies on the edges."""
    rng = np.random.default_rng(seed)
    uniform = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    moderate = (rng.normal(size=size) * 2.0 ** rng.integers(-30, 20, size)).astype(np.float32)
    few_bits = rng.integers(-64, 65, size) * 2.0 ** rng.integers(-30, 14, size)  # many ties
    edges = np.array([0, np.inf, np.nan, 65519.99, 65520, 464, 464.01, 248, 1e-45], np.float32)
    uniform[np.isnan(uniform)] = np.nan  # numpy keeps payloads of NaN in float16, encode does not
    few_bits = few_bits.astype(np.float32)
    return np.concatenate([uniform, moderate, few_bits, edges, -edges])


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_limits_equal_finfo_exactly(name):
    ours, theirs = formats.FORMATS[name], ml_dtypes.finfo(dtype_of(name))
    assert ours.max == float(theirs.max)
    assert ours.smallest_normal == float(theirs.smallest_normal)
    assert ours.smallest_subnormal == float(theirs.smallest_subnormal)
    assert ours.epsilon == float(theirs.eps)
    assert ours.bits == theirs.bits
    assert ours.min_exponent == theirs.minexp
    assert (ours.exponent_bits, ours.mantissa_bits) == (theirs.nexp, theirs.nmant)


def test_every_ml_dtypes_float_is_known():
    theirs = {n for n in dir(ml_dtypes) if n.startswith(("float", "bfloat"))}
    assert theirs <= set(formats.FORMATS)


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_max_exponent_and_thresholds_are_where_the_cast_turns(name):
    fmt = formats.FORMATS[name]
    assert 1 <= fmt.max / 2.0**fmt.max_exponent < 2
    limit = fmt.overflow_threshold
    below = math.nextafter(limit, 0)
    value = lambda x: float(formats.decode(formats.encode(x, fmt), fmt))
    assert value(below) == fmt.max
    over = {"ieee": np.inf, "none": fmt.max}.get(fmt.reserved, np.nan)
    np.testing.assert_equal(value(limit), over)
    if fmt.has_zero:
        assert value(fmt.flush_threshold) == 0
        assert value(math.nextafter(fmt.flush_threshold, 1)) == fmt.smallest_subnormal


@pytest.mark.parametrize("name", NARROW)
def test_every_code_decodes_as_the_hardware_cast_and_encodes_back(name):
    codes = all_codes(name)
    with np.errstate(invalid="ignore"):  # signalling NaN
        theirs = codes.view(dtype_of(name)).astype(np.float64)
    ours = formats.decode(codes, name)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[ours == 0]), np.signbit(theirs[theirs == 0]))
    number = ~np.isnan(ours)
    np.testing.assert_array_equal(formats.encode(ours, name)[number], codes[number])
    assert np.isnan(formats.decode(formats.encode(ours[~number], name), name)).all()


@pytest.mark.parametrize(("name", "finite", "nan"), [("f16", 63488, 2046), ("bf16", 65280, 254)])
def test_16_bit_codes_decode_as_jax_casts(name, finite, nan):
    codes = np.arange(2**16, dtype=np.uint16)
    ours = formats.decode(codes, name)
    assert np.isfinite(ours).sum() == finite
    assert np.isnan(ours).sum() == nan
    theirs = jnp.asarray(codes.view(dtype_of(formats.format_of(name).name))).astype(jnp.float32)
    np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_wide_codes_decode_as_reinterpreted(name):
    dtype = np.dtype(name)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2 ** (8 * dtype.itemsize), 100_000, dtype=unsigned, endpoint=False)
    codes[:4] = 0, 1, (1 << formats.FORMATS[name].mantissa_bits) - 1, formats.FORMATS[name].max_code
    ours = formats.decode(codes, name)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(ours, codes.view(dtype).astype(np.float64))
    number = ~np.isnan(ours)
    np.testing.assert_array_equal(formats.encode(ours, name)[number], codes[number])


@pytest.mark.parametrize("name", NARROW)
def test_encode_rounds_float32_as_ml_dtypes(name):
    x = float32_samples(70_000)
    if name == "float8_e8m0fnu":  # where ml_dtypes 0.6 rounds every subnormal float32 up
        x = x[~((x > 2.0**-127) & (x < 2.0**-126))]
    with np.errstate(over="ignore"):
        theirs = x.astype(dtype_of(name))
    ours = formats.encode(x, name)
    np.testing.assert_array_equal(ours, theirs.view(ours.dtype))


def test_encode_rounds_once_where_ml_dtypes_rounds_twice():
    x = 1 + 2.0**-8 + 2.0**-30  # just above the tie between 1 and 1 + 2^-7; float32 loses the rest
    assert formats.explain(x, "bfloat16").value == 1 + 2**-7
    assert float(np.float64(x).astype(ml_dtypes.bfloat16)) == 1.0


def test_tf32_is_float32_with_ten_fraction_bits():
    x = np.abs(float32_samples(10_000))
    x = x[(x < formats.FORMATS["tf32"].overflow_threshold) & (x >= 2.0**-126)]
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) >> 13
    np.testing.assert_array_equal(formats.encode(x, "tf32"), rounded)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.floats(allow_nan=False), st.sampled_from(list(formats.FORMATS)))
def test_nearest_number_wins(x, name):
    fmt = formats.FORMATS[name]
    hypothesis.assume(abs(x) < fmt.overflow_threshold and (fmt.signed or x > 0))
    told = formats.explain(x, fmt)
    step = 0.5 if fmt.has_zero or x >= fmt.smallest_normal else 1.0  # e8m0fnu has no zero below
    assert abs(told.error_ulp) <= step
    assert int(formats.encode(told.value, fmt)) == told.bits


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.floats(allow_nan=False), st.floats(allow_nan=False), st.sampled_from(list(formats.FORMATS))
)
def test_rounding_is_monotonic(x, y, name):
    low, high = formats.decode(formats.encode(sorted([x, y]), name), name)
    assert np.isnan(low) or np.isnan(high) or low <= high


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(2, 8), st.integers(1, 20))
def test_any_ieee_like_format_follows_the_textbook(e, m):
    fmt = formats.FloatFormat("any", e, m, 2 ** (e - 1) - 1)
    assert (fmt.min_exponent, fmt.max_exponent) == (2 - 2 ** (e - 1), 2 ** (e - 1) - 1)
    assert Fraction(fmt.max) == (2 - Fraction(1, 2**m)) * Fraction(2) ** fmt.max_exponent
    assert Fraction(fmt.smallest_subnormal) == Fraction(2) ** (fmt.min_exponent - m)
    assert float(formats.decode(fmt.max_code, fmt)) == fmt.max


# The statements of the source document, row by row.


def test_float16_range():
    f16 = formats.FORMATS["float16"]
    assert f16.smallest_subnormal == 2.0**-24 == 5.960464477539063e-08
    assert f16.smallest_normal == 2.0**-14
    assert f16.max == 65504 == (2 - 2**-10) * 2**15
    assert abs(15 * 1.99903 - 65504) > 65000
    assert sum(Fraction(1, 2**i) for i in range(1, 11)) == Fraction("0.9990234375")
    assert (f16.min_exponent, f16.max_exponent) == (-14, 15)


def test_float32_max_has_its_significand():
    f32 = formats.FORMATS["float32"]
    assert f32.max == 3.4028234663852886e38 == (2 - 2**-23) * 2.0**127
    assert f"{2.0**127:.1e}" == "1.7e+38"
    assert f32.smallest_subnormal == 2.0**-149 == 1.401298464324817e-45


@pytest.mark.parametrize(
    ("name", "binades"),
    [("f16", 40.0), ("bf16", 261.0), ("f32", 277.0), ("e4m3fn", 17.8), ("e5m2", 31.8)],
)
def test_binades(name, binades):
    fmt = formats.format_of(name)
    assert round(fmt.binades, 1) == binades
    assert fmt.decades == pytest.approx(math.log10(fmt.max / fmt.smallest_subnormal))


def test_which_are_ieee_754():
    ieee = [name for name, fmt in formats.FORMATS.items() if fmt.ieee754]
    assert sorted(ieee) == ["float16", "float32", "float64"]


def test_bfloat16_is_float32_with_the_low_half_rounded_off():
    x = np.random.default_rng(2).integers(0, 0x7F800000, 2**20, dtype=np.uint32)
    trick = ((x.astype(np.uint64) + 0x7FFF + (x >> 16 & 1)) >> 16).astype(np.uint16)
    cast = np.asarray(jnp.asarray(x.view(np.float32)).astype(jnp.bfloat16)).view(np.uint16)
    normal = x >= 0x800000  # XLA may flush subnormals
    np.testing.assert_array_equal(trick[normal], cast[normal])
    np.testing.assert_array_equal(trick, formats.encode(x.view(np.float32), "bf16"))


def test_bfloat16_keeps_float32s_normals_but_not_its_max_or_subnormals():
    bf16, f32 = formats.FORMATS["bfloat16"], formats.FORMATS["float32"]
    assert bf16.smallest_normal == f32.smallest_normal == 2.0**-126
    assert bf16.smallest_subnormal == 2.0**-133 > f32.smallest_subnormal
    assert bf16.max == 3.3895313892515355e38
    assert formats.explain(f32.max, "bf16").kind == "infinity"
    assert jnp.isinf(jnp.float32(f32.max).astype(jnp.bfloat16))


def test_explain_a_tenth():
    half, brain = formats.explain(0.1, "fp16"), formats.explain(0.1, "bf16")
    assert half.value == 0.0999755859375
    assert brain.value == 0.10009765625
    assert (brain.sign, brain.exponent_field, brain.fraction, brain.exponent) == (0, 123, 77, -4)
    assert brain.error_ulp == pytest.approx(0.2)
    assert half.error_ulp == pytest.approx(-0.4)
    text = str(brain)
    for piece in ("0.10009765625", "0x3dcd", "01111011: 123 - 127 = -4", "1001101: 1 + 77/2^7"):
        assert piece in text


@pytest.mark.parametrize(
    ("bits", "value", "kind"),
    [
        (1, 2.0**-24, "subnormal"),
        (0x3FF, 1023 * 2.0**-24, "subnormal"),
        (0x400, 2.0**-14, "normal"),
    ],
)
def test_implicit_bit_is_one_for_normals_only(bits, value, kind):
    assert float(formats.decode(bits, "f16")) == value
    told = formats.explain(value, "f16")
    assert (told.kind, told.exponent, told.bits) == (kind, -14, bits)
    lead = int(kind == "normal")
    assert f": {lead} + {bits % 1024}/2^10" in str(told)


def test_rounding_thresholds_of_float16():
    assert formats.FORMATS["float16"].overflow_threshold == 65520
    assert formats.FORMATS["float16"].flush_threshold == 2.0**-25
    assert formats.explain(65519.99, "f16").value == 65504
    assert formats.explain(65520, "f16").value == math.inf
    assert formats.explain(2.0**-25, "f16").value == 0
    assert formats.explain(2.0**-25 * (1 + 2.0**-20), "f16").value == 2.0**-24
    with np.errstate(over="ignore"):
        assert np.float16(65519.99) == 65504 and np.isinf(np.float16(65520))


def test_tie_above_max_of_float8_e4m3fn_stays():
    assert formats.explain(464, "e4m3fn").value == 448
    assert formats.explain(464.0001, "e4m3fn").kind == "nan"
    assert formats.FORMATS["float8_e4m3fn"].overflow_threshold == math.nextafter(464, math.inf)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-30, -3e-8, 1.5, 1e5, -math.inf, math.nan, 1e-310])
@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_explanations_can_be_read(name, x):
    told = formats.explain(x, name)
    text = str(told)
    assert name in text and told.kind in text and len(text.splitlines()) <= 7
    assert max(map(len, text.splitlines())) <= 100
    if told.kind in ("normal", "subnormal"):
        lead = told.kind == "normal"
        significand = lead + Fraction(told.fraction, 2**told.format.mantissa_bits)
        assert (-1) ** told.sign * significand * Fraction(2) ** told.exponent == told.value
        shown = decimal.Decimal(text.splitlines()[0].split(" is ")[1].split(" ")[0])
        assert float(shown) == told.value


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("f16", "float16"),
        ("FP16", "float16"),
        ("bf16", "bfloat16"),
        ("tensorfloat32", "tf32"),
        ("fp64", "float64"),
        ("e4m3fn", "float8_e4m3fn"),
        ("F8E5M2", "float8_e5m2"),
        ("fp8_e4m3b11fnuz", "float8_e4m3b11fnuz"),
        ("fp4_e2m1fn", "float4_e2m1fn"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.float8_e4m3fn, "float8_e4m3fn"),
        (np.float16, "float16"),
        (np.dtype("float32"), "float32"),
        (ml_dtypes.float6_e3m2fn, "float6_e3m2fn"),
        (jnp.dtype(jnp.bfloat16), "bfloat16"),
        (formats.FORMATS["tf32"], "tf32"),
    ],
    ids=str,
)
def test_format_of_accepts(spelling, name):
    assert formats.format_of(spelling) is formats.FORMATS[name]


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_format_of_accepts_names_dtypes_and_scalar_types(name):
    fmt, dtype = formats.FORMATS[name], dtype_of(name)
    assert all(formats.format_of(thing) is fmt for thing in (name, dtype, dtype.type))


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [
        ("bfloat61", "bfloat16"),
        ("fp8", "float8_e4m3fn"),
        ("f8", "float8_e5m2"),
        ("e4m3x", "float8_e4m3"),
        ("int32", "float32"),
        ("", "bfloat16"),
        (None, "float32"),
        (jnp.int32, "bfloat16"),
        (3.5, "float32"),
        ([], "float32"),
    ],
    ids=str,
)
def test_format_of_suggests(wrong, suggestion):
    with pytest.raises(ValueError, match=f"is not a floating-point format; try .*{suggestion}"):
        formats.format_of(wrong)


def test_decode_refuses_what_is_no_code():
    with pytest.raises(ValueError, match="0x10 is no code of float4_e2m1fn, which has 4 bits"):
        formats.decode([3, 16], "float4_e2m1fn")
    with pytest.raises(ValueError, match="integers"):
        formats.decode([0.5], "float16")


def test_reserved_is_checked():
    with pytest.raises(ValueError, match="reserved is 'inf'; it must be one of"):
        formats.FloatFormat("any", 5, 2, 15, "inf")


def test_compare_tells_ranges():
    lines = formats.compare("f16", "bf16").splitlines()
    assert len(lines) == 3
    assert "65504" in lines[1] and "yes" in lines[1] and "40.0" in lines[1]
    assert "3.3895e+38" in lines[2] and "no" in lines[2] and "261.0" in lines[2]
    assert len(formats.compare().splitlines()) == 1 + len(formats.FORMATS)


def test_formats_hash_and_compare():
    assert formats.FORMATS["float16"] == formats.FloatFormat("float16", 5, 10, 15, ieee754=True)
    assert len(set(formats.FORMATS.values())) == len(formats.FORMATS)


def test_xla_computes_with_float16_subnormals_but_not_with_float32s():
    # Why limits of a format are not yet limits of a machine. True for XLA's CPU backend.
    if jax.default_backend() != "cpu":
        pytest.skip("a statement about the CPU backend")
    double = jax.jit(lambda x: x + x)
    assert float(double(jnp.float16(2.0**-24))) == 2.0**-23
    assert float(double(jnp.asarray(np.float32(2.0**-128)))) == 0.0
