"""The simulator of narrow formats against ml_dtypes' casts, and what it shows of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.numerics import formats, rounding

SIGNED = [name for name, fmt in formats.FORMATS.items() if fmt.signed]
SIMULATED = [name for name in SIGNED if name not in ("float64", "float32", "tf32")]

# One program for each format and shape: op by op, each of them would compile a dozen. All of it is integer
# arithmetic, which gives the same bits either way.
quantize = jax.jit(rounding.quantize, static_argnames=("reserved", "subnormals", "saturate"))
simulate_cast = jax.jit(rounding.simulate_cast, static_argnames=("format", "saturate"))


def float32_samples(size=70_000, seed=0):
    """3 size float32 numbers and edges: uniform bits (all exponents), moderate ones, ties."""
    rng = np.random.default_rng(seed)
    uniform = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    moderate = (rng.normal(size=size) * 2.0 ** rng.integers(-30, 20, size)).astype(np.float32)
    ties = (rng.integers(-64, 65, size) * 2.0 ** rng.integers(-30, 14, size)).astype(np.float32)
    edges = np.array([0, np.inf, np.nan, 65519.99, 65520, 464, 464.01, 248, 1e-45], np.float32)
    return np.concatenate([uniform, moderate, ties, edges, -edges])


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize("name", SIMULATED)
def test_no_mismatch_with_ml_dtypes_in_210_000_values(name):
    x = float32_samples()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.dtype(name)).astype(np.float32)
    ours = np.asarray(simulate_cast(x, name))
    number = ~np.isnan(x)  # of NaN, only that it stays NaN
    assert np.isnan(ours[~number]).all()
    np.testing.assert_array_equal(np.isnan(ours[number]), np.isnan(expected[number]))
    number &= ~np.isnan(ours)
    np.testing.assert_array_equal(bits(ours[number]), bits(expected[number]))


def test_widths_may_be_traced_and_one_compilation_serves_all():
    x = float32_samples()
    traces = []
    sweep = jax.jit(lambda *args: traces.append(args) or rounding.quantize(*args))
    for name in ("float16", "bfloat16", "tf32", "float8_e5m2", "float8_e4m3", "float8_e3m4"):
        fmt = formats.FORMATS[name]
        traced = sweep(x, fmt.exponent_bits, fmt.mantissa_bits)
        np.testing.assert_array_equal(bits(traced), bits(simulate_cast(x, name)))
    assert len(traces) == 1


def test_widths_broadcast_and_vmap():
    x = np.linspace(-3.0, 3.0, 64, dtype=np.float32)
    widths = np.arange(1, 11)
    rows = jax.jit(jax.vmap(lambda m: rounding.quantize(x, 5, m)))(widths)
    np.testing.assert_array_equal(rows, quantize(x[None], 5, widths[:, None]))
    errors = np.max(np.abs(rows - x), axis=1)
    assert np.all(np.diff(errors) < 0)


@pytest.mark.parametrize("e", range(2, 9))
@pytest.mark.parametrize("m", [0, 1, 5, 10, 23])
def test_agrees_with_encode_for_any_width(e, m):
    x = float32_samples(500, seed=e * 100 + m)
    x[np.isnan(x)] = 0  # not left out, so that all have one shape
    for reserved in ("ieee",) if e == 8 or m == 0 else ("ieee", "nan", "none"):
        fmt = formats.FloatFormat("any", e, m, 2 ** (e - 1) - 1, reserved)
        expected = formats.decode(formats.encode(x, fmt), fmt).astype(np.float32)
        ours = quantize(x, e, m, reserved=reserved)
        np.testing.assert_array_equal(ours, expected)
    # Above the widths are traced; known ones are compared with the range, and these lie in it.
    assert jax.eval_shape(lambda x: rounding.quantize(x, e, m), x).shape == x.shape


def test_full_width_is_the_identity():
    x = float32_samples(5_000)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(bits(quantize(x, 8, 23)), bits(x))


def test_float64_is_rounded_once():
    with jax.enable_x64(True):
        x = (
            np.random.default_rng(3).normal(size=10_000)
            * 2.0 ** np.arange(-80, 80).repeat(63)[:10_000]
        )
        x[0] = 1 + 2.0**-8 + 2.0**-30  # by way of float32 this is a tie
        for name in ("float32", "tf32", "bfloat16", "float16", "float8_e4m3fn"):
            ours = simulate_cast(x, name)
            assert ours.dtype == jnp.float64
            np.testing.assert_array_equal(ours, formats.decode(formats.encode(x, name), name))
        same = simulate_cast(x, "float64")
        np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_arrays_keep_their_dtype(dtype):
    x = jnp.asarray(np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype)))
    ours = simulate_cast(x, "float8_e5m2")
    assert ours.dtype == x.dtype
    codes = np.arange(2**16, dtype=np.uint16)
    wide = formats.decode(codes, dtype)
    expected = formats.decode(formats.encode(wide, "e5m2"), "e5m2")
    np.testing.assert_array_equal(np.asarray(ours).astype(np.float64), expected)


def test_out_of_range():
    x = np.array([500.0, -500.0, np.inf], np.float32)
    np.testing.assert_array_equal(simulate_cast(x, "e4m3fn"), [np.nan] * 3)
    np.testing.assert_array_equal(simulate_cast(x, "e4m3"), [np.inf, -np.inf, np.inf])
    np.testing.assert_array_equal(simulate_cast(x, "f4e2m1fn"), [6, -6, 6])
    kept = simulate_cast(x, "e4m3fn", saturate=True)
    np.testing.assert_array_equal(kept, [448, -448, 448])


def test_subnormals_can_be_flushed_after_rounding():
    x = np.array([2.0**-14, 2.0**-14 * (1 - 2.0**-13), 2.0**-15, -(2.0**-24)], np.float32)
    flushed = quantize(x, 5, 10, subnormals=False)
    np.testing.assert_array_equal(flushed, [2.0**-14, 2.0**-14, 0, 0])
    np.testing.assert_array_equal(quantize(x, 5, 10), [2.0**-14, 2.0**-14, 2.0**-15, -(2.0**-24)])


def test_derivative_is_straight_through():
    x = jnp.array([0.1, -3.0, 1e5])
    loss = lambda x, m: jnp.sum(rounding.quantize(x, 5, m) * jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(jax.grad(loss)(x, 2), [1, 2, 3])
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x, 2), [1, 2, 3])
    _, tangent = jax.jvp(lambda x: rounding.simulate_cast(x, "e4m3fn"), (x,), (x,))
    np.testing.assert_array_equal(tangent, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rounding.quantize(jnp.arange(3), 5, 2), "this one is int32"),
        (lambda: rounding.quantize(jnp.ones(3), 9, 2), "exponent_bits is 9; .* must be 2 to 8"),
        (lambda: rounding.quantize(jnp.ones(3), 5, 24), "mantissa_bits is 24; .* must be 0 to 23"),
        (lambda: rounding.quantize(jnp.ones(3), 5, 2, reserved="inf"), "reserved is 'inf'"),
        (lambda: rounding.simulate_cast(jnp.ones(3), "e8m0fnu"), "float8_e8m0fnu is unsigned"),
        (lambda: rounding.simulate_cast(jnp.ones(3), "float64"), "exponent_bits is 11"),
        (lambda: rounding.simulate_cast(jnp.ones(3), "e4m4"), "not a floating-point format"),
    ],
)
def test_mistakes_are_answered_in_sentences(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        x = np.ones(3, jnp.bfloat16)
        assert quantize(x, 4, np.int32(3)).dtype == jnp.bfloat16


def test_reduce_precision_is_no_simulator():
    # The reason for this module: lax.reduce_precision flushes what a float16 subnormal is.
    codes = np.arange(2**16, dtype=np.uint16)
    values = formats.decode(codes, "f16")
    values = values[np.isfinite(values)].astype(np.float32)
    assert values.size == 63488
    reduced = jax.lax.reduce_precision(values, exponent_bits=5, mantissa_bits=10)
    assert int((np.asarray(reduced) != values).sum()) == 2046
    np.testing.assert_array_equal(bits(quantize(values, 5, 10)), bits(values))


@pytest.mark.slow
def test_training_needs_exponent_bits_more_than_mantissa_bits():
    """Digits MLP with weights, activations and cotangents rounded, no loss scaling.

    Without any mantissa bit it still learns to 90%; without the fifth exponent bit it does not.
    """
    accuracy = dict(zip(GRID, np.asarray(_digits_accuracy(GRID)), strict=True))
    assert accuracy[8, 23] > 0.96
    assert accuracy[5, 10] > accuracy[8, 23] - 0.02
    assert accuracy[5, 0] > 0.9 and accuracy[8, 0] > 0.9
    assert accuracy[5, 3] > 0.95
    assert accuracy[4, 3] < 0.5 and accuracy[4, 0] < 0.3


GRID = ((8, 23), (5, 10), (5, 3), (5, 0), (8, 0), (4, 3), (4, 0))


@jax.custom_vjp
def _rounded(x, e, m):
    return quantize(x, e, m)


_rounded.defvjp(
    lambda x, e, m: (quantize(x, e, m), (e, m)),
    lambda widths, g: (quantize(g, *widths), None, None),
)


def _digits_accuracy(grid, steps=250, batch=128):
    """Test accuracy for each (exponent bits, mantissa bits), all trained at once under vmap."""
    import optax
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:-360], order[-360:]
    sizes = (64, 96, 96, 96, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    params = [
        (jax.random.normal(k, (a, b)) * np.sqrt(2 / a), jnp.zeros(b))
        for k, a, b in zip(keys, sizes, sizes[1:])
    ]
    rows = np.random.default_rng(1).choice(train, (steps, batch))
    tx = optax.adam(2e-3)

    def logits(params, x, e, m):
        q = lambda v: _rounded(v, e, m)
        x = q(x)
        for i, (w, b) in enumerate(params):
            x = q(x @ q(w) + q(b))
            x = jax.nn.relu(x) if i < len(params) - 1 else x
        return x

    def loss(params, rows, e, m):
        scores = logits(params, jnp.asarray(images)[rows], e, m)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.asarray(labels)[rows])
        return losses.mean()

    @jax.jit
    @jax.vmap
    def accuracy(e, m):
        def step(carry, rows):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, rows, e, m), state)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(rows))
        return jnp.mean(logits(trained, images[test], e, m).argmax(-1) == labels[test])

    return accuracy(*np.array(grid).T)
