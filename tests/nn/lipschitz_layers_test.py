"""The Linen and the NNX module of each function give what the function gives, and train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxmp.nn.nnx as jnnx
from jaxmp.nn import functional as F
from jaxmp.nn import init, layers, linen, lipschitz
from jaxmp.nn import lipschitz_layers as in_linen
from jaxmp.nn import lipschitz_nnx as in_nnx
from jaxmp.training import step as training
from jaxmp.training.state import TrainState

ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)).astype("float32"))
BATCH = {"inputs": ROWS, "targets": (ROWS[:, :4].sum(1) > 0).astype("int32")}
OTHER = ROWS[::-1]

LAYERS = {
    "center_norm": (in_linen.CenterNorm(), in_nnx.CenterNorm(8), (ROWS,)),
    "rms_norm": (in_linen.RMSNorm(), in_nnx.RMSNorm(8), (ROWS,)),
    "qk_norm": (in_linen.QKNorm(), in_nnx.QKNorm(8), (ROWS, OTHER)),
    "residual": (in_linen.WeightedResidual(0.25), in_nnx.WeightedResidual(8, 0.25), (ROWS, OTHER)),
    "soft_cap": (in_linen.SoftCap(0.5), in_nnx.SoftCap(0.5), (ROWS,)),
    "z_loss": (in_linen.ZLoss(), in_nnx.ZLoss(), (ROWS,)),
}
AT_THE_START = {
    "center_norm": lambda x: lipschitz.center_norm(x, jnp.ones(8), jnp.zeros(8)),
    "rms_norm": lambda x: lipschitz.rms_norm(x, jnp.ones(8)),
    "qk_norm": lambda q, k: lipschitz.qk_norm(q, k, jnp.ones(8), jnp.ones(8)),
    "residual": lambda x, y: lipschitz.weighted_residual(x, y, jnp.full(8, 0.25)),
    "soft_cap": lambda x: lipschitz.soft_cap(x, 0.5),
    "z_loss": lipschitz.z_loss,
}


@pytest.mark.parametrize("name", LAYERS)
def test_modules_give_what_the_function_gives(name):
    module, nnx_module, arguments = LAYERS[name]
    expected = AT_THE_START[name](*arguments)
    out, variables = module.init_with_output(jax.random.key(0), *arguments)
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    jax.tree.map(np.testing.assert_array_equal, nnx_module(*arguments), expected)
    shapes = lambda tree: sorted(x.shape for x in jax.tree.leaves(tree))
    assert shapes(variables.get("params", {})) == shapes(jnnx.split(nnx_module)[1])


@pytest.mark.parametrize("name", LAYERS)
def test_float32_parameters_do_not_widen_16_bit_inputs(name):
    module, nnx_module, arguments = LAYERS[name]
    half = [x.astype("bfloat16") for x in arguments]
    both = lambda *half: (module.init_with_output(jax.random.key(0), *half)[0], nnx_module(*half))
    with jax.numpy_dtype_promotion("strict"):
        outs = jax.jit(both)(*half)
    wanted = "float32" if name == "z_loss" else "bfloat16"
    assert {str(x.dtype) for x in jax.tree.leaves(outs)} == {wanted}


class TestDropPath:
    rows = jnp.ones((512, 3))

    def test_in_linen_it_draws_by_the_key_in_training_alone(self):
        apply = lambda key, train: in_linen.DropPath(0.5).apply(
            {}, self.rows, train, rngs={"dropout": jax.random.key(key)}
        )
        np.testing.assert_array_equal(apply(0, False), self.rows)
        assert set(np.unique(apply(0, True))) == {0.0, 2.0}
        assert (apply(0, True) != apply(1, True)).any()

    def test_in_nnx_every_call_draws_anew_and_eval_switches_it_off(self):
        module = in_nnx.DropPath(0.5, rngs=nnx.Rngs(0))
        first, second = module(self.rows), module(self.rows)
        assert set(np.unique(first)) == {0.0, 2.0} and (first != second).any()
        module.eval()
        np.testing.assert_array_equal(module(self.rows), self.rows)

    def test_the_rate_zero_needs_no_key_and_adds_nothing_to_the_program(self):
        jaxpr = jax.make_jaxpr(lambda x: in_linen.DropPath(0.0).apply({}, x, True))(self.rows)
        assert not jaxpr.jaxpr.eqns


class SigmaNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(in_linen.SigmaDense(16)(x, train))
        return in_linen.SigmaDense(2)(x, train)


class SigmaNetNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = (
            in_nnx.SigmaLinear(*sizes, rngs=rngs) for sizes in ((8, 16), (16, 2))
        )

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


@functools.cache
def linen_net():
    params, state = linen.init(SigmaNet(), jax.random.key(0), ROWS)
    losses = linen.loss_from, linen.eval_loss_from
    return params, state, [make(SigmaNet(), F.softmax_cross_entropy) for make in losses]


@functools.cache
def nnx_net():
    graphdef, params, state = jnnx.split(SigmaNetNNX(nnx.Rngs(0)))
    losses = jnnx.loss_from, jnnx.eval_loss_from
    return params, state, [make(graphdef, F.softmax_cross_entropy) for make in losses]


@pytest.mark.slow
@pytest.mark.parametrize("net", (linen_net, nnx_net))
@pytest.mark.parametrize("compute", ("float32", "bfloat16"))
def test_sigma_reparametrised_nets_train_and_keep_their_norms(net, compute):
    params, model_state, (loss_fn, eval_loss_fn) = net()
    tx = optax.adam(1e-2)
    state = TrainState.create(params, tx, model_state=model_state)
    policy = f"params=float32,compute={compute},output=float32"
    step = jax.jit(training.make_train_step(loss_fn, tx, policy))
    for _ in range(60):
        state, metrics = step(state, BATCH)
        assert not metrics["skipped"]
    assert metrics["loss"] < 0.5
    pairs = jax.tree.leaves(state.model_state)
    assert {x.dtype for x in pairs} == {jnp.dtype("float32")}
    # The kernel turns slowly, so one power iteration a step keeps the norm at gamma.
    layers_ = [p for p in state.params.values() if "kernel" in p]
    spectral = state.model_state.get("spectral", state.model_state)
    for params, stored in zip(layers_, spectral.values()):
        pair = stored.get("pair", stored)
        pair = pair if isinstance(pair, tuple) else lipschitz.SingularPair(pair["u"], pair["v"])
        kernel = jax.jit(lipschitz.sigma_reparametrise)(params["kernel"], params["gamma"], pair)
        assert np.linalg.norm(kernel, ord=2) == pytest.approx(float(params["gamma"]), rel=0.02)
    _, aux = eval_loss_fn(state.params, BATCH, None, state.model_state)
    jax.tree.map(np.testing.assert_array_equal, aux["model_state"], state.model_state)


def test_cosine_attention_in_nnx_is_that_in_linen():
    x = np.random.default_rng(1).normal(size=(2, 5, 8)).astype("float32")
    kernel_init = init.spectral()
    module = layers.SelfAttention(2, True, "xla", kernel_init, kernel_init, cosine=True)
    expected, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    ours = in_nnx.CosineSelfAttention(8, 2, causal=True, kernel_init=kernel_init, rngs=nnx.Rngs(0))
    for name, layer in (("qkv", ours.qkv), ("out", ours.out)):
        assert np.linalg.norm(layer.kernel[...], ord=2) == pytest.approx(1, rel=1e-5)
        layer.kernel[...] = variables["params"][name]["kernel"]
    np.testing.assert_allclose(nnx.jit(ours)(x), expected, atol=1e-6)
    with pytest.raises(ValueError, match="8 features cannot be split among 3 heads"):
        in_nnx.CosineSelfAttention(8, 3, rngs=nnx.Rngs(0))
