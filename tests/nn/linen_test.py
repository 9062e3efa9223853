"""Linen modules as loss functions: state, randomness, overrides, and training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxmp.nn import functional as F
from jaxmp.nn import linen, models
from jaxmp.optim import scaling
from jaxmp.precision import loss_scale
from jaxmp.precision.policy import Policy, get_policy
from jaxmp.training import step as training
from jaxmp.training.state import TrainState

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
BATCH = {"inputs": jnp.asarray(ROWS), "targets": jnp.asarray(np.int32(ROWS[:, :4].sum(1) > 0))}


class Net(nn.Module):
    """Flax's own layers, told that they train by an argument called `train`."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


class Deterministic(nn.Module):
    """The same argument under Flax's other name."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=deterministic)(x))


@functools.cache
def initial(model):
    return linen.init(model, KEY, BATCH["inputs"])


def shapes(model, inputs=BATCH["inputs"], **arguments):
    """What `linen.init` gives, as shapes and dtypes: nothing to compile."""
    return jax.eval_shape(lambda: linen.init(model, KEY, inputs, **arguments))


@functools.cache
def compiled_loss(model, train):
    make = linen.loss_from if train else linen.eval_loss_from
    return jax.jit(make(model, F.softmax_cross_entropy, metrics={"accuracy": F.accuracy}))


def value(model, *, rng=KEY, train=True):
    # Dropout has no parameters: every `Net` starts with those of one.
    params, state = initial(Net() if isinstance(model, Net) else model)
    return compiled_loss(model, train)(params, BATCH, rng, state)


class TestInit:
    def test_parameters_and_the_rest(self):
        params, state = shapes(Net())
        assert set(params) == {"Dense_0", "BatchNorm_0", "Dense_1"}
        assert set(state) == {"batch_stats"}
        assert shapes(nn.Dense(2))[1] == {}

    def test_arguments_reach_the_model(self):
        class Chosen(nn.Module):
            @nn.compact
            def __call__(self, x, *, width, train=True):
                assert not train
                return nn.Dense(width)(x)

        params, _ = shapes(Chosen(), width=3)
        assert params["Dense_0"]["kernel"].shape == (8, 3)

    def test_is_repeatable(self):
        again = linen.init(Net(), KEY, BATCH["inputs"])
        jax.tree.map(np.testing.assert_array_equal, initial(Net()), again)


class TestLoss:
    def test_is_the_loss_of_apply(self):
        params, state = initial(Net())
        loss, aux = value(Net())
        variables = {"params": params, **state}
        apply = jax.jit(lambda v, x: Net().apply(v, x, train=True, mutable=["batch_stats"]))
        logits, new = apply(variables, BATCH["inputs"])
        np.testing.assert_allclose(loss, F.softmax_cross_entropy(logits, BATCH["targets"]))
        assert set(aux) == {"accuracy", "model_state"}
        np.testing.assert_allclose(aux["accuracy"], F.accuracy(logits, BATCH["targets"]))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        jax.tree.map(close, dict(aux["model_state"]), dict(new))
        assert not np.array_equal(
            state["batch_stats"]["BatchNorm_0"]["mean"],
            aux["model_state"]["batch_stats"]["BatchNorm_0"]["mean"],
        )

    def test_evaluation_uses_the_running_statistics_and_leaves_them(self):
        _, state = initial(Net())
        loss, aux = value(Net(0.5), train=False)
        jax.tree.map(np.testing.assert_array_equal, aux["model_state"], state)
        other_key, _ = value(Net(0.5), train=False, rng=jax.random.key(1))
        assert loss == other_key
        assert loss != value(Net(0.0))[0]

    @pytest.mark.parametrize("model", (Net(0.5), Deterministic()), ids=("train", "deterministic"))
    def test_randomness_follows_the_key(self, model):
        assert value(model)[0] == value(model)[0]
        assert value(model)[0] != value(model, rng=jax.random.key(1))[0]
        assert value(model, train=False)[0] == value(model, train=False, rng=None)[0]

    def test_a_model_without_either_argument(self):
        loss, aux = value(nn.Dense(2))
        assert loss == value(nn.Dense(2), train=False)[0]
        assert aux["model_state"] == {}

    def test_each_stream_has_its_own_key(self):
        class Noisy(nn.Module):
            @nn.compact
            def __call__(self, x):
                a, b = (jax.random.normal(self.make_rng(name), ()) for name in ("a", "b"))
                return nn.Dense(2)(x) + a - b

        params, _ = linen.init(Noisy(), KEY, BATCH["inputs"], rngs=("a", "b"))
        # Adding one number to all logits would not change a cross entropy.
        loss_fn = linen.loss_from(Noisy(), lambda z, _: jnp.mean(z), rngs=("a", "b"))
        plain = jnp.mean(nn.Dense(2).apply({"params": params["Dense_0"]}, BATCH["inputs"]))
        assert abs(loss_fn(params, BATCH, KEY, {})[0] - plain) > 1e-3


class PostNorm(nn.Module):
    """Residual blocks of Flax's own layers, which promote silently."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        for _ in range(2):
            x = nn.LayerNorm()(x + nn.Dense(16)(nn.gelu(nn.Dense(32)(x))))
        return nn.Dense(2, name="head")(x)


def products(policy, model, *, intercept=True):
    """Gives the operands' dtypes of every product, forward and backward, and the logits' dtype."""
    params, state = shapes(model)
    seen = []

    def loss(logits, targets):
        seen.append(str(logits.dtype))
        return F.softmax_cross_entropy(logits, targets)

    loss_fn = linen.loss_from(model, loss, policy=policy if intercept else None)
    grads_of = jax.grad(loss_fn, has_aux=True)

    def gradients(params, state):
        batch = {**BATCH, "inputs": BATCH["inputs"].astype(policy.compute_dtype)}
        return grads_of(policy.cast_to_compute(params), batch, KEY, state)[0]

    jaxpr = jax.make_jaxpr(gradients)(params, state)
    found = [
        tuple(str(v.aval.dtype) for v in eqn.invars)
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    return found, seen[0]


def equations(jaxpr):
    """Yields all equations of a jaxpr, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def mixed(overrides, dtype="bfloat16"):
    return Policy("float32", dtype, "float32", overrides=overrides)


HALF, FULL = ("bfloat16", "bfloat16"), ("float32", "float32")


class TestOverrides:
    def test_a_float32_norm_leaves_the_products_in_16_bits(self):
        policy = mixed({"**/LayerNorm_*": "float32"})
        found, logits = products(policy, PostNorm())
        assert set(found) == {HALF} and logits == "bfloat16"
        careless, logits = products(policy, PostNorm(), intercept=False)
        assert FULL in careless and logits == "float32"  # what is avoided

    def test_the_norm_itself_runs_in_float32(self):
        model = nn.Sequential([nn.LayerNorm()])
        params, _ = linen.init(model, KEY, BATCH["inputs"])
        params = jax.tree.map(lambda x: x + 1e-3, params)  # not a number of bfloat16
        policy = mixed({"**/layers_0": "float32"})
        kept = {}
        loss_fn = linen.loss_from(model, lambda z, _: kept.setdefault("z", z).sum(), policy=policy)
        half = BATCH["inputs"].astype("bfloat16")
        loss_fn(policy.cast_to_compute(params), {**BATCH, "inputs": half}, KEY, {})
        exact = model.apply({"params": params}, half.astype("float32"))
        np.testing.assert_array_equal(kept["z"], exact)  # the model's own result: not cast back

    def test_a_float32_head_yields_float32_logits(self):
        found, logits = products(mixed({"head": "float32"}), PostNorm())
        assert logits == "float32"
        assert found.count(FULL) == 3 and set(found) == {HALF, FULL}  # forward and two backward

    def test_one_parameter_does_not_promote_what_follows(self):
        found, logits = products(mixed({"Dense_1/bias": "float32"}), PostNorm())
        assert set(found) <= {HALF, FULL, ("float32", "bfloat16"), ("bfloat16", "float32")}
        assert len([f for f in found if f != HALF]) <= 3 and logits == "bfloat16"

    def test_modules_inside_a_region_keep_its_dtype(self):
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(16)(x)
                return nn.Dense(16)(x)

        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(2)(Inner(name="exact")(nn.Dense(16)(x)))

        found, _ = products(mixed({"exact": "float32"}), Outer())
        forward = found[:4]
        assert forward == [HALF, FULL, FULL, HALF]

    def test_the_last_override_decides(self):
        policy = mixed((("**/LayerNorm_*", "float32"), ("LayerNorm_0", "bfloat16")))
        assert policy.dtype_at("LayerNorm_0") == jnp.bfloat16
        assert set(products(policy, PostNorm())[0]) == {HALF}

    def test_reference_models(self):
        images = np.zeros((4, 8, 8, 1), np.float32)
        model = models.VisionTransformer(models.ViTConfig(depth=1))
        params, state = shapes(model, images)
        policy = mixed({"**/LayerNorm_*": "float32"})
        loss_fn = linen.loss_from(model, F.softmax_cross_entropy, policy=policy)
        batch = {"inputs": images.astype("bfloat16"), "targets": np.zeros(4, np.int32)}
        cast = jax.eval_shape(policy.cast_to_compute, params)
        assert cast["TransformerBlock_0"]["LayerNorm_0"]["scale"].dtype == jnp.float32
        jaxpr = jax.make_jaxpr(lambda p, state: loss_fn(p, batch, KEY, state)[0])(cast, state)
        for eqn in equations(jaxpr.jaxpr):
            if eqn.primitive.name == "dot_general":
                assert {str(v.aval.dtype) for v in eqn.invars} == {"bfloat16"}

    def test_an_override_that_matched_nothing_is_named(self):
        policy = mixed({"**/LayerNrom_*": "float32"})
        params, state = shapes(PostNorm())
        loss_fn = linen.loss_from(PostNorm(), F.softmax_cross_entropy, policy=policy)
        with pytest.raises(ValueError, match=r"'\*\*/LayerNrom_\*' matched no parameter and no"):
            jax.eval_shape(loss_fn, params, BATCH, KEY, state)


@pytest.mark.parametrize("policy", ("float32", "mixed_bfloat16", "mixed_float16"))
def test_a_model_with_batch_norm_trains(policy):
    model = Net(dropout=0.1)
    params, state = initial(Net())
    scale = loss_scale.DynamicLossScale() if "float16" in policy else None
    tx = scaling.with_loss_scale(optax.sgd(0.2, 0.9), scale)
    metrics = {"accuracy": F.accuracy}
    loss_fn = linen.loss_from(model, F.softmax_cross_entropy, metrics=metrics)
    step = jax.jit(training.make_train_step(loss_fn, tx, get_policy(policy), accumulate=2))
    train_state = TrainState.create(params, tx, model_state=state, rng=KEY)
    losses = []
    for _ in range(40):
        train_state, report = step(train_state, BATCH)
        losses.append(float(report["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    evaluate = training.make_eval_step(
        linen.eval_loss_from(model, F.softmax_cross_entropy, metrics=metrics), policy
    )
    assert jax.jit(evaluate)(train_state, BATCH)["accuracy"] > 0.9
    bad = {**BATCH, "inputs": BATCH["inputs"].at[0, 0].set(jnp.inf)}
    skipped, report = step(train_state, bad)
    assert report["skipped"]
    for before, after in (
        (train_state.params, skipped.params),
        (train_state.model_state, skipped.model_state),
    ):
        jax.tree.map(np.testing.assert_array_equal, before, after)
