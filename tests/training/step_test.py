"""The step: two roads to one number, whole skips, one compile, sixteen bits where promised."""

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp import optim, training
from jaxmp.nn import linen as linen_adapter

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (8, 16)), "v": jax.random.normal(KEYS[1], (16, 1))}
BATCH = {"inputs": jax.random.normal(KEYS[2], (32, 8)), "targets": jnp.ones((32, 1))}
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]


def regression(params, batch):
    y = jnp.tanh(batch["inputs"] @ params["w"]) @ params["v"]
    return jnp.mean((y.astype(jnp.float32) - batch["targets"]) ** 2)


def run(tx, policy, batches, accumulate=1, loss=regression, params=PARAMS):
    state = training.TrainState.create(params, tx)
    step = training.jit_step(training.make_train_step(loss, tx, policy, accumulate))
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(metrics)
    return state, history


@pytest.mark.parametrize("policy", POLICIES)
def test_the_step_equals_casts_and_updates_written_by_hand(policy):
    dtype = jaxmp.get_policy(policy).compute_dtype
    tx = optax.sgd(0.1)
    state, [metrics] = run(tx, policy, [BATCH])

    @jax.jit
    def by_hand(params):
        def loss(params):
            half = jax.tree.map(lambda p: p.astype(dtype), params)
            return regression(half, {**BATCH, "inputs": BATCH["inputs"].astype(dtype)})

        value, grads = jax.value_and_grad(loss)(params)
        return value, grads, jax.tree.map(lambda p, g: p + -0.1 * g, params, grads)

    value, grads, want = by_hand(PARAMS)
    np.testing.assert_array_equal(metrics["loss"], value)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    chex.assert_trees_all_close_ulp(state.params, want, maxulp=1)


def test_a_growing_scale_changes_no_bit_of_a_float32_run():
    """Powers of two: losses, gradients' norm and parameters equal those without scaling, always."""
    tx = lambda scale: optim.adamw(1e-2, loss_scale=scale)
    # The same program with a scale of one: without any, XLA may contract other multiply-adds.
    one = jaxmp.DynamicLossScale(1.0, period=1000)
    plain, plain_history = run(tx(one), "float32", [BATCH] * 7)
    scaled, history = run(tx(jaxmp.DynamicLossScale(2.0**3, period=2)), "float32", [BATCH] * 7)
    assert [float(m["loss_scale"]) for m in history] == [8, 8, 16, 16, 32, 32, 64]
    chex.assert_trees_all_equal(scaled.params, plain.params)
    for got, want in zip(history, plain_history):
        chex.assert_trees_all_equal(got["loss"], want["loss"])
        chex.assert_trees_all_equal(got["grad_norm"], want["grad_norm"])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parts", [2, 8])
def test_small_batches_add_up_to_the_large_one(policy, parts):
    # Plain SGD: the update is the gradient.
    whole, [one] = run(optax.sgd(1.0), policy, [BATCH])
    split, [many] = run(optax.sgd(1.0), policy, [BATCH], accumulate=parts)
    ulp = {"float32": 1e-6, "mixed_bfloat16": 2.0**-7, "mixed_float16": 2.0**-10}[policy]
    gradient = lambda state: jax.tree.map(jnp.subtract, PARAMS, state.params)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, gradient(split), gradient(whole)))
    assert error <= 2 * ulp * optax.tree.norm(gradient(whole))
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=2 * ulp)


class Net(nn.Module):
    """Convolution-free but with everything that a step can spoil: BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))


def net_setup(scale, policy="mixed_float16", accumulate=1):
    squared = lambda y, t: jnp.mean((y.astype(jnp.float32) - t) ** 2)
    params, model_state = linen_adapter.init(Net(), KEYS[3], BATCH["inputs"], train=False)
    rate = optim.warmup_cosine(1e-2, 50, 5, start=1e-3)
    tx = optim.adamw(rate, ema=0.9, loss_scale=scale)
    state = training.TrainState.create(params, tx, model_state=model_state, rng=KEYS[0])
    loss = linen_adapter.loss_from(Net(), squared)
    return state, training.jit_step(training.make_train_step(loss, tx, policy, accumulate))


def bits(tree):
    """Every leaf as integers, by path, so that -0.0 and NaN count as what they are."""

    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return {
        jax.tree_util.keystr(path): raw(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


MOVING = {
    ".opt_state.loss_scale.loss_scale",
    ".opt_state.loss_scale.counter",
    ".opt_state.skipped",
    ".opt_state.skipped_in_a_row",
}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_skipped_step_changes_nothing_but_the_scale_and_its_counters(bad, accumulate):
    state, step = net_setup(jaxmp.DynamicLossScale(2.0**8), accumulate=accumulate)
    for _ in range(3):
        state, metrics = step(state, BATCH)
        assert not metrics["skipped"]
    before = bits(state)
    assert any("batch_stats" in k for k in before) and any("ema" in k for k in before)
    # One example, hence one microbatch, is not finite.
    poisoned = {**BATCH, "inputs": BATCH["inputs"].at[5, 2].set(bad)}
    state, metrics = step(state, poisoned)
    assert metrics["skipped"] and not metrics["finite"]
    changed = {name for name, value in bits(state).items() if value != before[name]}
    assert changed <= MOVING and ".opt_state.skipped" in changed
    state, metrics = step(state, BATCH)
    assert not metrics["skipped"] and np.isfinite(metrics["loss"])
    assert int(state.step) == 4 and jaxmp.all_finite(state.params)


def test_an_overflow_of_the_gradients_alone_halves_the_scale_and_the_next_step_is_clean():
    state, step = net_setup(jaxmp.DynamicLossScale(2.0**40, max_loss_scale=2.0**60))
    before = bits(state)
    state, metrics = step(state, BATCH)
    assert metrics["skipped"] and np.isfinite(metrics["loss"]) and metrics["loss_scale"] == 2.0**40
    assert jaxmp.loss_scale_of(state.opt_state) == 2.0**39
    assert {n for n, v in bits(state).items() if v != before[n]} <= MOVING
    for _ in range(40):
        state, metrics = step(state, BATCH)
    assert not metrics["skipped"] and int(state.step) > 0


def test_a_chain_without_loss_scale_is_guarded_as_well():
    state = training.TrainState.create(PARAMS, optax.adam(1e-2))
    step = training.jit_step(training.make_train_step(regression, optax.adam(1e-2), "float32"))
    state, _ = step(state, BATCH)
    before = bits(state)
    state, metrics = step(state, {**BATCH, "inputs": BATCH["inputs"] * jnp.nan})
    assert metrics["skipped"] and metrics["loss_scale"] == 1 and bits(state) == before


def test_what_stands_beside_the_loss_scale_is_held_too():
    tx = optax.chain(optim.with_loss_scale(optax.adam(1e-2)), optax.trace(0.9))
    state = training.TrainState.create(PARAMS, tx)
    step = training.jit_step(training.make_train_step(regression, tx, "float32"))
    state, _ = step(state, BATCH)
    before = bits(state)
    state, _ = step(state, {**BATCH, "inputs": BATCH["inputs"] * jnp.inf})
    changed = {name for name, value in bits(state).items() if value != before[name]}
    assert changed == {".opt_state[0].skipped", ".opt_state[0].skipped_in_a_row"}


@pytest.mark.parametrize("policy", POLICIES)
def test_it_learns_in_every_precision(policy):
    scale = jaxmp.DynamicLossScale() if policy == "mixed_float16" else None
    _, history = run(optim.adamw(1e-2, loss_scale=scale), policy, [BATCH] * 60)
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]


def test_one_compile_and_a_donated_state():
    tx = optim.adamw(1e-2, loss_scale=jaxmp.DynamicLossScale(2.0**15))
    state = training.TrainState.create(PARAMS, tx)
    step = training.jit_step(training.make_train_step(regression, tx))
    first = state
    for _ in range(3):
        state, _ = step(state, BATCH)
    assert step._cache_size() == 1
    assert first.params["w"].is_deleted() and not PARAMS["w"].is_deleted()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_both_passes_are_16_bit_and_state_is_float32(dtype):
    tx = optim.adamw(1e-2)
    state = training.TrainState.create(PARAMS, tx)
    step = training.make_train_step(regression, tx, f"mixed_{dtype}", 2)
    text = str(jax.make_jaxpr(step)(state, BATCH))
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert len(products) == 5  # two forward, two for weights, one for activations
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert all(f":{short}[" in line for line in products), products
    after, _ = jax.eval_shape(step, state, BATCH)
    for leaf in jax.tree.leaves((after.params, after.opt_state)):
        assert leaf.dtype in (np.float32, np.int32)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_autocast_reaches_16_bits_without_casting_up_front(accumulate):
    """A model that computes in what it is given gets float32 here; its products run in bfloat16."""
    seen = []

    def loss(params, batch):
        seen.append((params["w"].dtype, batch["inputs"].dtype))
        return regression(params, batch)

    tx = optim.adamw(1e-2)
    step = training.make_train_step(loss, tx, accumulate=accumulate, autocast=True)
    state = training.TrainState.create(PARAMS, tx)
    text = str(jax.make_jaxpr(step)(state, BATCH))
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert len(products) == 5 and all(":bf16[" in line for line in products)
    assert set(seen) == {(np.dtype("float32"), np.dtype("float32"))}
    _, [cast_up_front] = run(tx, "mixed_bfloat16", [BATCH])
    _, metrics = jax.jit(step)(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], cast_up_front["loss"], rtol=2.0**-7)


def test_labels_masks_and_indices_are_not_cast():
    seen = {}

    def loss(params, batch):
        seen.update(jax.tree.map(lambda x: x.dtype.name, batch))
        return regression(params, batch)

    batch = {
        **BATCH,
        "mask": jnp.ones(32),
        "ids": jnp.arange(32),
        "targets": jnp.full((32, 1), 7e4),
    }
    _, [metrics] = run(optax.sgd(1e-9), "mixed_float16", [batch], loss=loss)
    assert seen == {"inputs": "float16", "mask": "float32", "ids": "int32", "targets": "float32"}
    assert np.isfinite(metrics["loss"])
    policy = jaxmp.get_policy("mixed_float16")
    x, y = training.cast_inputs((jnp.ones(2), jnp.ones(2)), policy)
    assert (x.dtype, y.dtype) == (np.float16, np.float32)
    with pytest.raises(ValueError, match=r"'audio', 'mask'.*inputs=\('audio',\)"):
        training.cast_inputs({"audio": jnp.ones(2), "mask": jnp.ones(2)}, policy)
    with pytest.raises(ValueError, match="no entry named 'sound'"):
        training.cast_inputs({"audio": jnp.ones(2)}, policy, inputs=("sound",))


def test_mistakes_are_sentences():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="32 examples cannot be accumulated in 5"):
        run(tx, "float32", [BATCH], accumulate=5)
    with pytest.raises(ValueError, match="expected a scalar"):
        run(tx, "float32", [BATCH], loss=lambda p, b: b["inputs"] @ p["w"])
    with pytest.raises(ValueError, match="did not return its successor"):
        run(tx, "float32", [BATCH], loss=lambda p, b, rng, model_state: 0.0)


def test_value_and_grad_serves_a_hand_written_loop():
    """The step, written by its user, gives the bits of make_train_step."""
    tx = optim.adamw(1e-2, loss_scale=jaxmp.DynamicLossScale(2.0**10))
    loss_and_grad = jaxmp.value_and_grad(regression, "mixed_float16")

    @jax.jit
    def step(params, opt_state):
        scale = jaxmp.loss_scale_of(opt_state)
        loss, grads = loss_and_grad(params, BATCH, scale=scale)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, opt_state, loss = step(params, opt_state)
    state, history = run(tx, "mixed_float16", [BATCH] * 3)
    chex.assert_trees_all_equal(params, state.params)
    assert loss == history[-1]["loss"]


def test_value_and_grad_with_aux_rng_and_model_state():
    def loss(params, batch, rng, model_state):
        noise = jax.random.normal(rng, batch["inputs"].shape, batch["inputs"].dtype)
        value = regression(params, {**batch, "inputs": batch["inputs"] + noise})
        return value, {"model_state": model_state + 1, "twice": 2 * value}

    fn = jaxmp.value_and_grad(loss, "float32", has_aux=True, accumulate=4)
    (value, aux), grads = fn(PARAMS, BATCH, KEYS[0], jnp.int32(5), scale=4.0)
    assert aux["model_state"] == 9  # passed from one microbatch to the next
    np.testing.assert_allclose(aux["twice"], 2 * value, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, PARAMS)


def test_subclasses_of_the_state_keep_their_fields():
    @flax.struct.dataclass
    class MyState(training.TrainState):
        note: jax.Array

    tx = optax.sgd(0.1)
    state = MyState.create(
        {"w": jnp.ones((8, 16), jnp.bfloat16), "v": PARAMS["v"]}, tx, note=jnp.int32(3)
    )
    assert state.params["w"].dtype == np.float32
    state, _ = training.jit_step(training.make_train_step(regression, tx))(state, BATCH)
    assert isinstance(state, MyState) and state.note == 3 and int(state.step) == 1


def test_evaluation_uses_the_policy_and_changes_nothing():
    state, _ = net_setup(None)
    squared = lambda y, t: jnp.mean((y.astype(jnp.float32) - t) ** 2)
    evaluate = jax.jit(
        training.make_eval_step(linen_adapter.eval_loss_from(Net(), squared), "mixed_float16")
    )
    metrics = evaluate(state, BATCH)
    assert set(metrics) == {"loss"} and metrics["loss"] == evaluate(state, BATCH)["loss"]


def test_the_step_runs_under_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        tx = optim.with_loss_scale(optim.clip_by_global_norm(1.0), jaxmp.DynamicLossScale(2.0**4))
        state = training.TrainState.create(PARAMS, tx)
        step = training.make_train_step(regression, tx, "mixed_float16", 2)
        state, metrics = jax.jit(step)(state, BATCH)
    assert metrics["finite"]


def test_an_outlier_left_out_is_left_out_of_model_state_and_step_count_too():
    def loss(params, batch, *, model_state):
        return regression(params, batch), {"model_state": {"seen": model_state["seen"] + 1}}

    guard = lambda chain: optim.skip_outliers(chain, 10.0, warmup=2)
    tx = optim.adamw(1e-2, clip=None, guard=guard, loss_scale=jaxmp.StaticLossScale(2.0**8))
    step = training.make_train_step(loss, tx, "float32")
    start = training.TrainState.create(PARAMS, tx, model_state={"seen": jnp.float32(0)})
    far = {**BATCH, "targets": 1e4 * BATCH["targets"]}
    states, skips = [start], []
    for batch in (BATCH, BATCH, BATCH, far, BATCH):
        state, metrics = jax.jit(step)(states[-1], batch)
        states.append(state)
        skips.append((bool(metrics["skipped"]), bool(metrics["finite"])))
    assert skips == [(False, True)] * 3 + [(True, True), (False, True)]
    chex.assert_trees_all_equal(
        (states[3].step, states[3].params, states[3].model_state),
        (states[4].step, states[4].params, states[4].model_state),
    )
    assert (states[5].step, states[5].model_state["seen"]) == (4, 4)
