"""Several devices follow one: its loss, a share of its state, sums in the dtype asked for, skips as one."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxmp import training
from jaxmp.training import mesh as meshes

# One process of eight virtual devices computes everything, since the others of this run have one.
PROGRAM = """
import json, re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
from jaxmp import nn, optim, training
from jaxmp.nn import functional as F
from jaxmp.nn.models.gpt import GPT, GPTConfig
from jaxmp.nn.models.llama import Llama, LlamaConfig
from jaxmp.precision import loss_scale as scales

STEPS = 30
gpt = GPT(GPTConfig(vocab_size=64, context=16, width=32, depth=1, heads=4))
llama = Llama(LlamaConfig(64, 16, width=32, depth=2, heads=4, kv_heads=2, mlp_width=64))
tokens = np.random.default_rng(0).integers(0, 64, (STEPS, 16, 16)).astype(np.int32)
batches = [{"inputs": t, "targets": np.roll(t, -1, 1)} for t in tokens]
tx = optim.adamw(1e-3)

def init(model):
    params, model_state = nn.linen.init(model, jax.random.key(0), tokens[0][:1])
    return training.TrainState.create(params, tx, model_state=model_state)

starts = {model: jax.jit(init, static_argnums=0)(model) for model in (gpt, llama)}
starts = {model: jax.device_get(state.replace(rng=None)) for model, state in starts.items()}

def run(spec, policy, model=gpt, **how):
    steps = STEPS if model is gpt else 10
    shardings, trained = None, model
    state = starts[model].replace(rng=jax.random.key(0))
    if spec:
        mesh = training.make_mesh(spec)
        shardings = training.state_shardings(state, mesh)
        how["shardings"] = shardings.params
    if spec and model is llama:
        stacked = shardings.params["layers"]
        trained = llama.clone(whole=training.layer_gatherer(stacked, how["reduce_dtype"]))
        how["in_parts"] = "layers/**"
    loss = nn.linen.loss_from(trained, F.softmax_cross_entropy)
    state = jax.device_put(state, shardings)
    lowered = training.jit_step(training.make_train_step(loss, tx, policy, **how), shardings)
    lowered = lowered.lower(state, batches[0])
    step = lowered.compile()
    size = lambda l: (l.addressable_shards[0].data.nbytes, l.nbytes)
    held, whole = np.sum([size(l) for l in jax.tree.leaves(state)], axis=0)
    losses = []
    for batch in batches[:steps]:
        if spec:
            batch = jax.device_put(batch, training.batch_sharding(training.make_mesh(spec)))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return {"losses": losses, "share": float(held / whole), "text": lowered.as_text()}

found = {"one": run(None, "float32")["losses"], "one 16": run(None, "mixed_bfloat16")["losses"]}
for spec in ("data=8", "fsdp=8", "tensor=4", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"):
    found[spec] = run(spec, "float32")
    del found[spec]["text"]
found["layers one"] = run(None, "float32", llama)["losses"]
two_axes = run("fsdp=2,tensor=2", "float32", llama, reduce_dtype="float32")
found["layers two axes"] = two_axes["losses"]
found["layers 16"] = run("fsdp=8", "mixed_bfloat16", llama, reduce_dtype="float32")
found["layers one 16"] = run(None, "mixed_bfloat16", llama)["losses"]
for dtype in ("float32", "bfloat16"):
    found["16 " + dtype] = run("fsdp=8", "mixed_bfloat16", reduce_dtype=dtype)

# The step inside shard_map, data parallel on four devices in float16 with a dynamic scale.
PARAMS = {"w": jax.random.normal(jax.random.key(1), (4,))}
rows = {"inputs": jax.random.normal(jax.random.key(2), (16, 4)), "targets": jnp.ones(16)}
def square(params, batch):
    y = (batch["inputs"] @ params["w"]).astype(jnp.float32)
    return jnp.mean((y - batch["targets"]) ** 2)
mesh = training.make_mesh("data=4")
sgd = optim.with_loss_scale(optax.sgd(1.0), scales.DynamicLossScale(2.0**6))
for check in (True, False):
    for parts in (1, 2):
        step = training.make_train_step(square, sgd, "mixed_float16", parts, axis_name="data")
        apart = lambda tree: jax.tree.map(lambda x: x[None], tree)
        def each(state, batch):
            state, metrics = step(state, batch)
            kept = (state.params, state.step, state.opt_state.loss_scale, metrics)
            return jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying")[None], kept)
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data"), "check_vma": check}
        mapped = jax.jit(jax.shard_map(each, mesh=mesh, **specs))
        state = training.TrainState.create(PARAMS, sgd)
        bad = {**rows, "inputs": rows["inputs"].at[5, 0].set(jnp.inf)}
        huge = {**rows, "targets": rows["targets"].at[5].set(3e4)}
        answers = {}
        for name, batch in {"good": rows, "bad": bad, "huge": huge}.items():
            params, count, scale, metrics = mapped(state, batch)
            answers[name] = {
                "w": np.asarray(params["w"]).tolist(), "step": np.asarray(count).tolist(),
                "scale": np.asarray(scale.loss_scale).tolist(),
                "norm": np.asarray(metrics["grad_norm"]).tolist(),
                "skipped": np.asarray(metrics["skipped"]).tolist(),
            }
        found[f"mapped {check} {parts}"] = answers
found["gradient"] = jax.grad(square)(PARAMS, rows)["w"].tolist()
found["start"] = PARAMS["w"].tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["data=8", "fsdp=8", "tensor=4", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"]
)
def test_a_mesh_follows_the_loss_of_one_device(found, spec):
    assert found[spec]["losses"] == pytest.approx(found["one"], abs=1e-5, rel=0)


@pytest.mark.slow
def test_a_device_holds_its_share_of_the_state(found):
    assert found["data=8"]["share"] == 1
    assert found["fsdp=8"]["share"] <= 1.1 / 8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_in_the_dtype_asked_for(found, dtype):
    run = found[f"16 {dtype}"]
    noise = max(abs(a - b) for a, b in zip(found["one"], found["one 16"]))
    assert run["losses"] == pytest.approx(found["one 16"], abs=2 * noise, rel=0)
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    lines = run["text"].split("stablehlo.reduce_scatter")[1:]
    results = [part[part.index(") : (") :].splitlines()[0] for part in lines]
    assert results and all(f"x{short}>" in line for line in results), results[:3]


@pytest.mark.slow
def test_layers_gathered_in_their_loop_follow_the_loss_of_one_device(found):
    assert found["layers two axes"] == pytest.approx(found["layers one"], abs=1e-5, rel=0)


@pytest.mark.slow
def test_layers_are_gathered_in_16_bits_one_at_a_time(found):
    run, one = found["layers 16"], found["layers one 16"]
    noise = max(abs(a - b) for a, b in zip(found["layers one"], one))
    assert run["losses"] == pytest.approx(one, abs=2 * noise, rel=0)
    gathers = re.findall(r"stablehlo\.all_gather.*-> tensor<([^>]*)>", run["text"])
    assert gathers and all(shape.endswith("xbf16") for shape in gathers), gathers
    # One layer's kernels have two axes; both layers' would have three.
    assert max(shape.count("x") for shape in gathers) == 2, gathers


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map_devices_agree_and_skip_as_one(found, check, parts):
    answers = found[f"mapped {check} {parts}"]
    for answer in answers.values():
        for values in answer.values():
            assert all(value == values[0] for value in values)
    moved = [a - b for a, b in zip(found["start"], answers["good"]["w"][0])]
    # Rounded inputs and products, each to 11 bits.
    assert moved == pytest.approx(found["gradient"], rel=2e-2, abs=2e-2)
    assert not answers["good"]["skipped"][0] and answers["good"]["step"][0] == 1
    for name in ("bad", "huge"):
        assert answers[name]["skipped"][0] and answers[name]["step"][0] == 0
        assert answers[name]["w"][0] == found["start"]
    # A loss that is not finite is no fault of the scale; a gradient that overflows is.
    assert answers["bad"]["scale"][0] == 2.0**6 and answers["huge"]["scale"][0] == 2.0**5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("data=two", "cannot be read"),
        ("model=2", "unknown"),
        ("data=2,data=2", "twice"),
        ("data=-1,fsdp=-1", "several sizes"),
        ("data=1000", "needs 1000 devices and there is 1"),
        ("data=-1,fsdp=3", "3 does not divide"),
    ],
)
def test_a_mesh_that_cannot_be_is_told_in_a_sentence(spec, said):
    with pytest.raises(ValueError, match=said):
        training.make_mesh(spec, jax.devices()[:1])


ABSTRACT = {
    "a": {"kernel": jax.ShapeDtypeStruct((64, 48), jnp.float32)},
    "tokens": {"embedding": jax.ShapeDtypeStruct((128, 64), jnp.float32)},
    "scale": jax.ShapeDtypeStruct((3,), jnp.float32),
}


def absent_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_defaults_and_rules_and_what_follows_a_parameter():
    state = training.TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=ABSTRACT,
        opt_state={"mu": ABSTRACT},
        model_state={},
        rng=jax.ShapeDtypeStruct((), jnp.uint32),
    )
    mesh = absent_mesh(fsdp=4, tensor=2)
    placed = training.state_shardings(state, mesh, {"a/kernel": P("tensor", ("data", "fsdp"))})
    assert placed.params["a"]["kernel"].spec == P("tensor", "fsdp")
    assert placed.params["tokens"]["embedding"].spec == P("tensor", "fsdp")
    assert placed.params["scale"].spec == P() and placed.step.spec == P()
    assert placed.opt_state["mu"] == placed.params
    assert training.state_shardings(ABSTRACT, mesh)["a"]["kernel"].spec == P("fsdp")
    assert meshes.batch_parts(mesh) == 4


@pytest.mark.parametrize(
    ("pattern", "spec", "said"),
    [
        ("b/kernel", P("fsdp"), "matched no parameter"),
        ("a/kernel", P("pipe"), "no axis of a mesh"),
        ("scale", P("fsdp"), "into 4 parts"),
        ("scale", P(None, "fsdp"), "at most 1 entries"),
    ],
)
def test_a_rule_that_does_not_fit_is_told(pattern, spec, said):
    with pytest.raises(ValueError, match=said):
        training.state_shardings(ABSTRACT, absent_mesh(fsdp=4), [(pattern, spec)])


@pytest.mark.parametrize("spec", ["data=1", "fsdp=1", "data=1,fsdp=1"])
def test_on_one_device_nothing_is_exchanged(spec):
    params = {"w": jnp.ones((4, 4))}
    shardings = training.state_shardings(params, training.make_mesh(spec, jax.devices()[:1]))
    loss = lambda params, batch: jnp.mean((batch @ params["w"]) ** 2)
    gradient = training.value_and_grad(loss, shardings=shardings)
    text = jax.jit(gradient).lower(params, jnp.ones((2, 4))).as_text()
    assert not re.search("manual_computation|all_reduce|all_gather|reduce_scatter", text)
