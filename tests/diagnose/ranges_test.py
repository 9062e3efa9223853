"""Audits of planted models: what they find, what they propose, and that the proposal trains."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxmp
from configs import digits_vit_float32, text_gpt_float32
from jaxmp.diagnose import tensor_ranges
from jaxmp.nn.models.gpt import GPTConfig
from jaxmp.nn.models.vit import ViTConfig
from jaxmp.run import build
from jaxmp.run.data import TextConfig


class Planted(nn.Module):
    """Four layers, of which one gives numbers near 1e6 that a norm brings back."""

    large: str = "big"

    @nn.compact
    def __call__(self, x):
        for name in ("first", "big", "third"):
            scale = 1e5 if name == self.large else 0.3
            x = nn.Dense(16, name=name, kernel_init=nn.initializers.normal(scale))(x)
            x = nn.LayerNorm(name=f"{name}_norm", use_scale=False)(x)
            x = nn.relu(x)
        return nn.Dense(4, name="head")(x)


class Scanned(nn.Module):
    """The same as a layer of a rematerialised scan: its large numbers lie inside a block."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                h = nn.Dense(16, name="wide", kernel_init=nn.initializers.normal(1e5))(x)
                h = nn.LayerNorm(name="norm", use_scale=False)(h)
                return x + nn.Dense(16, name="narrow")(h), None

        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(4, name="head")(layers(name="layers")(x)[0])


def batch(width: int = 8) -> dict:
    inputs = jax.random.normal(jax.random.key(0), (32, width))
    return {"inputs": inputs, "targets": jax.nn.one_hot(jnp.int32(inputs[:, 0] > 0), 4)}


def cross_entropy(logits, targets):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits.astype(jnp.float32)) * targets, -1))


def linen(model, inputs):
    params = jax.jit(model.init)(jax.random.key(1), inputs)["params"]
    loss = lambda params, batch: cross_entropy(
        model.apply({"params": params}, batch["inputs"]), batch["targets"]
    )
    return loss, params


def plain(scope, factor=1e5):
    """A function over a dict; `scope(name)` surrounds each layer."""
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"w1": (8, 16), "w2": (16, 16), "w3": (16, 4)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    params["w2"] *= factor

    def loss(params, batch):
        with scope("one"):
            h = jax.nn.relu(batch["inputs"] @ params["w1"])
        with scope("two"):
            h = jnp.tanh((h @ params["w2"]) * (0.3 / factor))
        with scope("three"):
            return cross_entropy(h @ params["w3"], batch["targets"])

    return loss, params


def trained(loss, params, batch, policy, scale, autocast, steps=10):
    """The losses of some steps, and how many of them were skipped."""
    tx = jaxmp.with_loss_scale(optax.sgd(1e-2), jaxmp.StaticLossScale(scale))
    step = jaxmp.make_train_step(loss, tx, policy, autocast=autocast)
    step = jax.jit(step)
    state = jaxmp.TrainState.create(params, tx)
    found = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        found.append((float(metrics["loss"]), bool(metrics["skipped"])))
    losses, skipped = zip(*found)
    return np.array(losses), sum(skipped)


def holds_up(loss, params, data, suggestion, autocast=(False, True)):
    exact, _ = trained(loss, params, data, "float32", 1.0, False)
    for way in autocast:
        policy = suggestion.autocast_policy if way else suggestion.policy
        found, skipped = trained(loss, params, data, policy, suggestion.loss_scale, way)
        assert skipped == 0
        np.testing.assert_allclose(found, exact, rtol=0.01)
        # Without the overrides nothing would have held: the plant is real.
        bare, skipped = trained(loss, params, data, "mixed_float16", 1.0, way, 2)
        assert skipped == 2 or not np.isfinite(bare).all()


def test_exactly_the_planted_layer_is_proposed():
    data = batch()
    loss, params = linen(Planted("big"), data["inputs"])
    audit = jaxmp.audit_ranges(loss, params, data, formats=("float16", "bfloat16"))
    found = audit.suggestions["float16"]
    assert found.overrides == (("big", "float32"),)
    assert found.scopes == (("Planted/big", "float32"),)
    assert found.by_cast and found.by_autocast and audit.suggestion == found
    holds_up(loss, params, data, found)
    bfloat16 = audit.suggestions["bfloat16"]
    assert bfloat16.overrides == () == bfloat16.scopes and bfloat16.loss_scale == 1


def test_a_layer_of_a_scan_with_remat_is_proposed():
    data = batch(16)
    loss, params = linen(Scanned(), data["inputs"])
    found = jaxmp.audit_ranges(loss, params, data, formats=("float16",)).suggestion
    assert found.overrides == (("layers/wide", "float32"),)
    assert found.scopes == (("Scanned/layers/wide", "float32"),)
    holds_up(loss, params, data, found, (True,))


def test_a_plain_function_names_parameters_and_named_scopes():
    data = batch()
    loss, params = plain(jax.named_scope)
    found = jaxmp.audit_ranges(loss, params, data, formats=("float16",)).suggestion
    assert found.overrides == (("w2", "float32"),) and found.scopes == (("two", "float32"),)
    holds_up(loss, params, data, found)


def test_without_scopes_autocast_has_nothing_to_name_and_says_so():
    data = batch()
    loss, params = plain(lambda name: contextlib.nullcontext())
    found = jaxmp.audit_ranges(loss, params, data, formats=("float16",)).suggestion
    assert found.overrides == (("w2", "float32"),)
    assert found.by_cast and not found.by_autocast
    assert "no overrides were found" in str(found)
    holds_up(loss, params, data, found, (False,))


@functools.cache
def honest():
    """(parameters, audit) of the model without a plant, its loss returning a key as well."""
    data = batch()
    loss, params = linen(Planted("none"), data["inputs"])
    with_aux = lambda params, batch, rng: (loss(params, batch), {"key": rng})
    return params, jaxmp.audit_ranges(with_aux, params, data, jax.random.key(0))


def test_an_honest_model_needs_nothing():
    found = honest()[1].suggestion
    assert found.overrides == () == found.scopes and found.holds


def test_the_scale_of_tiny_gradients_recovers_what_it_says():
    """Means over so many examples that every cotangent is below 2^-25."""
    data = batch()
    loss, params = plain(jax.named_scope, 1.0)
    small = lambda params, batch: 2.0**-30 * loss(params, batch)
    audit = jaxmp.audit_ranges(small, params, data, formats=("float16",))
    found = audit.suggestion
    assert 2**20 <= found.loss_scale <= 2**32
    before, after = found.flushed
    assert before > 0.9 and after < 0.01
    gradient = jax.jit(jax.grad(small))(params, data)
    ranges = tensor_ranges(gradient, ("float16",), "gradient").total("gradient")
    flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)]).astype(np.float64)
    flat = flat[flat != 0]
    lost = lambda scale: np.mean((flat * scale).astype(np.float16) == 0)
    for scale in (1.0, 2.0**6, found.loss_scale):
        assert ranges.shares("float16", scale).flush == lost(scale)
        assert ranges.recovered("float16", scale) == 1 - lost(scale) / lost(1.0)


def test_rows_count_what_each_operation_gives():
    """Of a scan of squares, against the same done by hand in float64."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)

    def fn(w, x):
        body = lambda c, row: (c + jnp.sum(jnp.square(row) * w), None)
        return jax.lax.scan(body, jnp.float32(0), x)[0]

    audit = jaxmp.audit_ranges(fn, jnp.float32(3.0), x, formats=("float16",))
    squares = [r for r in audit.rows if r.site and r.site.primitive in ("square", "integer_pow")]
    assert len(squares) == 1 and squares[0].site.loops == ("scan",)
    exponents = np.frexp(np.square(np.asarray(x)).astype(np.float64))[1] - 1
    values, counts = np.unique(exponents, return_counts=True)
    binades = squares[0].magnitudes.binades
    assert dict(zip(values, counts)) == dict(
        zip(audit.exponents[binades > 0], binades[binades > 0])
    )
    assert squares[0].kind == "activation"
    gradients = audit.of("gradient")
    assert any(row.site and row.site.phase == "backward" for row in gradients)
    assert gradients[-1].site is None and gradients[-1].magnitudes.total == 1


def test_kinds_are_told_apart_and_all_is_plain_data():
    params, audit = honest()
    assert set(audit.histograms) == {"parameters", "activations", "gradients"}
    size = sum(x.size for x in jax.tree.leaves(params))
    zeros = sum(int(jnp.sum(x == 0)) for x in jax.tree.leaves(params))
    assert audit.histograms["parameters"].sum() == size - zeros
    names = [row.name for row in audit.rows if row.kind == "gradient" and row.site is None]
    assert names == [row.name for row in audit.of("parameter")]
    assert json.loads(json.dumps(audit.to_json()))["differentiated"] == "the first argument"
    assert "float8_e5m2" in str(audit) and "Planted/head" in str(audit)
    forward = jaxmp.audit_ranges(
        lambda p, x: Planted("none").apply({"params": p}, x), params, batch()["inputs"]
    )
    assert forward.differentiated == "" and not forward.of("gradient")


GPT = dataclasses.replace(
    text_gpt_float32.get_config(),
    model=GPTConfig(vocab_size=256, context=32, width=64, depth=1, heads=2, dropout=0.1),
    data=TextConfig(sequence_length=32),
    batch_size=8,
    steps=100,
)
VIT = dataclasses.replace(
    digits_vit_float32.get_config(), model=ViTConfig(width=32, depth=1, heads=2, dropout=0.1)
)


def audited(config):
    parts = build.build(config)
    state = build.first_state(parts)
    return jaxmp.audit_ranges(
        parts.loss,
        state.params,
        parts.source.batch_at(0),
        state.rng,
        state.model_state,
        formats=("float16", "bfloat16"),
    )


def assert_a_loss_scale_is_all(audit):
    for name, suggestion in audit.suggestions.items():
        assert suggestion.overrides == () == suggestion.scopes, name
        assert suggestion.by_cast and suggestion.by_autocast and suggestion.holds
    assert audit.suggestions["bfloat16"].loss_scale == 1


@pytest.mark.slow
def test_the_shipped_vit_needs_a_loss_scale_at_most():
    assert_a_loss_scale_is_all(audited(VIT))


@pytest.mark.slow
def test_what_is_proposed_for_the_shipped_gpt_trains_it_as_float32():
    audit = audited(GPT)
    assert_a_loss_scale_is_all(audit)
    suggestion, final = audit.suggestion, {}
    for policy in ("float32", suggestion.policy):
        config = dataclasses.replace(
            GPT,
            policy=policy,
            overrides=(),
            loss_scale=dataclasses.replace(GPT.loss_scale, initial=suggestion.loss_scale),
        )
        parts = build.build(config)
        _, step = build.compile_step(parts)
        state, losses = build.first_state(parts), []
        for index in range(config.steps):
            state, metrics = step(state, parts.source.batch_at(index))
            losses.append(float(metrics["loss"]))
        final[policy] = np.mean(losses[-20:])
    assert abs(final["float32"] - final[suggestion.policy]) < 0.02, final
