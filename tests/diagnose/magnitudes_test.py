"""Counts by power of two against NumPy in float64, shares against ml_dtypes' casts, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmp.diagnose import magnitudes
from jaxmp.numerics import formats as number_formats

FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
measure = jax.jit(magnitudes.measure, static_argnums=1)


def widened(x) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.asarray(x).astype(np.float64).ravel()


def direct(x) -> dict:
    """The counts by power of two of the finite numbers other than zero, by NumPy's frexp in float64."""
    wide = np.abs(widened(x))
    exponents = np.frexp(wide[np.isfinite(wide) & (wide > 0)])[1] - 1
    return dict(zip(*np.unique(exponents, return_counts=True)))


def counted(found) -> dict:
    return {e: n for e, n in zip(magnitudes.EXPONENTS, found.binades) if n}


def every_float(bits: np.dtype, dtype) -> np.ndarray:
    return np.arange(2 ** (8 * bits.itemsize), dtype=np.uint64).astype(bits).view(dtype)


def hard_float32() -> np.ndarray:
    """Random bits (all exponents, subnormals, NaN), every power of two, and both neighbours of each."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    powers = np.ldexp(1.0, magnitudes.EXPONENTS).astype(np.float32).view(np.uint32)
    edges = np.concatenate([powers - 1, powers, powers + 1, [0, 0x7F800000, 0x7FC00000]])
    subnormal = np.random.default_rng(1).integers(0, 2**23, 10_000, np.uint32)
    return np.concatenate([bits, edges.astype(np.uint32), subnormal]).view(np.float32)


@pytest.mark.parametrize(
    "x",
    [
        every_float(np.dtype("u2"), np.float16),
        every_float(np.dtype("u2"), ml_dtypes.bfloat16),
        every_float(np.dtype("u1"), ml_dtypes.float8_e4m3fn),
        every_float(np.dtype("u1"), ml_dtypes.float8_e5m2),
        hard_float32(),
    ],
    ids=lambda x: x.dtype.name,
)
def test_counts_equal_numpys_one_for_one(x):
    found = measure(x, FORMATS)
    wide = widened(x)
    assert counted(found) == direct(x)
    assert found.total == x.size
    assert found.zeros == np.sum(wide == 0)
    assert found.not_finite == np.sum(~np.isfinite(wide))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("source", ["float16", "float32"])
def test_shares_are_what_a_cast_would_do(name, source):
    x = every_float(np.dtype("u2"), np.float16) if source == "float16" else hard_float32()
    shares = measure(x, FORMATS).shares(name)
    fmt = number_formats.format_of(name)
    wide = widened(x)
    wide = wide[np.isfinite(wide) & (wide != 0)]
    with np.errstate(over="ignore"):
        after = wide.astype(np.float32).astype(name).astype(np.float64)
    flushed, over = after == 0, ~np.isfinite(after)
    small = (np.abs(wide) < fmt.smallest_normal) & ~flushed
    expected = [np.sum(part) / wide.size for part in (flushed, small, over)]
    assert list(shares) == expected
    assert name == "bfloat16" or source == "float32" or (shares.flush > 0) == (fmt.bits == 8)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-3, 7, 15])
def test_a_scale_flushes_what_the_scaled_numbers_lose(name, exponent):
    rng = np.random.default_rng(2)
    x = np.exp2(rng.uniform(-40, 10, 50_000)).astype(np.float32)
    x = np.concatenate([x, np.exp2(np.arange(-60, 20)).astype(np.float32)])  # exact ties
    scale = 2.0**exponent
    got = measure(x, FORMATS).shares(name, scale)
    exact = measure((x.astype(np.float64) * scale).astype(np.float32), FORMATS).shares(name)
    assert got == exact


def test_ties_at_the_thresholds_fall_as_rounding_has_them():
    x = np.array([2.0**-25, np.nextafter(np.float32(2.0**-25), np.float32(1))], np.float32)
    assert measure(x, FORMATS).shares("float16").flush == 0.5
    x = np.array([65519.99, 65520.0], np.float32)
    assert measure(x, FORMATS).shares("float16").overflow == 0.5
    x = np.array([464.0, np.nextafter(np.float32(464), np.float32(512))], np.float32)
    assert measure(x, FORMATS).shares("float8_e4m3fn").overflow == 0.5


def test_log_normal_gradients_flush_as_the_closed_form_says():
    from math import erf, log, sqrt

    mean, deviation = log(1e-7), 2.0
    x = np.exp(np.random.default_rng(3).normal(mean, deviation, 10**6)).astype(np.float32)
    found = measure(x, FORMATS)
    for scale in (1.0, 2.0**5):
        z = (log(2.0**-25) - log(scale) - mean) / deviation
        expected = 0.5 * (1 + erf(z / sqrt(2)))
        assert abs(found.shares("float16", scale).flush - expected) < 2e-3
    lost = found.shares("float16").flush
    assert found.recovered("float16", 32.0) == 1 - found.shares("float16", 32.0).flush / lost


def test_merging_is_measuring_together_and_scans_in_constant_memory():
    x = np.random.default_rng(4).normal(size=(5, 1000)).astype(np.float32) * 1e5
    whole = measure(x, FORMATS)

    @jax.jit
    def scanned(x):
        add = lambda found, row: (
            magnitudes.merge(found, magnitudes.measure(row, FORMATS)),
            None,
        )
        return jax.lax.scan(add, magnitudes.empty(FORMATS), x)[0]

    for a, b in zip(jax.tree.leaves(scanned(x)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    on_host = magnitudes.total_of([measure(row, FORMATS) for row in x], FORMATS)
    assert on_host.to_json() == whole.to_json()


def test_what_cannot_be_measured_is_refused_in_words():
    with pytest.raises(ValueError, match="floating-point"):
        magnitudes.measure(jnp.arange(3), FORMATS)
    with pytest.raises(ValueError, match="not measured"):
        measure(np.ones(3, np.float32), ("float16",)).shares("bfloat16")
    with pytest.raises(ValueError, match="power of two"):
        measure(np.ones(3, np.float32), ("float16",)).shares("float16", 3.0)
