"""Autocast costs no more than the native bfloat16 model, on machines that are absent too."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxmp.plan import targets

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def bench():
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("bench_autocast")


def residuals(name, way):
    """Dtypes and shapes of what the first scan of a model's gradient hands on, and their bytes."""
    zoo = bench().zoo
    entry = zoo.ZOO[name]
    params, state = jax.eval_shape(entry.build(zoo.SMALL, None).init, jax.random.key(0))
    gradient = bench().gradient_of(name, way, zoo.SMALL)
    batch = zoo.SMALL.random_batch(entry.kind)
    jaxpr = jax.make_jaxpr(gradient)(params, state, batch, jax.random.key(0)).jaxpr
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    avals = [v.aval for v in scans[0].outvars]
    return {str(a) for a in avals}, sum(a.size * a.dtype.itemsize for a in avals)


@pytest.mark.slow
def test_a_scanned_stack_saves_what_the_native_one_saves():
    (ours, our_bytes), (_, native_bytes) = (
        residuals("pre-ln-scan", way) for way in ("autocast", "native")
    )
    assert "bfloat16[2,16,2,32,32]" in ours  # attention weights
    assert "float32[2,16,2,32,32]" not in ours
    assert our_bytes <= native_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "vit-scan", "pre-ln-scan"])
def test_it_moves_what_the_native_model_moves(name):
    missing = targets.missing_wheel("gpu-h100")
    if missing:
        pytest.skip(missing)
    row = bench().compile_row(name, "gpu-h100")
    assert row["bytes"] <= 1.02
    assert row["temporary"] <= 1.02
    assert row["float32 products"] == 0


def test_a_logarithm_sees_what_float32_gives():
    autocast = bench().autocast
    w = jnp.full((1, 1), 4.0)
    squash = lambda x: jnp.log(1 - jnp.tanh(x @ w) ** 2 + 1e-6).sum()
    x = jnp.ones((1, 1))
    assert float(autocast(squash)(x)) == pytest.approx(float(squash(x)), rel=1e-3)


def test_wrong_arguments_are_answered_in_a_sentence(capsys):
    with pytest.raises(SystemExit):
        bench().main(["gpt-huge"])
    assert "gemma" in capsys.readouterr().err


def test_a_model_whose_package_is_absent_is_answered_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench().main(["transformers/bert", "--error"]) == 0
    assert "transformers/bert needs the package transformers." in capsys.readouterr().err


def test_a_size_is_told_in_the_words_of_every_config():
    """Llama's, T5's, GPT-2's and Whisper's words for width, length and feed-forward width."""
    words = bench().transformers_zoo.names_of(bench().zoo.SMALL)
    assert [words[word] for word in ("hidden_size", "d_model", "n_embd")] == [64] * 3
    assert [words[word] for word in ("intermediate_size", "d_ff", "encoder_ffn_dim")] == [256] * 3
    assert words["head_dim"] * words["num_attention_heads"] == words["d_kv"] * words["n_head"] == 64
