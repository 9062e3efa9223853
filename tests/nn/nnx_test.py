"""NNX modules as loss functions, and under a policy with `nnx.value_and_grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp.nn.nnx as jnnx
from jaxmp.nn import functional as F
from jaxmp.optim import scaling
from jaxmp.precision import loss_scale
from jaxmp.precision.policy import get_policy
from jaxmp.training import step as training
from jaxmp.training.state import TrainState

ROWS = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
BATCH = {"inputs": jnp.asarray(ROWS), "targets": jnp.asarray(np.int32(ROWS[:, :4].sum(1) > 0))}


class Net(nnx.Module):
    """Has parameters in a list, running statistics, and a random stream."""

    def __init__(self, rngs, dropout=0.1):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.last = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        for block in self.blocks:
            x = x + nnx.relu(block(x))
        return self.last(x)


def test_split_separates_parameters_from_the_rest_and_merge_undoes_it():
    module = Net(nnx.Rngs(0))
    graphdef, params, model_state = jnnx.split(module)
    assert set(params) == {"first", "norm", "blocks", "last"}
    assert set(model_state) == {"norm", "dropout"}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((params, model_state)))
    module.eval()
    merged = nnx.merge(graphdef, params, model_state)
    merged.eval()
    np.testing.assert_array_equal(merged(BATCH["inputs"]), module(BATCH["inputs"]))


def test_loss_is_that_of_the_module_and_state_moves_on():
    graphdef, params, state = jnnx.split(Net(nnx.Rngs(0)))
    loss_fn = jnnx.loss_from(graphdef, F.softmax_cross_entropy, metrics={"accuracy": F.accuracy})
    loss, aux = jax.jit(loss_fn)(params, BATCH, None, state)
    module = Net(nnx.Rngs(0))
    loss_of = lambda module, x, y: F.softmax_cross_entropy(module(x), y)
    expected = nnx.jit(loss_of)(module, BATCH["inputs"], BATCH["targets"])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    _, _, expected_state = jnnx.split(module)
    new = aux["model_state"]
    assert jax.tree.structure(new) == jax.tree.structure(state)
    np.testing.assert_allclose(new["norm"]["mean"], expected_state["norm"]["mean"], rtol=1e-5)
    assert new["dropout"]["rngs"]["count"] == state["dropout"]["rngs"]["count"] + 1
    again, _ = jax.jit(loss_fn)(params, BATCH, None, new)
    assert again != loss  # another dropout mask


def test_evaluation_is_deterministic_and_leaves_the_state():
    graphdef, params, state = jnnx.split(Net(nnx.Rngs(0), dropout=0.5))
    loss_fn = jnnx.eval_loss_from(graphdef, F.softmax_cross_entropy)
    loss, aux = loss_fn(params, BATCH, None, state)
    assert aux["model_state"] is state
    assert loss == loss_fn(params, BATCH, None, state)[0]


def test_sown_values_do_not_become_state():
    class Sowing(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(8, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.seen = nnx.Intermediate(x)
            return self.dense(x)

    graphdef, params, state = jnnx.split(Sowing())
    _, aux = jnnx.loss_from(graphdef, F.softmax_cross_entropy)(params, BATCH, None, state)
    assert jax.tree.structure(aux["model_state"]) == jax.tree.structure(state)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("make", (jnnx.loss_from, jnnx.eval_loss_from), ids=("train", "eval"))
def test_running_statistics_do_not_promote_activations(make, dtype):
    graphdef, params, state = jnnx.split(Net(nnx.Rngs(0)))
    seen = []
    loss_fn = make(graphdef, lambda logits, _: seen.append(logits.dtype) or logits.sum())
    batch = {**BATCH, "inputs": ROWS.astype(dtype)}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    _, aux = jax.eval_shape(loss_fn, params, batch, None, state)
    assert seen == [jnp.dtype(dtype)]
    assert aux["model_state"]["norm"]["mean"].dtype == jnp.float32


@pytest.mark.parametrize("policy", ("float32", "mixed_bfloat16", "mixed_float16"))
def test_a_module_trains(policy):
    graphdef, params, state = jnnx.split(Net(nnx.Rngs(0)))
    scale = loss_scale.DynamicLossScale() if "float16" in policy else None
    tx = scaling.with_loss_scale(optax.sgd(0.05, 0.9), scale)
    metrics = {"accuracy": F.accuracy}
    loss_fn = jnnx.loss_from(graphdef, F.softmax_cross_entropy, metrics=metrics)
    step = jax.jit(training.make_train_step(loss_fn, tx, policy, accumulate=2))
    train_state = TrainState.create(params, tx, model_state=state)
    losses = []
    for _ in range(40):
        train_state, report = step(train_state, BATCH)
        losses.append(float(report["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    evaluate = training.make_eval_step(
        jnnx.eval_loss_from(graphdef, F.softmax_cross_entropy, metrics=metrics), policy
    )
    assert jax.jit(evaluate)(train_state, BATCH)["accuracy"] > 0.9
    assert train_state.model_state["dropout"]["rngs"]["count"] == 80  # two microbatches a step


@pytest.mark.parametrize("policy", ("mixed_bfloat16", "mixed_float16"))
def test_nnx_value_and_grad_with_optax_and_a_loss_scale(policy):
    policy = get_policy(policy)
    model = Net(nnx.Rngs(0))
    tx = scaling.with_loss_scale(optax.sgd(0.05, 0.9), loss_scale.DynamicLossScale())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    product_dtypes = set()

    @nnx.jit
    def step(model, optimizer, batch):
        scale = scaling.loss_scale_of(optimizer.opt_state)

        def loss_fn(model):
            half = jnnx.cast_to_compute(model, policy)
            logits = half(policy.cast_to_compute(batch["inputs"]))
            product_dtypes.add(str(logits.dtype))
            jnnx.update_state(model, half)
            loss = F.softmax_cross_entropy(logits, batch["targets"])
            return loss * scale, loss

        (_, loss), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, BATCH)) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    assert product_dtypes == {policy.compute_dtype.name}
    assert model.first.kernel[...].dtype == jnp.float32
    assert model.dropout.rngs.count[...] == 40
    assert np.any(np.asarray(model.norm.mean[...]) != 0)

    before = jax.tree.map(np.asarray, jnnx.split(model)[1])
    step(model, optimizer, {**BATCH, "inputs": BATCH["inputs"].at[0, 0].set(jnp.inf)})
    jax.tree.map(np.testing.assert_array_equal, before, jnnx.split(model)[1])  # held
    assert scaling.loss_scale_of(optimizer.opt_state) < 2.0**15
