"""Each layer's Lipschitz statement against its exact Jacobian, its value against float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmp.nn import functional as F
from jaxmp.nn import lipschitz

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(seed, *shape, dtype="float32", scale=1.0):
    # Rounded by NumPy, since JAX would compile a program for each shape and dtype.
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(values.astype(jnp.dtype(dtype)))


def exact(x):
    return np.asarray(x).astype(np.float64)


@partial(jax.jit, static_argnums=0)
def jacobian(f, x, *arguments):
    return jax.jacfwd(lambda flat: f(flat.reshape(x.shape), *arguments).ravel())(x.ravel())


def largest_singular_value(f, x, *arguments):
    """Of the whole Jacobian of f(x, *arguments) in x, formed column by column."""
    return np.linalg.norm(exact(jacobian(f, x, *arguments)), ord=2)


@partial(jax.jit, static_argnums=0)
def value_and_radial_derivative(f, x, *arguments):
    return jax.jvp(lambda x: f(x, *arguments), (x,), (x,))


def euler(f, x, *arguments):
    """The degree k that fits J x = k f(x) best, and what is left over, relative to f."""
    out, tangent = (exact(y).ravel() for y in value_and_radial_derivative(f, x, *arguments))
    degree = tangent @ out / (out @ out)
    return degree, np.linalg.norm(tangent - degree * out) / np.linalg.norm(out)


class TestValues:
    """Against the formulas in NumPy's float64; results in the first argument's dtype."""

    def check(self, out, expected, dtype, tolerance=2.0):
        assert out.dtype == dtype
        unit = float(jnp.finfo(dtype).eps) * np.abs(expected).max()
        np.testing.assert_allclose(exact(out), expected, rtol=0, atol=tolerance * unit)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_norms(self, dtype):
        x, scale, bias = (normal(i, *s, dtype=dtype) for i, s in enumerate(((3, 64), (64,), (64,))))
        x64, scale64, bias64 = map(exact, (x, scale, bias))
        centred = (x64 - x64.mean(-1, keepdims=True)) * (64 / 63)
        self.check(lipschitz.center_norm(x, scale, bias), scale64 * centred + bias64, dtype)
        root = np.sqrt(np.square(x64).mean(-1, keepdims=True) + 1e-6)
        self.check(lipschitz.rms_norm(x, scale), scale64 * x64 / root, dtype)
        root = np.sqrt(np.square(x64).sum(-1, keepdims=True) + 1e-6)
        self.check(lipschitz.unit_rows(x), x64 / root, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_elementwise(self, dtype):
        x, y, alpha = (normal(i, *s, dtype=dtype) for i, s in enumerate(((3, 8), (3, 8), (8,))))
        expected = exact(x) + exact(alpha) * exact(y)
        self.check(lipschitz.weighted_residual(x, y, alpha), expected, dtype)
        self.check(lipschitz.soft_cap(x, 0.5), 0.5 * np.tanh(exact(x) / 0.5), dtype)

    @pytest.mark.parametrize("causal", (False, True))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cosine_attention(self, dtype, causal):
        q, k, v = (normal(i, 2, 5, 3, 8, dtype=dtype) for i in range(3))
        out = lipschitz.cosine_attention(q, k, v, causal=causal, nu=2.0)
        unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
        q64, k64, v64 = (unit(exact(x)) for x in (q, k, v))
        logits = 10 * np.einsum("btnh,bsnh->bnts", q64, k64)
        if causal:
            logits = np.where(np.tril(np.ones((5, 5), bool)), logits, -np.inf)
        weights = scipy.special.softmax(logits, -1)
        # Unit vectors rounded to 16 bits make logits of size 10 wrong by some units of last place.
        expected = 2 * np.einsum("bnts,bsnh->btnh", weights, v64)
        self.check(out, expected, dtype, tolerance=10.0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sums_over_large_values_do_not_overflow(self, dtype):
        x = jnp.full((1, 64), 60000, dtype)
        np.testing.assert_allclose(exact(lipschitz.unit_rows(x)), 1 / 8, rtol=1e-2)
        np.testing.assert_allclose(exact(lipschitz.rms_norm(x, jnp.ones(64, dtype))), 1, rtol=1e-2)

    def test_a_single_channel_has_no_centre(self):
        with pytest.raises(ValueError, match="1 channel is always zero; it takes two or more"):
            lipschitz.center_norm(jnp.ones((3, 1)), jnp.ones(1), jnp.zeros(1))


@pytest.mark.parametrize("function", ("center_norm", "rms_norm", "weighted_residual"))
def test_gradients_of_parameters_are_summed_in_float32(function):
    """Ones summed in bfloat16 stand still at 256."""
    x, half = jnp.tile(jnp.asarray([-1.0, 1.0], "bfloat16"), (5000, 1)), jnp.bfloat16
    calls = {
        "center_norm": lambda p: lipschitz.center_norm(x, p, jnp.zeros(2, half)) * x,
        "rms_norm": lambda p: lipschitz.rms_norm(x, p, 0.0) * x,
        "weighted_residual": lambda p: lipschitz.weighted_residual(x, jnp.abs(x), p),
    }
    grad = jax.grad(lambda p: jnp.sum(calls[function](p).astype("float32")))(jnp.ones(2, half))
    np.testing.assert_array_equal(
        exact(grad), exact(jnp.bfloat16(10000 if function == "center_norm" else 5000))
    )


class TestNorms:
    def test_center_norm_is_linear_with_the_constant_stated(self):
        x, ones, zeros = normal(0, 64), np.ones(64, "float32"), np.zeros(64, "float32")
        for scale in (ones, np.asarray(normal(1, 64))):
            call = lipschitz.center_norm, x, scale, zeros
            bound = 64 / 63 * np.abs(exact(scale)).max()
            assert largest_singular_value(*call) <= bound * (1 + 1e-6)
            assert euler(*call)[0] == pytest.approx(1, abs=1e-6)
        sigma = largest_singular_value(lipschitz.center_norm, x, ones, zeros)
        assert sigma == pytest.approx(64 / 63, rel=1e-6)

    @pytest.mark.parametrize("scale", (0.0, 1e-3, 1.0, 100.0))
    def test_rms_norm_stretches_by_one_over_the_root_mean_square(self, scale):
        x = normal(0, 64, scale=scale)
        sigma = largest_singular_value(lipschitz.rms_norm, x, np.ones(64, "float32"))
        expected = 1 / np.sqrt(np.square(exact(x)).mean() + 1e-6)
        assert sigma == pytest.approx(expected, rel=1e-5)

    def test_unit_rows_stretch_most_at_zero(self):
        for scale, expected in ((0.0, 1e3), (1e-3, None), (1.0, None)):
            x = normal(0, 16, scale=scale)
            expected = expected or 1 / np.sqrt(np.square(exact(x)).sum() + 1e-6)
            assert largest_singular_value(lipschitz.unit_rows, x) == pytest.approx(
                expected, rel=1e-4
            )


class TestCosineAttention:
    """Self-attention of 5 tokens, 8 wide, 2 heads, the first token zero, the others at a scale s."""

    kernels = tuple(normal(i, 8, 8, scale=8**-0.5) for i in range(3))
    tokens = np.asarray(normal(9, 5, 8))
    scales = (0.1, 1.0, 10.0, 1000.0)

    @classmethod
    @cache
    def attention(cls, attend):
        """A function of x and, if given, epsilon; always the same one, so that it is compiled once."""

        def attention(x, *epsilon):
            parts = ((x @ kernel).reshape(1, 5, 2, 4) for kernel in cls.kernels)
            return attend(*parts, causal=False, **dict(zip(("epsilon",), epsilon))).reshape(5, 8)

        return attention

    def sigmas(self, attend, epsilon):
        """At each of `scales`, or of epsilons with the last scale."""
        scales = np.float32(self.scales if epsilon.ndim == 0 else self.scales[-1:])
        tokens = self.tokens * (np.arange(5)[:, None] > 0)
        calls = ((scale * tokens, eps) for scale, eps in np.broadcast(scales, epsilon))
        return np.array([largest_singular_value(self.attention(attend), *call) for call in calls])

    @staticmethod
    def values_not_normalised(query, key, value, causal, epsilon=1e-6):
        query = 10 * value.shape[-1] ** 0.5 * lipschitz.unit_rows(query, epsilon)
        return F.attention(query, lipschitz.unit_rows(key, epsilon), value, causal=causal)

    def test_it_stays_bounded_where_the_released_variant_grows(self):
        epsilon = np.float32(1e-6)
        ours = self.sigmas(lipschitz.cosine_attention, epsilon)
        released = self.sigmas(self.values_not_normalised, epsilon)
        np.testing.assert_allclose(ours[2:], ours[1], rtol=0.02)
        assert 1e3 < ours[-1] < 1e4  # of the order of 1/sqrt(epsilon)
        np.testing.assert_allclose(released[1:] / released[:-1], (10, 10, 100), rtol=0.05)

    def test_the_bound_of_the_paper_holds_and_epsilon_is_the_knob(self):
        epsilons = np.array([1e-6, 1e-4, 1e-2])
        plateaus = self.sigmas(lipschitz.cosine_attention, np.float32(epsilons))
        q, k, v = (np.linalg.norm(exact(w), ord=2) for w in self.kernels)
        # Theorem 1 with softmax's constant 1/2 in its first two terms, nu = 1, tau = 10, N = 5.
        assert (plateaus < (5 * 4 * 10 * k + 4 * 10 * q + 2 * 5 * v) * epsilons**-0.5).all()
        np.testing.assert_allclose(plateaus[:-1] / plateaus[1:], 10, rtol=0.01)

    def test_degrees_in_eulers_sense(self):
        tokens = lambda scale: self.tokens * np.float32(scale)
        degree = lambda attend, scale: euler(self.attention(attend), tokens(scale))
        assert degree(lipschitz.cosine_attention, 10.0) == pytest.approx((0, 0), abs=1e-5)
        assert degree(self.values_not_normalised, 10.0) == pytest.approx((1, 0), abs=1e-5)
        assert degree(F.attention, 1.0)[1] > 0.05  # dot-product attention has none

    @pytest.mark.parametrize("scale", (1e-3, 1.0, 1e4))
    def test_rows_are_no_longer_than_nu(self, scale):
        q, k, v = (normal(i, 2, 5, 3, 8, scale=scale) for i in range(3))
        out = lipschitz.cosine_attention(q, k, v, causal=False, nu=3.0)
        assert np.linalg.norm(exact(out), axis=-1).max() <= 3 * (1 + 1e-6)


class TestQKNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", (1.0, 1e3))
    def test_logits_are_capped_by_the_parameters(self, scale, dtype):
        q, k = (normal(i, 64, 8, dtype=dtype, scale=scale) for i in range(2))
        gains = (jnp.asarray(np.full(8, gain, jnp.dtype(dtype))) for gain in (1.5, 0.5))
        q, k = lipschitz.qk_norm(q, k, *gains)
        logits = exact(q) @ exact(k).T / np.sqrt(8)
        cap = np.sqrt(8) * 1.5 * 0.5
        assert np.abs(logits).max() <= cap * (1 + 4 * float(jnp.finfo(dtype).eps))

    def test_the_cap_is_reached_by_parallel_vectors(self):
        q, k = lipschitz.qk_norm(
            *(normal(0, 1, 8),) * 2, *(jnp.asarray(np.ones(8, "float32")),) * 2
        )
        assert exact(q) @ exact(k).T / np.sqrt(8) == pytest.approx(np.sqrt(8), rel=1e-5)


class TestWeightedResidual:
    kernels = np.stack([np.linalg.qr(normal(i, 8, 8))[0] for i in range(48)])

    @staticmethod
    def stack(branch, x, depth, kernels):
        """`depth` layers by a loop, so that one program serves every depth."""
        alpha = jnp.full(8, 1 / depth, "float32")
        layer = lambda i, x: lipschitz.weighted_residual(x, branch(x, kernels[i]), alpha)
        return jax.lax.fori_loop(0, depth, layer, x)

    bent = partial(stack, lambda x, kernel: jnp.tanh(x @ kernel))
    turned = partial(stack, lambda x, kernel: x @ kernel)
    aligned = partial(stack, lambda x, kernel: x)

    @pytest.mark.parametrize("depth", (2, 12, 48))
    def test_a_stack_of_layers_of_constant_1_stretches_by_at_most_e(self, depth):
        worst = (1 + 1 / depth) ** depth
        for stack in (self.bent, self.turned):
            sigma = largest_singular_value(stack, normal(99, 8), depth, self.kernels)
            assert sigma <= worst <= np.e
        sigma = largest_singular_value(self.aligned, normal(99, 8), depth, self.kernels)
        assert sigma == pytest.approx(worst, rel=1e-5)


class TestDropPath:
    drop_path = staticmethod(jax.jit(lipschitz.drop_path))

    def test_rates_lie_on_a_line_with_exact_ends(self):
        for depth, last in ((2, 0.1), (7, 0.1), (12, 0.3), (49, 0.7)):
            rates = lipschitz.drop_path_rates(depth, last)
            assert len(rates) == depth and rates[0] == 0 and rates[-1] == last
            np.testing.assert_allclose(np.diff(rates), last / (depth - 1), rtol=1e-12)
        assert lipschitz.drop_path_rates(1, 0.5) == (0,)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_example_is_dropped_whole_or_divided_by_what_is_kept(self, dtype):
        x = normal(0, 64, 3, 5, dtype=dtype)
        out = self.drop_path(x, 0.25, jax.random.key(0))
        assert out.dtype == x.dtype
        dropped = ~exact(out).any((1, 2))
        assert 4 < dropped.sum() < 32
        kept = (exact(x) / 0.75).astype(out.dtype)[~dropped]
        np.testing.assert_allclose(
            exact(out)[~dropped], exact(kept), rtol=float(jnp.finfo(dtype).eps)
        )

    def test_the_mean_over_keys_is_the_input(self):
        x = np.ones((4096, 1), "float32")
        out = exact(self.drop_path(x, 0.2, jax.random.key(1)))
        deviation = np.sqrt(0.2 / 0.8 / 4096)
        assert abs(out.mean() - 1) < 4 * deviation

    def test_rate_zero_changes_nothing(self):
        x = normal(0, 64, 3, 5)
        np.testing.assert_array_equal(self.drop_path(x, 0.0, jax.random.key(0)), x)


class TestSigmaReparametrisation:
    kernel, inputs = normal(0, 48, 32), normal(1, 16, 48)
    gamma = jnp.asarray(np.float32(1.7))
    singular_pair = staticmethod(jax.jit(lipschitz.singular_pair))
    power_step = staticmethod(jax.jit(lipschitz.power_step))

    def settled(self, kernel):
        return self.power_step(kernel, self.singular_pair(kernel, jax.random.key(0), 20), 500)

    def test_the_norm_is_gamma(self):
        out = lipschitz.sigma_reparametrise(self.kernel, self.gamma, self.settled(self.kernel))
        assert np.linalg.norm(exact(out), ord=2) == pytest.approx(1.7, rel=1e-6)

    @staticmethod
    @jax.jit
    @jax.grad
    def gradient(kernel, gamma, inputs, pair):
        hat = lipschitz.sigma_reparametrise(kernel, gamma, pair)
        return jnp.sum(jnp.sin(inputs @ hat))

    @pytest.mark.parametrize("steps", (1, 500))
    def test_the_gradient_is_orthogonal_to_the_kernel_however_good_the_pair(self, steps):
        pair = self.singular_pair(self.kernel, jax.random.key(0), steps)
        grad = exact(self.gradient(self.kernel, self.gamma, self.inputs, pair))
        kernel = exact(self.kernel)
        cosine = (grad * kernel).sum() / np.linalg.norm(grad) / np.linalg.norm(kernel)
        assert abs(cosine) < 1e-6

    def test_the_gradient_is_that_of_the_closed_form(self):
        pair, cotangent = self.settled(self.kernel), normal(2, 48, 32)
        reparametrise = lambda w: lipschitz.sigma_reparametrise(w, self.gamma, pair)
        (grad,) = jax.jit(lambda w: jax.vjp(reparametrise, w)[1](cotangent))(self.kernel)
        u, s, vt = np.linalg.svd(exact(self.kernel))
        along = (exact(cotangent) * exact(self.kernel)).sum() / s[0]
        expected = 1.7 / s[0] * (exact(cotangent) - along * np.outer(u[:, 0], vt[0]))
        np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max())

    def test_one_step_for_each_update_follows_a_drifting_kernel(self):
        rng = np.random.default_rng(3)
        kernel = rng.normal(size=(48, 32))
        pair = self.singular_pair(kernel.astype("float32"), jax.random.key(0), 1)
        share = []
        singular_value = jax.jit(lipschitz.singular_value)
        for _ in range(200):
            kernel += 0.01 * rng.normal(size=kernel.shape)
            pair = self.power_step(kernel.astype("float32"), pair, 1)
            sigma = singular_value(kernel.astype("float32"), pair)
            share.append(float(sigma) / np.linalg.norm(kernel, ord=2))
        assert max(share) <= 1 + 1e-6
        assert min(share) > 0.7 and min(share[10:]) > 0.95 and share[-1] > 0.99

    @pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
    def test_16_bit_kernels_keep_float32_vectors(self, dtype):
        kernel = self.kernel.astype(dtype)
        pair = self.settled(kernel)
        out = lipschitz.sigma_reparametrise(kernel, self.gamma.astype(dtype), pair)
        assert {x.dtype for x in pair} == {jnp.dtype("float32")} and out.dtype == dtype
        norm = np.linalg.norm(exact(out), ord=2)
        assert norm == pytest.approx(
            float(self.gamma.astype(dtype)), rel=float(jnp.finfo(dtype).eps)
        )


class TestSoftCap:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_stays_within_the_cap_and_its_slope_within_one(self, dtype):
        x = np.linspace(-3e4, 3e4, 999).astype(jnp.dtype(dtype))
        call = jax.jit(
            lambda x: jax.jvp(lambda x: lipschitz.soft_cap(x, 30.0), (x,), (jnp.ones_like(x),))
        )
        out, slope = call(x)
        assert np.abs(exact(out)).max() <= 30
        assert exact(slope).min() >= 0 and exact(slope).max() <= 1

    def test_its_derivative_is_that_of_tanh(self):
        x = normal(0, 64, scale=20.0)
        slope = jax.jit(jax.grad(lambda x: jnp.sum(lipschitz.soft_cap(x, 5.0))))(x)
        np.testing.assert_allclose(slope, np.cosh(exact(x) / 5) ** -2, atol=2e-6)
        assert jax.jit(jax.grad(lipschitz.soft_cap), static_argnums=1)(np.float32(0), 30.0) == 1


class TestZLoss:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_value_and_gradient_are_the_closed_forms(self, dtype):
        logits = normal(0, 3, 4, 10, dtype=dtype, scale=3.0)
        value, grad = jax.jit(jax.value_and_grad(lipschitz.z_loss))(logits)
        log_z = scipy.special.logsumexp(exact(logits), -1, keepdims=True)
        expected = 2e-4 * log_z * scipy.special.softmax(exact(logits), -1) / 12
        assert value.dtype == jnp.float32 and grad.dtype == dtype
        np.testing.assert_allclose(value, 1e-4 * np.square(log_z).mean(), rtol=1e-6)
        unit = float(jnp.finfo(dtype).eps) * np.abs(expected).max()
        np.testing.assert_allclose(exact(grad), expected, rtol=0, atol=2 * unit)

    def test_it_is_zero_where_z_is_one(self):
        logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5]], "float32"))
        assert abs(float(jax.jit(lipschitz.z_loss)(logits))) < 1e-15
