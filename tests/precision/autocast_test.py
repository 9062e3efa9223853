"""autocast on every construct of JAX: 16-bit products forward and backward, dtypes and values kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec

from jaxmp.precision.autocast import autocast

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def products(fn: Callable, *args: Any) -> list[tuple[str, ...]]:
    """The dtypes of both operands of every product that a function traces, however deep."""
    found: list[tuple[str, ...]] = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in PRODUCTS:
                found.append(tuple(v.aval.dtype.name for v in eqn.invars[:2]))
            for inner in core.jaxprs_in_params(eqn.params):
                walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def uniform(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    values = np.random.default_rng(seed).uniform(-scale, scale, shape)
    return jnp.asarray(values, jnp.float32)


X, W, V = uniform(4, 8), uniform(8, 8, seed=1, scale=0.5), uniform(8, 8, seed=2, scale=0.5)


class Construct(NamedTuple):
    """A function of arrays in which autocast has something to do."""

    fn: Callable
    args: tuple = (X, W)


def attention(x: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(x, x, x)


def norm(x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)


@jax.custom_jvp
def swish(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


@swish.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    s = jax.nn.sigmoid(primals[0])
    return primals[0] * s, tangents[0] * (s + primals[0] * s * (1 - s))


@jax.custom_vjp
def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


dense.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda res, g: ((g @ res[1].T).astype(res[0].dtype), (res[0].T @ g).astype(res[1].dtype)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def take(x: jax.Array, rows: jax.Array, factor: float) -> jax.Array:
    return x[rows] * factor


take.defvjp(
    lambda x, rows, factor: (x[rows] * factor, (x, rows)),
    lambda factor, res, g: (jnp.zeros_like(res[0]).at[res[1]].add(g * factor), None),
)


def sharded(x: jax.Array, w: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.pmean(jnp.sum((x @ w) ** 2), "d")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec()
    )(x, w)


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    image = x.reshape(1, 4, 8, 1)
    y = lax.conv_general_dilated(
        image, w[:3, :3, None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return nn.max_pool(jax.nn.relu(y), (2, 2), (2, 2)).reshape(-1) @ w.reshape(-1, 8)[:8]


class Block(nn.Module):
    """A pre-norm block with attention, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Stack(nn.Module):
    """A scanned and rematerialised stack between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(11, 8)(tokens)
        block = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = block(name="blocks")(x, None)
        return nn.Dense(11, name="head")(nn.LayerNorm()(x))


class Net(nnx.Module):
    """An NNX layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.dense(x))


def linen(model: nn.Module, *inputs: jax.Array) -> Construct:
    params = jax.jit(model.init)(jax.random.key(0), *inputs)
    return Construct(lambda p: model.apply(p, *inputs), (params,))


def nnx_merge() -> Construct:
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return Construct(lambda s: nnx.merge(graph, s)(X), (state,))


def equinox_mlp() -> Construct:
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(8, 8, 16, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(mlp, eqx.is_array)
    return Construct(lambda a: jax.vmap(eqx.combine(a, static))(X), (arrays,))


def layers(body: Callable) -> Callable:
    return lambda x, w: body(jax.nn.relu(body(x, w)), w)


POLICY = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
QKV = uniform(1, 4, 2, 8)
CONSTRUCTS: dict[str, Callable[[], Construct]] = {
    "dot": lambda: Construct(lambda x, w: x @ w),
    "einsum": lambda: Construct(lambda x, w: jnp.einsum("bi,ij,kj->bk", x, w, w)),
    "vmap": lambda: Construct(jax.vmap(lambda x, w: jnp.tanh(x @ w), (0, None))),
    "dict arguments": lambda: Construct(
        lambda p: p["x"] @ p["w"] + p["b"], ({"x": X, "w": W, "b": W[0]},)
    ),
    "integer output": lambda: Construct(lambda x, w: (x @ w, jnp.argmax(x @ w, -1))),
    "key argument": lambda: Construct(
        lambda x, w, k: jnp.where(jax.random.bernoulli(k, 0.5, (4, 8)), x @ w, 0) @ w,
        (X, W, jax.random.key(0)),
    ),
    "relu": lambda: Construct(lambda x, w: jax.nn.relu(x @ w) @ w),
    "gelu": lambda: Construct(lambda x, w: jax.nn.gelu(x @ w) @ w),
    "exact gelu": lambda: Construct(lambda x, w: jax.nn.gelu(x @ w, approximate=False) @ w),
    "softmax": lambda: Construct(lambda x, w: jax.nn.softmax(x @ w) @ w),
    "layer norm": lambda: Construct(lambda x, w: norm(x @ w) @ w),
    "attention": lambda: Construct(attention, (QKV,)),
    "inner jit": lambda: Construct(lambda x, w: jax.jit(lambda a: jax.nn.relu(a @ w))(x) @ w),
    "scan over activations": lambda: Construct(
        lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c @ w), c @ w), x, length=3, xs=None)
    ),
    "scan over weights": lambda: Construct(
        lambda x, ws: lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x @ ws[0], ws)[0],
        (X, jnp.stack([W, V])),
    ),
    "while": lambda: Construct(
        lambda x, w: jax.vjp(
            lambda x: x @ w,
            lax.while_loop(
                lambda c: c[0] < 2,
                lambda c: (c[0] + 1, jnp.tanh(c[1] @ lax.stop_gradient(w))),
                (0, lax.stop_gradient(x)),
            )[1],
        )[0],
    ),
    "fori": lambda: Construct(lambda x, w: lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c @ w), x)),
    "cond": lambda: Construct(
        lambda x, w: lax.cond(
            x[0, 0] > 9, lambda x: jnp.exp(x @ w), lambda x: jnp.tanh(x @ w) @ w, x
        )
    ),
    "switch": lambda: Construct(
        lambda x, w: lax.switch(1, [lambda x: x, lambda x: x @ w, lambda x: x * 2], x)
    ),
    "remat": lambda: Construct(layers(jax.checkpoint(lambda x, w: jnp.tanh(x) @ w))),
    "remat with policy": lambda: Construct(
        layers(jax.checkpoint(lambda x, w: jnp.tanh(x @ w) @ w, policy=POLICY))
    ),
    "custom_jvp": lambda: Construct(lambda x, w: swish(x @ w) @ w),
    # In one argument: of a rule whose operand is not moved, autocast leaves the product out.
    "custom_vjp": lambda: Construct(lambda xw: jax.nn.relu(dense(*xw)) @ xw[1], ((X, W),)),
    "custom_vjp with integers": lambda: Construct(
        lambda x, w: take(x @ w, jnp.array([0, 2]), 2.0) @ w
    ),
    "shard_map": lambda: Construct(sharded),
    "ragged_dot": lambda: Construct(
        lambda x, ws: lax.ragged_dot(x, ws, jnp.array([1, 3])), (X, jnp.stack([W, V]))
    ),
    "conv": lambda: Construct(conv, (X, uniform(8, 8, seed=3))),
    "associative scan": lambda: Construct(lambda x, w: lax.associative_scan(jnp.add, x @ w) @ w),
    "platform dependent": lambda: Construct(
        lambda x, w: lax.platform_dependent(x, cpu=lambda x: x @ w, default=lambda x: 2 * (x @ w))
    ),
    "Linen Dense": lambda: linen(nn.Dense(5), X),
    "Linen attention": lambda: linen(nn.MultiHeadDotProductAttention(num_heads=2), X[None]),
    "Linen scan and remat": lambda: linen(Stack(), jnp.arange(6).reshape(2, 3)),
    "NNX merge": nnx_merge,
    "Equinox MLP": equinox_mlp,
}


def total(fn: Callable) -> Callable:
    """The sum of a function's floating-point outputs, squared, as a loss."""

    def loss(*args: Any) -> jax.Array:
        outs = [o for o in jax.tree.leaves(fn(*args)) if jnp.issubdtype(o.dtype, jnp.floating)]
        return sum(jnp.sum(o.astype(jnp.float32) ** 2) for o in outs)

    return loss


def grad(fn: Callable) -> Callable:
    return jax.grad(total(fn), allow_int=True)


def relative(found: Any, expected: Any) -> float:
    """The error of a tree's floating-point leaves, relative to their norm."""
    pairs = [
        (a.astype(jnp.float32) - b, b)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))
        if jnp.issubdtype(b.dtype, jnp.floating)
    ]
    error, size = (sum(jnp.sum(pair[i] ** 2) for pair in pairs) for i in (0, 1))
    return float(jnp.sqrt(error / size))


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_products_are_16_bit_forward_and_backward(name: str) -> None:
    fn, args = CONSTRUCTS[name]()
    cast = autocast(fn)
    roads = [(fn, cast)]
    if name != "while":
        roads += [(grad(fn), grad(cast)), (grad(fn), autocast(grad(fn)))]
    for plain, mixed in roads:
        found = products(mixed, *args)
        assert len(found) == len(products(plain, *args)), found
        assert set(found) == {("bfloat16", "bfloat16")}


SLOW = ("Linen scan and remat", "Linen attention")
MARKED = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONSTRUCTS]


@pytest.mark.parametrize("name", MARKED)
def test_results_keep_their_dtypes_and_values(name: str) -> None:
    fn, args = CONSTRUCTS[name]()
    exact, mixed = (fn, grad(fn)), (autocast(fn), grad(autocast(fn)), autocast(grad(fn)))
    if name == "while":  # has no reverse mode
        exact, mixed = exact[:1], mixed[:1]
    # Compiled together, which takes a third less time.
    expected, *gradients = jax.jit(lambda *args: [f(*args) for f in exact])(*args)
    found, *others = jax.jit(lambda *args: [f(*args) for f in mixed])(*args)
    same = jax.tree.map(
        lambda a, b: (a.dtype, a.weak_type) == (b.dtype, b.weak_type), expected, found
    )
    assert all(jax.tree.leaves(same))
    assert relative(found, expected) < 0.02
    for other in others:
        assert relative(other, gradients[0]) < 0.03


# Operations that the table does not know


def unknown(name: str, **params: Any) -> Callable:
    """A function that traces one operation of this name, as somebody's kernel is called."""
    kernel = core.Primitive(name)
    kernel.def_abstract_eval(lambda x, **_: x)
    return lambda x: kernel.bind(x, **params)


def test_an_unknown_operation_runs_in_its_own_dtypes() -> None:
    kernel = unknown("somebodys_kernel", block=128, shape=(8, 8))

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        y = x @ w
        return (kernel(y) + kernel(y.astype(jnp.bfloat16))) @ w

    jaxpr = jax.make_jaxpr(autocast(fn))(X, W).jaxpr
    calls = [e for e in jaxpr.eqns if e.primitive.name == "somebodys_kernel"]
    assert [e.invars[0].aval.dtype.name for e in calls] == ["float32", "bfloat16"]
    assert [e.params["block"] for e in calls] == [128, 128]
    assert products(autocast(fn), X, W) == [("bfloat16", "bfloat16")] * 2


def test_an_unknown_operation_that_holds_a_program_is_refused_by_name() -> None:
    inner = jax.make_jaxpr(lambda x: x @ x)(W)
    for held in (inner, (inner, inner), inner.jaxpr):
        kernel = unknown("somebodys_loop", body=held)
        with pytest.raises(NotImplementedError, match=r"'somebodys_loop'.*holds a program"):
            jax.make_jaxpr(autocast(kernel))(W)


def test_fused_attention_of_cudnn_takes_the_users_cast() -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        y = (x @ w).astype(jnp.bfloat16)
        return jax.nn.dot_product_attention(y, y, y, implementation="cudnn").astype(jnp.float32)

    x, w = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.float32), jnp.eye(64)
    try:
        jax.make_jaxpr(fn)(x, w)
    except RuntimeError as error:
        pytest.skip(f"JAX traces this attention where cuDNN is installed alone: {error}")
    gradient = jax.grad(lambda x, w: autocast(fn)(x, w).sum(), argnums=1)
    assert set(products(gradient, x, w)) == {("bfloat16", "bfloat16")}
    calls = str(jax.make_jaxpr(gradient)(x, w))
    assert "dot_product_attention_fwd" in calls and "dot_product_attention_bwd" in calls
