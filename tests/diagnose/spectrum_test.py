"""Jacobians against dense singular values, Euler's identity against closed forms, stacks against both."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxmp.diagnose import spectrum
from jaxmp.nn import functional as F


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def _normal(seed, *shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype or float)


def _largest(jacobian):
    return np.linalg.svd(np.asarray(jacobian, np.float64), compute_uv=False)[0]


# What a Jacobian is.


def test_backpropagation_is_a_product_of_jacobians():
    """Backpropagation multiplies the layers' Jacobians; products with vectors never form them."""
    with jax.enable_x64(True):
        weights = [_normal(i, 12, 12) / math.sqrt(6) for i in range(4)]
        layers = [lambda h, w=w: jax.nn.relu(w @ h) for w in weights]

        def network(h):
            for layer in layers:
                h = layer(h)
            return h

        x, product = _normal(9, 12), np.eye(12)
        h = x
        for layer in layers:
            product = np.asarray(jax.jacfwd(layer)(h)) @ product
            h = layer(h)
        np.testing.assert_allclose(product, jax.jacfwd(network)(x), rtol=0, atol=1e-14)
        v = _normal(10, 12)
        np.testing.assert_allclose(v @ product, jax.vjp(network, x)[1](v)[0], rtol=0, atol=1e-14)
        stack = spectrum.stack_spectrum(layers, x)
        np.testing.assert_allclose(float(stack.whole), _largest(product), rtol=1e-12)


def test_the_jacobian_of_a_linear_layer_is_its_weight():
    """A linear layer's Jacobian is its weight matrix, bit for bit; Flax keeps the transpose."""
    weight = _normal(0, 7, 5)
    np.testing.assert_array_equal(jax.jacfwd(lambda x: weight @ x)(_normal(1, 5)), weight)
    dense = nn.Dense(7)
    params = dense.init(jax.random.key(2), jnp.zeros(5))
    jacobian = jax.jacfwd(lambda x: dense.apply(params, x))(_normal(1, 5))
    np.testing.assert_array_equal(jacobian, params["params"]["kernel"].T)


# Lanczos.


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (512, 512)])
def test_lanczos_finds_the_largest_singular_value_within_a_percent(shape):
    """Twelve steps come within 1% of a Gaussian matrix's norm; twice as many from every start."""
    matrix = _normal(0, *shape)

    def ratios(steps):
        measure = lambda seed: spectrum.lipschitz(
            lambda x: matrix @ x, jnp.ones(shape[1]), steps=steps, key=jax.random.key(seed)
        )
        return np.asarray(jax.jit(jax.vmap(measure))(np.arange(17)).values) / _largest(matrix)

    twelve, twice = ratios(12), ratios(24)  # the first is what is measured by default
    assert twelve[0] >= 0.99 and np.median(twelve) >= 0.99 and twice.min() >= 0.99
    assert max(twelve.max(), twice.max()) <= 1 + 1e-6


def test_every_value_is_a_lower_bound_and_enough_steps_give_all():
    """The Ritz values interlace from below; as many steps as rows give the whole spectrum."""
    with jax.enable_x64(True):
        x = _normal(0, 10)
        fn = lambda x: jnp.sin(_normal(1, 8, 10) @ jnp.exp(x))
        true = np.linalg.svd(jax.jacfwd(fn)(x), compute_uv=False)
        for steps in (3, 50):
            measure = lambda x, n=steps: spectrum.jacobian_spectrum(fn, x, steps=n).singular_values
            found = jax.jit(measure)(x)
            assert found.shape == (min(steps, 8),)
            assert np.all(np.diff(found) <= 0) and np.all(found <= true[: len(found)] * (1 + 1e-12))
        np.testing.assert_allclose(found, true, rtol=1e-10)


def test_trees_integers_and_sixteen_bits():
    """Any pytree of numbers in and out; what is not floating-point is held constant."""
    weight = _normal(0, 6, 4)
    x = {"a": _normal(1, 2), "b": [_normal(2, 1, 2)], "label": jnp.array([1, 0])}

    def fn(x):
        h = weight @ jnp.concatenate([x["a"], x["b"][0][0]])
        return {"out": jnp.tanh(h)[:4], "rest": (jnp.tanh(h)[4:], x["label"])}

    def flat(v):
        y = fn({"a": v[:2], "b": [v[None, 2:]], "label": x["label"]})
        return jnp.concatenate([y["out"], y["rest"][0]])

    want = _largest(jax.jacfwd(flat)(jnp.concatenate([x["a"], x["b"][0][0]])))
    np.testing.assert_allclose(float(spectrum.lipschitz(fn, x)), want, rtol=1e-5)
    np.testing.assert_allclose(float(spectrum.lipschitz(lambda x: x**2, 3.0)), 6, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sixteen_bit_function_is_measured_as_it_runs(dtype):
    """Vectors are combined in float32, so only the products round: the format's own precision."""
    weight = _normal(0, 96, 64).astype(dtype)
    found = spectrum.lipschitz(lambda x: weight @ x, jnp.ones(64, dtype))
    assert found.values.dtype == jnp.float32
    np.testing.assert_allclose(float(found), _largest(weight), rtol=float(jnp.finfo(dtype).eps))


@jax.jit
def _spectrum_of(matrix, magnitude):
    x = jnp.ones(matrix.shape[1])
    return spectrum.jacobian_spectrum(lambda x: (matrix @ x) * magnitude, x, probes=64)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["identity", "rank one", "decaying"])
def test_right_at_any_magnitude_and_where_the_space_is_exhausted(kind, magnitude):
    """Squares of these values leave float32's range, and Krylov spaces of dimension 1 end at once."""
    left, _, right = np.linalg.svd(np.asarray(_normal(0, 24, 16)), full_matrices=False)
    values = {"identity": np.ones(16), "rank one": np.eye(16)[0], "decaying": 4.0 ** -np.arange(16)}
    matrix = ((left * values[kind]) @ right).astype(np.float32)
    found = _spectrum_of(matrix, np.float32(magnitude))
    np.testing.assert_allclose(found.singular_values[0], magnitude, rtol=1e-5)
    want = np.linalg.norm(values[kind]) * magnitude
    assert abs(found.frobenius_norm - want) <= 4 * found.frobenius_error + 1e-5 * want


def test_zero_and_not_finite_jacobians_are_told_apart():
    """A constant function stretches nothing; NaN is not mistaken for it."""
    x = _normal(0, 5)
    constant = spectrum.jacobian_spectrum(lambda x: x * 0, x)
    assert not np.any(constant.singular_values) and constant.frobenius_norm == 0
    for bad in (jnp.nan, jnp.inf):
        assert np.isnan(spectrum.lipschitz(lambda x, bad=bad: x * bad, x).max)


@jax.custom_vjp
def _cube(x):
    return x**3


_cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


def _through_a_loop(x):
    block = jax.checkpoint(lambda h, w: (jnp.tanh(w @ h), jnp.sum(h)))
    return jax.lax.scan(block, x, _normal(3, 3, 6, 6))


PROGRAMS = {
    "custom_vjp": _cube,
    "scan and remat": _through_a_loop,
    "jit": jax.jit(lambda x: jax.nn.softmax(2 * x)),
    "cond": lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
    "custom_jvp": F.gelu,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_all_kinds_under_jit_and_vmap(name):
    """Loops, branches and custom derivatives, in either mode: what reverse mode can differentiate."""
    fn = PROGRAMS[name]
    x = _normal(4, 3, 6)
    jacobian = lambda x: jnp.concatenate(
        [j.reshape(-1, 6) for j in jax.tree.leaves(jax.jacrev(fn)(x))]
    )
    want = [_largest(row) for row in jax.jit(jax.vmap(jacobian))(x)]
    one = lambda x: spectrum.lipschitz(fn, x, steps=6)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x).values, want, rtol=1e-5)


def test_one_number_for_each_example():
    """A batch reports its largest, 99th percentile and median; the examples are independent."""
    x = _normal(0, 40, 3)
    gains = spectrum.lipschitz(lambda x: jnp.sum(x**2), x, batched=True)
    want = 2 * np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(gains.values, want, rtol=1e-5)
    np.testing.assert_allclose(gains.p99, np.quantile(want, 0.99), rtol=1e-5)
    np.testing.assert_allclose(gains.median, np.median(want), rtol=1e-5)
    assert f"max {want.max():.4g}" in str(gains) and "40 points" in str(gains)


# The Frobenius norm.


def test_frobenius_norm_of_layer_norm():
    """LayerNorm's |J|_F^2 is (D-2)/(v+e) + e^2/(v+e)^3; random signs estimate it within their error."""
    x, epsilon = _normal(0, 64), 1e-5
    v = np.var(np.asarray(x, np.float64)) + epsilon
    want = math.sqrt(62 / v + epsilon**2 / v**3)
    fn = lambda x: F.layer_norm(x, jnp.ones(64), jnp.zeros(64), epsilon)
    norm, error = spectrum.frobenius_norm(fn, x, probes=64)
    assert abs(norm - want) < 4 * error and error < 0.005 * want


def test_frobenius_error_is_the_one_that_theory_predicts():
    """Var |Jv|^2 = 2 (|J^T J|_F^2 - sum of its squared diagonal) for random signs v."""
    matrix = _normal(0, 20, 10)
    keys = jax.random.split(jax.random.key(1), 400)
    norm, error = jax.jit(
        jax.vmap(lambda k: spectrum.frobenius_norm(lambda x: matrix @ x, jnp.ones(10), key=k))
    )(keys)
    gram = np.asarray(matrix.T @ matrix, np.float64)
    variance = 2 * (np.sum(gram**2) - np.sum(np.diag(gram) ** 2)) / 8
    squares = np.asarray(norm, np.float64) ** 2
    # 400 repetitions know a mean within 5% of one deviation, and a variance within 7% of itself.
    np.testing.assert_allclose(squares.mean(), np.trace(gram), atol=0.2 * math.sqrt(variance))
    np.testing.assert_allclose(squares.var(), variance, rtol=0.28)
    reported = np.mean((2 * np.asarray(norm) * np.asarray(error)) ** 2)
    np.testing.assert_allclose(reported, variance, rtol=0.28)


# Slopes of single functions.


@pytest.mark.parametrize("radius", [1.0, 10.0, 100.0])
def test_the_square_has_slope_two_r_on_an_interval(radius):
    """y = x^2 has an unbounded slope: on [-R, R] the Lipschitz constant is 2R."""
    x = jnp.linspace(-radius, radius, 101)
    gains = spectrum.lipschitz(lambda x: x**2, x, batched=True)
    np.testing.assert_allclose(float(gains), 2 * radius, rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_stacked_squares_overflow_float16_early_and_have_degree_two_to_the_depth(depth):
    """L stacked squares leave float16 from 65504^(1/2^L) on: 255.9, 16, 4, 2, 1.4."""
    every = np.arange(0x3C00, 0x7C00, dtype=np.uint16).view(np.float16)

    def squares(x):
        for _ in range(depth):
            x = x * x
        return x

    first = every[~np.isfinite(np.asarray(squares(jnp.asarray(every))))].min()
    # Each rounding moves the threshold by less than 2^-11, and float16 is spaced by up to 2^-10.
    np.testing.assert_allclose(float(first), 65504 ** (1 / 2**depth), rtol=2**-9)
    if depth == 1:
        assert first == 256 and squares(jnp.float16(255.875)) == 65472
    found = spectrum.homogeneity_degree(squares, _normal(0, 8))
    np.testing.assert_allclose(found.degree, 2**depth, rtol=1e-5)


def test_softmax_stretches_by_at_most_one_half():
    """The softmax's Jacobian diag(p) - p p^T has norm at most 1/2, met by two equal logits."""
    scales = jnp.repeat(jnp.array([0.1, 1.0, 3.0, 10.0]), 50)[:, None]
    measure = jax.jit(lambda x: spectrum.lipschitz(jax.nn.softmax, x, batched=True, steps=6))
    gains = measure(_normal(0, 200, 6) * scales)
    assert gains.max <= 0.5 * (1 + 1e-6) and gains.max > 0.45
    pairs = jnp.tile(jnp.array([0.0, 0.0, -40.0, -40.0, -40.0, -40.0]), (200, 1))
    np.testing.assert_allclose(float(measure(pairs)), 0.5, rtol=1e-6)


# Attention.


def _dot_product_attention(x):
    return jax.nn.softmax(x @ x.T / math.sqrt(x.shape[-1])) @ x


@pytest.mark.parametrize("s", [1.0, 10.0, 100.0, 1e4])
def test_dot_product_attention_has_no_lipschitz_constant(s):
    """Tokens (0, s, -s) of one dimension give df_1/dx_1 = 1/3 + 2 s^2 / 3 (Kim et al. 2021)."""
    x = jnp.array([[0.0], [s], [-s]])
    slope = jax.jacrev(_dot_product_attention)(x)[0, 0, 0, 0]
    np.testing.assert_allclose(slope, 1 / 3 + 2 * s**2 / 3, rtol=1e-6)
    assert float(spectrum.lipschitz(_dot_product_attention, x)) >= slope * (1 - 1e-6)


def test_attention_beside_a_zero_token_grows_with_the_square_of_the_others():
    """One zero token among tokens of scale s: the local constant grows as s^2."""
    tokens = _normal(0, 6, 8).at[0].set(0)
    heads = lambda x: jnp.concatenate([_dot_product_attention(h) for h in jnp.split(x, 2, axis=1)])
    at = jax.jit(lambda s: spectrum.lipschitz(heads, s * tokens).max)
    np.testing.assert_allclose(at(1000.0) / at(100.0), 100, rtol=0.01)


def test_l2_attention_stays_below_its_bound():
    """Attention by distances with tied queries and keys has a constant (Kim et al. 2021, th. 3.2)."""
    tokens, width, heads = 8, 8, 2
    size = width // heads
    query, value = _normal(0, heads, width, size) / 3, _normal(1, heads, width, size) / 3
    output = _normal(2, width, width) / 3

    def attention(x):
        parts = []
        for w_q, w_v in zip(query, value):
            q = x @ w_q
            distance = jnp.sum(jnp.square(q[:, None] - q[None]), axis=-1)
            weights = jax.nn.softmax(-distance / math.sqrt(size))
            parts.append(weights @ x @ (w_q @ w_q.T / math.sqrt(size)) @ w_v)
        return jnp.concatenate(parts, axis=1) @ output

    # phi(x) = x exp(x + 1) = N - 1 is solved by Lambert's W.
    inverse = float(special.lambertw((tokens - 1) / math.e).real)
    products = sum(_largest(w_q) ** 4 * _largest(w_v) ** 2 for w_q, w_v in zip(query, value))
    bound = math.sqrt(tokens / size) * (4 * inverse + 1) * math.sqrt(products) * _largest(output)
    scales = jnp.array([1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e3])
    x = _normal(3, 4, 1, tokens, width) * scales[:, None, None]
    measure = jax.jit(lambda x: spectrum.lipschitz(attention, x, batched=True))
    gains = measure(x.reshape(-1, tokens, width))
    assert 0 < gains.max < bound


# Stacks of blocks.


def test_a_stack_stretches_by_at_most_the_product_of_its_blocks():
    """A product of Jacobians is bounded by the product of their norms; one vmap or a list agree."""
    weights = _normal(0, 3, 16, 16) / 4
    block = lambda w, h: h + jnp.tanh(w @ h)
    x = _normal(1, 16)
    scanned = jax.jit(lambda w, x: spectrum.stack_spectrum(block, x, w, steps=16))(weights, x)
    blocks = [lambda h, i=i: block(weights[i], h) for i in range(3)]
    listed = jax.jit(lambda x: spectrum.stack_spectrum(blocks, x, steps=16))(x)
    jacobian = jax.jit(jax.jacfwd(block, argnums=1))
    h, true = x, []
    for w in weights:
        true.append(_largest(jacobian(w, h)))
        h = block(w, h)
    np.testing.assert_allclose(scanned.blocks, true, rtol=1e-5)
    np.testing.assert_allclose(scanned.blocks, listed.blocks, rtol=1e-5)
    np.testing.assert_allclose(scanned.whole, listed.whole, rtol=1e-5)
    assert scanned.whole < scanned.product
    np.testing.assert_allclose(scanned.log10_product, math.log10(scanned.product), rtol=1e-5)
    measure = jax.vmap(lambda x: spectrum.stack_spectrum(block, x, weights, steps=4))
    examples = jax.jit(measure)(_normal(2, 4, 16))
    assert examples.blocks.shape == (4, 3) and "3 blocks" in str(examples)


def test_a_product_beyond_float32_is_still_told():
    """Sixty blocks that stretch by a thousand make 10^180."""
    stack = spectrum.stack_spectrum(lambda w, h: w * h, jnp.ones(3), jnp.full(60, 1e3))
    assert stack.product == jnp.inf
    np.testing.assert_allclose(stack.log10_product, 180, rtol=1e-5)
    assert "10^180" in str(stack)


@pytest.mark.parametrize("depth", [4, 16])
def test_weighted_residuals_keep_a_whole_network_below_e(depth):
    """x + f(x)/L with Lip(f) = 1 stretches by at most (1 + 1/L)^L <= e; plain residuals by up to 2^L."""
    weights = jnp.linalg.qr(_normal(0, depth, 12, 12))[0]
    block = lambda alpha, w, h: h + alpha * jnp.tanh(w @ h)
    measure = jax.jit(
        lambda alpha: spectrum.stack_spectrum(
            lambda w, h: block(alpha, w, h), 0.1 * _normal(1, 12), weights
        )
    )
    weighted, plain = measure(1 / depth), measure(1.0)
    assert np.all(weighted.blocks <= (1 + 1 / depth) * (1 + 1e-5))
    assert weighted.whole <= weighted.product * (1 + 1e-5) <= math.e * (1 + 1e-4)
    assert plain.whole >= weighted.whole * (1 - 1e-6) and plain.product <= 2**depth * (1 + 1e-4)


# Homogeneity.


def _mlp(activation, bias=0.0, depth=3):
    weights = [_normal(i, 16, 16) / 4 for i in range(depth)]

    def network(x):
        for w in weights:
            x = activation(w @ x + bias)
        return x

    return network


def _conv_network(x):
    convolve = lambda x, k: jax.lax.conv_general_dilated(
        x[None], k / 5, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    x = x.reshape(4, 4, 1) * jnp.ones((1, 1, 3))
    for i in range(3):
        x = x + convolve(jax.nn.relu(convolve(x, _normal(i, 3, 3, 3, 3))), _normal(9, 3, 3, 3, 3))
    return x


def _max_pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (2,), "VALID")


def _tokens(attention):
    return lambda x: attention(x.reshape(4, 4))


ONES, ZEROS = np.ones(16, np.float32), np.zeros(16, np.float32)
HOMOGENEOUS = {
    "linear": (lambda x: _normal(0, 16, 16) @ x, 1),
    "ReLU network": (_mlp(jax.nn.relu), 1),
    "residual ReLU": (lambda x: x + _mlp(jax.nn.relu)(x), 1),
    "residual convolutions": (_conv_network, 1),
    "square": (lambda x: x**2, 2),
    "cube": (lambda x: x**3, 3),
    "squared ReLU, depth 3": (_mlp(lambda x: jax.nn.relu(x) ** 2), 8),
    "LayerNorm": (lambda x: F.layer_norm(x, ONES, ZEROS, 1e-6), 0),
    "RMSNorm": (lambda x: x / jnp.sqrt(jnp.mean(x**2) + 1e-6), 0),
    "CenterNorm": (lambda x: 16 / 15 * (x - jnp.mean(x)), 1),
    "max pooling": (_max_pool, 1),
    "linear attention": (_tokens(lambda x: (x @ x.T) @ x), 3),
}
NOT_HOMOGENEOUS = {
    "ReLU network with biases": _mlp(jax.nn.relu, bias=0.5),
    "GELU network": _mlp(jax.nn.gelu),
    "tanh": jnp.tanh,
    "pre-LN residual": lambda x: x + _mlp(jax.nn.relu)(F.layer_norm(x, ONES, ZEROS, 1e-6)),
    "softmax attention": _tokens(_dot_product_attention),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous_functions_have_their_degree(name):
    """Convolutions, ReLU, pooling and residuals have degree 1, norms 0; Euler's identity says so."""
    fn, degree = HOMOGENEOUS[name]
    x = _normal(7, 16)
    found = spectrum.homogeneity_degree(fn, x)
    assert found.residual < 1e-5
    np.testing.assert_allclose(found.degree, degree, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fn(2 * x), 2.0**degree * fn(x), rtol=1e-5, atol=1e-5)
    assert str(found).startswith("homogeneous")


@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_non_homogeneous_functions_leave_a_residual(name):
    """Softmax attention, GELU, biases and norms beside a residual have no degree."""
    found = spectrum.homogeneity_degree(NOT_HOMOGENEOUS[name], _normal(7, 16))
    assert found.residual > 0.05
    assert str(found).startswith("not homogeneous")


def test_the_degree_in_the_parameters_is_the_depth():
    """A ReLU network without biases is homogeneous in its parameters, of a degree equal to its depth."""

    def apply(params):
        x = _normal(8, 16)
        for w in params:
            x = jax.nn.relu(w @ x)
        return x

    found = spectrum.homogeneity_degree(apply, [_normal(i, 16, 16) / 4 for i in range(4)])
    np.testing.assert_allclose(found.degree, 4, rtol=1e-6)
    assert found.residual < 1e-5


@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_the_degree_is_found_at_any_magnitude(magnitude):
    """The squares of these outputs are beyond float32."""
    found = spectrum.homogeneity_degree(lambda x: magnitude * jax.nn.relu(x), _normal(0, 16))
    np.testing.assert_allclose(found.degree, 1, rtol=1e-6)


# Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum.lipschitz(lambda x: x, jnp.arange(3)), "floating-point numbers on both"),
        (lambda: spectrum.lipschitz(lambda x: jnp.argmax(x), jnp.ones(3)), "return the float"),
        (lambda: spectrum.lipschitz(jnp.sin, jnp.ones(3), steps=0), "at least one step"),
        (lambda: spectrum.frobenius_norm(jnp.sin, jnp.ones(3), probes=1), "at least 2 probes"),
        (lambda: spectrum.stack_spectrum(lambda w, h: h, jnp.ones(3)), "needs stacked parameters"),
        (lambda: spectrum.stack_spectrum([], jnp.ones(3)), "at least one function"),
        (lambda: spectrum.stack_spectrum([jnp.sin], jnp.ones(3), {}), "without params"),
    ],
)
def test_refusals_are_sentences(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_people_read():
    found = spectrum.jacobian_spectrum(lambda x: 3 * x, jnp.ones(4))
    assert "at least 3," in str(found) and "6 +- 0" in str(found) and "local" in str(found)
    assert "local" in str(spectrum.lipschitz(jnp.sin, jnp.ones(4)))
