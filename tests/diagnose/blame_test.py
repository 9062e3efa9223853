"""Planted faults are found where they were planted; infinities that a program means are left alone."""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxmp
from jaxmp.diagnose import Blame

vg = jax.value_and_grad
X = np.array([0.0, 1.0, 4.0], np.float32)
HALF = jnp.float16
MASK = jnp.array([[True, False, True], [False, False, False], [True, True, True]])


def scoped(fn, name="plant"):
    """The sum of a function in a named scope, and its gradient."""

    def loss(*args):
        with jax.named_scope(name):
            return jnp.sum(fn(*args)).astype(jnp.float32)

    return vg(loss)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A program with a fault, and what is to be said of it."""

    fn: Callable
    args: tuple
    primitive: str
    direction: str = "forward"
    path: str = "plant"
    iterations: tuple[int, ...] = ()
    cause: str = ""


@jax.custom_vjp
def divides_backward(x):
    return x * 2


divides_backward.defvjp(
    lambda x: (x * 2, x), lambda x, g: (jax.named_scope("rule")(jnp.divide)(g, x),)
)


def scanned(layer, count=4):
    """Layers `layer(x, i)` in a rematerialised scan."""

    def fn(x):
        body = jax.checkpoint(lambda c, i: (layer(c, i), None))
        return jax.lax.scan(body, x, jnp.arange(count))[0]

    return fn


def counted(x):
    def body(state):
        i, x = state
        with jax.named_scope("plant"):
            return i + 1, x + 1 / (3 - i)

    return jax.lax.while_loop(lambda state: state[0] < 5, body, (jnp.float32(0), x))[1]


def nested(x):
    def inner(c, j):
        return c + jnp.log(jnp.float32(5) - c), None

    def outer(c, i):
        return jax.lax.scan(inner, jnp.float32(2) * i, jnp.arange(3))[0] * 0 + c, None

    return jax.lax.scan(outer, x, jnp.arange(4))[0]


class Layer(linen.Module):
    """A dense layer in float16, and a root of what it gives for the first example."""

    root: bool = False

    @linen.compact
    def __call__(self, x):
        h = linen.Dense(3, dtype=HALF, use_bias=False, name="wide")(x)
        h = h * HALF(1e-3)
        return (h + jnp.sqrt(jnp.abs(h)) if self.root else h), None


class Stack(linen.Module):
    """Layers in a rematerialised scan."""

    root: bool = False

    @linen.compact
    def __call__(self, x):
        layers = linen.scan(
            linen.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(self.root, name="layers")(x)[0]


def stack(plant, root=False):
    """The gradient of a stack, and its parameters: kernels [3, 3, 3] with the entries of `plant`."""
    model, x = Stack(root), np.ones([1, 3], HALF)
    kernel = np.tile(np.eye(3, dtype=np.float32) * 1e3, [3, 1, 1])
    for place, value in plant.items():
        kernel[place] = value
    params = {"layers": {"wide": {"kernel": kernel}}}
    loss = lambda params: jnp.sum(model.apply({"params": params}, x).astype(jnp.float32))
    return vg(loss), (params,)


class Model(nnx.Module):
    """Two layers, of which the first takes a logarithm or a root."""

    def __init__(self, act):
        ones = nnx.initializers.ones
        self.first = nnx.Linear(3, 3, kernel_init=ones, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(3, 1, kernel_init=ones, rngs=nnx.Rngs(1))
        self.act = act

    def __call__(self, x):
        with jax.named_scope("first"):
            x = self.act(self.first(x))
        with jax.named_scope("last"):
            return self.last(x)


def nnx_model(act):
    model = Model(act)
    model.first.kernel[...] = np.eye(3, dtype=np.float32)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params, x: jnp.sum(nnx.merge(graph, params, rest)(x))
    return vg(loss), (params, X[None])


def nnx_stack():
    """Linear layers in an NNX scan with remat, the third of which has a zero row that a root sees."""

    kernel = np.tile(np.eye(3, dtype=np.float32), [4, 1, 1])
    kernel[2, 0] = 0
    layers = nnx.Linear(3, 3, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    layers.kernel, layers.bias = nnx.Param(kernel), nnx.Param(np.zeros([4, 3], np.float32))
    graph, params = nnx.split(layers)

    def loss(params, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            with jax.named_scope("layer"):
                return jnp.sqrt(layer(x)) + 1

        return jnp.sum(run(x, nnx.merge(graph, params)))

    return vg(loss), (params, X[None] + 1)


FAULTS = {
    "log of 0": Fault(scoped(jnp.log), (X,), "log", cause="log of 0"),
    "log of a negative": Fault(scoped(jnp.log), (X - 2,), "log", cause="negative number (-2)"),
    "root of a negative": Fault(scoped(jnp.sqrt), (X - 2,), "sqrt", cause="sqrt of a negative"),
    "x / 0": Fault(scoped(lambda x: 1 / x), (X,), "div", cause="Division by zero"),
    "0 / 0": Fault(scoped(lambda x: x / (x[:1] * x)), (X,), "div", cause="0 / 0"),
    "exp": Fault(scoped(lambda x: jnp.exp(x * 50)), (X,), "exp", cause="exp of 200 overflows"),
    "float16 product": Fault(
        scoped(lambda x: x @ x), (np.full([3], 200, HALF),), "dot_general", cause="120000 is above"
    ),
    "float16 square": Fault(
        scoped(lambda x: jnp.mean(jnp.square(x))), (X.astype(HALF) * 100,), "square", cause="160000"
    ),
    "float16 cumsum": Fault(
        scoped(lambda x: jnp.cumsum(x) * 0), (np.full([3], 3e4, HALF),), "cumsum", cause="65504"
    ),
    "cast to float16": Fault(
        scoped(lambda x: x.astype(HALF)), (X * 2e4,), "convert_element_type", cause="80000 is above"
    ),
    "float16 gradient, scaled": Fault(
        vg(lambda x: jnp.sum(jax.named_scope("plant")(lambda x: x * HALF(100))(x)) * HALF(4096)),
        (np.full([3], 1e-3, HALF),),
        "mul",
        "backward",
        cause="lower the loss scale",
    ),
    "lookup beyond the table": Fault(
        scoped(lambda table: jnp.take(table, jnp.array([1, 7]), 0)), (X,), "gather", cause="bounds"
    ),
    "root' at 0": Fault(scoped(jnp.sqrt), (X,), "div", "backward", cause="square root"),
    "power' at 0": Fault(scoped(lambda x: x**0.3), (X,), "pow", "backward", cause="power -0.7"),
    "norm' at 0": Fault(scoped(jnp.linalg.norm), (X * 0,), "div", "backward", cause="norm"),
    "log masked by where": Fault(
        scoped(lambda x: jnp.where(x > 0, jnp.log(x), 0)), (X,), "div", "backward", cause="0 / 0"
    ),
    "exp masked by where": Fault(
        scoped(lambda x: jnp.where(x < 2, jnp.exp(x * 50), 0)),
        (X,),
        "mul",
        "backward",
        cause="0 times",
    ),
    "custom rule": Fault(
        scoped(divides_backward), (X,), "div", "backward", "plant/rule", cause="Division by zero"
    ),
    "a row masked whole": Fault(
        scoped(lambda x: jax.nn.softmax(jnp.where(MASK, x, -jnp.inf)) * x),
        (X,),
        "sub",
        cause="masked",
    ),
    "beside a harmless mask": Fault(
        scoped(lambda x: jnp.exp(jnp.where(MASK[0], x, -jnp.inf) * HALF(2e4))),
        (X.astype(HALF),),
        "mul",
        cause="80000",
    ),
    "in the second branch": Fault(
        scoped(lambda x: jax.lax.cond(x[0] > 0, jnp.exp, jnp.log, x)), (X,), "log"
    ),
    "forward in scan and remat": Fault(
        scoped(scanned(lambda c, i: c * jnp.log(2.0 - i))), (X,), "log", iterations=(2,)
    ),
    "backward in scan and remat": Fault(
        scoped(scanned(lambda c, i: c + jnp.sqrt(c * (i - 1) ** 2))),
        (X + 1,),
        "div",
        "backward",
        iterations=(1,),
        cause="square root",
    ),
    "in a while": Fault(counted, (X,), "div", iterations=(3,), cause="Division by zero"),
    "in nested scans": Fault(scoped(nested), (np.float32(0),), "log", iterations=(3, 0)),
    "after harmless births of the same place": Fault(
        scoped(scanned(lambda c, i: jnp.where(i < 2, jnp.abs(jnp.sign(jnp.log(c))), jnp.log(c)))),
        (X[:1],),
        "log",
        iterations=(2,),
    ),
    "Linen, scan and remat, forward": Fault(
        *stack({(1, 2, 2): 6e4, (0, 2, 2): 4e3}),
        "dot_general",
        path="Stack/layers/wide",
        iterations=(1,),
        cause="240000 is above 65504",
    ),
    "Linen, scan and remat, backward": Fault(
        *stack({(2, ..., 1): 0}, root=True),
        "div",
        "backward",
        "Stack/layers",
        (2,),
        cause="square root",
    ),
    "NNX forward": Fault(*nnx_model(jnp.log), "log", path="first"),
    "NNX backward": Fault(*nnx_model(jnp.sqrt), "div", "backward", "first"),
    "NNX, scan and remat": Fault(*nnx_stack(), "div", "backward", "layer", (2,)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault):
    found = jaxmp.blame_nonfinite(fault.fn, *fault.args)
    told = (found.primitive, found.direction, found.path, found.iterations)
    assert told == (fault.primitive, fault.direction, fault.path, fault.iterations), str(found)
    assert fault.cause in found.cause, str(found)
    assert found.source.startswith("tests/diagnose/blame_test.py:"), found.source
    assert "\n" not in str(found) and f"`{fault.primitive}`" in str(found)


def online_softmax(x):
    """The running maximum starts at -inf, as in attention that goes over its keys in a scan."""

    def body(carry, x):
        largest, total = carry
        new = jnp.maximum(largest, x)
        return (new, total * jnp.exp(largest - new) + jnp.exp(x - new)), None

    return jnp.log(jax.lax.scan(body, (-jnp.inf, 0.0), x)[0][1])


HARMLESS = {
    "finite": (vg(lambda x: jnp.sum(x**2)), X),
    "a mask of -inf": (vg(lambda x: jax.nn.softmax(jnp.where(MASK[0], x, -jnp.inf))[0]), X),
    "an argument that masks": (
        vg(lambda x, mask: jax.nn.logsumexp(x + mask)),
        X,
        np.array([0, -np.inf, 0], np.float32),
    ),
    "log of what where leaves out twice": (
        vg(lambda x: jnp.sum(jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), 0))),
        X,
    ),
    "an overflow that is masked": (lambda x: jnp.where(x < 1, jnp.exp(x * 1e3), 0).sum(), X),
    "1 / inf": (lambda x: 1 / (1 + jnp.exp(x * 50)), X),
    "the largest of nothing": (lambda x: jnp.max(x, initial=-jnp.inf), X),
    "a scan that starts at -inf": (vg(online_softmax), X),
    "masked results": (lambda x: {"logits": jnp.where(MASK, x, -jnp.inf), "best": jnp.inf}, X),
    "not among the results": (lambda x: jnp.argmax(jnp.log(x)), X),
    "causal attention": (
        vg(
            lambda q: jnp.sum(
                jax.nn.softmax(jnp.where(jnp.tri(3, dtype=bool), q @ q.T, -jnp.inf)) @ q
            )
        ),
        np.ones([3, 3], np.float32),
    ),
}


@pytest.mark.parametrize("fn, args", [(fn, args) for fn, *args in HARMLESS.values()], ids=HARMLESS)
def test_a_harmless_program_is_left_alone(fn, args):
    assert jaxmp.blame_nonfinite(fn, *args) is None


def test_an_argument_that_holds_a_nan_is_named():
    kernel = np.eye(3, dtype=np.float32)
    params = {"head": {"kernel": kernel, "bias": np.array([0, 1, np.nan], np.float32)}}
    loss = lambda params, x: jnp.sum(x @ params["head"]["kernel"] + params["head"]["bias"])
    found = jaxmp.blame_nonfinite(vg(loss), params, x=X)
    assert (found.kind, found.path, found.at, found.output.nans) == (
        "argument",
        "0/head/bias",
        (2,),
        1,
    )
    assert str(found).startswith("The argument 0/head/bias is not finite to begin with: float32[3]")
    infinite = np.array([np.inf, 1, 4], np.float32)
    found = jaxmp.blame_nonfinite(vg(loss), {"head": {"kernel": kernel, "bias": X}}, x=infinite)
    assert (found.kind, found.path, found.output.infs) == ("argument", "x", 1)


def test_a_captured_array_that_holds_a_nan_is_told():
    table = jnp.asarray(np.array([0, np.nan, 4], np.float32))
    for fn in (lambda x: jnp.sum(x * table), lambda x: jax.jit(lambda x: jnp.sum(x * table))(x)):
        found = jaxmp.blame_nonfinite(fn, X)
        assert (found.kind, found.at, found.output.nans) == ("constant", (1,), 1)


def test_what_was_masked_forward_is_named_as_the_origin_of_a_fault_backward():
    found = jaxmp.blame_nonfinite(FAULTS["exp masked by where"].fn, X)
    assert found.direction == "backward" and found.origin.startswith("`exp` in plant at tests/")
    assert found.origin.endswith("forward") and found.origin in str(found)
    found = jaxmp.blame_nonfinite(FAULTS["a row masked whole"].fn, X)
    assert found.origin == "an infinite constant of the program"
    assert (
        found.output.here != found.output.here and [v.here for v in found.inputs] == [-np.inf] * 2
    )


def test_the_values_that_went_in_are_told():
    w = np.array([[1e3, 1], [2, 3]], HALF)
    loss = lambda w, x: jnp.sum((x @ w) * HALF(40)).astype(jnp.float32)
    found = jaxmp.blame_nonfinite(vg(loss), w, np.array([[2, 1]], HALF))
    product, factor = found.inputs
    assert dataclasses.astuple(product) == ((1, 2), "float16", 5, 2002, 2002, 0, 0, 0, 2002)
    assert (factor.shape, factor.here, found.at, found.exact) == ((), 40, (0, 0), 80080)
    assert (found.output.infs, found.output.here, found.output.max) == (1, np.inf, 200)
    assert found.became_nan == "" and "80080 is above 65504" in str(found)
    cast = jaxmp.blame_nonfinite(lambda x: x.astype(HALF), X * 2e4)
    assert cast.inputs[0].beyond == pytest.approx(1 / 3) and cast.reads == ("0",)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["output"]["here"] == "inf" and told["paragraph"] == str(found)
    assert isinstance(found, Blame) and told["inputs"][0]["max"] == 2002


def test_a_repair_does_not_make_a_loop_endless():
    def fn(x):  # with the quotient repaired to 0 it would go on for ever
        halve = lambda c: c / 2 + (c - c) / (c - c)
        return jax.lax.while_loop(lambda c: c < 1, halve, x)

    found = jaxmp.blame_nonfinite(fn, jnp.float32(0.5))
    assert (found.primitive, found.iterations) == ("div", (0,))
