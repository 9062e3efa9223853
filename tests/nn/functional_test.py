"""The arithmetic of the models against plain float64 references."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

from jaxmp.nn import functional as F

DTYPES = ("float32", "bfloat16", "float16")
HALF = ("bfloat16", "float16")


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(seed, *shape, dtype="float32", scale=1.0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(values, dtype)


def exact(x):
    return np.asarray(x).astype(np.float64)


def assert_close_ulp(actual, expected, max_ulp):
    """Compares with float64 values rounded to the actual dtype."""
    chex.assert_trees_all_close_ulp(actual, jnp.asarray(expected, actual.dtype), maxulp=max_ulp)


def value_and_cotangents(f, arguments, cotangent):
    """(value, cotangents of the arguments) as one program, which compiles sooner than its operations."""

    def both(arguments, cotangent):
        out, pullback = jax.vjp(f, *arguments)
        return (out, *pullback(cotangent.astype(out.dtype)))

    return jax.jit(both)(arguments, cotangent)


def product_dtypes(jaxpr):
    """Gives (operands' dtypes, result's dtype) of every product in a jaxpr, inner ones included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(tuple(str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)))
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += product_dtypes(inner)
    return found


class TestLlamasPieces:
    """Values are held to float64 by `models/llama_test.py`; here their derivatives and 16-bit results."""

    @pytest.mark.parametrize(
        ("fn", "shapes"),
        [(F.rms_norm, [(3, 8), (8,)]), (F.swiglu, [(3, 8), (3, 8)]), (F.rotary, [(2, 5, 2, 4)])],
        ids=["rms_norm", "swiglu", "rotary"],
    )
    def test_both_modes_agree_with_differences(self, fn, shapes):
        arguments = [normal(i, *shape) for i, shape in enumerate(shapes)]
        check_grads(jax.jit(fn), arguments, order=1, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)

    @pytest.mark.parametrize("dtype", HALF)
    def test_16_bit_results_are_float64_ones_rounded(self, dtype):
        x, y = normal(0, 64, 32, dtype=dtype), normal(1, 64, 32, dtype=dtype)
        gate, up = exact(x), exact(y)
        assert_close_ulp(F.swiglu(x, y), gate * scipy.special.expit(gate) * up, 1)
        root = np.sqrt((gate**2).mean(-1, keepdims=True) + 1e-5)
        assert_close_ulp(F.rms_norm(x, y[0]), gate / root * up[0], 1)

    def test_queries_that_share_a_key_are_those_of_repeated_keys(self):
        q, k, v = normal(0, 2, 5, 6, 4), normal(1, 2, 5, 2, 4), normal(2, 2, 5, 2, 4)
        attend = jax.jit(lambda q, k, v: F.attention(q, k, v, causal=True))
        each = [
            attend(*(np.asarray(x)[:, :, j : j + 1] for x, j in ((q, i), (k, i // 3), (v, i // 3))))
            for i in range(6)
        ]
        together = attend(q, k, v)
        np.testing.assert_allclose(together, np.concatenate(each, axis=2), atol=1e-6)


class TestSoftmaxCrossEntropy:
    targets = jnp.array([[0, 4, 2], [1, 1, 3]])

    def reference(self, logits):
        z, t = exact(logits), np.asarray(self.targets)
        picked = np.take_along_axis(z, t[..., None], -1)[..., 0]
        return np.mean(scipy.special.logsumexp(z, axis=-1) - picked)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", (1.0, 30.0, 2e4))
    def test_value_is_that_of_float64(self, dtype, scale):
        logits = normal(0, 2, 3, 5, dtype=dtype, scale=scale)
        loss = F.softmax_cross_entropy(logits, self.targets)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, self.reference(logits), rtol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradient_is_that_of_float64_in_the_dtype_of_the_logits(self, dtype):
        logits = normal(1, 2, 3, 5, dtype=dtype)
        grad = jax.jit(jax.grad(F.softmax_cross_entropy))(logits, self.targets)
        expected = scipy.special.softmax(exact(logits), -1) - np.eye(5)[np.asarray(self.targets)]
        assert grad.dtype == logits.dtype
        np.testing.assert_allclose(
            exact(grad), expected / 6, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-7
        )

    def test_both_modes_agree_with_differences(self):
        logits = normal(2, 2, 3, 5)
        loss = lambda z: F.softmax_cross_entropy(z, self.targets)
        check_grads(jax.jit(loss), (logits,), order=1, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)

    def test_the_largest_float16_values_stay_finite(self):
        logits = jnp.asarray([[65504.0, -65504.0]], jnp.float16)
        assert F.softmax_cross_entropy(logits, jnp.array([1])) == 131008.0

    def test_shapes_that_do_not_fit_are_named(self):
        with pytest.raises(ValueError, match=r"\(3, 2\).*expected integers of shape \(2, 3\)"):
            F.softmax_cross_entropy(jnp.zeros((2, 3, 5)), self.targets.T)


class TestDot:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_value_and_gradients_are_those_of_float64(self, dtype):
        x, y = normal(0, 7, 64, dtype=dtype), normal(1, 64, 5, dtype=dtype)
        cotangent = normal(2, 7, 5, dtype=dtype)
        product = lambda x, y: F.dot("ik,kj->ij", x, y, "float32")
        out, dx, dy = value_and_cotangents(product, (x, y), cotangent)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, exact(x) @ exact(y), rtol=1e-5, atol=1e-5)
        tolerance = {"rtol": float(jnp.finfo(dtype).eps), "atol": 1e-5}
        np.testing.assert_allclose(exact(dx), exact(cotangent) @ exact(y).T, **tolerance)
        np.testing.assert_allclose(exact(dy), exact(x).T @ exact(cotangent), **tolerance)

    @pytest.mark.parametrize("dtype", HALF)
    def test_backward_products_have_16_bit_operands(self, dtype):
        def loss(product, x, y):
            return jnp.sum(jnp.sin(product(x, y)))

        ours = lambda x, y: F.dot("ik,kj->ij", x, y, "float32")
        plain = lambda x, y: jnp.einsum("ik,kj->ij", x, y, preferred_element_type="float32")
        x, y = normal(0, 7, 64, dtype=dtype), normal(1, 64, 5, dtype=dtype)
        trace = lambda f: product_dtypes(jax.make_jaxpr(jax.grad(loss, (1, 2)), 0)(f, x, y).jaxpr)
        assert all(operands == [dtype, dtype] for *operands, _ in trace(ours))
        assert any("float32" in operands for *operands, _ in trace(plain))  # what is avoided

    def test_forward_mode_and_second_derivatives(self):
        x, y = normal(0, 3, 4), normal(1, 4, 2)
        f = lambda x, y: jnp.sum(jnp.sin(F.dot("ik,kj->ij", x, y)))
        check_grads(jax.jit(f), (x, y), order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)

    def test_operands_of_two_dtypes_are_promoted(self):
        out = F.dot("i,i->", normal(0, 3, dtype="bfloat16"), normal(1, 3))
        assert out.dtype == jnp.float32


class TestLongSums:
    """Ones summed in bfloat16 stand still at 256."""

    def test_gradient_of_a_bias(self):
        x = jnp.zeros((8, 4000, 3), jnp.bfloat16)
        loss = lambda b: jnp.sum(F.add_bias(x, b).astype(jnp.float32))
        grad = jax.jit(jax.grad(loss))(jnp.zeros(3, jnp.bfloat16))
        np.testing.assert_array_equal(exact(grad), 32000)

    def test_gradient_of_an_embedding(self):
        table, tokens = jnp.zeros((4, 3), jnp.bfloat16), jnp.zeros(5000, jnp.int32)
        loss = lambda lookup, table: jnp.sum(lookup(table).astype(jnp.float32))
        ours = jax.jit(jax.grad(lambda t: loss(lambda t: F.embed(t, tokens), t)))(table)
        plain = jax.jit(jax.grad(lambda t: loss(lambda t: t[tokens], t)))(table)
        np.testing.assert_array_equal(exact(ours)[0], exact(jnp.bfloat16(5000)))
        np.testing.assert_array_equal(exact(plain)[0], 256)  # what is avoided
        np.testing.assert_array_equal(exact(ours)[1:], 0)

    def test_gradient_of_a_norm(self):
        x = jnp.tile(jnp.asarray([-1.0, 1.0], jnp.bfloat16), (5000, 1))
        loss = lambda b: jnp.sum(F.layer_norm(x, jnp.ones(2, x.dtype), b).astype(jnp.float32))
        grad = jax.jit(jax.grad(loss))(jnp.zeros(2, x.dtype))
        np.testing.assert_array_equal(exact(grad), exact(jnp.bfloat16(5000)))


class TestElementwise:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gelu_is_that_of_float64(self, dtype):
        x = jnp.asarray(np.linspace(-6, 6, 1001), dtype)
        z = exact(x)
        argument = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
        expected = 0.5 * z * (1 + np.tanh(argument))
        eps = float(jnp.finfo(dtype).eps)
        tolerance = {"rtol": 32 * eps if dtype == "float32" else eps}
        tolerance["atol"] = 2.0**-24 if dtype == "float16" else 0.0  # its smallest number
        np.testing.assert_allclose(exact(F.gelu(x)), expected, **tolerance)
        slope = 0.5 * (1 + np.tanh(argument)) + 0.5 * z / np.cosh(argument) ** 2 * np.sqrt(
            2 / np.pi
        ) * (1 + 3 * 0.044715 * z**2)
        grad = jax.jit(jax.vmap(jax.grad(F.gelu)))(x)
        assert grad.dtype == x.dtype
        tolerance["atol"] += 1e-6  # where the slope crosses zero
        np.testing.assert_allclose(exact(grad), slope, **tolerance)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layer_norm_and_its_gradients_are_those_of_float64(self, dtype):
        x = normal(0, 3, 5, 32, dtype=dtype, scale=3.0) + jnp.asarray(2.0, dtype)
        scale, bias = normal(1, 32, dtype=dtype), normal(2, 32, dtype=dtype)
        cotangent = normal(3, 3, 5, 32, dtype=dtype)
        found = value_and_cotangents(F.layer_norm, (x, scale, bias), cotangent)
        z, g, b, c = exact(x), exact(scale), exact(bias), exact(cotangent)
        inverse = 1 / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
        unit = (z - z.mean(-1, keepdims=True)) * inverse
        dunit = c * g
        dx = inverse * (
            dunit - dunit.mean(-1, keepdims=True) - unit * (unit * dunit).mean(-1, keepdims=True)
        )
        expected = (unit * g + b, dx, (c * unit).sum((0, 1)), c.sum((0, 1)))
        eps = float(jnp.finfo(dtype).eps)
        for actual, reference in zip(found, expected):
            assert actual.dtype == x.dtype
            np.testing.assert_allclose(exact(actual), reference, rtol=2 * eps, atol=3e-6)

    def test_layer_norm_output_follows_x_not_its_parameters(self):
        x = normal(0, 2, 8, dtype="bfloat16")
        assert F.layer_norm(x, jnp.ones(8), jnp.zeros(8)).dtype == jnp.bfloat16

    def test_layer_norm_of_squares_beyond_float16(self):
        x = jnp.asarray([[-60000.0, 60000.0]], jnp.float16)
        np.testing.assert_array_equal(
            exact(F.layer_norm(x, jnp.ones(2, x.dtype), jnp.zeros(2, x.dtype))), [[-1, 1]]
        )

    def test_all_rules_in_both_modes(self):
        x, scale, bias = normal(0, 4, 6), normal(1, 6), normal(2, 6)
        for f, arguments in (
            (F.gelu, (x,)),
            (F.add_bias, (x, bias)),
            (F.layer_norm, (x, scale, bias)),
            (lambda t: F.embed(t, jnp.array([0, 2, 2])), (x,)),
        ):
            check_grads(jax.jit(f), arguments, order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


def attention_reference(q, k, v, causal):
    """Gives the output and a function of its cotangent giving those of q, k, v, in float64."""
    q, k, v = map(exact, (q, k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if causal:
        t, s = logits.shape[-2:]
        logits = np.where(np.tril(np.ones((t, s), bool), s - t), logits, -np.inf)
    p = scipy.special.softmax(logits, -1)

    def pullback(c):
        c = exact(c)
        dp = np.einsum("btnh,bsnh->bnts", c, v)
        dlogits = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
        return (
            np.einsum("bnts,bsnh->btnh", dlogits, k),
            np.einsum("bnts,btnh->bsnh", dlogits, q),
            np.einsum("bnts,btnh->bsnh", p, c),
        )

    return np.einsum("bnts,bsnh->btnh", p, v), pullback


class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("causal,queries", ((False, 6), (True, 6), (True, 4)))
    def test_value_and_gradients_are_those_of_float64(self, dtype, causal, queries):
        q = normal(0, 2, queries, 3, 8, dtype=dtype)
        k, v = normal(1, 2, 6, 3, 8, dtype=dtype), normal(2, 2, 6, 3, 8, dtype=dtype)
        cotangent = normal(3, *q.shape, dtype=dtype)
        attend = lambda q, k, v: F.attention(q, k, v, causal=causal)
        found = value_and_cotangents(attend, (q, k, v), cotangent)
        expected, expected_pullback = attention_reference(q, k, v, causal)
        eps = float(jnp.finfo(dtype).eps)
        for actual, reference in zip(found, (expected, *expected_pullback(cotangent))):
            assert actual.dtype == q.dtype
            np.testing.assert_allclose(exact(actual), reference, atol=4 * eps, rtol=4 * eps)

    def test_both_modes(self):
        q, k, v = (normal(i, 1, 4, 2, 3) for i in range(3))
        attend = lambda q, k, v: F.attention(q, k, v, causal=True)
        check_grads(jax.jit(attend), (q, k, v), order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)

    def test_agrees_with_jax(self):
        q, k, v = (normal(i, 2, 8, 2, 4) for i in range(3))
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        np.testing.assert_allclose(F.attention(q, k, v, causal=True), expected, atol=1e-6)

    def test_products_beyond_float16_do_not_overflow(self):
        q = k = jnp.full((1, 2, 1, 64), 100.0, jnp.float16)  # q.k = 640,000
        v = normal(0, 1, 2, 1, 64, dtype="float16")
        assert jnp.all(jnp.isfinite(F.attention(q, k, v, causal=True)))

    def test_an_unknown_implementation_is_named(self):
        x = jnp.zeros((1, 2, 1, 8))
        with pytest.raises(ValueError, match="'flash' is unknown; choose one of xla, cudnn"):
            F.attention(x, x, x, causal=True, implementation="flash")

    def test_cudnn_refuses_float32(self):
        x = jnp.zeros((1, 2, 1, 8))
        with pytest.raises(ValueError, match="takes float16 or bfloat16, not float32"):
            F.attention(x, x, x, causal=True, implementation="cudnn")


class TestScaleGradient:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_forward_is_the_identity_and_the_cotangent_is_scaled(self, dtype):
        x = normal(0, 5, dtype=dtype)
        out, pullback = jax.vjp(lambda x: F.scale_gradient(x, 0.25), x)
        chex.assert_trees_all_equal(out, x)
        chex.assert_trees_all_equal(pullback(x)[0], x * jnp.asarray(0.25, dtype))

    def test_a_small_factor_flushes_float16_alone(self):
        def gradient(dtype):
            f = lambda x: F.scale_gradient(x, 2.0**-20) * jnp.asarray(2.0**-6, dtype)
            return float(jax.grad(f)(jnp.ones([], dtype)))

        assert gradient("float16") == 0
        assert gradient("bfloat16") == gradient("float32") == 2.0**-26


def test_accuracy():
    logits = jnp.asarray([[[1.0, 2], [3, 0]], [[0, 1], [0, 5]]], jnp.bfloat16)
    share = F.accuracy(logits, jnp.array([[1, 0], [0, 1]]))
    assert share.dtype == jnp.float32 and share == 0.75


def test_wide_dtype():
    assert F.wide_dtype("float16") == F.wide_dtype("bfloat16") == jnp.float32
    assert F.common_dtype("float16", "bfloat16") == jnp.float32
