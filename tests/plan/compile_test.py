"""Reports of compiled steps: the machine at hand always, absent ones where their compiler is."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxmp.nn import functional as F
from jaxmp.plan import compile as plan
from jaxmp.plan import targets


def step(state, batch):
    def loss(weights):
        return jnp.mean((jnp.tanh(batch @ weights.astype(batch.dtype))) ** 2)

    grads = jax.grad(loss)(state["weights"])
    state = {"weights": state["weights"] - 0.1 * grads, "count": state["count"] + 1}
    return state, {"loss": loss(state["weights"])}


def arguments(dtype=jnp.float32):
    state = {
        "weights": jax.ShapeDtypeStruct((128, 128), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    return state, jax.ShapeDtypeStruct((64, 128), dtype)


def test_a_report_of_the_machine_at_hand():
    report = plan.compile_for(step, *arguments(), target="cpu")
    assert report.dtype_bytes == {"float32": 128 * 128 * 4, "int32": 4}
    assert report.argument_bytes == 128 * 128 * 4 + 4 + 64 * 128 * 4
    assert report.alias_bytes == 128 * 128 * 4 + 4
    assert report.not_aliased == ()
    assert report.product_flops == 3 * 2 * 64 * 128 * 128  # forward twice, weights' gradient once
    assert report.bytes_accessed == pytest.approx(report.compiler_bytes, rel=0.05)
    assert len(report.wide_products) == 3
    assert __file__ in report.wide_products[0].source
    assert report.peak_bytes == report.argument_bytes + report.temporary_bytes + (
        report.output_bytes - report.alias_bytes
    )


def test_a_report_is_plain_data_and_text():
    report = plan.compile_for(step, *arguments(), target="cpu")
    row = json.loads(json.dumps(report.to_dict()))
    assert row["products"] == {"float32 x float32 -> float32": {"count": 3, "flops": 6291456.0}}
    assert "3 products float32 x float32 -> float32" in str(report)


def test_arrays_do_as_well_as_shapes():
    state, batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), arguments())
    report = plan.compile_for(step, state, batch, target="cpu")
    assert report.bytes_accessed == plan.compile_for(step, *arguments(), "cpu").bytes_accessed
    assert not state["weights"].is_deleted()


def test_a_buffer_that_cannot_be_reused_is_named():
    def grows(state, batch):
        return {"weights": jnp.concatenate([state["weights"]] * 2), "count": state["count"]}, {}

    report = plan.compile_for(grows, *arguments(), target="cpu")
    assert report.not_aliased == ("state['weights']",)
    assert "donated but not reused" in str(report)


def test_an_unknown_target_is_answered_with_the_known():
    with pytest.raises(ValueError, match="gpu-h100"):
        plan.compile_for(step, *arguments(), target="gpu-h100x")


def test_a_placement_by_the_caller():
    everywhere = lambda devices: (jax.sharding.SingleDeviceSharding(devices[0]),) * 2
    report = plan.compile_for(step, *arguments(), target="cpu", shardings=everywhere)
    assert report.not_aliased == ()


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("target", ["gpu-h100", "tpu-v5e"])
def test_a_report_of_an_absent_machine(target):
    missing = targets.missing_wheel(target)
    if missing:
        pytest.skip(missing)
    report = plan.compile_for(step, *arguments(jnp.bfloat16), target=target)
    assert report.not_aliased == ()
    assert report.wide_products == ()
    assert report.product_flops == 3 * 2 * 64 * 128 * 128
    assert (report.compiler_bytes is None) == (target == "gpu-h100")
    assert report.memory_bytes == targets.parse_target(target).chip.memory_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("length", [64, 197])
def test_fused_attention_takes_any_length(length):
    """As a ViT-B/16 has 197 tokens with its class token, and cuDNN's backward pass wants even ones."""
    missing = targets.missing_wheel("gpu-h100")
    if missing:
        pytest.skip(missing)

    def attend(state, batch):
        attention = lambda x: F.attention(x, x, x, causal=False, implementation="cudnn")
        loss = lambda x: jnp.sum(attention(x).astype(jnp.float32))
        return state - jax.grad(loss)(state), {}

    array = jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16)
    report = plan.compile_for(attend, array, array, target="gpu-h100")
    assert [product.kind for product in report.products] == ["attention", "attention"]
