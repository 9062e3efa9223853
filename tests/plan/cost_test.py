"""Estimates against sums done by hand, for chips that are data and programs compiled here."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import pytest

from jaxmp.plan import collectives, cost
from jaxmp.plan import compile as compiling


def step(state, batch):
    def loss(weights):
        return jnp.mean(jnp.tanh(batch @ weights.astype(batch.dtype)) ** 2)

    grads = jax.grad(loss)(state["weights"])
    return {"weights": state["weights"] - 0.1 * grads}, {"loss": loss(state["weights"])}


@pytest.fixture(scope="module")
def parts():
    weights = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    batch = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    program = compiling.compile_for(step, {"weights": weights}, batch, "cpu")
    state = types.SimpleNamespace(params={"weights": weights}, opt_state=(), model_state={})
    return program, state, batch


def on(target, parts, **changes):
    program, state, batch = parts
    return cost.estimate(dataclasses.replace(program, target=target, **changes), state, batch)


def test_memory_by_what_fills_it_adds_up_to_the_peak(parts):
    found = on("cpu", parts)
    assert found.parameters == 256 * 128
    assert found.memory["parameters"] == 256 * 128 * 4
    assert found.memory["batch"] == 64 * 256 * 4
    assert sum(found.memory.values()) == found.peak_bytes == parts[0].peak_bytes
    assert found.fits and math.isnan(found.seconds)


def test_the_roofline_is_the_slower_side(parts):
    flops = 2 * 2 * 64 * 256 * 128  # forward, and the gradient of the weights
    found = on("gpu-h100", parts, bytes_accessed=3.352e9)
    assert found.memory_seconds == pytest.approx(1e-3)
    assert found.product_seconds == pytest.approx(flops / 494.7e12)
    assert found.bound == "memory" and found.seconds == found.memory_seconds
    quick = on("gpu-h100", parts, bytes_accessed=1.0)
    assert quick.bound == "products" and quick.seconds == found.product_seconds


def test_exchanges_bind_where_links_are_slowest(parts):
    # 2 GB gathered over four devices: each sends three quarters of it at 200 GB/s.
    whole = collectives.Collective("all-gather", "bfloat16", 10**9, 2.0, "", "", 4)
    found = on("tpu-v5e:2x2", parts, device_count=4, collectives=(whole,))
    assert found.exchange_seconds == pytest.approx(1.5 / 200)
    assert found.bound == "exchanges" and found.seconds == found.exchange_seconds
    assert "exchanges 7.50 ms" in str(found)
    assert found.to_dict()["exchange_seconds"] == found.exchange_seconds


def test_what_does_not_fit_says_by_how_much_and_what_to_try(parts):
    found = on("tpu-v5e", parts, temporary_bytes=20 * 2**30)
    assert not found.fits
    assert found.free_bytes == 16 * 2**30 - found.peak_bytes
    assert "does NOT fit" in str(found) and "4.00 GiB missing" in str(found)
    assert any("accumulate" in sentence for sentence in cost.suggestions(found))
    too_large = on("tpu-v5e", parts, argument_bytes=17 * 2**30)
    assert any("shard" in sentence for sentence in cost.suggestions(too_large))


def test_wide_products_are_named_with_their_lines(parts):
    text = str(on("gpu-h100", parts))
    assert "cost_test.py" in text and "float32 x float32" in text
    assert "compute in bfloat16" in text


def test_a_cpu_is_not_told_to_multiply_in_16_bits(parts):
    text = str(on("cpu", parts))
    assert "float32 x float32" in text and "compute in bfloat16" not in text


def test_plain_data_for_json(parts):
    row = json.loads(json.dumps(on("cpu", parts).to_dict()))
    assert row["fits"] is True and row["bound"] is None and row["parameters"] == 256 * 128


def test_a_sharded_leaf_counts_as_one_devices_part(parts):
    class Halved:
        def shard_shape(self, shape):
            return (shape[0] // 2, *shape[1:])

    program, _, batch = parts
    leaf = types.SimpleNamespace(
        shape=(256, 128), size=256 * 128, dtype=jnp.dtype("float32"), sharding=Halved()
    )
    state = types.SimpleNamespace(params={"weights": leaf}, opt_state=(), model_state={})
    found = cost.estimate(program, state, batch)
    assert found.memory["parameters"] == 256 * 128 * 4 // 2
